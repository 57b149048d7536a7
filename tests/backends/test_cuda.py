"""The CUDA backend without a GPU: its launches are replaced by an emulation that runs them on the host.

Cutting, index arithmetic, the order of sums, the glue and the bindings are those of the real backend.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pat_fast.backends import cuda, kept, reference
from pat_fast.backends.known import Known, UnknownError
from pat_fast.errors import BackendError
from pat_fast.ops import Tile, TileTable
from tests.backends import cases
from tests.ops.layouts import DTYPES, ORDERS, make

ROOT = Path(__file__).resolve().parents[2]
BIG = (*cases.FULL.big, (9000, 40, 1))


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
    monkeypatch.setattr(kept, "stream_of", lambda device: 0)
    yield
    cuda._captured.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype) -> None:
    cases.reduce(cuda.OPS, order, dtype)


@pytest.mark.parametrize("sizes", BIG, ids=str)
@pytest.mark.parametrize("order", ["rck", "rkc", "crk"])
def test_reduce_of_many_blocks(sizes: tuple[int, int, int], order: str) -> None:
    cases.reduce_big(cuda.OPS, sizes, order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype) -> None:
    cases.writes(cuda.OPS, order, dtype)


@pytest.mark.parametrize("sizes", BIG, ids=str)
def test_writes_of_many_blocks(sizes: tuple[int, int, int]) -> None:
    cases.writes_big(cuda.OPS, sizes)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_channels(dtype: torch.dtype, p: float) -> None:
    cases.totals(cuda.SHORTCUTS, dtype, p)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_penalty_of_norms(dtype: torch.dtype, p: float) -> None:
    cases.push(cuda.SHORTCUTS, dtype, p)


def test_tensors_of_another_device_are_not_given_to_a_kernel() -> None:
    case = cases.Grouped.of(torch.float32, "cpu")
    groups, known = case.native(cuda.SHORTCUTS), Known(case.xs)
    known.device = torch.device("meta")
    with pytest.raises(UnknownError):
        cuda.channel_totals(case.xs, known, groups, 2.0, False)
    with pytest.raises(UnknownError):
        cuda.group_push(lambda: (case.xs, range(3)), case.xs, known, groups, 2.0, 16.0, 1.0, None)


def test_gradients_are_held_until_the_kernels_are_launched(
    on_host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may let go of them meanwhile, and the allocator give their memory to others."""
    case = cases.Grouped.of(torch.float32, "cpu")
    groups, known = case.native(cuda.SHORTCUTS), Known(case.xs)
    made: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(on_host, name)

        def push(self, *arguments: Any) -> None:
            alive.append([ref() is not None for ref in made])
            on_host.push(*arguments)

    def gradients() -> tuple[list[Tensor], range]:
        ys = [torch.zeros_like(x) for x in case.xs]
        made.extend(map(weakref.ref, ys))
        return ys, range(len(ys))

    monkeypatch.setattr(cuda, "_CUDA", Watched())
    cuda.group_push(gradients, case.xs, known, groups, 2.0, 16.0, 1.0, None)
    assert alive == [[True] * len(case.xs)]
    assert len(made) > 1


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_compact(order: str, dtype: torch.dtype) -> None:
    cases.compact(cuda.OPS, order, dtype)


def test_addresses_that_are_no_multiple_of_16() -> None:
    cases.unaligned(cuda.OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_zero_clears_inf_and_nan(dtype: torch.dtype) -> None:
    cases.zero_clears(cuda.OPS, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_many_kinds_equals_the_reference(dtype: torch.dtype) -> None:
    cases.many_kinds(cuda.OPS, dtype)


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
    assert len(moved) < 9000


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
        capture.setattr(kept, "is_capturing", lambda device: True)
        with pytest.raises(BackendError, match="run the step once before the capture"):
            cuda.channel_scale_(*arguments)
    cuda.channel_scale_(*arguments)
    monkeypatch.setattr(kept, "is_capturing", lambda device: True)
    cuda.channel_scale_(*arguments)
    (blocks,) = cuda._captured.values()
    table = arguments = None
    assert blocks.memory.tensor.numel()  # a graph would go on reading it
