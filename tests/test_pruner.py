"""The pruner from outside: the quick start, the configuration file, and every option."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from benchmarks.models.residual import resnet18
from pat_fast import pruner as pruner_module
from pat_fast.plan import bind, build_plan
from tests.helpers import Small, small_inputs
from tests.training import adamw, hooks, no_hooks_left, same, sgd, steps, train_one_epoch, weights

AS_IT_STANDS = """
{"start_epoch": 5, "end_epoch": 50, "interval": 5, "global_sparsity": 0.5,
 "mac_target": 0.7, "layers_to_prune": ["conv1", "layer2", "layer3"]}
"""


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with no_hooks_left():
        yield


# The quick start


def test_quick_start() -> None:
    model, num_epochs = Small(width=18), 13
    optimizer = adamw(model)
    parameters = list(model.parameters())
    reports, stages = [], []

    pruner = pat.Pruner(model, target_sparsity=0.5, schedule="linear")
    for _ in range(num_epochs):
        train_one_epoch(model, optimizer)
        reports.append(pruner.step())
        stages.append(pruner.stage)

    dense = 18 + 22
    assert reports[0].dense_channels == dense
    assert [r.channels[1] for r in reports] == [int(dense * (1 - 0.05 * e) + 1e-9) for e in range(1, 11)] + [20] * 3
    assert model.stem.out_channels + model.inner.out_channels == dense // 2
    assert stages == ["prune"] * 9 + ["finetune"] * 4
    assert [r.stage for r in reports] == stages
    assert [r.epoch for r in reports] == list(range(1, 14))
    assert reports[-1].sparsity == 0.5
    assert reports[-1].params[1] == sum(p.numel() for p in model.parameters())
    assert reports[-1].dense_params > reports[-1].params[1]
    # The optimizer is the one that it was, and trains everything.
    assert [p for g in optimizer.param_groups for p in g["params"]] == parameters == list(model.parameters())
    for p in parameters:
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    before = weights(model)
    train_one_epoch(model, optimizer)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_quick_start_regularises_in_the_training_step() -> None:
    """One SGD step with the pruner differs from one without by exactly the regulariser's gradient."""
    model = Small().double()
    twin = copy.deepcopy(model)
    x = small_inputs(dtype=torch.float64)
    pruner = pat.Pruner(model, target_sparsity=0.5, schedule="linear", reg_strength=1e-2)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    pat.regularizers.GroupNormRegularizer(1e-2).apply(bind(build_plan(twin, x), twin))
    expected = {name: -0.05 * p.grad for name, p in twin.named_parameters()}
    for m in (model, twin):
        train_one_epoch(m, torch.optim.SGD(m.parameters(), lr=0.05), batches=1, x=x)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p - twin.get_parameter(name), expected[name], rtol=1e-6, atol=1e-12, msg=name)
    assert expected["inner.weight"].any()
    assert not expected["inner.bias"].any()
    assert pruner.stage == "prune"


def test_the_default_end_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    pat.Pruner(Small(), 0.3, start_epoch=4)
    assert "end_epoch was not given; the whole target is reached at the 14th step()" in caplog.text
    caplog.clear()
    pat.Pruner(Small(), 0.3, end_epoch=5)
    assert not caplog.text


# The configuration file


def wide_resnet() -> nn.Module:
    """A ResNet that does most of its work in the layers that the configuration names."""
    return resnet18(widths=(8, 28, 36, 12), depths=(1, 2, 2, 1), stem=8, num_classes=5)


