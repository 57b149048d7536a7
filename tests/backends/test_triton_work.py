"""How work is cut for the Triton kernels: every element once, every partial once, in equal shares."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pat_fast.backends.triton.work import (
    COPY,
    ITEM,
    ITEM_ELEMENTS,
    KERNEL_INNER,
    SCALAR,
    SUM_SLOTS,
    Ints,
    Shape,
    cut,
    cut_copy,
)
from pat_fast.ops import Tile, TileTable
from tests.ops.layouts import ORDERS, SIZES, SLOTS, make

FLOAT = Shape.of(4)


def field(records: Ints, name: str, names: tuple[str, ...] = ITEM) -> Ints:
    return records[:, names.index(name)]


def elements(record: Ints, shape: Shape) -> tuple[Ints, Ints, Ints, Ints]:
    """Offsets ``[rows, n]``, rows, columns and flat indices of one item, as the kernels work them out."""
    get = dict(zip(ITEM, record.tolist(), strict=True))
    j = np.arange(get["start"], min(get["start"] + shape.width, get["flat"]))
    inner = bool(get["flags"] & KERNEL_INNER)
    near = get["k"] if inner else get["c"]
    c, k = (j // near, j % near) if inner else (j % near, j // near)
    rows = np.arange(get["rows"])
    at = c * get["col_stride"] + k * get["kernel_stride"]
    if not get["flags"] & SCALAR:
        assert (at == j).all()
    return get["offset"] + rows[:, None] * get["row_stride"] + at, rows, c, j


@pytest.mark.parametrize("order", ORDERS)
def test_the_sums_of_the_partials_are_the_sums_of_the_tile(order: str) -> None:
    for number, sizes in enumerate((*SIZES, (300, 40, 9), (3, 1000, 1), (1000, 1, 3))):
        slots = SLOTS[number % 4]
        made = make(sizes, order, gap=number % 2)
        table = made.table(slots, start=2, length=sum(sizes) + 5)
        found = cut(table.table.numpy(), table.slots, FLOAT)
        flat = made.base[made.x.storage_offset() :].double().numpy()
        seen = np.zeros(len(flat), np.int64)
        partials = np.full(found.partials, np.nan)
        for record in found.items:
            at, rows, _, j = elements(record, FLOAT)
            seen[at] += 1
            for part, values, index in (
                (record[ITEM.index("row_part")], flat[at].sum(1), rows),
                (record[ITEM.index("col_part")], flat[at].sum(0), j),
            ):
                if part >= 0:
                    assert np.isnan(partials[part + index]).all()
                    partials[part + index] = values
        want = np.zeros(len(flat), np.int64)
        np.add.at(want, torch.arange(len(flat)).as_strided(made.sizes, made.strides).numpy().ravel(), 1)
        assert (seen == want).all()
        out = np.full(table.slots, np.nan)
        for slot, slots_here, base, step, blocks, block_stride, kernel, kernel_stride in found.sums.tolist():
            assert slots_here <= SUM_SLOTS
            for s in range(slots_here):
                places = itertools.product(range(blocks), range(kernel))
                own = [base + s * step + b * block_stride + k * kernel_stride for b, k in places]
                assert np.isnan(out[slot + s])
                out[slot + s] = partials[own].sum()
        exact = np.zeros(table.slots)
        row, col = table.rows[0][8:]
        values = made.x.double().numpy()
        if row >= 0:
            exact[row : row + sizes[0]] = values.sum((1, 2))
        if col >= 0:
            exact[col : col + sizes[1]] = values.sum((0, 2))
        np.testing.assert_allclose(out, exact, atol=1e-9)


def model(scale: int) -> TileTable:
    """Layers as in a network, ``scale`` times as wide as the smallest."""
    shapes = [(64, 3, 49), (64, 64, 9), (256, 64, 1), (512, 512, 9), (1000, 2048, 1), (2048, 512, 1)]
    tensors = [torch.empty(r * scale, c * scale, k, device="meta") for r, c, k in shapes]
    tensors += [torch.empty(64 * scale, device="meta") for _ in range(100)]
    tiles, slot = [], 0
    for at, x in enumerate(tensors):
        r, c, k = (*x.shape, 1, 1)[:3] if x.dim() == 1 else tuple(x.shape)
        tiles.append(Tile(at, 0, (r, c, k), (c * k, k, 1), slot, slot + r))
        slot += r + c
    return TileTable.from_tiles(tensors, tiles)


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_items_are_equal_shares_of_the_bytes(scale: int) -> None:
    table = model(scale)
    items = cut(table.table.numpy(), table.slots, FLOAT).items
    width = np.minimum(field(items, "flat") - field(items, "start"), FLOAT.width)
    shares = field(items, "rows") * width
    total = sum(r * c * k for _, _, r, c, k, *_ in table.rows)
    assert shares.sum() == total
    assert shares.max() <= min(max(1.1 * total / 2048, ITEM_ELEMENTS[0]), ITEM_ELEMENTS[1])
    # Most of the bytes lie in items of nearly the full share.
    assert shares[shares > 0.7 * shares.max()].sum() > 0.9 * total


def test_partials_are_few() -> None:
    table = model(4)
    found = cut(table.table.numpy(), table.slots, FLOAT)
    assert found.partials < 0.02 * sum(r * c * k for _, _, r, c, k, *_ in table.rows)


@pytest.mark.parametrize(
    ("sizes", "order", "gap", "vectors"),
    [
        ((8, 4, 9), "rck", 0, True),  # a row is 36 elements
        ((8, 4, 9), "rkc", 0, True),  # channels_last
        ((8, 4, 9), "crk", 0, True),  # a transposed weight
        ((8, 4, 9), "krc", 0, False),  # nine runs of columns make a row
        ((8, 5, 9), "rck", 0, False),  # 45 elements
        ((8, 4, 9), "rck", 1, False),
        ((64, 1, 1), "rck", 0, True),
        ((63, 1, 1), "rck", 0, False),
    ],
)
def test_what_is_read_in_vectors(sizes: tuple[int, int, int], order: str, gap: int, vectors: bool) -> None:
    made = make(sizes, order, gap)
    table = TileTable.from_tiles([made.x], [made.tile("both")])
    items = cut(table.table.numpy(), table.slots, FLOAT).items
    assert (field(items, "flags") & SCALAR == 0).all() == vectors
    shifted = TileTable.from_tiles([made.base], [Tile(0, 3, made.sizes, made.strides, 0, sizes[0])])
    assert (field(cut(shifted.table.numpy(), shifted.slots, FLOAT).items, "flags") & SCALAR).all()


@pytest.mark.parametrize(("columns", "vectors"), [(-1, True), (3, False)])
def test_rows_are_copied_in_vectors_unless_columns_are_gathered(columns: int, vectors: bool) -> None:
    x, out = torch.empty(6, 8), torch.empty(3, 8)
    table = TileTable.from_tiles([x], [Tile(0, 0, (6, 8, 1), (8, 1, 1))])
    out_table = TileTable.from_tiles([out], [Tile(0, 0, (3, 8, 1), (8, 1, 1), 0, columns)], 20, shared_slots=True)
    items = cut_copy(table.table.numpy(), out_table.table.numpy(), FLOAT)
    assert (field(items, "flags", COPY) & SCALAR == 0).all() == vectors
    # One row of a source whose rows are not whole vectors may lie anywhere.
    odd = TileTable.from_tiles([x], [Tile(0, 0, (5, 8, 1), (9, 1, 1))])
    one = TileTable.from_tiles([out], [Tile(0, 0, (1, 8, 1), (8, 1, 1), 0)], 20, shared_slots=True)
    assert (field(cut_copy(odd.table.numpy(), one.table.numpy(), FLOAT), "flags", COPY) & SCALAR).all()
