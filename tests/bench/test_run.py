"""A whole run: every row that was asked for, and no ratio and no number for what is not equal."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import moments
from pat_fast import ConfigError, backends
from pat_fast.backends import Backend, cpu, reference
from pat_fast.bench import Mismatch, Result, Row, Settings, machine, render, run, steps, table
from pat_fast.bench.bandwidth import Bandwidth
from pat_fast.bench.clock import Clock
from pat_fast.bench.figure import draw
from pat_fast.bench.kernels import VARIANTS, Kernels
from pat_fast.bench.models import SHAPES, find, vary_
from pat_fast.bench.run import DTYPES, names
from pat_fast.bench.steps import STEPS
from pat_fast.bench.subject import Subject, at_most
from tests.helpers import Small

CALLS = [call for calls in VARIANTS.values() for call in calls]
QUICK = Settings(models=("tiny",), ops=tuple(VARIANTS), rounds=1, mebibytes=1, small=True)


@pytest.fixture(autouse=True)
def _one_thread(_light_garbage: None) -> None:
    torch.set_num_threads(1)


def small_model() -> nn.Module:
    return Small()


def model_with_a_scalar() -> nn.Module:
    model = Small()
    model.scale = nn.Parameter(torch.tensor(2.0))
    return model


def bare_model() -> nn.Module:
    return nn.Sequential(nn.ReLU())


def lazy_model() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5))


def meta_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2, device="meta"))


FACTORY = f"{__name__}:small_model"
INPUTS = (torch.randn(2, 3, 8, 8),)


def test_every_op_of_every_backend_gets_a_row() -> None:
    result = run(QUICK)
    found = {(row.backend, row.op) for row in result.rows}
    assert {op for backend, op in found if backend == "reference"} == set(CALLS)
    assert {backend for backend, _ in found} >= {"cpu", "reference"}
    for row in result.rows:
        assert row.problem == ""
        assert row.ms is not None
        assert row.ms > 0
        assert row.gbps is not None
        assert row.peak_gbps == result.bandwidth[row.traffic]
        assert row.share == pytest.approx(row.gbps / row.peak_gbps)
    traffic = {row.op: row.traffic for row in result.rows}
    assert [traffic[op] for op in CALLS] == ["read", "read", "axpy", "scale", "copy", "copy"]
    assert result.is_right


def test_bytes_are_those_that_anything_must_move() -> None:
    row = next(row for row in run(replace(QUICK, ops=("channel_axpy_",))).rows)
    n = sum(torch.Size(shape).numel() for shape in SHAPES["tiny"]())
    assert row.gbps is not None
    assert row.ms is not None
    assert row.gbps * row.ms * 1e6 == pytest.approx(3 * 4 * n)


def test_what_a_prune_copies_is_held_against_index_select(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = replace(QUICK, ops=("channel_compact",), backends=("reference",))
    one, row = run(fresh).rows
    assert row.op == "channel_compact fresh"
    assert row.extra["times index_select"] == pytest.approx(row.extra["index_select ms"] / row.ms)
    assert row.extra["most"] == pytest.approx(row.extra["index_select ms"] / row.plain_ms)
    assert row.gbps * row.ms == pytest.approx(4 * one.gbps * one.ms)
    monkeypatch.setattr(sys.modules["pat_fast.bench.run"], "MOST", 100)
    result = run(fresh)
    assert [row.op for row in result.rows] == ["channel_compact"]
    assert "not measured: channel_compact fresh of tiny: four copies are 0.0 GB" in result.notes


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ extension is not built")
def test_a_prune_copies_what_is_small_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the backend can, and only if it is the one that a prune would use."""
    calls = list[tuple[int, bool]]()

    def beside(parts: Any, tiles: Any, *arguments: Any) -> None:
        calls.append((len(tiles), len(arguments) > 3))
        cpu.compact_beside(parts, tiles, *arguments)

    others: list[int] = []

    def other(outs: Any, *arguments: Any) -> None:
        others.append(len(outs))
        cpu.channel_compact(outs, *arguments)

    monkeypatch.setattr("pat_fast.bench.kernels.shortcut", lambda *_: beside)
    case = Kernels(SHAPES["tiny"](), torch.float32, torch.device("cpu"), False)
    case.check("channel_compact fresh", {"channel_compact": other})
    assert others == [4 * len(case.xs)]
    assert not calls
    case.check("channel_compact fresh", {"channel_compact": cpu.channel_compact})
    (large, first), (small, second) = calls
    assert first
    assert not second
    assert large + small == 4 * len(case.xs)
    assert min(large, small) > 0