def test_the_configuration_of_the_design_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(AS_IT_STANDS)
    model = wide_resnet()
    optimizer = sgd(model)
    x = torch.randn(2, 3, 32, 32)
    pruner = pat.Pruner.from_config(model, path)
    widths = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    reports, stages, costs = [], [], []
    for _ in range(50):
        train_one_epoch(model, optimizer, batches=1, x=x)
        assert pruner.plan is not None
        costs.append(cost_of_one_unit(pruner.plan))
        reports.append(pruner.step())
        stages.append(pruner.stage)

    pruned = [r for r in reports if r.changed]
    last = pruned[-1]
    assert [r.epoch for r in pruned] == list(range(10, last.epoch + 1, 5))
    assert last.epoch < 50
    for r in pruned[:-1]:
        assert r.ratio == pytest.approx(0.5 * (1 - (1 - (r.epoch - 5) / 45) ** 3))
        assert r.channels[1] == int(r.dense_channels * (1 - r.ratio) + 1e-9)
    # Down to 70 % of the MACs, and not one unit further.
    limit = 0.7 * last.dense_macs
    assert limit - costs[last.epoch - 1] < last.macs[1] <= limit < last.macs[0]
    assert all(r.macs == (last.macs[1], last.macs[1]) for r in reports[last.epoch :])
    assert stages == ["regularize"] * 4 + ["prune"] * (last.epoch - 5) + ["finetune"] * (51 - last.epoch)
    # Only what was named: all of layer2 and layer3, of conv1 nothing, since layer1 adds to its channels.
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.out_channels < widths[name]]
    assert {n.split(".")[0] for n in names} == {"layer2", "layer3"}
    assert dict(last.frozen)["conv1"] == (
        "conv1 shares its channels with layer1.0.conv2, which is not in layers_to_prune"
    )
    assert last.dense_channels == 28 * 3 + 36 * 3  # in each stage: one sum of blocks, two inner convolutions


def cost_of_one_unit(plan: pat.Plan) -> int:
    """The most MACs that the removal of one unit saves."""
    everything = plan.unit >= 0
    return max(plan.macs() - plan.macs(everything & (plan.unit != u)) for u in range(plan.n_units))


def test_a_configuration_may_be_a_dict_and_be_overridden() -> None:
    given = {"target_sparsity": 0.25, "end_epoch": 4, "schedule": "cubic"}
    pruner = pat.Pruner.from_config(Small(), given, interval=2, regularizer=None)
    assert (pruner.target_sparsity, pruner.schedule.end, pruner.schedule.curve) == (0.25, 4, "cubic")
    assert (pruner.schedule.interval, pruner.regularizer) == (2, None)
    assert given == {"target_sparsity": 0.25, "end_epoch": 4, "schedule": "cubic"}


