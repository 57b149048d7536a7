"""The C++ kernels against the reference: layouts, sizes, dtypes, threads, instruction sets, forks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pat_fast import ops
from pat_fast.backends import cpu, reference
from pat_fast.ops import Tile, TileTable
from tests.ops.layouts import DTYPES, ORDERS, SIZES, SLOTS, Made, make

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ extension is not built")
ISAS = cpu.details()["isas"] if cpu.unavailable() is None else []
BIG = ((300, 150, 9), (150, 2000, 1), (3, 50000, 1), (70000, 1, 3), (1100, 5, 25))
"""Sizes of several chunks, several blocks of columns or several folds."""
EPS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FUNCTIONS = (("pow", 1.0), ("pow", 2.0), ("pow", 0.7), ("mul", 2.0), ("absmul", 2.0), ("sqmul", 2.0))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu._C.isa()
    assert cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(best)


def poison(slots: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next allocation of this size is likely to get."""
    torch.full((slots,), float("nan"), dtype=ops.accumulator(dtype))


def exact_reduce(made: Made, ys: list[Tensor], table: TileTable, f: str, p: float) -> Tensor:
    """Return what the reference says in float64, on copies of the same layout."""
    doubles = []
    for tensor in (made.x, *ys):
        buffer = torch.zeros(made.base.numel(), dtype=torch.float64)
        doubles.append(buffer.as_strided(made.sizes, made.strides).copy_(tensor))
    return reference.channel_reduce(doubles[:1], doubles[1:], table.table, table.slots, f, p)


def check_reduce(made: Made, other: Made, slots: str, f: str, p: float) -> None:
    table = made.table(slots, start=2, length=sum(made.sizes[:2]) + 5)
    ys = [] if f == "pow" else [other.x]
    poison(table.slots, made.x.dtype)
    found = cpu.channel_reduce([made.x], ys, table.table, table.slots, f, p)
    assert found.dtype == ops.accumulator(made.x.dtype)
    exact = exact_reduce(made, ys, table, f, p)
    terms = exact_reduce(made, [y.abs() for y in ys], table, "absmul" if f == "mul" else f, p)
    tolerance = (1e-12 if made.x.dtype == torch.float64 else 1e-5) * terms + 1e-30
    assert ((found.double() - exact).abs() <= tolerance).all(), (made.sizes, made.strides, slots, f, p)
    assert (found[terms == 0] == 0).all()  # slots that no tile names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype, isa: str) -> None:
    for sizes in SIZES:
        for gap in (0, 1):
            made, other = make(sizes, order, gap, dtype), make(sizes, order, gap, dtype, seed=1)
            for slots in SLOTS:
                for f, p in FUNCTIONS if slots == "both" else FUNCTIONS[1:4]:
                    check_reduce(made, other, slots, f, p)


@pytest.mark.parametrize("sizes", BIG, ids=str)
@pytest.mark.parametrize("order", ["rck", "rkc", "crk"])
def test_reduce_of_many_chunks(sizes: tuple[int, int, int], order: str, isa: str) -> None:
    made, other = make(sizes, order), make(sizes, order, seed=1)
    for slots in SLOTS[:3]:
        check_reduce(made, other, slots, "pow", 2.0)
    check_reduce(made, other, "both", "mul", 2.0)


def check_writes(made: Made, other: Made, slots: str) -> None:
    dtype = made.x.dtype
    table = made.table(slots, start=1, length=sum(made.sizes[:2]) + 3)
    values = torch.randn(table.slots, dtype=ops.accumulator(dtype))
    values[::3] = 0
    values[1::5] = 1
    y, want_y = other.twin(), other.twin()
    cpu.channel_axpy_([y.x], [made.x], table.table, values)
    reference.channel_axpy_([want_y.x], [made.x], table.table, values)
    bound = EPS[dtype] * (other.x.double().abs() + 8 * made.x.double().abs())
    assert ((y.x.double() - want_y.x.double()).abs() <= bound).all(), (made.sizes, made.strides, slots)
    x, want_x = made.twin(), made.twin()
    cpu.channel_scale_([x.x], table.table, values)
    reference.channel_scale_([want_x.x], table.table, values)
    torch.testing.assert_close(x.x, want_x.x, rtol=EPS[dtype], atol=0)
    for written in (x, y):
        assert (written.outside() == 42).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype, isa: str) -> None:
    for sizes in SIZES:
        for gap in (0, 1):
            made, other = make(sizes, order, gap, dtype), make(sizes, order, gap, dtype, seed=1)
            for slots in SLOTS:
                check_writes(made, other, slots)