Op = Callable[..., Any]


def one_element_off(right: Op) -> Op:
    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        (result if result is not None else arguments[0][0]).view(-1)[3:4].add_(1)
        return result

    return wrong


def nothing_done(right: Op) -> Op:
    return lambda *arguments: torch.zeros(arguments[3]) if right is reference.channel_reduce else None


def with_tiles(change: Callable[[torch.Tensor], object]) -> Callable[[Op], Op]:
    def make(right: Op) -> Op:
        def wrong(*arguments: Any) -> Any:
            changed = list(arguments)
            for at, given in enumerate(changed):
                if isinstance(given, torch.Tensor) and given.shape[1:] == (10,):
                    changed[at] = given.clone()
                    change(changed[at])
            return right(*changed)

        return wrong

    return make


def with_factors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Op], Op]:
    return lambda right: lambda *arguments: right(*arguments[:-1], change(arguments[-1]))


WRONG: dict[str, Callable[[Op], Op]] = {
    "one element": one_element_off,
    "nothing": nothing_done,
    "all columns but the last": with_tiles(lambda tiles: tiles[:, 3].sub_(1)),
    "rows alone": with_tiles(lambda tiles: tiles[:, 9].fill_(-1)),
    "columns alone": with_tiles(lambda tiles: tiles[:, 8].fill_(-1)),
    "factors of others": with_factors(lambda factors: factors.flip(0)),
    "a tenth too much": with_factors(lambda factors: factors * 1.1),
}
FOR_FACTORS, WITH_FACTORS = ("factors of others", "a tenth too much"), ("channel_axpy_", "channel_scale_")


