"""Every backend that serves CUDA, on a GPU: the cases of the CPU, and what only a GPU can get wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
import pat_fast.torch_pruning as tp
from pat_fast import backends, ops
from pat_fast.backends import cuda, reference, selfcheck
from pat_fast.backends.known import is_reliable
from pat_fast.criteria import GroupNorm, is_scored
from pat_fast.ops import Tile, TileTable, accumulator
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.regularizers import (
    BNScaleRegularizer,
    GroupNormRegularizer,
    GrowingRegularizer,
    Penalty,
    ProximalGroupLasso,
)
from tests.backends import cases
from tests.backends.cases import Ops
from tests.helpers import Case, Small, small_inputs
from tests.ops.layouts import DTYPES, ORDERS, make

NAMES = [backend.name for backend in backends.BACKENDS if "cuda" in backend.devices]
HALVES = (torch.float16, torch.bfloat16)
pytestmark = pytest.mark.gpu
unforced = pytest.mark.skipif(backends.ENV in os.environ, reason="a backend is forced")


def is_here(name: str) -> bool:
    """Whether a backend was built, or installed; then it must run."""
    return importlib.util.find_spec({"cuda": "pat_fast._CUDA"}.get(name, name)) is not None


BEST = next(filter(is_here, NAMES), "reference")


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Ops:
    backend = next(b for b in backends.BACKENDS if b.name == request.param)
    if not is_here(backend.name):
        pytest.skip(f"{backend.name} is not here")
    assert backend.probe("cuda") is None
    return backend.ops()


@pytest.fixture
def shortcuts() -> Ops:
    """Whether the self-check let them pass or not."""
    if not is_here("cuda"):
        pytest.skip("the CUDA extension is not built")
    return cuda.SHORTCUTS


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let whatever waits for the GPU raise."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_equals_the_reference(order: str, dtype: torch.dtype, kernels: Ops) -> None:
    cases.reduce(kernels, order, dtype, device="cuda")


@pytest.mark.parametrize("sizes", cases.FULL.big, ids=str)
@pytest.mark.parametrize("order", ["rck", "rkc", "crk"])
def test_reduce_of_many_blocks(sizes: tuple[int, int, int], order: str, kernels: Ops) -> None:
    cases.reduce_big(kernels, sizes, order, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_writes_equal_the_reference(order: str, dtype: torch.dtype, kernels: Ops) -> None:
    cases.writes(kernels, order, dtype, device="cuda")


@pytest.mark.parametrize("sizes", cases.FULL.big, ids=str)
def test_writes_of_many_blocks(sizes: tuple[int, int, int], kernels: Ops) -> None:
    cases.writes_big(kernels, sizes, device="cuda")


def test_addresses_that_are_no_multiple_of_16(kernels: Ops) -> None:
    cases.unaligned(kernels, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_zero_clears_inf_and_nan(dtype: torch.dtype, kernels: Ops) -> None:
    cases.zero_clears(kernels, dtype, device="cuda")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_converts_as_torch_converts_it(dtype: torch.dtype, kernels: Ops) -> None:
    cases.halves_convert(kernels, dtype, device="cuda")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_sums_of_special_values(dtype: torch.dtype, kernels: Ops) -> None:
    cases.halves_sum(kernels, dtype, device="cuda")


def test_a_list_of_many_kinds_equals_the_reference(kernels: Ops) -> None:
    cases.many_kinds(kernels, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_compact(order: str, dtype: torch.dtype, kernels: Ops) -> None:
    cases.compact(kernels, order, dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
def test_compact_moves_any_dtype(dtype: torch.dtype, kernels: Ops) -> None:
    cases.compact_moves_bits(kernels, dtype, device="cuda")


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_channels(dtype: torch.dtype, p: float, shortcuts: Ops) -> None:
    cases.totals(shortcuts, dtype, p, device="cuda")


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_penalty_of_norms(dtype: torch.dtype, p: float, shortcuts: Ops) -> None:
    cases.push(shortcuts, dtype, p, device="cuda")


@unforced
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_s16", "mobilenet_v2"])
def test_networks_are_scored_and_pushed_as_with_the_four_ops(
    name: str, shortcuts: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.build(name, torch.float32)
    plan = build_plan(case.model, case.inputs)
    binding = bind(plan, case.model.cuda())

    def both() -> list[Tensor]:
        for parameter in case.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        GroupNormRegularizer(1e-2).apply(binding)
        return [GroupNorm().score(binding), *(p.grad for p in case.model.parameters() if p.grad is not None)]

    assert binding.tiles("scored", is_scored)
    assert binding.grouping("scored") is not None
    first = both()
    assert any(g.any() for g in first[1:])
    for _ in range(3):  # known tensors, too
        assert all(torch.equal(a, b) for a, b in zip(both(), first, strict=True))
    with no_waiting():
        both()
    monkeypatch.setattr(Binding, "at_once", lambda *_: None)
    for short, long in zip(first, both(), strict=True):
        torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-9)


def test_the_self_check_agrees(kernels: Ops) -> None:
    assert selfcheck.difference(kernels, torch.device("cuda")) is None


def test_the_self_check_agrees_with_the_shortcuts(shortcuts: Ops) -> None:
    assert is_reliable()  # else they are not looked at
    assert selfcheck.difference({**reference.OPS, **shortcuts}, torch.device("cuda")) is None


@unforced
def test_the_best_backend_that_is_here_runs_every_op() -> None:
    """What the self-check passes over would not be missed anywhere else."""
    found = backends.select("cuda")
    assert {c.op: c.backend for c in found} == dict.fromkeys(reference.OPS, BEST), {c.why for c in found}
    assert {name: backends.shortcut(name, "cuda") for name in cuda.SHORTCUTS} == (
        cuda.SHORTCUTS if BEST == "cuda" else dict.fromkeys(cuda.SHORTCUTS)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_the_same_bits_every_time(dtype: torch.dtype, kernels: Ops) -> None:
    tensors, table = cases.model(dtype, device="cuda")
    first, second = (cases.everything(kernels, tensors, table) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_tensors_of_more_than_two_to_the_31_elements(kernels: Ops) -> None:
    """Offsets beyond 32 bits, in rows and in columns."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    columns = 2**20 + 8
    x = torch.ones(2100, columns, dtype=torch.float16, device="cuda")
    x[-1] = 2
    table = TileTable.from_tiles([x], [Tile(0, 0, (2100, columns, 1), (columns, 1, 1), 0, 2100)])
    found = kernels["channel_reduce"]([x], [], table.table, table.slots, "pow", 1.0)
    assert found[:2099].eq(columns).all()
    assert found[2099] == 2 * columns
    assert found[2100:].eq(2101).all()
    scale = torch.ones(table.slots, device="cuda")
    scale[2099] = scale[-1] = 0
    kernels["channel_scale_"]([x], table.table, scale)
    assert x[-1].eq(0).all()
    assert x[:, -1].eq(0).all()
    assert x[:-1, :-1].eq(1).all()


