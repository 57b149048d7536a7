"""What a prune leaves of a plan, for all of its channel vectors at once.

A model has hundreds of tensors and as many axes, which share a few dozen channel vectors. Laid end to end, one pass
over them says what is left of every one, and arrays with a row per tensor say what shapes follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .parts import Axis, TensorMap

ChannelArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.int64]


def count_between(bounds: IndexArray, chosen: BoolArray) -> IndexArray:
    """How many are ``chosen [L]`` between every two of ``bounds [n + 1]``: ``[n]``."""
    return np.diff(np.searchsorted(np.flatnonzero(chosen), bounds))


class Vectors:
    """Distinct channel vectors (distinct objects) end to end.

    Attributes:
        arrays: the vectors.
        channels: all their entries ``[L]``.
        starts: where each begins, and the end of the last ``[V + 1]``.
    """

    def __init__(self, arrays: Iterable[ChannelArray]) -> None:
        self.arrays = list({id(a): a for a in arrays}.values())
        self.channels: ChannelArray = np.concatenate([np.zeros(0, np.int32), *self.arrays])
        self.starts: IndexArray = np.cumsum([0, *map(len, self.arrays)])

    @classmethod
    def split(cls, channels: ChannelArray, starts: IndexArray) -> Vectors:
        """``channels [L]`` cut at ``starts``."""
        made = cls.__new__(cls)
        bounds = starts.tolist()
        made.arrays = [channels[a:b] for a, b in pairwise(bounds)]
        made.channels, made.starts = channels, starts
        return made

    @cached_property
    def number(self) -> dict[int, int]:
        """The place of a vector in the list, by its ``id``."""
        return {id(a): i for i, a in enumerate(self.arrays)}

    @cached_property
    def lengths(self) -> IndexArray:
        """``[V]``."""
        return np.diff(self.starts)

    @cached_property
    def free(self) -> BoolArray:
        """Whether each holds a channel, not fixed positions alone: ``[V]``."""
        return self.count(self.channels >= 0) > 0

    def count(self, chosen: BoolArray) -> IndexArray:
        """How many entries of each vector are ``chosen [L]``: ``[V]``."""
        return count_between(self.starts, chosen)


class Holdings:
    """Which groups each vector holds channels of."""

    def __init__(self, vectors: Vectors, group_of: ChannelArray, n_groups: int) -> None:
        held = np.flatnonzero(vectors.channels >= 0)
        number = np.repeat(np.arange(len(vectors.arrays)), vectors.lengths)[held]
        channels = vectors.channels[held].astype(np.int64)
        groups = group_of[channels]
        present = np.zeros((len(vectors.arrays), n_groups), dtype=np.bool_)
        present[number, groups] = True
        rank = np.cumsum(present, axis=1) - 1
        self._which = rank[number, groups]
        self._held, self._channels = held - vectors.starts[number], channels
        self._bounds = np.searchsorted(held, vectors.starts).tolist()
        self._groups = np.nonzero(present)[1].tolist()
        self._ends = np.cumsum([0, *present.sum(1)]).tolist()

    def groups(self, number: int) -> list[int]:
        """The groups that vector ``number`` holds channels of."""
        return self._groups[slice(*self._ends[number : number + 2])]

    def of(self, number: int) -> tuple[IndexArray, IndexArray, list[int], IndexArray | int]:
        """See :meth:`Plan.holds`."""
        own, groups = slice(*self._bounds[number : number + 2]), self.groups(number)
        return self._held[own], self._channels[own], groups, 0 if len(groups) == 1 else self._which[own]


class Kept:
    """Which indices of a channel vector survive ``keep [N]``.

    Most axes of a plan share their vectors (a weight's rows, its bias, the norm behind it), so what is found for a
    vector is remembered for the object. With ``vectors``, all of them are looked at in one pass.

    Attributes:
        positions: indices into ``vectors.channels`` that stay, ascending.
        bounds: where those of each vector begin among them, and the end ``[V + 1]``.
    """

    positions: IndexArray
    bounds: IndexArray

    def __init__(self, keep: BoolArray, vectors: Vectors | None = None) -> None:
        self.keep = keep
        self.vectors = vectors
        self.left: tuple[Shapes, IndexArray, IndexArray] | None = None  # see Shapes.left
        self._found: dict[int, tuple[ChannelArray, IndexArray]] = {}
        self._tensors: dict[int, tuple[TensorMap, list[IndexArray], tuple[int, ...]]] = {}
        if vectors is not None:
            # The last entry is for -1: a fixed position stays.
            self.positions = np.flatnonzero(np.append(keep, True)[vectors.channels])
            self.bounds = np.searchsorted(self.positions, vectors.starts)

    @cached_property
    def counts(self) -> IndexArray:
        """How many indices of each vector stay: ``[V]``."""
        return np.diff(self.bounds)

    @cached_property
    def local(self) -> IndexArray:
        """``positions``, counted from the beginning of their vector."""
        assert self.vectors is not None
        return self.positions - np.repeat(self.vectors.starts[:-1], self.counts)

    def of(self, tensor: TensorMap) -> tuple[list[IndexArray], tuple[int, ...]]:
        """For each axis of ``tensor`` the indices that stay, and the shape that is left."""
        known = self._tensors.get(id(tensor))
        if known is None:
            left = [self(a.channels) for a in tensor.axes]
            known = (tensor, left, shrunk_shape(tensor, left))
            self._tensors[id(tensor)] = known
        return known[1], known[2]

    def __call__(self, channels: ChannelArray) -> IndexArray:
        """Indices into ``channels`` that stay: kept channels and fixed positions."""
        known = self._found.get(id(channels))
        if known is None:
            number = None if self.vectors is None else self.vectors.number.get(id(channels))
            if number is None:
                left = np.flatnonzero((channels < 0) | self.keep[channels])
            else:
                left = self.local[self.bounds[number] : self.bounds[number + 1]]
            known = (channels, left)
            self._found[id(channels)] = known
        return known[1]


def is_grouped(tensor: TensorMap, axis: Axis) -> bool:
    """Whether ``axis`` is dimension 1 of a grouped convolution, with an entry per group and index."""
    return tensor.groups > 1 and axis.dim == 1


def groups_left(tensor: TensorMap, kept: Sequence[IndexArray]) -> int:
    """Convolution groups of ``tensor`` when the indices ``kept`` of each axis are left."""
    if not tensor.whole_groups:
        return tensor.groups
    return tensor.groups * len(kept[0]) // len(tensor.axes[0].channels)


def shrunk_shape(tensor: TensorMap, kept: Sequence[IndexArray]) -> tuple[int, ...]:
    """Shape of ``tensor`` when the indices ``kept`` of each axis are left."""
    shape = list(tensor.shape)
    for axis, left in zip(tensor.axes, kept, strict=True):
        shape[axis.dim] = len(left) // (groups_left(tensor, kept) if is_grouped(tensor, axis) else 1)
    return tuple(shape)


def units_above(tensor: TensorMap, unit: ChannelArray, keep: BoolArray) -> int:
    """How many units of its columns must stay for ``tensor`` to have more of them than rows, of which ``keep`` stay."""
    by_dim = {axis.dim: axis.channels for axis in tensor.axes}
    rows, columns = by_dim.get(0), by_dim[1]
    left = tensor.shape[0] if rows is None else int(((rows < 0) | keep[rows]).sum())
    live = columns[columns >= 0]
    times = np.unique(unit[live], return_counts=True)[1]
    return min(-(-(left + 1 - len(columns) + len(live)) // int(times.min())), len(times))


@dataclass(frozen=True)
class Shapes:
    """Shapes of tensors and what their axes hold, a row for each tensor and for each axis, in order.

    Attributes:
        sizes: shapes, filled up with ones: ``[T, D]``.
        ndim: ``[T]``.
        groups: of a convolution ``[T]``.
        whole: see :class:`TensorMap` ``[T]``.
        tensor, dim, vector: of each axis ``[A]``.
        lengths: of the vectors ``[V]``.
        rows: which tensors these were in the plan that this one is a prune of ``[T]``.
    """

    sizes: IndexArray
    ndim: IndexArray
    groups: IndexArray
    whole: BoolArray
    tensor: IndexArray
    dim: IndexArray
    vector: IndexArray
    lengths: IndexArray
    rows: IndexArray

    @classmethod
    def of(cls, tensors: Sequence[TensorMap], vectors: Vectors) -> Shapes:
        """Those of the tensors of a plan."""
        number = vectors.number
        axes = [(i, a.dim, number[id(a.channels)]) for i, t in enumerate(tensors) for a in t.axes]
        ndim = np.array([len(t.shape) for t in tensors], dtype=np.int64)
        most = int(ndim.max(initial=1))
        sizes = np.array([t.shape + (1,) * (most - len(t.shape)) for t in tensors], dtype=np.int64)
        tensor, dim, vector = np.array(axes, dtype=np.int64).reshape(len(axes), 3).T
        return cls(
            sizes.reshape(len(tensors), most),
            ndim,
            np.array([t.groups for t in tensors], dtype=np.int64),
            np.array([t.whole_groups for t in tensors], dtype=np.bool_),
            tensor,
            dim,
            vector,
            vectors.lengths,
            np.arange(len(tensors)),
        )

    @cached_property
    def by_ndim(self) -> IndexArray:
        """The tensors with few dimensions first ``[T]``."""
        return np.argsort(self.ndim, kind="stable")

    @cached_property
    def grouped(self) -> BoolArray:
        """Whether an axis is dimension 1 of a grouped convolution ``[A]``."""
        return (self.groups[self.tensor] > 1) & (self.dim == 1)

    @cached_property
    def least(self) -> IndexArray:
        """How many indices of an axis must stay (see :meth:`Plan.least`) ``[A]``."""
        groups = self.groups[self.tensor]
        blocks = (groups > 1) & ~self.whole[self.tensor]
        return np.where(blocks, np.minimum(self.lengths[self.vector], 2 * groups), 1)

    def left(self, kept: Kept) -> tuple[IndexArray, IndexArray]:
        """Sizes ``[T, D]`` and groups ``[T]`` that are left; not to be written to."""
        if kept.left is not None and kept.left[0] is self:
            return kept.left[1:]
        counts, groups, sizes = kept.counts, self.groups, self.sizes.copy()
        tensor, vector = self._whole_groups
        if len(tensor):
            groups = groups.copy()
            groups[tensor] = groups[tensor] * counts[vector] // self.lengths[vector]
        places, is_any_grouped = self._entries
        of_axes = counts[self.vector]
        if is_any_grouped:
            of_axes //= np.where(self.grouped, groups[self.tensor], 1)
        sizes.reshape(-1)[places] = of_axes
        kept.left = self, sizes, groups
        return sizes, groups

    @cached_property
    def _entries(self) -> tuple[IndexArray, bool]:
        """Where the axes stand in all sizes, laid end to end ``[A]``; whether one is of a grouped convolution's inputs.
        """
        return self.tensor * self.sizes.shape[1] + self.dim, bool(self.grouped.any())

    @cached_property
    def _whole_groups(self) -> tuple[IndexArray, IndexArray]:
        """The tensors whose groups go as a whole, and the vector of their first axis."""
        first = np.flatnonzero(self.whole[self.tensor] & (np.diff(self.tensor, prepend=-1) > 0))
        return self.tensor[first], self.vector[first]

    def smaller(self, sizes: IndexArray, groups: IndexArray, vectors: Vectors) -> Shapes:
        """The shapes after a prune that leaves ``sizes`` and ``groups``, of the tensors that still hold channels."""
        free = vectors.free[self.vector]
        rows, tensor = np.unique(self.tensor[free], return_inverse=True)
        return Shapes(
            sizes[rows],
            self.ndim[rows],
            groups[rows],
            self.whole[rows],
            tensor,
            self.dim[free],
            self.vector[free],
            vectors.lengths,
            rows,
        )

    def tuples(self, sizes: IndexArray) -> list[tuple[int, ...]]:
        """Rows of ``sizes [T, D]`` without what was filled up."""
        return [tuple(row[:n]) for row, n in zip(sizes.tolist(), self.ndim.tolist(), strict=True)]