@pytest.mark.parametrize(
    ("op", "wrong"), [(op, w) for op in VARIANTS for w in WRONG if w not in FOR_FACTORS or op in WITH_FACTORS]
)
def test_a_wrong_kernel_gets_no_number(op: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no dtype."""
    ops = {**reference.OPS, op: WRONG[wrong](reference.OPS[op])}
    monkeypatch.setitem(sys.modules, "broken_backend", SimpleNamespace(OPS=ops))
    monkeypatch.setattr(
        backends, "BACKENDS", (Backend("broken", "broken_backend", ("cpu",), lambda device: None),)
    )
    others = [o for o in VARIANTS if o != op]
    result = run(replace(QUICK, ops=(op, others[0]), dtypes=tuple(DTYPES)))
    assert not result.is_right
    bad = [row for row in result.rows if row.op.startswith(op)]
    assert {row.dtype for row in bad} == set(DTYPES)
    for row in bad:
        assert row.problem
        assert row.ms is None
        assert row.gbps is None
    assert all(row.ms is not None for row in result.rows if row not in bad)
    assert "no numbers: " in render(result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_kernel_says_by_how_much(dtype: str) -> None:
    case = Kernels(SHAPES["tiny"](), DTYPES[dtype], torch.device("cpu"), False)
    for op in VARIANTS:
        broken = {op: one_element_off(reference.OPS[op])}
        with pytest.raises(Mismatch, match=r"differs from the reference by up to (1\.0e\+00|9\.\de-01)"):
            case.check(op, broken)
    with pytest.raises(Mismatch, match="returned 0 tensors, the reference 1"):
        case.check("channel_reduce", {"channel_reduce": lambda *_: None})


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_stay_in_range_while_they_are_timed(dtype: str) -> None:
    case = Kernels([(4, 3), (5,)], DTYPES[dtype], torch.device("cpu"), False)
    before = [y.abs().amax() for y in case.ys]
    for _ in range(1000):
        case.call("channel_axpy_", reference.OPS).run()
        case.call("channel_scale_", reference.OPS).run()
    for y, was in zip(case.ys, before, strict=True):
        assert bool(y.isfinite().all())
        assert was / 10 < y.abs().amax() < 10 * was


def test_what_an_earlier_call_left_in_memory_is_no_result() -> None:
    """What a compaction makes may lie where the reference's was, and is right if nothing writes it."""
    case = Kernels(SHAPES["tiny"](), torch.float32, torch.device("cpu"), False)
    kept = reference.OPS["channel_compact"]
    for _ in range(3):
        case.call("channel_compact fresh", {"channel_compact": kept}).run()
        with pytest.raises(Mismatch, match="by up to nan"):
            case.check("channel_compact fresh", {"channel_compact": lambda *_: None})


def test_operations_are_compared_with_torch_pruning() -> None:
    result = run(replace(QUICK, models=("resnet18", FACTORY), ops=tuple(STEPS), inputs=INPUTS))
    assert result.is_right
    assert [(row.model, row.op) for row in result.rows] == [(m, op) for m in ("resnet18", FACTORY) for op in STEPS]
    for row in result.rows:
        assert row.ratio is not None, row
        assert row.tp_ms == pytest.approx(row.ratio * row.ms)
        assert row.backend == "cpu"
        matched, _, known = row.groups.partition("/")
        assert matched == known


@pytest.mark.parametrize("op", STEPS)
def test_a_result_that_differs_gets_no_ratio_but_by_how_much(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    total = steps.GroupNorm.total

    def wrong(self: Any, binding: Any) -> torch.Tensor:
        sums = total(self, binding)
        return sums * torch.linspace(1.0, 4.0, len(sums))

    monkeypatch.setattr(steps.GroupNorm, "total", wrong)
    monkeypatch.setattr(steps.Binding, "grouping", lambda self, key: None)  # or it would not be asked
    result = run(replace(QUICK, models=("resnet18",), ops=(op,)))
    (row,) = result.rows
    assert row.differs
    assert not result.is_right
    assert row.ratio is None
    assert row.tp_ms is None
    assert row.ms is not None
    says = "differs after the step" if op == "step" else r"differs from Torch-Pruning by"
    assert says in row.no_ratio
    assert table([row]).splitlines()[1].endswith(" none")
    assert f"no ratio for {op} of resnet18 (float32): {row.no_ratio}" in table([row])


def test_the_largest_difference_is_the_one_that_is_told() -> None:
    one, two = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    with pytest.raises(steps.Mismatch, match=r"b differs from Torch-Pruning by 5\.0e-01 relative.*; 2 of 3 differ"):
        steps.compare([("a", one * 1.1, one), ("b", one * 0.75, two), ("c", one, one)], 1e-5)
    with pytest.raises(steps.Mismatch, match="a differs from Torch-Pruning by nan"):
        steps.compare([("a", one * torch.nan, one)], 1e-5)
    with pytest.raises(steps.Mismatch, match=r"shape \(2,\)"):
        steps.compare([("a", one[:2], one)], 1e-5)


def test_where_torch_pruning_fails_ours_is_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Subject) -> None:
        raise ZeroDivisionError("of Torch-Pruning's")

    monkeypatch.setattr(Subject, "_meet_torch_pruning", fail)
    result = run(replace(QUICK, models=("resnet18",), ops=tuple(STEPS)))
    assert result.is_right
    for row in result.rows:
        assert row.ratio is None
        assert row.ms is not None
        assert row.no_ratio == "Torch-Pruning: ZeroDivisionError: of Torch-Pruning's"


def test_what_does_not_end_is_left() -> None:
    def forever() -> None:
        while True:
            pass

    with pytest.raises(TimeoutError, match="groups took more than 0 s"), at_most(0.05, "groups"):
        forever()


def test_the_regulariser_beside_a_training_step() -> None:
    (row,) = run(replace(QUICK, models=("resnet18",), ops=("training",), batch=2)).rows
    assert row.extra["batch"] == 2
    assert row.extra["share_of_step"] == pytest.approx(row.ms / row.extra["step_ms"])
    assert row.extra["added_share"] > -1


def test_layouts_are_for_convolutions() -> None:
    both = ("contiguous", "channels_last")
    found = run(replace(QUICK, models=("resnet18", "vit_s16"), ops=("channel_scale_",), layouts=both))
    rows = [(row.model, row.layout) for row in found.rows if row.backend == "reference"]
    assert rows == [("resnet18", "contiguous"), ("resnet18", "channels_last"), ("vit_s16", "contiguous")]
    assert not find("vit_l", (), {}).is_convolutional()
    why = "most of its parameters are no weights of 2-d convolutions"
    assert f"not measured: channels_last of vit_s16, but contiguous: {why}" in found.notes
    assert not any("resnet18" in note for note in found.notes)


def test_a_single_number_is_measured_as_a_vector_of_one() -> None:
    result = run(replace(QUICK, models=(f"{__name__}:model_with_a_scalar",), inputs=INPUTS))
    assert result.is_right
    assert {row.op for row in result.rows} == set(CALLS)


def test_what_cannot_be_made_is_a_row_beside_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(shapes: Any, dtype: torch.dtype, *arguments: Any) -> Kernels:
        if dtype == torch.float64:
            raise MemoryError("no more of it")
        return Kernels(shapes, dtype, *arguments)

    monkeypatch.setattr(sys.modules["pat_fast.bench.run"], "Kernels", made)
    one = replace(QUICK, ops=("channel_scale_",), backends=("reference",), dtypes=("float32", "float64", "float16"))
    result = run(one)
    assert not result.is_right
    told = [(row.dtype, row.op, row.problem) for row in result.rows]
    op = "channel_scale_"
    assert told == [("float32", op, ""), ("float64", op, "MemoryError: no more of it"), ("float16", op, "")]
    assert "no numbers: MemoryError" in render(result)


def test_what_is_not_measured_is_said() -> None:
    result = run(replace(QUICK, ops=("channel_reduce", "step"), backends=("reference",)))
    assert {row.backend for row in result.rows} == {"reference"}
    assert "not measured: step of tiny in float32: it is a list of shapes alone" in result.notes
    result = run(replace(QUICK, models=("resnet18",), ops=("channel_reduce", "step"), dtypes=("bfloat16",)))
    assert any("Torch-Pruning does not add up in float32" in note for note in result.notes)
    result = run(replace(QUICK, models=("resnet18",), ops=("channel_reduce", "step"), backends=("reference",)))
    assert any("they run the cpu kernels, which --backends leaves out" in note for note in result.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": ("channel_reducee",)}, "did you mean 'channel_reduce'"),
        ({"dtypes": ("float8",)}, "--dtypes: expected names out of float32"),
        ({"layouts": ("nhwc",)}, "--layouts: expected names out of contiguous, channels_last; got 'nhwc'"),
        ({"backends": ("gpu",)}, "--backends: expected names out of cuda, cpu, triton, reference; got 'gpu'"),
        ({"backends": ("cuda",)}, "--backends: expected backends that run on cpu, got cuda: it does not serve cpu"),
        ({"device": "cuda:99"}, "--device: expected a device that PyTorch can use, got 'cuda:99'"),
        ({"device": "cpu:1"}, "got 'cpu:1' and one CPU, which is cpu"),
        ({"device": "tpu"}, "--device: expected cpu, cuda or cuda:0, got 'tpu'"),
        ({"device": "meta"}, "--device: expected cpu or cuda, got 'meta'"),
        ({"rounds": 0}, "--rounds: expected an integer >= 1, got 0"),
        ({"batch": 0}, "--batch: expected an integer >= 1, got 0"),
        ({"batch": 4}, "--batch: expected training in --ops beside it, or --deploy, got neither"),
        ({"models": (f"{__name__}:bare_model",)}, "expected a network with parameters, got "),
        ({"models": (f"{__name__}:lazy_model",)}, "whose 0.weight has no shape yet (a lazy layer); run one forward"),
        ({"models": (f"{__name__}:meta_model",)}, "whose 0.weight is on the meta device"),
        ({"models": ("resnet51",)}, "did you mean 'resnet50'"),
        ({"models": ("tests.bench.test_run:smal_model",)}, "did you mean 'small_model'"),
        ({"models": ("transformers:vitt",)}, "expected a model type of Transformers, got 'vitt'; did you mean 'vit'"),
        ({"ops": ("step",)}, "expected something to measure, got nothing: not measured: step of tiny"),
    ],
)
def test_bad_settings_are_one_clear_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(replace(QUICK, **change))
    assert message in str(error.value)


