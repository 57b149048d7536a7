"""The C++ kernels against the reference: layouts, sizes, dtypes, threads, instruction sets, forks."""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pat_fast import ops
from pat_fast.backends import cpu
from tests.backends import cases
from tests.ops.layouts import DTYPES, ORDERS

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ extension is not built")
ISAS = cpu.details()["isas"] if cpu.unavailable() is None else []
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = cpu._C.isa()
    assert cpu._C.set_isa(request.param)
    yield request.param
    cpu._C.set_isa(best)


@pytest.fixture(params=["through the caches", "past the caches"])
def stores(request: pytest.FixtureRequest) -> Iterator[None]:
    """How a compaction writes: usually past the caches if it writes more than these hold."""
    cpu._C.set_stream_bytes(0 if request.param == "past the caches" else 2**62)
    yield
    cpu._C.set_stream_bytes(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype, isa: str) -> None:
    cases.reduce(cpu.OPS, order, dtype)


@pytest.mark.parametrize("sizes", cases.FULL.big, ids=str)
@pytest.mark.parametrize("order", ["rck", "rkc", "crk"])
def test_reduce_of_many_chunks(sizes: tuple[int, int, int], order: str, isa: str) -> None:
    cases.reduce_big(cpu.OPS, sizes, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype, isa: str) -> None:
    cases.writes(cpu.OPS, order, dtype)


@pytest.mark.parametrize("sizes", cases.FULL.big, ids=str)
def test_writes_of_many_chunks(sizes: tuple[int, int, int]) -> None:
    cases.writes_big(cpu.OPS, sizes)


