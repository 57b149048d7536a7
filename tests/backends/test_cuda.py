"""The CUDA backend without a GPU: its launches are replaced by an emulation that runs them on the host.

Cutting, index arithmetic, the order of sums, the glue and the bindings are those of the real backend.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from pat_fast import ops
from pat_fast.backends import cuda, reference
from pat_fast.errors import BackendError
from pat_fast.ops import Tile, TileTable
from tests.ops.layouts import DTYPES, ORDERS, SIZES, SLOTS, Made, make

ROOT = Path(__file__).resolve().parents[2]
BIG = ((300, 150, 9), (150, 2000, 1), (3, 50000, 1), (70000, 1, 3), (1100, 5, 25), (9000, 40, 1))
"""Sizes of several rows of blocks, several columns of blocks or both."""
FUNCTIONS = (("pow", 1.0), ("pow", 2.0), ("pow", 0.7), ("mul", 2.0), ("absmul", 2.0), ("sqmul", 2.0))
EPS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="session")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Return the extension module, compiled with the emulation instead of the kernels."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    import pybind11

    target = tmp_path_factory.mktemp("emulation") / "_CUDA.so"
    sources = [ROOT / "csrc/cuda" / name for name in ("bindings.cpp", "work.cpp")]
    sources.append(ROOT / "tests/backends/cuda_on_host.cpp")
    include = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"]
    flags += os.environ.get("CXXFLAGS", "").split()
    command = [compiler, *flags, *include, *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    spec = importlib.util.spec_from_file_location("_CUDA", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _emulated(on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "_CUDA", on_host)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    monkeypatch.setattr(cuda, "_capturing", lambda: False)
    yield
    cuda._captured.clear()


def in_double(made: Made) -> Tensor:
    buffer = torch.zeros(made.base.numel(), dtype=torch.float64)
    return buffer.as_strided(made.sizes, made.strides, made.x.storage_offset()).copy_(made.x)


def check_reduce(made: Made, other: Made, slots: str, f: str, p: float) -> None:
    table = made.table(slots, start=2, length=sum(made.sizes[:2]) + 5)
    ys, doubles = ([], []) if f == "pow" else ([other.x], [in_double(other)])
    found = cuda.channel_reduce([made.x], ys, table.table, table.slots, f, p)
    assert found.dtype == ops.accumulator(made.x.dtype)
    x = in_double(made)
    exact = reference.channel_reduce([x], doubles, table.table, table.slots, f, p)
    for y in doubles:
        y.abs_()
    terms = reference.channel_reduce([x], doubles, table.table, table.slots, "absmul" if f == "mul" else f, p)
    tolerance = (1e-12 if made.x.dtype == torch.float64 else 1e-5) * terms + 1e-30
    assert ((found.double() - exact).abs() <= tolerance).all(), (made.sizes, made.strides, slots, f, p)
    assert (found[terms == 0] == 0).all()  # slots that no tile names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        for gap in (0, 1):
            made, other = make(sizes, order, gap, dtype), make(sizes, order, gap, dtype, seed=1)
            for slots in SLOTS:
                for f, p in FUNCTIONS if slots == "both" else FUNCTIONS[1:4]:
                    check_reduce(made, other, slots, f, p)


@pytest.mark.parametrize("sizes", BIG, ids=str)
@pytest.mark.parametrize("order", ["rck", "rkc", "crk"])
def test_reduce_of_many_blocks(sizes: tuple[int, int, int], order: str) -> None:
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
    cuda.channel_axpy_([y.x], [made.x], table.table, values)
    reference.channel_axpy_([want_y.x], [made.x], table.table, values)
    bound = EPS[dtype] * (other.x.double().abs() + 8 * made.x.double().abs())
    assert ((y.x.double() - want_y.x.double()).abs() <= bound).all(), (made.sizes, made.strides, slots)
    x, want_x = made.twin(), made.twin()
    cuda.channel_scale_([x.x], table.table, values)
    reference.channel_scale_([want_x.x], table.table, values)
    torch.testing.assert_close(x.x, want_x.x, rtol=EPS[dtype], atol=0)
    for written in (x, y):
        assert (written.outside() == 42).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        for gap in (0, 1):
            made, other = make(sizes, order, gap, dtype), make(sizes, order, gap, dtype, seed=1)
            for slots in SLOTS:
                check_writes(made, other, slots)


@pytest.mark.parametrize("sizes", BIG, ids=str)
def test_writes_of_many_blocks(sizes: tuple[int, int, int]) -> None:
    for order in ("rck", "rkc", "crk"):
        check_writes(make(sizes, order), make(sizes, order, seed=1), "both")


@pytest.mark.parametrize("values", [[0.0, 1.0], [1.0], [0.0], [0.5, 0.0], [float("inf"), 0.0], [float("nan"), 0.0]])
def test_scale_by_special_values(values: list[float]) -> None:
    """What is skipped or cleared unread must be what the reference computes, over inf and nan too."""
    made = make((17, 16, 1))
    made.x[3, 5], made.x[4, 6], made.x[0] = float("nan"), float("inf"), float("-inf")
    table = made.table()
    scale = torch.tensor(values)[torch.randint(len(values), (table.slots,))]
    x, want = made.twin(), made.twin()
    cuda.channel_scale_([x.x], table.table, scale)
    reference.channel_scale_([want.x], table.table, scale)
    torch.testing.assert_close(x.x, want.x, rtol=0, atol=0, equal_nan=True)


def check_compact(source: Made, rows: Tensor | None, cols: Tensor | None, order: str, gap: int) -> None:
    r, c, k = source.sizes
    kept_rows, kept_cols = torch.arange(r) if rows is None else rows, torch.arange(c) if cols is None else cols
    target = make((len(kept_rows), len(kept_cols), k), order, gap, source.x.dtype)
    target.x.fill_(-7)
    index = torch.cat([torch.tensor([-1]), kept_rows, kept_cols]).to(torch.int32)  # offset 0 is nobody's
    lists = (-1 if rows is None else 1, -1 if cols is None else 1 + len(kept_rows))
    tile = Tile(0, 0, target.sizes, target.strides, *lists)
    out_table = TileTable.from_tiles([target.x], [tile], len(index), shared_slots=True)
    cuda.channel_compact([target.x], [source.x], source.table("none").table, out_table.table, index)
    assert torch.equal(target.x, source.x[kept_rows][:, kept_cols]), (source.sizes, source.strides, target.strides)
    assert (target.outside() == 42).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_compact(order: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for sizes in (*SIZES, (300, 90, 9), (150, 1000, 1), (64, 64, 16)):
        r, c, _ = sizes
        rows = torch.randperm(r, generator=generator)[: (r + 1) // 2].sort().values
        cols = torch.randperm(c, generator=generator)[: (2 * c + 2) // 3].sort().values
        source = make(sizes, order, 0, dtype)
        check_compact(source, rows, cols, order, 0)
        check_compact(source, rows, None, order, 0)
        check_compact(source, None, None, order, 0)
        check_compact(source, None, cols, order, 0)
        check_compact(source, None, torch.arange(c // 2, c), order, 1)
        check_compact(make(sizes, order, 1, dtype), rows, cols, "rck", 0)
        check_compact(source, rows[:0], cols, order, 0)


def model(dtype: torch.dtype) -> tuple[list[Tensor], TileTable]:
    """Return a list of many kinds: convs in two formats, a transposed and a grouped one, linears, vectors."""
    tensors: list[Tensor] = []
    tiles, slot = [], 0
    shapes = ((64, 32, 9, "rck"), (128, 64, 9, "rkc"), (96, 33, 4, "crk"), (200, 1000, 1, "rck"), (5, 0, 1, "rck"))
    for r, c, k, order in shapes:
        made = make((r, c, k), order, dtype=dtype, seed=r)
        tiles.append(made.tile("both", slot, len(tensors)))
        tensors.append(made.x)
        slot += r + c
    tensors.append(torch.randn(24, 4, 3, 3).to(dtype))
    for group in range(6):
        tiles.append(Tile(len(tensors) - 1, group * 4 * 36, (4, 4, 9), (36, 9, 1), slot, slot + 4))
        slot += 8
    for length in (0, 1, 3, 64, 50000):
        tensors.append(torch.randn(length).to(dtype))
        tiles.append(Tile(len(tensors) - 1, 0, (length, 1, 1), (1, 1, 1), slot))
        slot += length
    return tensors, TileTable.from_tiles(tensors, tiles, slot + 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_many_kinds_equals_the_reference(dtype: torch.dtype) -> None:
    tensors, table = model(dtype)
    found = cuda.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    want = reference.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    coef = torch.randn(table.slots, dtype=ops.accumulator(dtype))
    results = []
    for backend in (cuda, reference):
        ys = [torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in tensors]
        backend.channel_axpy_(ys, tensors, table.table, coef)
        backend.channel_scale_(ys, table.table, coef)
        results.append(ys)
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=EPS[dtype], atol=8 * EPS[dtype])


def test_blocks_are_of_even_size_whatever_the_tensors() -> None:
    """Many small tensors get one block each; a large one is cut, and no block moves much more than others."""
    sizes = [(64, 1, 1)] * 100 + [(4096, 4096, 1), (1, 3_000_000, 1), (512, 512, 9)]
    tensors = [torch.empty(size, device="meta") for size in sizes]
    tiles = [Tile(i, 0, (r, c, k), (c * k, k, 1)) for i, (r, c, k) in enumerate(sizes)]
    table = TileTable.from_tiles(tensors, tiles)
    works, _, _ = cuda._CUDA.plan(table.table.data_ptr(), len(table), 4)
    fields = torch.frombuffer(bytearray(works), dtype=torch.int64).reshape(-1, cuda._CUDA.WORK_BYTES // 8)
    positions, tensor, rows = fields[:, 1], fields[:, 6], fields[:, 8]
    moved = rows * positions
    assert [int(moved[tensor == i].sum()) for i in range(len(sizes))] == [r * c * k for r, c, k in sizes]
    assert (torch.bincount(tensor)[:100] == 1).all()
    assert int(moved.max()) * 4 <= 128 * 1024
    assert len(moved) < 7000


def test_offsets_beyond_32_bits() -> None:
    """The description of a block far inside a large tensor, and of columns far apart."""
    x = torch.empty(70_000, 70_000, device="meta")
    table = TileTable.from_tiles([x], [Tile(0, 0, (70_000, 70_000, 1), (70_000, 1, 1), 0, 70_000)])
    works, gathers, workspace = cuda._CUDA.plan(table.table.data_ptr(), 1, 2)
    fields = torch.frombuffer(bytearray(works), dtype=torch.int64).reshape(-1, cuda._CUDA.WORK_BYTES // 8)
    first, positions, offset, rows = fields[:, 0], fields[:, 1], fields[:, 7], fields[:, 8]
    assert int((rows * positions).sum()) == 70_000**2
    assert int((offset + (rows - 1) * 70_000 + first + positions).max()) == 70_000**2
    assert workspace > 0
    assert len(gathers) % cuda._CUDA.GATHER_BYTES == 0


def test_blocks_are_made_once_per_table(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make((8, 4, 1))
    table = made.table()
    uploads: list[bytes] = []
    upload = cuda._upload
    monkeypatch.setattr(cuda, "_upload", lambda data, device: uploads.append(data) or upload(data, device))
    for _ in range(3):
        cuda.channel_reduce([made.x], [], table.table, table.slots, "pow", 2.0)
        cuda.channel_scale_([made.x], table.table, torch.ones(table.slots))
    assert len(uploads) == 1
    before = len(cuda._made)
    del table
    assert len(cuda._made) == before - 1


def test_a_capture_needs_a_table_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make((8, 4, 1))
    table = made.table()
    arguments = ([made.x], table.table, torch.ones(table.slots))
    with monkeypatch.context() as capture:
        capture.setattr(cuda, "_capturing", lambda: True)
        with pytest.raises(BackendError, match="call the op once before the capture"):
            cuda.channel_scale_(*arguments)
    cuda.channel_scale_(*arguments)
    monkeypatch.setattr(cuda, "_capturing", lambda: True)
    cuda.channel_scale_(*arguments)
    (kept,) = cuda._captured.values()
    table = arguments = None
    assert kept.memory.numel()  # a graph would go on reading it
