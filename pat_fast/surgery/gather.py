"""What is kept of tensors, gathered into new ones: all tensors of a device and dtype in one call.

Nearly every tensor is dense and is one tile, rows by columns by kernel. How these lie in memory is found once per plan
(:class:`Layout`) and follows the model as it shrinks; a prune then computes their tables as arrays. What is left,
blocks of grouped convolutions and tensors with gaps, is planned tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import SurgeryError
from ..ops.tiles import NONE, WIDTH
from ..plan.bind import Block, blocks
from ..plan.flat import IndexArray, Kept, Shapes
from ..plan.types import Axis, Plan, TensorMap, groups_left, is_grouped

MOVABLE_BYTES = (1, 2, 4, 8)


def dense_strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` whose dimensions lie in the order of the strides ``like``."""
    if len(shape) == 1:
        return (1,)
    strides = [1] * len(shape)
    step = 1
    for dim in _ascending(like):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _ascending(strides: Sequence[int]) -> list[int]:
    """Dimensions from the smallest stride to the largest."""
    return sorted(range(len(strides)), key=lambda d: (strides[d], -d))


@lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], dims: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The dimensions that rows, columns and kernel of a dense tensor's one tile end with, -1 for none; whether one is
    enough.

    Then the sizes of columns (0 if they are an axis) and kernel, then all dimensions by descending stride.
    """
    order = _ascending(strides)[::-1]
    axes = [d for d in order if d in dims]
    runs: list[list[int]] = []  # of neighbouring dimensions that are not pruned
    inside = False
    for dim in order:
        if dim in dims:
            inside = False
        elif shape[dim] != 1:
            runs = [*runs[:-1], [*runs[-1], dim]] if inside else [*runs, [dim]]
            inside = True
    room = 3 - len(axes)
    is_one = dense_strides(shape, strides) == strides and len(runs) <= room
    ends, sizes = [r[-1] for r in runs], [math.prod(shape[d] for d in r) for r in runs]
    kernel, of_kernel = (ends[-1], sizes[-1]) if runs else (-1, 1)
    column, of_column = (ends[0], sizes[0]) if len(runs) == 2 else (-1, 1)
    if len(axes) == 2:
        column, of_column = axes[1], 0
    return (axes[0], column, kernel, of_column, of_kernel, *order), is_one


@dataclass
class Layout:
    """How the tensors of a plan lie in memory, a row for each ``[T]``.

    Attributes:
        strides: of the tensors.
        plain: whether a tensor is one dense tile.
        places: dimensions that its rows, columns and kernel end with, and sizes of columns and kernel ``[T, 5]``;
            see :func:`_places`.
        order: dimensions by descending stride ``[T, D]``.
        rows, columns: the channel vectors of both, the number of vectors for none.
    """

    strides: list[tuple[int, ...]]
    plain: NDArray[np.bool_]
    places: IndexArray
    order: IndexArray
    rows: IndexArray
    columns: IndexArray

    @classmethod
    def of(cls, plan: Plan, strides: list[tuple[int, ...]]) -> Layout:
        """The layout of tensors with these strides."""
        n, width = plan.shapes.sizes.shape
        made = cls(
            strides,
            np.zeros(n, dtype=np.bool_),
            np.zeros((n, 5), dtype=np.int64),
            np.tile(np.arange(width), (n, 1)),
            np.zeros(n, dtype=np.int64),
            np.zeros(n, dtype=np.int64),
        )
        made._fill(plan, range(n))
        return made

    def _fill(self, plan: Plan, numbers: Sequence[int] | range) -> None:
        """Work out the rows of these tensors."""
        place, none = plan.vectors.number, len(plan.vectors.arrays)
        width = self.order.shape[1]
        plain, places, order, rows, columns = [], [], [], [], []
        for i in numbers:
            tensor, strides = plan.tensors[i], self.strides[i]
            dims = tuple(a.dim for a in tensor.axes)
            found, is_one = _places(tensor.shape, strides, dims)
            vector = {a.dim: place[id(a.channels)] for a in tensor.axes}
            plain.append(is_one and not any(is_grouped(tensor, a) for a in tensor.axes))
            places.append(found[:5])
            order.append((*found[5:], *range(len(strides), width)))
            rows.append(vector[found[0]])
            columns.append(vector.get(found[1], none))
        if plain:
            index = np.asarray(numbers)
            self.plain[index], self.places[index], self.order[index] = plain, places, order
            self.rows[index], self.columns[index] = rows, columns

    def dense(self, sizes: IndexArray) -> IndexArray:
        """Strides of dense tensors of ``sizes [T, D]`` in the same order of dimensions ``[T, D]``."""
        ordered = np.maximum(np.take_along_axis(sizes, self.order, 1), 1)
        steps = np.ones_like(ordered)
        steps[:, :-1] = np.cumprod(ordered[:, :0:-1], axis=1)[:, ::-1]
        strides = np.empty_like(steps)
        np.put_along_axis(strides, self.order, steps, 1)
        return strides

    def tiles(self, sizes: IndexArray, strides: IndexArray) -> IndexArray:
        """Sizes and strides ``[T, 6]`` of the tiles of tensors of these sizes and strides ``[T, D]``."""
        number = np.arange(len(sizes))
        rows, columns, kernel, of_columns, of_kernel = self.places.T
        is_axis = of_columns == 0
        return np.stack(
            [
                sizes[number, rows],
                np.where(is_axis, sizes[number, columns], of_columns),
                of_kernel,
                strides[number, rows],
                np.where(columns < 0, 1, strides[number, columns]),
                np.where(kernel < 0, 1, strides[number, kernel]),
            ],
            axis=1,
        )

    def smaller(self, before: Plan, after: Plan, strides: list[tuple[int, ...]]) -> Layout:
        """The layout after a prune, of tensors with these ``strides``, given for all of the plan ``before`` it."""
        kept = after.shapes.rows
        made = Layout(
            [strides[i] for i in kept.tolist()],
            self.plain[kept],
            self.places[kept],
            self.order[kept],
            self.rows[kept],
            self.columns[kept],
        )
        axes, left = (np.bincount(s.tensor, minlength=len(s.ndim)) for s in (before.shapes, after.shapes))
        lost = np.flatnonzero((axes[kept] != left) | ~made.plain)
        made._fill(after, lost.tolist())
        return made


class Gathering:
    """The copies of one prune.

    Args:
        plan: before the prune.
        layout: of its tensors.
        kept: what stays.
        sizes: of the tensors after it ``[T, D]``.
    """

    def __init__(self, plan: Plan, layout: Layout, kept: Kept, sizes: IndexArray) -> None:
        self.plan, self.layout, self.kept = plan, layout, kept
        shapes: Shapes = plan.shapes
        self.shapes = shapes.tuples(sizes)
        dense = layout.dense(sizes)
        self.strides = shapes.tuples(dense)  # of plain tensors
        none = np.full((len(sizes), 2), NONE)
        self._before = np.concatenate([layout.tiles(shapes.sizes, layout.dense(shapes.sizes)), none], axis=1)
        starts, counts = np.append(kept.bounds[:-1], 0), np.append(kept.counts, 0)
        full = counts == np.append(plan.vectors.lengths, 0)
        sides = np.stack([layout.rows, layout.columns], axis=1)
        lists = np.where(full[sides], NONE, starts[sides])
        self._after = np.concatenate([layout.tiles(sizes, dense), lists], axis=1)
        self._plain = layout.plain.tolist()
        self._batches: dict[tuple[torch.device, torch.dtype], _Batch] = {}
        self.index = [kept.local.astype(np.int32)]  # lists of kept indices, by offset; that of every vector first
        self.length = len(self.index[0])
        self.lists: dict[tuple[int, int, int], int] = {}

    def add(self, number: int, source: Tensor) -> Tensor:
        """Plan the copy of what is kept of ``source``, laid out as tensor ``number``; the tensor that will hold it."""
        device, dtype = source.device, source.dtype
        batch = self._batches.get((device, dtype))
        if batch is None:
            batch = self._batches[device, dtype] = _Batch()
        if source.is_neg() or source.is_conj():
            source = source.resolve_neg().resolve_conj()
        stride, shape = source.stride(), self.shapes[number]
        plain = self._plain[number] and stride == self.layout.strides[number]
        strides = self.strides[number] if plain else dense_strides(shape, stride)
        out = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        if plain:
            batch.plain.append(number)
            batch.places.append(len(batch.xs))
        else:
            batch.odd += _pairs(self, number, len(batch.xs), source, out)
        batch.xs.append(source)
        batch.outs.append(out)
        return out

    def run(self) -> None:
        """Copy.

        Raises:
            SurgeryError: a dtype that cannot be moved.
        """
        index = torch.from_numpy(np.concatenate(self.index))
        for (device, dtype), batch in self._batches.items():
            if dtype.itemsize not in MOVABLE_BYTES:
                raise SurgeryError(f"expected elements of {MOVABLE_BYTES} bytes, got {dtype}; convert the model first")
            tables = [
                torch.from_numpy(batch.table(tiles, side)) for side, tiles in enumerate((self._before, self._after))
            ]
            # The tables were made from the plan and from tensors that were held against it just now: the public
            # wrapper's checks of each tensor would say the same again.
            torch.ops.pat_fast.channel_compact.default(batch.outs, batch.xs, *tables, index.to(device))


class _Batch:
    """Copies of one device and dtype."""

    def __init__(self) -> None:
        self.xs: list[Tensor] = []
        self.outs: list[Tensor] = []
        self.plain: list[int] = []  # tensors of the plan ...
        self.places: list[int] = []  # ... and where they stand in the lists above
        self.odd: list[tuple[list[int], list[int]]] = []  # rows of the two tables, one by one

    def table(self, tiles: IndexArray, side: int) -> IndexArray:
        """The tile table of the sources (0) or the destinations (1)."""
        table = np.zeros((len(self.plain) + len(self.odd), WIDTH), dtype=np.int64)
        table[: len(self.plain), 0] = self.places
        table[: len(self.plain), 2:] = tiles[self.plain]
        if self.odd:
            table[len(self.plain) :] = [pair[side] for pair in self.odd]
        return table


Rows = tuple[list[int], list[int]]


def _pairs(gathering: Gathering, number: int, place: int, source: Tensor, out: Tensor) -> list[Rows]:
    """Rows of both tables for each block of ``source``, the ``place``-th tensor of its batch."""
    tensor, kept = gathering.plan.tensors[number], gathering.kept
    left = tensor.kept(kept)
    axes = tuple(Axis(a.dim, a.channels[i], a.role) for a, i in zip(tensor.axes, left, strict=True))
    smaller = TensorMap(
        tensor.name, tensor.is_parameter, tuple(out.shape), groups_left(tensor, left), tensor.whole_groups, axes
    )
    sources = blocks(tensor, source.stride())
    if tensor.groups != smaller.groups and len(sources) > 1:
        per_group = len(tensor.axes[0].channels) // tensor.groups
        sources = [b for b in sources if np.isin(b.group * per_group, left[0])]
    targets = blocks(smaller, out.stride(), order=source.stride())
    found = []
    for one, two in zip(sources, targets, strict=True):
        lists = (
            _list(gathering, tensor, left, one.row_channels, one.row[0], two.row[0]),
            _list(gathering, tensor, left, one.col_channels, one.col[0], two.col[0]),
        )
        found.append((_entry(place, one, (NONE, NONE)), _entry(place, two, lists)))
    return found


def _entry(place: int, block: Block, lists: tuple[int, int]) -> list[int]:
    (r, sr), (c, sc), (k, sk) = block.row, block.col, block.kernel
    return [place, block.offset, r, c, k, sr, sc, sk, *lists]


def _list(
    gathering: Gathering,
    tensor: TensorMap,
    left: list[IndexArray],
    channels: NDArray[np.int32] | None,
    before: int,
    after: int,
) -> int:
    """Offset in the index of the kept positions along one side of a block."""
    if before == after:
        return NONE
    assert channels is not None
    for axis, kept in zip(tensor.axes, left, strict=True):
        start = _offset_in(axis.channels, channels)
        if start is not None:
            key = (id(axis.channels), start, before)
            if key not in gathering.lists:
                inside = kept[(kept >= start) & (kept < start + before)] - start
                gathering.lists[key] = gathering.length
                gathering.length += len(inside)
                gathering.index.append(inside.astype(np.int32))
            return gathering.lists[key]
    raise AssertionError("a block's channels are not a part of its axes")


def _offset_in(axis: NDArray[np.int32], part: NDArray[np.int32]) -> int | None:
    """Where the view ``part`` begins in ``axis``, or None if it is a view of something else."""
    if part is axis:
        return 0
    start = part.__array_interface__["data"][0] - axis.__array_interface__["data"][0]
    if not 0 <= start < max(axis.nbytes, 1):
        return None
    return start // axis.itemsize
