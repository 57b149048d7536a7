"""How the work of one call is cut into the programs of a launch.

A tile ``[R, C, K]`` is read as rows of a flat run of ``C * K`` elements, in the order that lies nearest in
memory: index ``j`` of a row is ``c * K + k``, or ``k * C + c`` where the columns are nearer than the kernel
(channels_last). Tiles whose rows are nearer than their columns change sides first.

An *item* is the work of one program: :class:`Shape` ``.width`` flat indices of some rows. It leaves one partial
sum for each of its rows and one for each of its flat indices; *sums* say which partials make up a slot. All cuts
depend on the table alone, and partials are added in a fixed order: results are the same bits every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

VECTOR_BYTES = 16
WARP = 32
ITEM_ELEMENTS = 4096, 65536
"""Least and most elements of an item: the least keeps a program busy, the most lets partials be few."""
ITEMS = 2048
"""Items to aim at between these bounds: a few for each place that programs can take on a large GPU."""
LONE = 1
"""A lone column with a kernel up to this long is a vector: read along the rows, not across."""
SUM_SLOTS = 64
"""Slots that one program of the second pass of a reduction adds up."""

ITEM = (
    "tensor", "offset", "rows", "row_stride", "start", "flat", "c", "k", "col_stride", "kernel_stride", "flags",
    "row_slot", "col_slot", "row_part", "col_part",
)  # fmt: skip
COPY = (
    "tensor", "offset", "rows", "row_stride", "start", "flat", "c", "k", "col_stride", "kernel_stride", "flags",
    "row_list", "col_list", "from_tensor", "from_offset", "from_row", "from_col", "from_kernel",
)  # fmt: skip
SUM = ("slot", "slots", "base", "step", "blocks", "block_stride", "kernel", "kernel_stride")

SCALAR, KERNEL_INNER = 1, 2
"""Flags: elements must be moved one by one; ``j = c * K + k``."""


@dataclass(frozen=True)
class Shape:
    """A program's block: ``rows`` times ``width`` elements at once, in vectors of ``vector`` elements."""

    rows: int
    width: int
    vector: int

    @classmethod
    def of(cls, element_bytes: int) -> Shape:
        """One vector for each lane of a warp makes a row, so that row sums stay inside a warp."""
        vector = VECTOR_BYTES // element_bytes
        width = WARP * min(vector, 8)
        return cls((2048 if element_bytes == 8 else 4096) // width, width, vector)


@dataclass(frozen=True)
class Cut:
    """The items of a table and, for a reduction, how their partials make up the slots.

    ``items [n, len(ITEM)]`` (or ``COPY``), ``sums [m, len(SUM)]``, both int64; ``partials``: how many.
    """

    items: Ints
    sums: Ints
    partials: int


@dataclass(frozen=True)
class Flat:
    """Columns of a table in canonical form, one entry per tile, and which tiles changed sides."""

    tensor: Ints
    offset: Ints
    r: Ints
    c: Ints
    k: Ints
    sr: Ints
    sc: Ints
    sk: Ints
    row: Ints
    col: Ints
    kernel_inner: NDArray[np.bool_]
    swapped: NDArray[np.bool_]

    def in_runs(self, vector: int) -> NDArray[np.bool_]:
        """Tiles whose rows are single runs of whole vectors, as far as offsets and strides tell."""
        return _in_runs(self, self.offset, self.sr, self.sc, self.sk, vector)


def flatten(table: Ints) -> Flat:
    """Bring the rows of a tile table (``[T, 10]``) into canonical form."""
    tensor, offset, r, c, k, sr, sc, sk, row, col = table.T
    swapped = np.where((r == 1) | (c == 1), (c == 1) & (r > 1) & (k <= LONE), sr < sc)
    r, c = np.where(swapped, c, r), np.where(swapped, r, c)
    sr, sc = np.where(swapped, sc, sr), np.where(swapped, sr, sc)
    row, col = np.where(swapped, col, row), np.where(swapped, row, col)
    kernel_inner = (k == 1) | (c == 1) | (sk < sc)
    return Flat(tensor, offset, r, c, k, sr, sc, sk, row, col, kernel_inner, swapped)


def _in_runs(tiles: Flat, offset: Ints, sr: Ints, sc: Ints, sk: Ints, vector: int) -> NDArray[np.bool_]:
    c, k, inner = tiles.c, tiles.k, tiles.kernel_inner
    near, far = np.where(inner, sk, sc), np.where(inner, sc, sk)
    count, times = np.where(inner, k, c), np.where(inner, c, k)
    # The stride of a dimension of size 1 means nothing.
    run = ((count == 1) | (near == 1)) & ((times == 1) | (far == count))
    whole = (c * k % vector == 0) & (offset % vector == 0) & ((tiles.r == 1) | (sr % vector == 0))
    return run & whole


def _steps(tiles: Flat, shape: Shape) -> Ints:
    """Rows of an item of each tile: equal shares of the whole, in whole blocks."""
    least, most = ITEM_ELEMENTS
    total = int((tiles.r * tiles.c * tiles.k).sum())
    target = min(max(total // ITEMS, least), most)
    # Rows that are short leave lanes idle: those cost as if they were a quarter full.
    width = np.clip(tiles.c * tiles.k, shape.width // 4, shape.width)
    return np.maximum(1, target // (width * shape.rows)) * shape.rows


@dataclass(frozen=True)
class _Blocks:
    """Items: for each its tile, and its place among the tile's blocks."""

    tile: Ints
    row_block: Ints
    col_block: Ints
    row_blocks: Ints  # per tile
    col_blocks: Ints  # per tile
    step: Ints  # per tile


def _blocks(tiles: Flat, shape: Shape) -> _Blocks:
    step = _steps(tiles, shape)
    row_blocks, col_blocks = -(-tiles.r // step), -(-(tiles.c * tiles.k) // shape.width)
    counts = row_blocks * col_blocks
    tile = np.repeat(np.arange(len(counts)), counts)
    local = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    across = col_blocks[tile]
    # Neighbours in the launch are neighbours in memory.
    return _Blocks(tile, local // across, local % across, row_blocks, col_blocks, step)


def _places(counts: Ints) -> tuple[Ints, int]:
    """Give every entry ``counts`` places in one array: where each begins, and how many there are."""
    ends = np.cumsum(counts)
    return ends - counts, int(ends[-1]) if len(ends) else 0


def _rectangles(tiles: Flat, b: _Blocks, shape: Shape) -> dict[str, NDArray[Any]]:
    """The columns that all items have: which part of which tensor."""
    t, first = b.tile, b.row_block * b.step[b.tile]
    return {
        "tensor": tiles.tensor[t],
        "offset": tiles.offset[t] + first * tiles.sr[t],
        "rows": np.minimum(b.step[t], tiles.r[t] - first),
        "row_stride": tiles.sr[t],
        "start": b.col_block * shape.width,
        "flat": (tiles.c * tiles.k)[t],
        "c": tiles.c[t],
        "k": tiles.k[t],
        "col_stride": tiles.sc[t],
        "kernel_stride": tiles.sk[t],
    }


def cut(table: Ints, slots: int, shape: Shape) -> Cut:
    """Cut a table for :func:`channel_reduce`, :func:`channel_axpy_` and :func:`channel_scale_`."""
    tiles = flatten(table)
    b = _blocks(tiles, shape)
    flat = tiles.c * tiles.k
    row_part, after_rows = _places(np.where(tiles.row >= 0, tiles.r * b.col_blocks, 0))
    col_part, after_cols = _places(np.where(tiles.col >= 0, flat * b.row_blocks, 0))
    col_part = col_part + after_rows
    t, first = b.tile, b.row_block * b.step[b.tile]

    def where_named(slot: Ints, value: Ints) -> Ints:
        return np.where(slot[t] >= 0, value, -1)

    flags = np.where(tiles.in_runs(shape.vector), 0, SCALAR) | np.where(tiles.kernel_inner, KERNEL_INNER, 0)
    columns = {
        **_rectangles(tiles, b, shape),
        "flags": flags[t],
        "row_slot": where_named(tiles.row, tiles.row[t] + first),
        "col_slot": tiles.col[t],
        "row_part": where_named(tiles.row, row_part[t] + b.col_block * tiles.r[t] + first),
        "col_part": where_named(tiles.col, col_part[t] + b.row_block * flat[t]),
    }
    return Cut(_stack(columns, ITEM), _sums(tiles, b, row_part, col_part, slots), after_rows + after_cols)


def _sums(tiles: Flat, b: _Blocks, row_part: Ints, col_part: Ints, slots: int) -> Ints:
    """For every slot its partials: ``base + s * step + block * block_stride + k * kernel_stride``."""
    one, flat = np.ones_like(tiles.r), tiles.c * tiles.k
    inner = tiles.kernel_inner
    rows = {
        "slot": tiles.row, "slots": tiles.r, "base": row_part, "step": one, "blocks": b.col_blocks,
        "block_stride": tiles.r, "kernel": one, "kernel_stride": one,
    }  # fmt: skip
    cols = {
        "slot": tiles.col, "slots": tiles.c, "base": col_part, "step": np.where(inner, tiles.k, 1),
        "blocks": b.row_blocks, "block_stride": flat, "kernel": tiles.k, "kernel_stride": np.where(inner, 1, tiles.c),
    }  # fmt: skip
    both = np.concatenate([_stack(rows, SUM), _stack(cols, SUM)])
    filled = np.concatenate([tiles.r * flat > 0] * 2)
    both = both[filled & (both[:, 0] >= 0)]
    both = both[np.argsort(both[:, 0], kind="stable")]
    # Slots that no tile names are sums of nothing.
    ends = np.concatenate([[0], both[:, 0] + both[:, 1]])
    starts = np.concatenate([both[:, 0], [slots]])
    gaps = np.zeros((int((starts > ends).sum()), len(SUM)), np.int64)
    gaps[:, 0], gaps[:, 1] = ends[starts > ends], (starts - ends)[starts > ends]
    return _split(np.concatenate([both, gaps]))


def _split(sums: Ints) -> Ints:
    """Cut sums into pieces of at most ``SUM_SLOTS`` slots."""
    counts = -(-sums[:, 1] // SUM_SLOTS)
    pieces = np.repeat(sums, counts, axis=0)
    starts, _ = _places(counts)
    first = (np.arange(len(pieces)) - np.repeat(starts, counts)) * SUM_SLOTS
    slot, slots, base, step = (pieces[:, i].copy() for i in range(4))
    pieces[:, 0], pieces[:, 1] = slot + first, np.minimum(slots - first, SUM_SLOTS)
    pieces[:, 2] = base + first * step
    return pieces


def cut_copy(table: Ints, out_table: Ints, shape: Shape) -> Ints:
    """Cut the destination of :func:`channel_compact`: items ``[n, len(COPY)]``."""
    tiles = flatten(out_table)
    b = _blocks(tiles, shape)
    t, first = b.tile, b.row_block * b.step[b.tile]
    source, offset = table[:, 0], table[:, 1]
    sr, sc, sk = table[:, 5], table[:, 6], table[:, 7]
    sr, sc = np.where(tiles.swapped, sc, sr), np.where(tiles.swapped, sr, sc)
    whole_runs = tiles.in_runs(shape.vector) & _in_runs(tiles, offset, sr, sc, sk, shape.vector)
    # A gathered row begins anywhere: its stride counts even if there is but one.
    whole_runs &= (tiles.col < 0) & ((tiles.row < 0) | (sr % shape.vector == 0))
    flags = np.where(whole_runs, 0, SCALAR) | np.where(tiles.kernel_inner, KERNEL_INNER, 0)
    listed = tiles.row[t] >= 0
    columns = {
        **_rectangles(tiles, b, shape),
        "flags": flags[t],
        "row_list": np.where(listed, tiles.row[t] + first, -1),
        "col_list": tiles.col[t],
        "from_tensor": source[t],
        "from_offset": offset[t] + np.where(listed, 0, first * sr[t]),
        "from_row": sr[t],
        "from_col": sc[t],
        "from_kernel": sk[t],
    }
    return _stack(columns, COPY)


def _stack(columns: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> Ints:
    return np.ascontiguousarray(np.stack([columns[name] for name in names], axis=1), dtype=np.int64)
