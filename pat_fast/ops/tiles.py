"""Tile tables: which part of which tensor an op works on, and where its rows and columns go.

A *tile* is a view ``[R, C, K]`` (rows, columns, kernel) of one tensor of a list. A table is an int64
CPU tensor ``[T, 10]``, one row per tile, with the columns named below. Rows and columns have *slots*:
row ``r`` of a tile stands at entry ``ROW + r`` of a flat vector, column ``c`` at ``COL + c``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.parameter import is_lazy

from pat_fast.backends.known import Known
from pat_fast.errors import OpError

TENSOR, OFFSET, R, C, K, SR, SC, SK, ROW, COL = range(10)
WIDTH = 10
NONE = -1
"""In ``ROW`` or ``COL``: the rows (columns) of this tile have no slots."""

REACH = 2**48
"""More elements than any memory holds; within it, no size in bytes overflows 64 bits."""

Layout = tuple[tuple[int, ...], tuple[int, ...]]
Columns = NDArray[np.int64]  # a table, transposed, or some of its columns


def not_strided(x: object) -> str | None:
    """What ``x`` is, if it is no tensor that has sizes and strides."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.layout is not torch.strided:
        return str(x.layout)
    return "a nested tensor" if x.is_nested else None


@dataclass(frozen=True)
class Tile:
    """One view ``[R, C, K]`` of one tensor.

    Args:
        tensor: index of the tensor in the list that the op is called with.
        offset: elements from the tensor's first element to the view's first.
        sizes: ``(R, C, K)``.
        strides: ``(SR, SC, SK)`` in elements.
        row: slot of row 0, or -1 when the rows have no slots.
        col: slot of column 0, or -1 when the columns have no slots.
    """

    tensor: int
    offset: int
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]
    row: int = NONE
    col: int = NONE

    def entry(self) -> tuple[int, ...]:
        """Return the tile as one row of a table."""
        return (self.tensor, self.offset, *self.sizes, *self.strides, self.row, self.col)


