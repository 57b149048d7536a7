"""Latency from measured layers: the model of it, the cache, and targets that are met by what it predicts.

Times are made up here, from the layers' sizes: what is tested does not depend on how busy the machine is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pat_fast as pat
from pat_fast.latency import LatencyModel, Tables, layers, model, table
from pat_fast.latency.layers import layers_of, runnable
from pat_fast.latency.table import Grid
from pat_fast.limits import Rules
from pat_fast.plan import bind, build_plan
from pat_fast.plan.running import call
from pat_fast.targets import Goal, Target
from tests.helpers import Case, Small, small_inputs
from tests.training import adamw, same, train_one_epoch, weights

OVERHEAD = 3e-5  # ms for each op of a forward, in the made-up times


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAT_FAST_CACHE", str(tmp_path))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer takes a nanosecond for each operation and some for itself; so does a model, and a tenth more."""

    def took(run: Any, device: torch.device, seconds: float = 0, runs: int = 0) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        share = 1.1 if seconds > table.SECONDS else 1.0  # whole models are measured longer
        return share * (OVERHEAD + counter.get_total_flops() * 1e-6)

    monkeypatch.setattr(table, "fastest", took)
    monkeypatch.setattr(model, "fastest", took)
    monkeypatch.setattr(table, "fast_multiple", lambda device, dtype: (4, 1, "made up"))  # the same on all machines


def goal_of(model: nn.Module, inputs: Any, target: Target, rules: Rules | None = None) -> tuple[Goal, Any]:
    binding = bind(build_plan(model, inputs), model)
    goal = Goal(target, None, rules or Rules())
    goal.start(binding, np.ones(binding.plan.n_channels, dtype=np.bool_), inputs)
    return goal, binding


# Layers


class Kinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2, padding="valid", bias=False)
        self.deep = nn.Conv2d(16, 32, 3, padding="same", groups=16)
        self.grouped = nn.Conv2d(32, 24, 1, groups=4)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2, output_padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.rows = nn.Linear(12, 20)
        self.layer_norm = nn.LayerNorm(20)
        self.line = nn.Conv1d(20, 8, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(self.grouped(self.deep(self.conv(x)))))
        return self.line(self.layer_norm(self.rows(x.flatten(2).transpose(1, 2))).transpose(1, 2)).mean(2)