def test_addresses_that_are_no_multiple_of_16(isa: str) -> None:
    cases.unaligned(cpu.OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_zero_clears_inf_and_nan(dtype: torch.dtype, isa: str) -> None:
    cases.zero_clears(cpu.OPS, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_converts_as_torch_converts_it(dtype: torch.dtype, isa: str) -> None:
    cases.halves_convert(cpu.OPS, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_sums_of_special_values(dtype: torch.dtype, isa: str) -> None:
    cases.halves_sum(cpu.OPS, dtype)


def test_a_list_of_many_kinds_equals_the_reference() -> None:
    cases.many_kinds(cpu.OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_thread_count(dtype: torch.dtype) -> None:
    tensors, table = cases.model(dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(cases.everything(cpu.OPS, tensors, table))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.usefixtures("stores")
def test_compact(order: str, dtype: torch.dtype, isa: str) -> None:
    cases.compact(cpu.OPS, order, dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.usefixtures("stores")
def test_compact_moves_any_dtype(dtype: torch.dtype, isa: str) -> None:
    cases.compact_moves_bits(cpu.OPS, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [1, 2, 9, 63, 64])
@pytest.mark.usefixtures("stores")
def test_compact_writes_nothing_around_rows(dtype: torch.dtype, kernel: int, isa: str) -> None:
    """Columns that are kept in short runs: whole registers are moved, of rows of any length that begin anywhere."""
    generator = torch.Generator().manual_seed(0)
    for columns in (*range(1, 80), 1500):
        x = torch.randn(8, columns, kernel, generator=generator).to(dtype)
        kept = torch.rand(columns, generator=generator).argsort()[: 1 + columns // 2].sort().values
        rows, n, start = torch.tensor([0, 2, 3, 5, 7]), len(kept), columns % 17
        flat = torch.full((start + 5 * n * kernel + 16,), 7, dtype=dtype)
        out = flat[start:-16].view(5, n, kernel)
        before = torch.tensor([[0, 0, 8, columns, kernel, columns * kernel, kernel, 1, -1, -1]])
        after = torch.tensor([[0, 0, 5, n, kernel, n * kernel, kernel, 1, 0, 5]])
        cpu.channel_compact([out], [x], before, after, torch.cat([rows, kept]).int())
        assert torch.equal(out, x[rows][:, kept])
        assert (flat[:start] == 7).all()
        assert (flat[-16:] == 7).all()


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("kept", ["rows", "columns", "few columns", "long runs"])
@pytest.mark.usefixtures("stores")
def test_compact_in_pieces(kept: str, threads: int, isa: str) -> None:
    """Threads share the lines of memory in which their pieces of a tensor meet."""
    torch.set_num_threads(threads)
    r, c = 1501, 707
    rows, cols = torch.arange(0, r, 2), torch.arange(c)
    if kept != "rows":
        cols = {"columns": cols[cols % 3 > 0], "few columns": cols[::9], "long runs": cols[cols % 200 > 1]}[kept]
    x, flat = torch.randn(r, c), torch.full((3 + len(rows) * len(cols) + 16,), torch.nan)
    out = flat[3:-16].view(len(rows), len(cols))
    before = torch.tensor([[0, 0, r, c, 1, c, 1, 1, -1, -1]])
    after = torch.tensor([[0, 0, *out.shape, 1, len(cols), 1, 1, 0, len(rows) if kept != "rows" else -1]])
    cpu.channel_compact([out], [x], before, after, torch.cat([rows, cols]).int())
    assert torch.equal(out, x[rows][:, cols])
    assert flat.isnan().sum() == 3 + 16


def test_a_large_compaction_writes_past_the_caches_and_the_same() -> None:
    x = torch.randn(4200, 4100)
    want = [x[::2], x[:, ::2], x]  # 131 MiB
    outs = [torch.full_like(w, torch.nan, memory_format=torch.contiguous_format) for w in want]
    before = torch.tensor([[i, 0, 4200, 4100, 1, 4100, 1, 1, -1, -1] for i in range(3)])
    sides = (0, -1), (-1, 2100), (-1, -1)
    after = torch.tensor([[i, 0, *w.shape, 1, w.shape[1], 1, 1, *sides[i]] for i, w in enumerate(want)])
    cpu.channel_compact(outs, [x, x, x], before, after, torch.cat([torch.arange(0, n, 2) for n in x.shape]).int())
    assert all(map(torch.equal, outs, want))


def halve(parts: Iterable[Any], xs: list[torch.Tensor], meanwhile: Any = None) -> None:
    """Write every other row and every other column of matrices of one shape, some at a time."""
    (r, c), each = xs[0].shape, range(len(xs))
    rows, cols = (r + 1) // 2, (c + 1) // 2
    tiles = torch.tensor([[i, 0, r, c, 1, c, 1, 1, -1, -1] for i in each])
    out_tiles = torch.tensor([[i, 0, rows, cols, 1, cols, 1, 1, 0, rows] for i in each])
    index = torch.cat([torch.arange(0, n, 2, dtype=torch.int32) for n in (r, c)])
    cpu.compact_beside(parts, tiles, out_tiles, index, xs[0].element_size(), meanwhile)


def halved(x: torch.Tensor, meanwhile: Any) -> torch.Tensor:
    out = torch.full_like(x[::2, ::2], torch.nan, memory_format=torch.contiguous_format)
    halve([([out], [x])], [x], meanwhile)
    return out


@pytest.mark.parametrize("shape", [(3, 5), (1500, 700)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_is_to_be_done_meanwhile_is_done_once(shape: tuple[int, int], threads: int) -> None:
    """On the caller's thread; it may use the kernels, and what it raises comes out."""
    torch.set_num_threads(threads)
    x = torch.randn(shape)
    seen: list[Any] = []
    assert torch.equal(halved(x, lambda: seen.extend((threading.get_ident(), halved(x, None), x @ x.t()))), x[::2, ::2])
    ident, inner, _ = seen
    assert ident == threading.get_ident()
    assert torch.equal(inner, x[::2, ::2])

    def fails() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        halved(x, fails)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_tensors_may_be_made_while_others_are_written(threads: int) -> None:
    """What making them raises comes out, and nobody waits for those that do not come."""
    torch.set_num_threads(threads)
    xs = list(torch.randn(100, 200, 90))

    def make(into: list[torch.Tensor], good: int) -> Iterator[Any]:
        for at in range(0, len(xs), 7):
            if at == good:
                raise KeyError(at)
            if at % 3 == 2:
                time.sleep(0.01)  # the others wait
            into += [torch.full((100, 45), torch.nan) for _ in xs[at : at + 7]]
            yield into[at:], xs[at : at + 7]

    outs: list[torch.Tensor] = []
    halve(make(outs, -1), xs)
    assert all(torch.equal(out, x[::2, ::2]) for out, x in zip(outs, xs, strict=True))
    for good in (0, 7, 70):
        with pytest.raises(KeyError, match=str(good)):
            halve(make([], good), xs)
    with pytest.raises(ValueError, match="fewer tensors"):
        halve(islice(make([], -1), 14), xs)
    assert torch.equal(halved(xs[0], None), xs[0][::2, ::2])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_hang() -> None:
    torch.set_num_threads(2)
    tensors, table = cases.model()
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


def test_what_checks_other_processors_still_compiles() -> None:
    """``make check-neon`` runs it."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = Path(__file__).with_name("kernels_alone.cpp")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-unknown-pragmas", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
