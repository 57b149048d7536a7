from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.parameter import UninitializedParameter

from pat_fast.errors import OpError
from pat_fast.ops import Tile, TileTable

W = torch.zeros(6, 4, 3, 3)


def weight(
    offset: int = 0, sizes=(6, 4, 9), strides=(36, 9, 1), row: int = 0, col: int = 6, tensor: int = 0
) -> Tile:
    return Tile(tensor, offset, sizes, strides, row, col)


def test_from_tiles_infers_the_slots() -> None:
    table = TileTable.from_tiles([W], [weight()])
    assert (table.slots, len(table), table.n_tensors) == (10, 1, 1)
    assert table.table.tolist() == [[0, 0, 6, 4, 9, 36, 9, 1, 0, 6]]
    assert table.layouts == (((6, 4, 3, 3), (36, 9, 3, 1)),)


def test_an_empty_table() -> None:
    table = TileTable.from_tiles([], [])
    assert (table.slots, len(table), table.writable) == (0, 0, True)


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (weight(tensor=1), "tensor index"),
        (weight(offset=1), "spans 216"),
        (weight(offset=-1), "no negative"),
        (weight(sizes=(7, 4, 9)), "element 251"),
        (weight(strides=(36, -9, 1)), "no negative"),
        (weight(row=-2), "ROW"),
        (weight(row=30), "ROW"),
        (weight(col=28), "COL"),
        (weight(col=5), "slot 5 for the rows of tile 0 and the columns of tile 0"),
    ],
)
def test_bad_tiles_are_refused(tile: Tile, message: str) -> None:
    with pytest.raises(OpError, match=message):
        TileTable.from_tiles([W], [tile], 31)


def test_slots_of_two_tiles_may_be_shared_only_when_asked() -> None:
    tiles = [weight(), weight(tensor=1)]
    with pytest.raises(OpError, match="give each its own slots"):
        TileTable.from_tiles([W, W], tiles)
    assert TileTable.from_tiles([W, W], tiles, shared_slots=True).slots == 10


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (None, "made of whole numbers; got None"),
        ([(0, 0, 6, 4, 9)], "made of whole numbers"),
        ([weight(offset="a")], "made of whole numbers"),
        ([weight(sizes=(6, 4.5, 9))], "made of whole numbers"),
        ([weight(row=math.nan)], "made of whole numbers"),
        ([weight(sizes=(6, 4))], "three sizes and three strides"),
    ],
)
def test_what_is_no_list_of_tiles_is_refused(tiles: Any, message: str) -> None:
    with pytest.raises(OpError, match=message):
        TileTable.from_tiles([W], tiles, 31)


def test_a_table_of_another_kind_is_refused() -> None:
    with pytest.raises(OpError, match="got list"):
        TileTable([[0] * 10], [W], 1)
    with pytest.raises(OpError, match=r"shape \[T, 10\]"):
        TileTable(torch.zeros(1, 9, dtype=torch.int64), [W], 1)
    with pytest.raises(OpError, match="int64"):
        TileTable(torch.zeros(1, 10), [W], 1)
    with pytest.raises(OpError, match=r"shape \[T, 10\]"):
        TileTable(torch.zeros(1, 10, dtype=torch.int64).to_sparse(), [W], 1)


@pytest.mark.parametrize(
    ("tensors", "slots", "message"),
    [
        ([W], 7.5, "slots and a list of tensors; got 7.5"),
        ([W], None, "slots and a list of tensors; got None"),
        (None, 1, "got 1 and NoneType"),
        ([1], 1, "tensor 0 to be strided; got int"),
        ([UninitializedParameter()], 1, "tensor 0 to have its shape"),
    ],
)
def test_a_table_over_what_is_no_list_of_tensors_is_refused(tensors: Any, slots: Any, message: str) -> None:
    with pytest.raises(OpError, match=message):
        TileTable(torch.zeros(0, 10, dtype=torch.int64), tensors, slots)


def test_a_table_lies_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert TileTable.from_tiles([W], [weight()], 31).table.device.type == "cpu"


def test_an_empty_tile_needs_no_tensor_elements() -> None:
    empty = torch.zeros(0, 4)
    assert TileTable.from_tiles([empty], [Tile(0, 0, (0, 4, 1), (4, 1, 1), 0, 0)]).slots == 4


@pytest.mark.parametrize(
    ("tiles", "writable"),
    [
        ([weight()], True),
        ([weight(strides=(0, 9, 1))], False),
        ([weight(sizes=(6, 4, 1), strides=(1, 1, 1))], False),
        ([weight(sizes=(3, 4, 9)), weight(108, (3, 4, 9), row=10, col=20)], True),
        ([weight(sizes=(4, 4, 9)), weight(108, (3, 4, 9), row=10, col=20)], False),
        # Interleaved: even and odd columns.
        ([weight(sizes=(6, 2, 9), strides=(36, 18, 1)), weight(9, (6, 2, 9), (36, 18, 1), 10, 20)], True),
        ([weight(sizes=(6, 2, 9), strides=(36, 18, 1)), weight(8, (6, 2, 9), (36, 18, 1), 10, 20)], False),
    ],
)
def test_writable_means_that_no_element_is_named_twice(tiles: list[Tile], writable: bool) -> None:
    assert TileTable.from_tiles([W], tiles, 40).writable is writable