@pytest.mark.parametrize("sizes", BIG, ids=str)
def test_writes_of_many_chunks(sizes: tuple[int, int, int]) -> None:
    for order in ("rck", "rkc", "crk"):
        check_writes(make(sizes, order), make(sizes, order, seed=1), "both")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_converts_as_torch_converts_it(dtype: torch.dtype, isa: str) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for factor in (1.0, 2.0, 1 / 3, 1e-3, 3e-8, 7e4, -5.0):
        x = bits.view(dtype).clone().reshape(2, -1)
        scale = torch.tensor([factor, 1.0] + [1.0, 1.0 + 2**-12] * (x.shape[1] // 2))
        table = TileTable.from_tiles([x], [Tile(0, 0, (*x.shape, 1), (x.shape[1], 1, 1), 0, 2)])
        want = (x.float() * (scale[:2, None] * scale[2:])).to(dtype)
        ops.channel_scale_([x], table, scale)
        assert torch.equal(x.isnan(), want.isnan())
        assert torch.equal(x[~x.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_sums_of_special_values(dtype: torch.dtype, isa: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal / 2
    x = torch.tensor([[1.0, tiny, -tiny, 0.0] * 16, [float("inf")] + [1.0] * 63], dtype=dtype)
    table = TileTable.from_tiles([x], [Tile(0, 0, (2, 64, 1), (64, 1, 1), 0, -1)])
    assert ops.channel_reduce([x], table, p=1.0)[1] == float("inf")
    x[1, 0] = float("nan")
    assert ops.channel_reduce([x], table, p=1.0)[1].isnan()
    assert ops.channel_reduce([x[:, 1:2].clone()], _column(x), p=1.0)[0] == tiny


def _column(x: Tensor) -> TileTable:
    return TileTable.from_tiles([x[:, 1:2].clone()], [Tile(0, 0, (2, 1, 1), (1, 1, 1), 0, -1)])


def model() -> tuple[list[Tensor], TileTable]:
    """Return a mixed list: convs in two formats, a transposed and a grouped one, a linear, vectors."""
    shapes = ((64, 32, 9, "rck"), (128, 64, 9, "rkc"), (96, 33, 4, "crk"), (200, 1000, 1, "rck"))
    mades = [make((r, c, k), order, seed=r) for r, c, k, order in shapes]
    tensors, tiles, slot = [m.x for m in mades], [], 0
    for at, made in enumerate(mades):
        tiles.append(made.tile("both", slot, at))
        slot += made.sizes[0] + made.sizes[1]
    grouped = torch.randn(24, 4, 3, 3)
    tensors.append(grouped)
    for group in range(6):
        tiles.append(Tile(4, group * 4 * 36, (4, 4, 9), (36, 9, 1), slot, slot + 4))
        slot += 8
    for length in (1, 3, 64, 50000):
        tensors.append(torch.randn(length))
        tiles.append(Tile(len(tensors) - 1, 0, (length, 1, 1), (1, 1, 1), slot))
        slot += length
    tensors.append(torch.randn(70, 1, 3, 3))
    tiles.append(Tile(len(tensors) - 1, 0, (70, 1, 9), (9, 9, 1), slot))
    return tensors, TileTable.from_tiles(tensors, tiles, slot + 70 + 3)


def test_a_list_of_many_kinds_equals_the_reference() -> None:
    tensors, table = model()
    found = cpu.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    want = reference.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    assert (found[-3:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_thread_count(dtype: torch.dtype) -> None:
    tensors, table = model()
    strides = [t.stride() for t in tensors]
    tensors = [
        torch.empty_strided(t.shape, s, dtype=dtype).copy_(t) for t, s in zip(tensors, strides, strict=True)
    ]
    coef = torch.randn(table.slots, dtype=ops.accumulator(dtype))

    def everything() -> list[Tensor]:
        ys = [torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in tensors]
        sums = ops.channel_reduce(tensors, table)
        products = ops.channel_reduce(tensors, table, ys, "mul")
        ops.channel_axpy_(ys, tensors, table, coef)
        ops.channel_scale_(ys, table, coef)
        return [sums, products, *ys]

    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(everything())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def check_compact(
    source: Made, keep_rows: Tensor | None, keep_cols: Tensor | None, order: str, gap: int
) -> None:
    r, c, k = source.sizes
    rows = torch.arange(r) if keep_rows is None else keep_rows
    cols = torch.arange(c) if keep_cols is None else keep_cols
    target = make((len(rows), len(cols), k), order, gap, source.x.dtype)
    target.x.fill_(-7)
    index = torch.cat([torch.tensor([-1]), rows, cols]).to(torch.int32)  # offset 0 is nobody's
    tile = Tile(
        0,
        0,
        target.sizes,
        target.strides,
        -1 if keep_rows is None else 1,
        -1 if keep_cols is None else 1 + len(rows),
    )
    out_table = TileTable.from_tiles([target.x], [tile], len(index), shared_slots=True)
    ops.channel_compact([target.x], [source.x], source.table("none"), out_table, index)
    assert torch.equal(target.x, source.x[rows][:, cols]), (source.sizes, source.strides, target.strides)
    assert (target.outside() == 42).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_compact(order: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for sizes in (*SIZES, (300, 90, 9), (150, 1000, 1)):
        r, c, _ = sizes
        rows = torch.randperm(r, generator=generator)[: (r + 1) // 2].sort().values
        cols = torch.randperm(c, generator=generator)[: (2 * c + 2) // 3].sort().values
        source = make(sizes, order, 0, dtype)
        check_compact(source, rows, cols, order, 0)
        check_compact(source, rows, None, order, 0)
        check_compact(source, None, cols, order, 0)
        check_compact(source, None, torch.arange(c // 2, c), order, 1)
        check_compact(make(sizes, order, 1, dtype), rows, cols, "rck", 0)
        check_compact(source, rows[:0], cols, order, 0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_compact_moves_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (6, 4)).to(dtype)
    out = torch.zeros(3, 4, dtype=dtype)
    table = TileTable.from_tiles([x], [Tile(0, 0, (6, 4, 1), (4, 1, 1))])
    out_table = TileTable.from_tiles([out], [Tile(0, 0, (3, 4, 1), (4, 1, 1), 0)], 3, shared_slots=True)
    ops.channel_compact([out], [x], table, out_table, torch.tensor([1, 2, 5], dtype=torch.int32))
    assert torch.equal(out, x[[1, 2, 5]])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_hang() -> None:
    torch.set_num_threads(2)
    tensors, table = model()
    want = ops.channel_reduce(tensors, table)  # the parent's OpenMP threads exist from here on
    scale = torch.full((table.slots,), 2.0)

    def work() -> None:  # nothing here may use PyTorch's own threads: they would hang
        ops.channel_scale_(tensors, table, scale)
        results.put(ops.channel_reduce(tensors, table).tolist()[:100])

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=work, daemon=True)
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
        pytest.fail("an op in a forked child did not return")
    assert child.exitcode == 0
    assert results.get() == (16 * want[:100]).tolist()
    assert torch.equal(ops.channel_reduce(tensors, table), want)


def test_set_isa_refuses_what_it_does_not_know() -> None:
    before = cpu._C.isa()
    assert not cpu._C.set_isa("mmx")
    assert cpu._C.isa() == before
    assert before in ISAS