def test_a_network_of_transformers_by_its_type() -> None:
    pytest.importorskip("transformers")
    args = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    args |= {"image_size": 32, "patch_size": 8}
    image = (torch.randn(1, 3, 32, 32),)
    (row,) = run(replace(QUICK, models=("transformers:vit",), ops=("importance",), inputs=image, args=args)).rows
    assert row.ms is not None
    assert row.ratio is not None or row.no_ratio


def test_constant_parameters_get_noise_and_others_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
    weight = model[0].weight.detach().clone()
    vary_(model)
    assert torch.equal(model[0].weight, weight)
    assert len(model[1].weight.unique()) == 6
    assert len(model[1].bias.unique()) == 6


def test_names_come_apart_or_with_commas() -> None:
    assert names(["a,b", "c", "a, d", ""], "--ops") == ("a", "b", "c", "d")
    assert names([], "--ops") == ()
    with pytest.raises(ConfigError, match="--ops: expected names, got ',' ''"):
        names([",", ""], "--ops")


def clocks(*seconds: tuple[float, ...]) -> Any:
    left = list(seconds)
    return lambda: left.pop(0)


def test_a_busy_machine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the time that others used meanwhile; what ended before and still stands in the load average does not count."""
    monkeypatch.setattr("os.getloadavg", lambda: (3.25, 1.0, 1.0))
    short = replace(QUICK, rounds=4, ops=("channel_scale_",))
    monkeypatch.setattr(machine, "_seconds", clocks((0.0, 0.0, 0.0, 0.0), (10.0, 18.0, 2.0, 14.0)))
    result = run(short)
    assert "disturbed, do not quote: 0.40 cores used by other processes and 0.20 cores lost to other" in render(result)
    monkeypatch.setattr(machine, "_seconds", clocks((0.0, 0.0, 0.0, 0.0), (10.0, 18.5, 0.1, 18.0)))
    result = run(short)
    assert (result.machine["others"], result.machine["stolen"], result.machine["load"]) == (0.05, 0.01, 3.25)
    assert "beside it: 0.05 cores used by others, 0.01 lost to others" in render(result)
    assert not any("cores" in reason for reason in result.disturbed)


def test_without_the_time_of_all_processes_the_load_average_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "missing")
    for load, says in ((3.25, "load average 3.2 before the start"), (0.1, "")):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 1.0, 1.0))
        found = machine.describe(torch.device("cpu"))
        machine.Watch().note(found)
        assert machine.busy(found) == says


def test_what_ran_beside_one_timing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_seconds", clocks((0.0, 0.0, 0.0, 0.0), (10.0, 18.0, 2.0, 14.0)))
    assert machine.Watch().seen() == "0.40 cores used by other processes and 0.20 cores lost to other machines"


@pytest.mark.skipif(not machine.STAT.exists(), reason="no /proc/stat")
def test_what_this_process_uses_is_its_own() -> None:
    began, watch, found = time.monotonic(), machine.Watch(), machine.describe(torch.device("cpu"))
    end = time.process_time() + 0.4
    while time.process_time() < end:
        pass
    watch.note(found)
    ours = 0.4 / (time.monotonic() - began)
    assert 0 <= found["others"] <= found["cores"] - ours + 0.1


def test_memory_that_slows_down_is_told_of() -> None:
    bandwidth = Bandwidth(Clock(torch.device("cpu"), 1, 1), 1)
    bandwidth._seen = {"read": [40.0, 39.0], "copy": [30.0, 20.0, 25.0]}
    assert bandwidth.drift().startswith("the memory was not the same all along: copy 20.0 to 30.0 GB/s;")
    bandwidth._seen = {"read": [40.0, 39.0]}
    assert bandwidth.drift() == ""


def test_the_machine_is_described() -> None:
    found = machine.describe(torch.device("cpu"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]
    assert found["threads"] == torch.get_num_threads()
    assert found["isa"] == "none" or found["isa"]


@pytest.fixture
def result() -> Result:
    like = Row("net", "", "float32", "cpu", traffic="read", ms=1.5, spread=0.1, gbps=12.0, peak_gbps=24.0, share=0.5)
    rows = (
        replace(like, op="channel_reduce"),
        replace(like, op="importance", tp_ms=30.0, tp_spread=0.5, ratio=20.0, groups="3/3"),
        replace(like, op="step", no_ratio="differs by 1e-3", differs=True, graph_ms=1.0, graph_share=0.75),
        replace(like, op="training", extra={"share_of_step": 0.25}),
        Row("net", "channel_axpy_", "float32", "triton", problem="RuntimeError: it broke"),
    )
    where = {"cpu": "a processor", "cores": 2, "threads": 2, "isa": "avx2", "gpu": None, "versions": {"torch": "2.13"}}
    return Result(where, {"rounds": 15}, {"read": 24.0}, rows, ("load average 9.0",), ("a note",))


def test_the_table(result: Result) -> None:
    text = render(result)
    lines = text.splitlines()
    assert "a processor" in lines[0]
    row = next(line for line in lines if "importance" in line)
    assert row.split() == [
        "net", "importance", "float32", "cpu", "1.500", "10%", "12.0", "50%", "of", "read", "24.0", "30.0", "20.0x!",
    ]  # fmt: skip
    assert next(line for line in lines if "channel_axpy_" in line).endswith("no numbers: RuntimeError: it broke")
    assert "no ratio for step of net (float32): differs by 1e-3" in text
    assert "note: a note" in text
    assert "training of net (float32, cpu): share of step 0.25" in text
    assert "1.000    75%" in text


def test_the_table_says_what_a_plain_pass_would_take(result: Result) -> None:
    rows = [replace(row, plain_ms=None if row.ms is None else 1.2) for row in result.rows]
    lines = render(replace(result, rows=tuple(rows))).splitlines()
    row = next(line for line in lines if "importance" in line)
    assert row.split()[-5:] == ["1.200", "80%", "30.0", "20.0x!", "25.0x"]
    assert next(line for line in lines if "channel_reduce" in line).split()[-2:] == ["1.200", "80%"]


def test_a_plain_pass_moves_as_many_bytes() -> None:
    bandwidth = Bandwidth(Clock(torch.device("cpu"), 1, 1), 1)
    each = bandwidth._x.nbytes
    bandwidth._x.fill_(1.0)
    bandwidth._y.fill_(0.0)
    run = bandwidth.plain({"read": each, "axpy": 3 * (2 * each + 4)})
    assert run is not None
    run()
    expected = torch.full_like(bandwidth._y, 2e-6)
    expected[0] = 3e-6
    assert torch.allclose(bandwidth._y, expected, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_what_lies_in_a_line_with_what_is_kept_is_read(channels_last: bool) -> None:
    kernels = Kernels([(8, 64, 3, 3), (40,), (6, 16)], torch.float32, torch.device("cpu"), channels_last)
    lines = 0
    for x, row in zip(kernels.xs, kernels.out_table.rows, strict=True):
        kept = torch.zeros_like(x)
        part = kept[kernels.index[row[8] : row[8] + row[2]].long()]
        if row[9] >= 0:
            part[:, kernels.index[row[9] : row[9] + row[3]].long()] = 1
        else:
            part[:] = 1
        kept[kernels.index[row[8] : row[8] + row[2]].long()] = part
        at = kept.permute(0, 2, 3, 1).reshape(-1) if channels_last and x.dim() == 4 else kept.view(-1)
        lines += len({i // 16 for i in at.nonzero().view(-1).tolist()})
    assert kernels.along == 64 * lines - 4 * sum(out.numel() for out in kernels.outs) > 0
    call = kernels.call("channel_compact fresh", reference.OPS)
    assert (call.moved, call.along) == (8 * kernels.kept, 4 * kernels.along)


def test_json_holds_everything(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["format"] == 1
    assert found["machine"]["cpu"] == "a processor"
    assert [Row(**row) for row in found["rows"]] == list(result.rows)
    assert found["disturbed"] == ["load average 9.0"]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_figure_shows_every_bar(result: Result, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure.{kind}"
    draw(result, path)
    assert path.stat().st_size > 1000
    if kind == "svg":
        text = path.read_text()
        for word in ("50%, 12 GB/s, 20x Torch-Pruning", "channel_reduce", "net, float32", "disturbed, do not"):
            assert f"<!-- {word}" in text
        assert "channel_axpy_" not in text


def test_moments_of_fast_memory(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["resnet18", "regularize", "--small", "--seconds"]
    moments.main([*arguments, "0.1", "--least", "0.001"])
    told = capsys.readouterr().out
    assert re.search(r"ours [\d.]+ ms \(\d+\), plain .* Torch-Pruning .*x, most [\d.]+x\n$", told)
    with pytest.raises(SystemExit, match="no such moments: ours 0, plain 0, Torch-Pruning 0"):
        moments.main([*arguments, "0.1", "--least", "1e9"])
    with pytest.raises(SystemExit, match="error: MODEL: expected one of"):
        moments.main(["resnet51", "importance"])
