"""The Triton kernels against the reference, in Triton's interpreter; on a GPU see ``test_gpu.py``."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pat_fast import backends
from pat_fast.backends import kept, triton
from pat_fast.backends.triton import tables
from pat_fast.errors import BackendError
from pat_fast.ops import Tile, TileTable
from tests.backends import cases
from tests.ops.layouts import DTYPES, ORDERS, make

WHY = triton.unavailable("cpu")
pytestmark = [
    pytest.mark.skipif(WHY is not None, reason=f"{WHY}; where there is a GPU, test_gpu.py runs these cases"),
    # The interpreter computes lanes that are masked, too.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
# A program takes about 10 ms in the interpreter. Blocks are 32 x 128 elements of float32, or 16 x 256 of a half type;
# without gaps the last two sizes are runs of whole vectors.
LIGHT = cases.Scope(
    sizes=((1, 1, 1), (2, 3, 2), (17, 3, 1), (3, 17, 9), (5, 2, 70), (9, 40, 8), (40, 136, 1)),
    big=((150, 150, 3), (3, 600, 1), (300, 1, 3), (140, 5, 25)),
    thorough=False,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype) -> None:
    cases.reduce(triton.OPS, order, dtype, LIGHT)


@pytest.mark.parametrize(
    ("sizes", "order"),
    [*((sizes, "rck") for sizes in LIGHT.big), (LIGHT.big[0], "rkc"), (LIGHT.big[0], "crk")],
    ids=str,
)
def test_reduce_of_many_items(sizes: tuple[int, int, int], order: str) -> None:
    cases.reduce_big(triton.OPS, sizes, order)


@pytest.mark.parametrize("p", [0.0, 3.0, -1.0])
def test_other_powers(p: float) -> None:
    made = make((5, 7, 3))
    cases.check_reduce(triton.OPS, made, made, "both", "pow", p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype) -> None:
    cases.writes(triton.OPS, order, dtype, LIGHT)


@pytest.mark.parametrize("sizes", LIGHT.big[::3], ids=str)
def test_writes_of_many_items(sizes: tuple[int, int, int]) -> None:
    cases.writes_big(triton.OPS, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_zero_clears_inf_and_nan(dtype: torch.dtype) -> None:
    cases.zero_clears(triton.OPS, dtype)


def test_every_half_converts_as_torch_converts_it() -> None:
    """Not for bfloat16: the interpreter's own conversion neither rounds to even nor knows denormal numbers."""
    cases.halves_convert(triton.OPS, torch.float16, factors=(1 / 3, 3e-8))


def test_half_sums_of_special_values() -> None:
    cases.halves_sum(triton.OPS, torch.float16)


def test_a_list_of_many_kinds_equals_the_reference() -> None:
    cases.many_kinds(triton.OPS, long=700)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_compact(order: str, dtype: torch.dtype) -> None:
    cases.compact(triton.OPS, order, dtype, LIGHT)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_compact_moves_any_dtype(dtype: torch.dtype) -> None:
    cases.compact_moves_bits(triton.OPS, dtype)


def test_addresses_that_are_no_multiple_of_16() -> None:
    cases.unaligned(triton.OPS)


def test_offsets_beyond_32_bits() -> None:
    """Of the 4 GiB only the pages that are named are ever touched."""
    far = 2**32 + 4096
    x = torch.empty(far + 4096, dtype=torch.int8)
    x[far : far + 6] = torch.arange(6, dtype=torch.int8)
    x[:3] = torch.tensor([7, 8, 9], dtype=torch.int8)
    out = torch.zeros(2, 3, dtype=torch.int8)
    rows = TileTable.from_tiles([x], [Tile(0, 0, (2, 3, 1), (far, 1, 1))])
    columns = TileTable.from_tiles([x], [Tile(0, far, (3, 2, 1), (1, 3, 1))])
    index = torch.tensor([0, 1], dtype=torch.int32)
    for table, tile, want in (
        (rows, Tile(0, 0, (2, 3, 1), (3, 1, 1), 0), [[7, 8, 9], [0, 1, 2]]),
        (columns, Tile(0, 0, (3, 2, 1), (1, 3, 1), -1, 0), [[0, 1, 2], [3, 4, 5]]),
    ):
        out_table = TileTable.from_tiles([out], [tile], 2, shared_slots=True)
        triton.channel_compact([out], [x], table.table, out_table.table, index)
        assert out.tolist() == want