def steps(kernels: Ops) -> tuple[list[Tensor], Callable[[], list[Tensor]]]:
    """Tensors, and a call of each op on them that returns what it wrote."""
    tensors, table = cases.model(device="cuda")
    ys = [t.clone() for t in tensors]
    coef = torch.linspace(-1, 1, table.slots, device="cuda", dtype=accumulator(tensors[0].dtype))
    linear, kept = tensors[3], torch.arange(0, 200, 3, dtype=torch.int32)
    out = torch.zeros(len(kept), 1000, device="cuda")
    source = TileTable.from_tiles([linear], [Tile(0, 0, (200, 1000, 1), (1000, 1, 1))])
    tile = Tile(0, 0, (len(kept), 1000, 1), (1000, 1, 1), 0)
    target = TileTable.from_tiles([out], [tile], len(kept), shared_slots=True)
    index = kept.to("cuda")

    def run() -> list[Tensor]:
        sums = kernels["channel_reduce"](tensors, [], table.table, table.slots, "pow", 2.0)
        products = kernels["channel_reduce"](tensors, ys, table.table, table.slots, "mul", 0.0)
        kernels["channel_axpy_"](ys, tensors, table.table, coef)
        kernels["channel_scale_"](ys, table.table, coef)
        kernels["channel_compact"]([out], [linear], source.table, target.table, index)
        return [sums, products, out, *ys]

    return ys, run


def test_no_call_waits_for_the_gpu(kernels: Ops) -> None:
    _, run = steps(kernels)
    run()  # compiles
    with no_waiting():
        run()


def test_a_first_call_with_new_tensors_does_not_wait_either(kernels: Ops) -> None:
    """Compiled kernels, but another table and other addresses: a layer was pruned, say."""
    steps(kernels)[1]()
    _, run = steps(kernels)
    with no_waiting():
        run()