def test_bad_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pat.ConfigError, match=r"target_sparsty: unknown key.*did you mean 'target_sparsity'"):
        pat.Pruner.from_config(Small(), {"target_sparsty": 0.5})
    with pytest.raises(pat.ConfigError, match="no such file"):
        pat.Pruner.from_config(Small(), tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"start_epoch": ')
    with pytest.raises(pat.ConfigError, match="line 1, column 17: expected JSON"):
        pat.Pruner.from_config(Small(), tmp_path / "broken.json")
    with pytest.raises(pat.ConfigError, match="'layer2' matches no layer of the model"):
        pat.Pruner.from_config(Small(), json.loads(AS_IT_STANDS) | {"layers_to_prune": ["layer2"]})


# Options


@pytest.mark.parametrize(
    ("schedule", "curve"),
    [("linear", lambda t: t), ("cubic", lambda t: 1 - (1 - t) ** 3), (lambda t: t * t, lambda t: t * t)],
)
def test_what_is_due_at_each_epoch(schedule: Any, curve: Callable[[float], float]) -> None:
    reports = steps(Small(width=30), 9, target_sparsity=0.6, schedule=schedule, start_epoch=2, end_epoch=8, interval=2)
    dense = 30 + 34
    left = dense
    for report in reports:
        t = min(max((report.epoch - 2) / 6, 0), 1)
        assert report.ratio == pytest.approx(0.6 * curve(t))
        if report.epoch in (4, 6, 8):
            left = int(dense * (1 - report.ratio) + 1e-9)
        assert report.channels[1] == left
    assert left == int(dense * 0.4)


def test_constant_takes_all_at_once() -> None:
    reports = steps(Small(), 4, target_sparsity=0.5, schedule="constant", start_epoch=2, end_epoch=6)
    assert [r.channels for r in reports] == [(28, 28), (28, 14), (14, 14), (14, 14)]


@pytest.mark.parametrize("name", ["group_norm", "bn_scale", {"name": "bn_scale", "group_lasso": True}, "growing"])
def test_regularisers_by_name_push_in_training(name: Any) -> None:
    """Without pruning, and with a gradient of zero, all that is left of a step is the regulariser's."""
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pruner = pat.Pruner(model, 0.5, start_epoch=5, regularizer=name, reg_strength=1e-2, example_inputs=small_inputs())
    before = model.norm.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    pushed = before - model.norm.weight.detach()
    assert pruner.stage == "regularize"
    if name == "group_norm":
        assert (pushed >= 1e-2 - 1e-6).all()  # gamma is 1 at least
    else:  # the weights are 1: so are their signs, their norms, and they themselves
        torch.testing.assert_close(pushed, torch.full_like(pushed, 1e-2))


def test_growing_strengths_grow_shrink_and_are_saved() -> None:
    model = Small()
    options = {"regularizer": "growing", "end_epoch": 4, "example_inputs": small_inputs()}
    pruner = pat.Pruner(model, 0.5, **options)
    for _ in range(2):
        pruner.step()
    assert pruner.binding is not None
    strengths = pruner.regularizer.strengths(pruner.binding)
    assert strengths.shape == (pruner.binding.plan.n_channels,)
    assert strengths.max() > strengths.min() >= 1e-4
    again = pat.Pruner(copy.deepcopy(model), 0.5, **options)
    again.load_state_dict(pruner.state_dict())
    assert again.binding is not None
    assert torch.equal(again.regularizer.strengths(again.binding), strengths)


def test_one_shot_is_done_after_its_prune() -> None:
    reports = steps(Small(), 3, target_sparsity=0.5, schedule="one_shot", start_epoch=2)
    assert [r.channels for r in reports] == [(28, 28), (28, 14), (14, 14)]
    assert [r.stage for r in reports] == ["regularize", "finetune", "finetune"]


@pytest.mark.parametrize("mode", ["prune", "mask"])
def test_optimizer_steps_may_count(mode: str) -> None:
    by_steps, by_calls = Small(), Small()
    by_calls.load_state_dict(by_steps.state_dict())
    optimizers = [adamw(by_steps), adamw(by_calls)]
    options = {"start_epoch": 2, "end_epoch": 8, "interval": 3, "example_inputs": small_inputs(), "mode": mode}
    counting = pat.Pruner(by_steps, 0.5, unit="step", optimizer=optimizers[0], **options)
    called = pat.Pruner(by_calls, 0.5, optimizer=optimizers[1], **options)
    for epoch in range(3):
        train_one_epoch(by_steps, optimizers[0], batches=4)
        for batch in range(4):  # the same batches one by one
            by_calls.train()
            optimizers[1].zero_grad()
            nn.functional.cross_entropy(by_calls(small_inputs()), torch.arange(4).add(batch) % 5).backward()
            optimizers[1].step()
            last = called.step()
        report = counting.step()
        assert (report.epoch, report.channels[1]) == (min(4 * epoch + 4, 8), last.channels[1])
        assert same(weights(by_steps), weights(by_calls))
        assert report.channels == [(28, 28), (28, 14), (14, 14)][epoch]
        assert sum(before - after for _, before, after in report.changed) == report.channels[0] - report.channels[1]
    assert counting.done


def test_local_and_global_ranking() -> None:
    local, overall = Small(width=20), Small(width=20)
    with torch.no_grad():
        for model in (local, overall):
            model.inner.weight[:18] *= 1e-3  # most of one group is of no use
            model.outer.weight[:, :18] *= 1e-3
    steps(local, 1, target_sparsity=0.5, schedule="constant", ranking="local")
    steps(overall, 1, target_sparsity=0.5, schedule="constant", ranking="global")
    assert (local.stem.out_channels, local.inner.out_channels) == (10, 12)
    assert overall.stem.out_channels + overall.inner.out_channels == 22
    assert overall.inner.out_channels <= 6


def test_round_to_and_min_channels() -> None:
    model = Small(width=40)
    reports = steps(model, 10, target_sparsity=0.7, round_to=8)
    for report in reports:
        assert all(after % 8 == 0 for _, _, after in report.changed)
    assert (model.stem.out_channels % 8, model.inner.out_channels % 8) == (0, 0)
    assert model.stem.out_channels + model.inner.out_channels <= 40
    model = Small()
    steps(model, 1, target_sparsity=18 / 28, schedule="constant", min_channels=5)
    assert (model.stem.out_channels, model.inner.out_channels) == (5, 5)


@pytest.mark.parametrize("given", [lambda m: ["inner"], lambda m: [m.inner], lambda m: ["inner", m.inner]])
def test_ignored_layers_by_name_and_by_module(given: Callable[[Small], list[str | nn.Module]]) -> None:
    model = Small()
    report = steps(model, 1, target_sparsity=0.5, schedule="constant", ignored_layers=given(model))[0]
    assert (model.stem.out_channels, model.inner.out_channels) == (6, 16)
    assert (report.dense_channels, report.channels) == (12, (12, 6))
    assert ("inner", "inner is in ignored_layers") in report.frozen
    assert any(name == "head" for name, _ in report.frozen)


def test_a_criterion_of_ones_own_decides() -> None:
    class LastFirst:
        def score(self, binding: pat.plan.Binding) -> Tensor:
            return -torch.arange(binding.plan.n_channels, dtype=torch.float32)

    model = Small()
    before = model.inner.weight.detach().clone()
    steps(model, 1, target_sparsity=0.5, schedule="constant", ranking="local", importance=LastFirst())
    assert torch.equal(model.inner.weight[:, :1], before[:8, :1])


def test_mac_target_stops_before_the_channels_are_gone() -> None:
    reports = steps(Small(width=40), 10, target_sparsity=0.9, mac_target=0.5)
    last = next(r for r in reports if r.stage == "finetune")
    assert last.epoch < 10
    assert 0.4 * last.dense_macs < last.macs[1] <= 0.5 * last.dense_macs
    assert all(not r.changed for r in reports[last.epoch :])
    untouched = steps(Small(), 2, target_sparsity=0.9, mac_target=1.0)
    assert [r.channels for r in untouched] == [(28, 28), (28, 28)]


def test_finalize_in_prune_mode_and_before_the_target() -> None:
    model = Small()
    optimizer = adamw(model)
    pruner = pat.Pruner(model, target_sparsity=0.5)
    train_one_epoch(model, optimizer)
    pruner.step()
    report = pruner.finalize()
    assert report.channels == (24, 24)
    assert pruner.stage == "finetune"
    train_one_epoch(model, optimizer)
    assert pruner.step().channels == (24, 24)


# By hand


def test_by_hand_is_the_same_as_by_hooks() -> None:
    by_hooks, by_hand = Small(), Small()
    by_hand.load_state_dict(by_hooks.state_dict())
    options = {"example_inputs": small_inputs(), "end_epoch": 3, "mode": "mask", "reg_strength": 1e-2}
    optimizers = [sgd(by_hooks), sgd(by_hand)]
    auto = pat.Pruner(by_hooks, optimizer=optimizers[0], **options)
    before = hooks(by_hand, optimizers[1])
    manual = pat.Pruner(by_hand, optimizer=optimizers[1], auto=False, **options)
    assert hooks(by_hand, optimizers[1]) == before
    for epoch in range(4):
        train_one_epoch(by_hooks, optimizers[0], batches=1)
        optimizers[1].zero_grad()
        nn.functional.cross_entropy(by_hand.train()(small_inputs()), torch.arange(4)).backward()
        manual.regularize()
        optimizers[1].step()
        manual.hold()
        reports = [auto.step(), manual.step()]
        assert not any("nothing was regularised" in n for r in reports for n in r.notes)
        assert same(weights(by_hooks), weights(by_hand)), epoch
    assert reports[0].channels == reports[1].channels == (14, 14)


def test_by_hand_without_regularising_is_noted() -> None:
    model = Small()
    pruner = pat.Pruner(model, example_inputs=small_inputs(), auto=False)
    assert pruner.step().notes[-1:] != ("no optimizer step was seen since the last step(): nothing was regularised",)
    assert "nothing was regularised" in pruner.step().notes[-1]
    pruner = pat.Pruner(model, example_inputs=small_inputs(), auto=False, regularizer=None)
    pruner.step()
    assert not any("nothing was regularised" in note for note in pruner.step().notes)


def test_by_hand_needs_inputs() -> None:
    with pytest.raises(pat.ConfigError, match="auto=False needs example_inputs"):
        pat.Pruner(Small(), auto=False)


# Life and death


def test_training_continues_after_close_without_the_regulariser() -> None:
    model = Small()
    optimizer = sgd(model)
    before = hooks(model, optimizer)
    pruner = pat.Pruner(model, 0.5, end_epoch=2, reg_strength=10.0)
    train_one_epoch(model, optimizer)
    pruner.step()
    pruner.close()
    pruner.close()
    assert hooks(model, optimizer) == before
    twin = copy.deepcopy(model)
    plain = sgd(twin)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_one_epoch(model, optimizer)
    train_one_epoch(twin, plain)
    assert same(weights(model), weights(twin))


def test_the_regulariser_rests_in_the_last_stage() -> None:
    model = Small()
    optimizer = sgd(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=1, reg_strength=10.0)
    train_one_epoch(model, optimizer)
    pruner.step()
    assert pruner.stage == "finetune"
    twin = copy.deepcopy(model)
    plain = sgd(twin)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_one_epoch(model, optimizer)
    train_one_epoch(twin, plain)
    assert same(weights(model), weights(twin))


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights transposed: one layer makes two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, 10), (10, 8), (8, 7)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        for layer in reversed(self.layers[1:]):
            x = (x @ layer.weight).relu()
        return x @ self.layers[0].weight


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_budgets_count_every_group_of_a_layer_that_makes_two(ranking: str) -> None:
    pruner = pat.Pruner(TiedAutoencoder(), 0.5, ranking=ranking, end_epoch=1, example_inputs=torch.randn(3, 6))
    report = pruner.step()
    assert (report.dense_channels, report.channels) == (25, (25, 12))
    assert len({name for name, _, _ in report.changed}) == 3


def test_a_prune_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, end_epoch=1, example_inputs=small_inputs())
    before = weights(model)

    def failing(*args: Any) -> None:
        raise pat.SurgeryError("no")

    monkeypatch.setattr(pruner_module, "remove", failing)
    with pytest.raises(pat.SurgeryError):
        pruner.step()
    assert (pruner.epoch, pruner.stage) == (0, "prune")
    assert same(weights(model), before)
    monkeypatch.undo()
    report = pruner.step()
    assert (report.epoch, report.channels) == (1, (28, 14))


def test_a_fresh_dependency_graph_after_a_step() -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, end_epoch=2, example_inputs=small_inputs())
    first = pruner.DG
    assert pruner.DG is first
    assert first.get_out_channels(model.inner) == 16
    pruner.step()
    again = pruner.DG
    assert again is not first
    assert again.get_out_channels(model.inner) == model.inner.out_channels < 16
    groups = list(again.get_all_groups(ignored_layers=[model.head]))
    assert sorted(len(g[0].idxs) for g in groups) == sorted([model.inner.out_channels, model.stem.out_channels])