class TileTable:
    """A table of tiles that was checked once against the tensors it describes.

    Attributes:
        table: ``[T, 10]`` int64 on the CPU; do not write to it.
        slots: length of the slot vector.
        n_tensors: length of the tensor list.
        layouts: ``(shape, strides)`` of each tensor; every call compares them with what it is given.
        shapes, strides: the same, apart.
        extents: ``[n_tensors]``, elements from a tensor's first to its last.
        rows: ``table`` as Python integers.
        shares_slots: whether tiles name the same slots, as those of a compaction's destination may.
        writable: whether no element is named twice, so that each can be written on its own.
        known: lists of tensors that were given before, by the name of the argument; None for one that came once.
        apart: addresses of tensors that were seen to share no memory, with the sizes that matter.
    """

    __slots__ = (
        "apart",
        "extents",
        "known",
        "layouts",
        "n_tensors",
        "rows",
        "shapes",
        "shares_slots",
        "slots",
        "strides",
        "table",
        "writable",
    )

    def __init__(
        self, table: Tensor, tensors: Sequence[Tensor], slots: int, *, shared_slots: bool = False
    ) -> None:
        """Check ``table`` (``[T, 10]`` int64) against ``tensors``.

        Args:
            shared_slots: let tiles name the same slots. Tables for the destination of
                :func:`channel_compact` need it, because there ``ROW`` and ``COL`` point into an index
                that several tiles may share.

        Raises:
            OpError: a tile leaves its tensor, or its slots are out of range or taken twice.
        """
        if not isinstance(table, Tensor):
            raise OpError(f"expected a tile table of shape [T, {WIDTH}], int64, on the CPU; got {type(table).__name__}")
        plain = table.is_cpu and table.layout is torch.strided
        if table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != WIDTH or not plain:
            raise OpError(
                f"expected a tile table of shape [T, {WIDTH}], int64, on the CPU; got {list(table.shape)} "
                f"{table.dtype} on {table.device}"
            )
        try:
            self.slots = index(slots)
            self.n_tensors = len(tensors)
        except TypeError:
            raise OpError(f"expected slots and a list of tensors; got {slots!r} and {type(tensors).__name__}") from None
        if self.slots < 0:
            raise OpError(f"expected slots >= 0; got {slots}")
        for number, tensor in enumerate(tensors):
            odd = not_strided(tensor)
            if odd is not None:
                raise OpError(f"expected tensor {number} to be strided; got {odd}")
            if is_lazy(tensor):
                raise OpError(f"expected tensor {number} to have its shape; got a lazy parameter; run a forward first")
        self.table = table.clone(memory_format=torch.contiguous_format)
        self.layouts: tuple[Layout, ...] = tuple((tuple(t.shape), tuple(t.stride())) for t in tensors)
        self.shapes = tuple(shape for shape, _ in self.layouts)
        self.strides = tuple(strides for _, strides in self.layouts)
        self.rows: list[list[int]] = self.table.tolist()
        extents = [_extent(layout) for layout in self.layouts]
        self.extents = np.asarray(extents, dtype=np.int64)
        columns = self.table.numpy().T
        if not _surely_inside(columns, extents, slots):
            for number, row in enumerate(self.rows):  # says what is wrong, if anything is
                _check_tile(number, row, extents, slots)
        self.shares_slots = not _surely_own_slots(columns)
        if self.shares_slots and not shared_slots:
            _check_slots(self.rows)
        self.writable = _is_disjoint(self.rows, columns, extents)
        self.known: dict[str, Known | None] = {}
        self.apart: tuple[int, ...] = ()

    @classmethod
    def from_tiles(
        cls,
        tensors: Sequence[Tensor],
        tiles: Iterable[Tile],
        slots: int | None = None,
        *,
        shared_slots: bool = False,
    ) -> TileTable:
        """Build the table of ``tiles`` over ``tensors``.

        Args:
            slots: length of the slot vector; by default just long enough for the tiles' slots.

        Raises:
            OpError: as the constructor.
        """
        try:
            entries = [tuple(map(index, tile.entry())) for tile in tiles]
            farthest = max(map(abs, chain.from_iterable(entries)), default=0)
        except (AttributeError, TypeError):
            raise OpError(f"expected tiles, made of whole numbers; got {tiles!r:.200}") from None
        if any(len(entry) != WIDTH for entry in entries):
            raise OpError(f"expected three sizes and three strides for each tile; got {tiles!r}")
        if farthest > REACH:
            number, entry = next((n, e) for n, e in enumerate(entries) if max(map(abs, e)) > REACH)
            raise OpError(f"tile {number}: expected entries within 2**48; got {entry}")
        if slots is None:
            slots = max((end for entry in entries for _, end, _ in _slot_ranges(entry)), default=0)
        table = torch.tensor(entries, dtype=torch.int64, device="cpu").reshape(len(entries), WIDTH)
        return cls(table, tensors, slots, shared_slots=shared_slots)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, of the shapes that the table was made for, still have its strides."""
        if not torch.compiler.is_compiling() and any(k is not None and k.matches(tensors) for k in self.known.values()):
            return True
        return tuple(map(Tensor.stride, tensors)) == self.strides

    def __len__(self) -> int:
        """Return the number of tiles."""
        return len(self.rows)

    def __repr__(self) -> str:
        return f"TileTable({len(self)} tiles, {self.n_tensors} tensors, {self.slots} slots)"


def _extent(layout: Layout) -> int:
    """Return the elements from a tensor's first to its last, both included."""
    shape, strides = layout
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _last(row: list[int]) -> int:
    """Return the last element that a tile names."""
    steps = zip(row[R : K + 1], row[SR : SK + 1], strict=True)
    return row[OFFSET] + sum((size - 1) * stride for size, stride in steps)


def _surely_inside(columns: Columns, extents: list[int], slots: int) -> bool:
    """Whether every tile passes :func:`_check_tile`; False where that has to look more closely."""
    if not columns.shape[1]:
        return True
    tensor, offset, sizes, strides = columns[TENSOR], columns[OFFSET], columns[R : K + 1], columns[SR : SK + 1]
    if columns[TENSOR : SK + 1].min() < 0 or tensor.max() >= len(extents) or sizes.min() < 1:
        return False
    reach = np.maximum(offset, strides.max(0)).astype(np.float64) * sizes.max(0)
    if max(reach.max(), np.prod(sizes, axis=0, dtype=np.float64).max()) > REACH / 2:
        return False
    last = offset + ((sizes - 1) * strides).sum(0)
    if (last >= np.asarray(extents, dtype=np.int64)[tensor]).any():
        return False
    starts, ends = columns[ROW : COL + 1], columns[ROW : COL + 1] + columns[R : C + 1]
    return bool((starts >= NONE).all() and ((starts < 0) | (ends <= slots)).all())