def test_ops_can_be_captured_in_a_cuda_graph(kernels: Ops) -> None:
    ys, run = steps(kernels)
    start = [y.clone() for y in ys]
    run()
    want = [y.clone() for y in run()]  # two rounds
    torch._foreach_copy_(ys, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    torch._foreach_copy_(ys, start)  # a capture does not run, but neither may it have written
    for _ in range(2):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


def test_a_capture_may_bring_new_tensors(kernels: Ops) -> None:
    """As gradients do, which the graph's own pool holds."""
    x = torch.randn(64, 128, device="cuda")
    table = TileTable.from_tiles([x], [Tile(0, 0, (64, 128, 1), (128, 1, 1), 0, 64)])
    coef = torch.randn(table.slots, device="cuda")
    kernels["channel_axpy_"]([torch.zeros_like(x)], [x], table.table, coef)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = x * 2
        kernels["channel_axpy_"]([grad], [x], table.table, coef)
    # Later calls must not be led to what only a replay fills.
    other = torch.zeros_like(x)
    kernels["channel_axpy_"]([other], [x], table.table, coef)
    want = (coef[:64, None] + coef[64:]) * x
    torch.testing.assert_close(other, want)
    for factor in (1.0, 3.0):
        x.mul_(factor)
        graph.replay()
        torch.testing.assert_close(grad, 2 * x + (coef[:64, None] + coef[64:]) * x)


def test_other_streams_see_the_tables_that_the_first_one_made(kernels: Ops) -> None:
    made = make((64, 129, 1), device="cuda")
    table = made.table()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(10_000_000)  # what `first` uploads comes late
        one = kernels["channel_reduce"]([made.x], [], table.table, table.slots, "pow", 2.0)
    with torch.cuda.stream(second):
        two = kernels["channel_reduce"]([made.x], [], table.table, table.slots, "pow", 2.0)
    torch.cuda.synchronize()
    assert torch.equal(one, two)
    assert one.sum() > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_the_current_one(kernels: Ops) -> None:
    cases.many_kinds(kernels, device="cuda:1")


def test_the_public_wrappers_choose_a_backend_and_run_without_waiting() -> None:
    tensors, table = cases.model(device="cuda")
    want = reference.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    ops.channel_reduce(tensors, table)
    with no_waiting():
        found = ops.channel_reduce(tensors, table)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


FIRST_OP = """
import torch
from pat_fast import backends
from pat_fast.ops import Tile, TileTable, channel_reduce

{before}
x = torch.ones(4, 3, device="cuda")
table = TileTable.from_tiles([x], [Tile(0, 0, (4, 3, 1), (3, 1, 1), 0, 4)])
assert channel_reduce([x], table).tolist() == [3] * 4 + [4] * 3
{after}
print(*{{choice.backend for choice in backends.select("cuda")}})
"""


@unforced
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("profiler = torch.profiler.profile(); profiler.start()", "profiler.stop()"),
        ("torch.set_default_device('cuda')", ""),
    ],
    ids=["profiler", "default device"],
)
def test_what_surrounds_the_first_op_of_a_process_does_not_change_the_choice(before: str, after: str) -> None:
    line = [sys.executable, "-c", FIRST_OP.format(before=before, after=after)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.splitlines()[-1:] == [BEST], done.stderr


REGULARIZERS: dict[str, Callable[[], Penalty]] = {
    "group norm": GroupNormRegularizer,
    "group norm, decoupled": lambda: GroupNormRegularizer(decoupled=True),
    "batch norm": BNScaleRegularizer,
    "batch norm, decoupled": lambda: BNScaleRegularizer(decoupled=True),
    "batch norm, group lasso": lambda: BNScaleRegularizer(group_lasso=True),
    "growing": GrowingRegularizer,
    "proximal": ProximalGroupLasso,
}


@pytest.mark.parametrize("rates", [(0.1,), (0.1, 0.2)], ids=["one rate", "two rates"])
@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_step_with_a_regularizer_does_not_wait(name: str, rates: tuple[float, ...]) -> None:
    model, x = Small().to("cuda"), small_inputs().to("cuda")
    parameters = list(model.parameters())
    groups = [{"params": parameters[i :: len(rates)], "lr": rate} for i, rate in enumerate(rates)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    own = REGULARIZERS[name]()
    pruner = pat.Pruner(model, 0.5, end_epoch=9, example_inputs=x, optimizer=optimizer, regularizer=own)
    model(x).square().mean().backward()
    pruner.regularize()
    optimizer.step()
    with no_waiting():
        pruner.regularize()
        optimizer.step()
    assert own.steps == 4
    assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("kind", ["GroupNormPruner", "BNScalePruner", "GrowingRegPruner"])
def test_a_drop_in_pruner_of_a_model_that_moves_to_the_gpu(kind: str) -> None:
    """Without buffers nothing but the parameters tells that it moved, and these are the same objects."""
    norm = nn.BatchNorm2d(12, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), norm, nn.ReLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(256, 5))
    x = small_inputs()
    pruner: Any = getattr(tp.pruner, kind)(
        model, x, tp.importance.GroupMagnitudeImportance(), reg=1e-2, pruning_ratio=0.5, ignored_layers=[model[-1]]
    )
    if kind == "GrowingRegPruner":
        pruner.update_reg()  # its strengths have to follow
    model.to("cuda")
    pruner.update_regularizer()
    model(x.to("cuda")).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    pruner.regularize(model)
    assert any(not torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    pruner.step()
    assert model[0].out_channels == 6
    assert model(x.to("cuda")).shape == (4, 5)