class Launches:
    """Stands for the kernels' module and counts what is launched."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.names = kernels, []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.kernels, name)
        return self._Counted(found, name, self.names) if name.endswith(("_items", "_partials")) else found

    class _Counted:
        def __init__(self, kernel: Any, name: str, names: list[str]) -> None:
            self.kernel, self.name, self.names = kernel, name, names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            self.names.append(self.name)
            return self.kernel[grid]


@pytest.mark.parametrize("layers", [1, 12])
def test_launches_do_not_depend_on_the_number_of_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches(triton._kernels())
    monkeypatch.setattr(triton, "_kernels", lambda: launches)
    mades = [make((3 + i, 4, 1 + i % 3), ORDERS[i % 6]) for i in range(layers)]
    tiles = [made.tile("both", 100 * i, i) for i, made in enumerate(mades)]
    tensors = [made.x for made in mades]
    table = TileTable.from_tiles(tensors, tiles)
    cases.everything(triton.OPS, tensors, table)
    assert launches.names == ["reduce_items", "add_partials"] * 2 + ["axpy_items", "scale_items"]
    launches.names.clear()
    outs = [torch.empty(made.sizes) for made in mades]
    kept = [Tile(i, 0, tuple(out.shape), out.stride()) for i, out in enumerate(outs)]
    out_table = TileTable.from_tiles(outs, kept, 0, shared_slots=True)
    index = torch.zeros(0, dtype=torch.int32)
    triton.channel_compact(outs, tensors, table.table, out_table.table, index)
    assert launches.names == ["copy_items"]
    assert all(torch.equal(out, x) for out, x in zip(outs, tensors, strict=True))


def test_results_are_the_same_bits_every_time() -> None:
    tensors, table = cases.model(long=300)
    first, second = (triton.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0) for _ in range(2))
    assert torch.equal(first, second)


def test_empty_lists_and_empty_tiles() -> None:
    nothing = TileTable.from_tiles([], [], 3)
    assert triton.channel_reduce([], [], nothing.table, 3, "pow", 2.0).tolist() == [0, 0, 0]
    triton.channel_scale_([], nothing.table, torch.ones(3))
    triton.channel_axpy_([], [], nothing.table, torch.ones(3))
    triton.channel_compact([], [], nothing.table, nothing.table, torch.zeros(3, dtype=torch.int32))
    x = torch.zeros(0, 4)
    empty = TileTable.from_tiles([x], [Tile(0, 0, (0, 4, 1), (4, 1, 1), 0, 0)], 5)
    torch.full((5,), math.nan)
    assert triton.channel_reduce([x], [], empty.table, 5, "pow", 2.0).tolist() == [0] * 5
    triton.channel_scale_([x], empty.table, torch.ones(5))


def test_records_and_addresses_are_kept_between_calls_and_die_with_the_table() -> None:
    made = make((4, 3, 2))
    table = made.table()
    work = tables.records(table.table, table.slots, made.x, 1)
    assert tables.records(table.table, table.slots, made.x, 1) is work
    assert work.addresses.of([made.x]) is work.addresses.of([made.x])
    others = [made.twin().x for _ in range(2 * tables.RECENT)]
    found = [work.addresses.of([other]).item() for other in others]
    assert found == [other.data_ptr() for other in others]
    assert len(work.addresses._recent) == tables.RECENT
    before = len(tables._records)
    del table
    gc.collect()
    assert len(tables._records) == before - 1


def test_a_table_that_was_never_used_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make((4, 3, 2))
    table = made.table()
    monkeypatch.setattr(kept, "is_capturing", lambda device: True)
    with pytest.raises(BackendError, match="once before the capture"):
        triton.channel_scale_([made.x], table.table, torch.ones(7))


def test_addresses_that_are_new_in_a_capture_are_staged_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = make((4, 3, 2)), make((4, 3, 2), seed=1)
    addresses = tables.Addresses(torch.device("cpu"), 1)
    addresses._spare = list(torch.empty(2, 1, dtype=torch.int64).unbind())
    known = addresses.of([made.x])
    monkeypatch.setattr(kept, "is_capturing", lambda device: True)
    assert addresses.of([made.x]) is known
    assert addresses.of([other.x]).item() == other.x.data_ptr()
    assert addresses.of([other.x]).item() == other.x.data_ptr()  # another graph, another copy
    with pytest.raises(BackendError, match="at most 4 captured calls"):
        addresses.of([other.x])


def test_it_runs_the_ops_when_it_is_named() -> None:
    code = (
        "import torch\n"
        "from pat_fast import backends, ops\n"
        "from pat_fast.backends.triton import tables\n"
        "cuts, cut = [], tables.cut\n"
        "tables.cut = lambda *a: cuts.append(1) or cut(*a)\n"
        "from pat_fast.ops import Tile, TileTable\n"
        "x = torch.arange(6.0).view(2, 3)\n"
        "table = TileTable.from_tiles([x], [Tile(0, 0, (2, 3, 1), (3, 1, 1), 0, 2)])\n"
        "print(ops.channel_reduce([x], table, p=1.0).tolist())\n"
        "ops.channel_reduce([x], table, p=1.0)\n"
        "print(len(cuts))\n"  # the dispatcher hands on the very table that the records are kept under
        "print({row['backend'] for row in backends.describe() if row['device'] == 'cpu'})\n"
    )
    environment = os.environ | {backends.ENV: "triton", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[3.0, 12.0, 3.0, 5.0, 7.0]", "1", "{'triton'}"], done.stderr