def test_a_layer_of_any_width_is_the_layer_of_the_model() -> None:
    net = Kinds()
    x = torch.randn(2, 3, 13, 13)
    shapes: dict[str, torch.Size] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: shapes.__setitem__(name, out.shape))
    found = layers_of(net, x)
    assert [layer.weight.rpartition(".")[0] for layer in found] == list(dict(net.named_children()))
    widths = [(3, 16), (32,), (32, 24), (24, 12), (12,), (12, 20), (20,), (20, 8)]
    for layer, expected in zip(found, widths, strict=True):
        assert layer.widths(layer.shape) == expected
        json.dumps(layer.spec)
        out = runnable(layer.spec, expected, torch.device("cpu"))()
        assert out.shape == shapes[layer.weight.rpartition(".")[0]]
        grain = layer.grains()
        smaller = tuple(max(w // 2 // g, 1) * g for w, g in zip(expected, grain, strict=True))
        assert runnable(layer.spec, smaller, torch.device("cpu"))().shape[0] == out.shape[0]


def test_a_layer_that_is_called_twice_counts_twice_and_one_with_two_names_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(self.one(x)))

    assert [layer.weight for layer in layers_of(Twice(), torch.randn(2, 6))] == ["one.weight"] * 3


# Tables


def test_between_the_points_of_a_grid_time_is_linear_and_never_falls_with_width() -> None:
    grid = Grid([[4, 8], [2, 6]], (1, 1), np.array([[1.0, 3.0], [2.0, 6.0]]))
    assert grid((4, 2)) == 1
    assert grid((8, 6)) == 6
    assert grid((6, 2)) == 1.5
    assert grid((6, 4)) == pytest.approx((1 + 3 + 2 + 6) / 4)
    assert grid((1, 1)) == 1
    noisy = Grid([[4, 8, 12]], (4,), np.array([2.0, 1.0, 3.0]))
    assert [noisy((w,)) for w in (4, 5, 8, 9, 12)] == [2, 2, 2, 3, 3]  # whole blocks of four


def test_tables_are_kept_and_what_is_known_is_not_measured_again(made_up: None, tmp_path: Path) -> None:
    found = layers_of(Small(), small_inputs())
    free = lambda layer: [True] * len(layer.widths(layer.shape))  # noqa: E731
    first, second = Tables(torch.device("cpu")), Tables(torch.device("cpu"))
    grids = first.grids(found, free)
    assert first.measured > 0
    again = second.grids(found, free)
    assert second.measured == 0
    for key, grid in grids.items():
        np.testing.assert_array_equal(grid.ms, again[key].ms)
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        assert Tables(torch.device("cpu")).path != first.path
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert [p.suffix for p in first.path.parent.iterdir()] == [".json"]  # nothing half written is left


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "machine": null, "layers": 3}', b"\xff\xfe", None]
)
def test_a_broken_cache_is_measured_anew_and_mended(
    made_up: None, content: str | bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    tables = Tables(torch.device("cpu"))
    found = layers_of(Small(), small_inputs())
    free = lambda layer: [False] * len(layer.widths(layer.shape))  # noqa: E731
    tables.grids(found, free)
    if content is None:
        data = json.loads(tables.path.read_text())
        next(iter(data["layers"].values())).update({"1": "fast"})
        content = json.dumps(data)
    tables.path.write_bytes(content if isinstance(content, bytes) else content.encode())
    again = Tables(torch.device("cpu"))
    again.grids(found, free)
    assert again.measured == tables.measured
    mended = Tables(torch.device("cpu"))
    mended.grids(found, free)
    assert mended.measured == 0


def test_a_cache_that_cannot_be_written_costs_a_warning(
    made_up: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAT_FAST_CACHE", str(tmp_path / "file"))
    grids = Tables(torch.device("cpu")).grids(
        layers_of(Small(), small_inputs()), lambda layer: [False] * len(layer.widths(layer.shape))
    )
    assert grids
    assert "cannot be written" in caplog.text


def test_really_measured_times_are_above_zero() -> None:
    spec = layers_of(Small(), small_inputs())[0].spec
    assert 0 < table.fastest(runnable(spec, (3, 8), torch.device("cpu")), torch.device("cpu"), 1e-3) < 1e3


# Targets


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50", "vit_s16", "unet"])
def test_a_latency_is_predicted_and_met_to_one_rounding_unit(made_up: None, name: str) -> None:
    case = Case.build(name, torch.float32)
    goal, binding = goal_of(case.model, case.inputs, Target("latency", 0.6))
    plan, latency = binding.plan, goal.latency
    assert latency is not None
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    assert latency.predict(plan, everything) == pytest.approx(latency.dense)
    goal.check(plan, everything)
    scores = np.random.default_rng(0).random(plan.n_channels)
    keep = goal.select(plan, scores, everything, everything, 1.0)
    left = latency.predict(plan, keep)
    assert left <= 0.6 * latency.dense * (1 + 1e-6)
    spared = ~keep
    one_less = min(  # with any of the removed units spared, it is either missed or within a hundredth
        (latency.predict(plan, keep | (plan.unit == u)) for u in np.unique(plan.unit[spared])), default=math.inf
    )
    assert one_less <= left * 1.2
    last = max(np.unique(plan.unit[spared]), key=lambda u: scores[plan.unit == u].mean())
    with_last = latency.predict(plan, keep | (plan.unit == last))
    assert with_last > 0.6 * latency.dense or left > 0.59 * latency.dense


def test_the_smaller_models_are_predicted_as_they_are_measured(made_up: None) -> None:
    net = Small(width=64)
    before = weights(net)
    binding = bind(build_plan(net, small_inputs()), net)
    keeps = []

    def cut(share: float) -> np.ndarray:
        keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
        for group in binding.plan.groups:
            keep[group.start : group.start + int(group.channels * share)] = False
        keeps.append(keep)
        return keep

    latency = LatencyModel.measure(binding, small_inputs(), 3, cut)
    assert same(before, weights(net))
    assert net.training
    for keep in keeps:
        point = latency.total(binding.plan, keep)
        assert latency.predict(binding.plan, keep) == pytest.approx(np.interp(point, latency._sums, latency._measured))
    state = json.loads(json.dumps(latency.state_dict()))
    again = LatencyModel.from_state(state, net)
    assert again.predict(binding.plan, keeps[0]) == latency.predict(binding.plan, keeps[0])


@pytest.mark.parametrize("mode", ["prune", "mask"])
def test_a_latency_in_training_and_after_a_resume(made_up: None, mode: str) -> None:
    net = Small(width=32)
    optimizer = adamw(net)
    # Widths between two steps of the tables cost as much as the next step, which made-up times know nothing of.
    options: dict[str, Any] = {"mode": mode, "schedule": "linear", "end_epoch": 4, "verify": False, "round_to": 4}
    pruner = pat.Pruner(net, target={"latency": 0.5, "batch": 4}, example_inputs=small_inputs(), **options)
    reports = []
    for epoch in range(4):
        train_one_epoch(net, optimizer)
        if epoch == 2:
            state = pruner.state_dict()
            pruner.close()
            pruner = pat.Pruner(net, target={"latency": 0.5, "batch": 4}, example_inputs=small_inputs(), **options)
            pruner.load_state_dict(state)
        reports.append(pruner.step())
    last = reports[-1]
    assert last.latency_ms is not None
    assert last.dense_latency_ms is not None
    assert 0.35 < last.latency_ms[1] / last.dense_latency_ms <= 0.5 + 1e-9
    assert all(r.dense_latency_ms == last.dense_latency_ms for r in reports)
    assert "predicted latency" in str(last)
    # What it predicts for the pruned model from the dense model's tables is what the pruned model's own say.
    pruner.finalize()
    binding = bind(build_plan(net, small_inputs()), net)
    everything = np.ones(binding.plan.n_channels, dtype=np.bool_)
    own = LatencyModel.measure(binding, small_inputs(), 4, lambda share: everything)
    assert last.latency_ms[1] == pytest.approx(own.dense, rel=0.1)


def test_layers_that_have_lost_their_last_choice_keep_their_shape(made_up: None) -> None:
    net = Small(width=8)
    pruner = pat.Pruner(
        net, target={"latency": 0.9}, schedule="one_shot", example_inputs=small_inputs(), verify=False
    )
    assert pruner.binding is not None
    keep = np.ones(pruner.binding.plan.n_channels, dtype=np.bool_)
    first = pruner.binding.plan.groups[0]
    keep[first.start + 1 : first.stop] = False
    predicted = pruner.goal.latency.predict(pruner.binding.plan, keep)  # type: ignore[union-attr]
    pruner._remove(pruner.binding, keep)
    left = np.ones(pruner.binding.plan.n_channels, dtype=np.bool_)
    assert pruner.goal.latency.predict(pruner.binding.plan, left) == pytest.approx(predicted)  # type: ignore[union-attr]


def test_what_cannot_be_reached_is_refused_with_what_can(made_up: None) -> None:
    pruner = pat.Pruner(Small(), target={"latency_ms": 1e-7}, example_inputs=small_inputs(), schedule="one_shot")
    with pytest.raises(pat.ConfigError, match=r"target: expected at least [\d.e-]+ ms \(.* of .* ms\), which stay"):
        pruner.step()


def test_a_batch_that_the_model_does_not_take_is_named(made_up: None) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).view(4, 8))

    with pytest.raises(pat.PlanError, match=r"expected a forward with a batch of 1 .* 'batch'"):
        pat.Pruner(Whole(), target={"latency": 0.5}, example_inputs=torch.randn(4, 6), end_epoch=2, verify=False)


def test_inputs_are_cut_or_repeated_to_the_batch() -> None:
    x, mask, scale = torch.arange(6.0).view(3, 2), torch.ones(3, dtype=torch.bool), torch.tensor(2.0)
    cut = model.of_batch({"x": x, "mask": mask, "scale": scale, "n": 3}, 5)
    assert torch.equal(cut["x"], x[[0, 1, 2, 0, 1]])
    assert len(cut["mask"]) == 5
    assert cut["scale"] is scale
    assert cut["n"] == 3
    assert call(nn.Linear(2, 2), model.of_batch(x, 1)).shape == (1, 2)
    assert layers.CONVOLUTIONS
