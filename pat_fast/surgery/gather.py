"""Where what stays of the tensors of a plan lies in them, and what goes: the tables of a prune's copies.

The tables of tensors that are one dense tile are computed as arrays, for all at once (:class:`Layout`). What is left,
blocks of grouped convolutions, tensors with gaps and vectors of many tensors, is planned tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..ops.tiles import NONE
from ..plan.bind import Block, blocks
from ..plan.flat import IndexArray, Kept
from ..plan.types import Axis, Plan, TensorMap, groups_left
from .layout import Layout, dense_strides

Row = list[int]  # of a tile table
Shape = tuple[int, ...]  # or strides
Pair = tuple[Row, Row]  # of both tables of a copy


class Part(NamedTuple):
    """A tensor in a vector of many, one behind the other: its number in the plan if it has one, its shape.

    Each of its entries takes ``per`` numbers of the vector: a complex one two.
    """

    number: int | None
    shape: tuple[int, ...]
    per: int

    def left(self, sizes: IndexArray) -> tuple[int, ...]:
        """What ``sizes [T, D]`` leave of its shape."""
        return self.shape if self.number is None else tuple(sizes[self.number, : len(self.shape)].tolist())


class Gathering:
    """What stays of the tensors of a plan, and what goes, as entries of tile tables.

    Args:
        plan: before the prune.
        layout: of its tensors.
        kept: what stays.
        sizes: of the tensors after it ``[T, D]``.
        joints: the parts of vectors of many tensors; their numbers come after the plan's.
    """

    def __init__(
        self, plan: Plan, layout: Layout, kept: Kept, sizes: IndexArray, joints: Sequence[Sequence[Part]] = ()
    ) -> None:
        self.plan, self.layout, self.kept, self.joints = plan, layout, kept, joints
        strides = layout.dense(sizes)  # of plain tensors
        self.before = layout.whole
        starts = np.where(kept.counts == plan.vectors.lengths, NONE, kept.bounds[:-1])
        self._sides = layout.sides
        self.after = np.concatenate([layout.tiles(sizes, strides), np.append(starts, NONE)[self._sides]], axis=1)
        self._index = [kept.local.astype(np.int32)]  # lists of indices, by offset; of what every vector keeps first
        self._length = len(self._index[0])
        self.lists: dict[tuple[int, int, int], tuple[int, int]] = {}
        self._joint_pairs: dict[int, list[tuple[bool, Pair]]] = {}
        self.sizes, self.strides, self.ndim = sizes, strides, plan.shapes.ndim
        self.plain, self.large, self.expected = layout.plain, layout.large, layout.strides
        if joints:
            ones = np.ones((len(joints), sizes.shape[1]), dtype=np.int64)
            lengths = [sum(math.prod(part.left(sizes)) * part.per for part in parts) for parts in joints]
            self.sizes = np.concatenate([sizes, np.insert(ones[:, 1:], 0, lengths, axis=1)])
            self.strides = np.concatenate([strides, ones])
            self.ndim = np.append(plan.shapes.ndim, ones[:, 0])
            self.plain = np.append(layout.plain, ones[:, 0] == 0)
            self.large = np.append(layout.large, ones[:, 0] == 1)
            self.expected = [*layout.strides, *[(1,) for _ in joints]]

    def rows(self, of: IndexArray, numbers: IndexArray) -> list[Shape]:
        """What ``sizes`` or ``strides`` say of these tensors."""
        ndim, rows = self.ndim[numbers], of[numbers]
        starts = [0, *(np.flatnonzero(np.diff(ndim)) + 1).tolist(), len(numbers)]
        found: list[Shape] = []
        for start, stop in pairwise(starts):
            found += map(tuple, rows[start:stop, : int(ndim[start])].tolist()) if stop > start else []
        return found

    def index(self) -> Tensor:
        """All lists that the tables made so far point into: int32."""
        if len(self._index) > 1:
            self._index = [np.concatenate(self._index)]
        return torch.from_numpy(self._index[0])

    def append(self, indices: IndexArray) -> int:
        """Where the list ``indices`` begins in the index."""
        self._index.append(indices.astype(np.int32))
        self._length += len(indices)
        return self._length - len(indices)

    @cached_property
    def gone(self) -> IndexArray:
        """Tiles of what goes of plain tensors: rows, then columns of the rows that stay ``[T, 2, 8]``.

        Each as it is laid out behind the others that go.
        """
        vectors, kept = self.plan.vectors, self.kept
        goes = np.ones(len(vectors.channels), dtype=np.bool_)
        goes[kept.positions] = False
        bounds = vectors.starts - kept.bounds
        local = np.flatnonzero(goes) - np.repeat(vectors.starts[:-1], np.diff(bounds))
        starts = np.append(self.append(local) + bounds[:-1], NONE)[self._sides]
        (rows, columns, kernel), (r, c) = self.before.T[:3], self.after.T[:2]
        one, none = np.ones_like(rows), np.full_like(rows, NONE)
        wide, narrow = columns * kernel, (columns - c) * kernel
        of_rows = [rows - r, columns, kernel, wide, kernel, one, starts[:, 0], none]
        of_columns = [r, columns - c, kernel, narrow, kernel, one, self.after[:, 6], starts[:, 1]]
        return np.stack([np.stack(of_rows, axis=1), np.stack(of_columns, axis=1)], axis=1)

    def joint_pairs(self, number: int) -> list[tuple[bool, Pair]]:
        """Those of a vector of many tensors, whose own place is not known yet: its parts', one behind the other."""
        if number not in self._joint_pairs:
            found: list[tuple[bool, Pair]] = []
            before = after = 0
            for part in self.joints[number - len(self.plan.tensors)]:
                left = part.left(self.sizes)
                for i in range(part.per):
                    for stays, (source, target) in self._part_pairs(part, left):
                        placed = _within(target, after + i, part.per) if stays else target
                        found.append((stays, (_within(source, before + i, part.per), placed)))
                before += math.prod(part.shape) * part.per
                after += math.prod(left) * part.per
            self._joint_pairs[number] = found
        return self._joint_pairs[number]

    def _part_pairs(self, part: Part, left: tuple[int, ...]) -> Iterator[tuple[bool, Pair]]:
        if part.number is not None and left != part.shape:
            order = range(len(left), 0, -1)
            yield from pairs(self, part.number, 0, dense_strides(part.shape, order), dense_strides(left, order))
        elif math.prod(left):
            rows = left[0] if len(left) > 1 else 1
            whole = _packed(rows, 1, math.prod(left) // rows, NONE, NONE)
            yield True, (whole, whole)


def _within(tile: Row, start: int, per: int) -> Row:
    """A tile of a tensor as one of the vector where its entries stand from ``start`` on, ``per`` apart."""
    offset, sizes, strides = tile[1], tile[2:5], tile[5:8]
    return [tile[0], start + offset * per, *sizes, *(stride * per for stride in strides), *tile[8:]]


def pairs(
    gathering: Gathering, number: int, place: int, stride: tuple[int, ...], strides: tuple[int, ...]
) -> Iterator[tuple[bool, Pair]]:
    """Rows of both tables for each block of a tensor, the ``place``-th of its copy: whether it stays, and where.

    ``strides`` are those of what stays; the place of what goes is not known yet.
    """
    if number >= len(gathering.plan.tensors):
        for is_kept, (source, target) in gathering.joint_pairs(number):
            yield is_kept, ([place, *source[1:]], [place, *target[1:]])
        return
    tensor, kept = gathering.plan.tensors[number], gathering.kept
    left = tensor.kept(kept)
    axes = tuple(Axis(a.dim, a.channels[i], a.role) for a, i in zip(tensor.axes, left, strict=True))
    smaller = TensorMap(
        tensor.name,
        tensor.is_parameter,
        gathering.rows(gathering.sizes, np.array([number]))[0],
        groups_left(tensor, left),
        tensor.whole_groups,
        axes,
    )
    sources = blocks(tensor, stride)
    if tensor.groups != smaller.groups and len(sources) > 1:
        per_group = len(tensor.axes[0].channels) // tensor.groups
        stays = [bool(np.isin(b.group * per_group, left[0])) for b in sources]
        for block in (b for b, stay in zip(sources, stays, strict=True) if not stay):
            yield False, (_entry(place, block), _packed(block.row[0], block.col[0], block.kernel[0], NONE, NONE))
        sources = [b for b, stay in zip(sources, stays, strict=True) if stay]
    for one, two in zip(sources, blocks(smaller, strides, order=stride), strict=True):
        rows, rows_gone = _list(gathering, tensor, left, one.row_channels, one.row[0], two.row[0])
        columns, columns_gone = _list(gathering, tensor, left, one.col_channels, one.col[0], two.col[0])
        source, kernel = _entry(place, one), one.kernel[0]
        yield True, (source, _entry(place, two, rows, columns))
        yield False, (source, _packed(one.row[0] - two.row[0], one.col[0], kernel, rows_gone, NONE))
        yield False, (source, _packed(two.row[0], one.col[0] - two.col[0], kernel, rows, columns_gone))


def _entry(place: int, block: Block, rows: int = NONE, columns: int = NONE) -> Row:
    (r, sr), (c, sc), (k, sk) = block.row, block.col, block.kernel
    return [place, block.offset, r, c, k, sr, sc, sk, rows, columns]


def _packed(r: int, c: int, k: int, rows: int, columns: int) -> Row:
    """A tile that lies dense, in a tensor and at an offset that are not known yet."""
    return [0, 0, r, c, k, c * k, k, 1, rows, columns]


def _list(
    gathering: Gathering,
    tensor: TensorMap,
    left: list[IndexArray],
    channels: NDArray[np.int32] | None,
    before: int,
    after: int,
) -> tuple[int, int]:
    """Offsets in the index of the positions along one side of a block that stay, and of those that go."""
    if before == after:
        return NONE, NONE
    assert channels is not None
    for axis, kept in zip(tensor.axes, left, strict=True):
        start = _offset_in(axis.channels, channels)
        if start is not None:
            key = (id(axis.channels), start, before)
            if key not in gathering.lists:
                inside = kept[(kept >= start) & (kept < start + before)] - start
                outside = np.setdiff1d(np.arange(before), inside, assume_unique=True)
                gathering.lists[key] = gathering.append(inside), gathering.append(outside)
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