def _check_tile(number: int, row: list[int], extents: list[int], slots: int) -> None:
    def fail(expected: str, got: Any) -> None:
        raise OpError(f"tile {number}: expected {expected}; got {got}; build the table from these tensors")

    tensor, offset = row[TENSOR], row[OFFSET]
    sizes, strides = row[R : K + 1], row[SR : SK + 1]
    if not 0 <= tensor < len(extents):
        fail(f"a tensor index in [0, {len(extents)})", tensor)
    if offset < 0 or min(sizes) < 0 or min(strides) < 0:
        fail("no negative offset, size or stride", f"offset {offset}, sizes {sizes}, strides {strides}")
    # Empty tiles too: kernels multiply before they compare.
    if max(offset, *strides) * max(1, *sizes) > REACH or math.prod(max(1, size) for size in sizes) > REACH:
        fail("sizes and strides of less than 2**48 elements", f"sizes {sizes}, strides {strides}")
    if 0 not in sizes:
        last = _last(row)
        if last >= extents[tensor]:
            fail(
                f"elements inside tensor {tensor}, which spans {extents[tensor]}",
                f"element {last} (offset {offset}, sizes {sizes}, strides {strides})",
            )
    for name, start, size in (("ROW", row[ROW], row[R]), ("COL", row[COL], row[C])):
        if start < NONE or (start >= 0 and start + size > slots):
            fail(f"{name} = -1 or slots inside [0, {slots})", f"[{start}, {start + size})")


def _slot_ranges(row: Sequence[int]) -> list[tuple[int, int, str]]:
    """Return ``(start, end, axis)`` of the slots that a tile names."""
    named = ((row[ROW], row[R], "rows"), (row[COL], row[C], "columns"))
    return [(start, start + size, axis) for start, size, axis in named if start >= 0 and size > 0]


def _surely_own_slots(columns: Columns) -> bool:
    """Whether tiles pass :func:`_check_slots`."""
    starts, sizes = columns[ROW : COL + 1].reshape(-1), columns[R : C + 1].reshape(-1)
    named = (starts >= 0) & (sizes > 0)
    order = starts[named].argsort()
    first, end = starts[named][order], (starts + sizes)[named][order]
    return bool((end[:-1] <= first[1:]).all())


def _check_slots(rows: list[list[int]]) -> None:
    ranges = sorted(
        (start, end, number, axis)
        for number, row in enumerate(rows)
        for start, end, axis in _slot_ranges(row)
    )
    for (_, end, tile, axis), (start, _, other, other_axis) in pairwise(ranges):
        if start < end:
            raise OpError(
                f"expected every slot to belong to one row or column; got slot {start} for the {axis} of "
                f"tile {tile} and the {other_axis} of tile {other}; give each its own slots"
            )


def _is_disjoint(rows: list[list[int]], columns: Columns, extents: list[int]) -> bool:
    sizes, strides = columns[R : K + 1], columns[SR : SK + 1]
    full = (sizes > 0).all(0)
    if not _are_injective(sizes[:, full], strides[:, full]).all():
        return False
    tiles_of = np.bincount(columns[TENSOR, full], minlength=len(extents))
    several = full & (tiles_of[columns[TENSOR]] > 1)
    first = columns[OFFSET]
    last = first + ((sizes - 1) * strides).sum(0)
    for tensor in np.flatnonzero(tiles_of > 1).tolist():
        own = np.flatnonzero(several & (columns[TENSOR] == tensor))
        order = own[first[own].argsort(kind="stable")]
        if (last[order[:-1]] >= first[order[1:]]).any() and not _are_apart([rows[i] for i in own], extents[tensor]):
            return False
    return True


def _are_injective(sizes: Columns, strides: Columns) -> NDArray[np.bool_]:
    """Whether views ``[3, T]`` name no element twice (strides nest; a few legal exotic views do not): ``[T]``."""
    order = np.lexsort((sizes, strides), axis=0)
    sizes, strides = np.take_along_axis(sizes, order, 0), np.take_along_axis(strides, order, 0)
    steps = np.where(sizes > 1, (sizes - 1) * strides, 0)
    below = np.cumsum(steps, axis=0) - steps
    return np.asarray(((sizes <= 1) | (strides > below)).all(0))


def _are_apart(tiles: list[list[int]], extent: int) -> bool:
    marks = torch.zeros(extent, dtype=torch.bool, device="cpu")
    for row in tiles:
        view = marks.as_strided(row[R : K + 1], row[SR : SK + 1], row[OFFSET])
        if view.any():
            return False
        view.fill_(True)
    return True
