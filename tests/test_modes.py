"""Modes beside each other: what is removed when, what may return, and that masked equals pruned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.training import same, train_one_epoch, weights

X = small_inputs(dtype=torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


def started(mode: Any, model: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Any, pat.Pruner]:
    """A model in double precision, its optimizer, and a pruner in ``mode``; half of the channels go in 4 epochs."""
    torch.manual_seed(0)
    model = (Small() if model is None else model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    strength = {} if "regularizer" in options else {"reg_strength": 1e-2}
    options = {"target_sparsity": 0.5, "end_epoch": 4} | strength | options
    return model, optimizer, pat.Pruner(model, mode=mode, example_inputs=X, optimizer=optimizer, **options)


def run(model: nn.Module, optimizer: Any, pruner: pat.Pruner, epochs: int) -> list[pat.StepReport]:
    reports = []
    for _ in range(epochs):
        train_one_epoch(model, optimizer, x=X)
        reports.append(pruner.step())
    return reports


def sizes(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mode", ["mask", "hybrid", {"name": "hybrid", "steps": 1}, {"name": "mask", "shrink": True}])
def test_modes_that_mask_end_where_pruning_ends(mode: Any) -> None:
    """Momentum, weight decay and regulariser: the masked network follows the one that is smaller."""
    pruned, masked = started("prune"), started(mode)
    first, second = run(*pruned, epochs=6), run(*masked, epochs=6)
    assert [(r.channels, r.params, r.macs) for r in first] == [(r.channels, r.params, r.macs) for r in second]
    masked[2].finalize()
    for name, p in pruned[0].state_dict().items():
        torch.testing.assert_close(masked[0].state_dict()[name], p, rtol=1e-9, atol=1e-11, msg=name)


class Normed(nn.Module):
    """Layers with a weight norm."""

    def __init__(self, normed: Any, groups: int) -> None:
        super().__init__()
        self.stem = normed(nn.Conv2d(3, 8, 3))
        self.wide = normed(nn.Conv2d(8, 8, 3, groups=groups))
        self.back = normed(nn.ConvTranspose2d(8, 6, 3), dim=1)
        self.head = normed(nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.wide, self.back):
            x = layer(x).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("normed", "groups"),
    [(weight_norm, 1), (weight_norm, 2), (torch.nn.utils.weight_norm, 1)],
    ids=["parametrization", "grouped", "hook"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_masked_equals_pruned_with_weight_norm(normed: Any, groups: int) -> None:
    options: dict[str, Any] = {"regularizer": None, "ranking": "local", "importance": LastFirst()}
    pruned = started("prune", Normed(normed, groups), **options)
    masked = started("mask", Normed(normed, groups), **options)
    masked[0].load_state_dict(pruned[0].state_dict())
    run(*pruned, epochs=5)
    reports = run(*masked, epochs=5)
    torch.testing.assert_close(masked[0](X), pruned[0](X), rtol=1e-9, atol=1e-12)
    assert not any("statistics" in note for r in reports for note in r.notes)
    masked[2].finalize()
    assert sizes(masked[0]) == sizes(pruned[0])
    torch.testing.assert_close(masked[0](X), pruned[0](X), rtol=1e-9, atol=1e-12)


class LastFirst:
    """A criterion that values channels by their place in the plan, those that are left in the same order."""

    def score(self, binding: Any) -> Tensor:
        return -torch.arange(binding.plan.n_channels, dtype=torch.float32)


class Turns:
    """A criterion that at every prune thinks the opposite of what it thought."""

    sign = 1.0

    def score(self, binding: Any) -> Tensor:
        self.sign = -self.sign
        return self.sign * torch.arange(binding.plan.n_channels, dtype=torch.float32)


def test_soft_masks_zero_filters_that_learn_on_and_may_return() -> None:
    options: dict[str, Any] = {"schedule": "constant", "ranking": "local", "importance": Turns(), "reg_strength": 0.0}
    model, optimizer, pruner = started("soft", **options)
    first = run(model, optimizer, pruner, 1)[0]
    gone = (model.inner.weight.flatten(1) == 0).all(1)
    assert int(gone.sum()) == 8
    assert (model.inner.bias[gone] == 0).all()
    assert (model.outer.weight[:, gone] != 0).any(0).all()  # what reads them stays, or they could not learn
    assert (model.norm.weight != 0).all()
    assert optimizer.state[model.inner.weight]["momentum_buffer"][gone].any()
    assert (first.channels, sizes(model)) == ((28, 14), first.dense_params)
    train_one_epoch(model, optimizer, x=X)
    assert not (model.inner.weight.flatten(1) == 0).all(1).any()
    second = pruner.step()
    assert torch.equal((model.inner.weight.flatten(1) == 0).all(1), ~gone)
    assert second.channels == (14, 14)
    assert any("14 channels that were masked are back" in note for note in second.notes)
    assert len(second.changed) == 2


def test_soft_masks_are_held_when_the_target_is_reached_and_removed_in_the_end() -> None:
    model, optimizer, pruner = started("soft")
    last = run(model, optimizer, pruner, 4)[-1]
    assert (last.stage, last.channels[1]) == ("finetune", 14)
    run(model, optimizer, pruner, 2)
    train_one_epoch(model, optimizer, x=X)
    dead = (model.inner.weight.flatten(1) == 0).all(1)
    assert dead.any()
    assert (model.outer.weight[:, dead] == 0).all()
    expected = model.eval()(X)
    report = pruner.finalize()
    assert sizes(model) == report.params[1] == last.params[1]
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_soft_masks_may_shrink_at_the_target_or_be_ended_before() -> None:
    model, optimizer, pruner = started({"name": "soft", "shrink": True})
    reports = run(model, optimizer, pruner, 4)
    assert sizes(model) == reports[-1].params[1] < reports[-2].dense_params
    model, optimizer, pruner = started("soft")
    report = run(model, optimizer, pruner, 2)[-1]
    assert sizes(model) == report.dense_params
    pruner.finalize()
    assert sizes(model) == report.params[1] < report.dense_params


def test_hybrid_shrinks_after_so_many_steps_and_at_the_target() -> None:
    model, optimizer, pruner = started({"name": "hybrid", "steps": 2}, end_epoch=5, schedule="linear")
    whole = sizes(model)
    now = []
    for _ in range(7):
        train_one_epoch(model, optimizer, x=X)
        report = pruner.step()
        now.append((sizes(model), report.params[1]))
    assert now[0][0] == now[1][0] == whole  # masked at steps 1 and 2,
    assert now[2][0] == now[2][1] < now[1][1] < whole  # removed at 3
    assert now[3][0] == now[2][0] > now[3][1]  # masked at 4,
    assert now[4] == now[5] == now[6]
    assert now[4][0] == now[4][1]  # and removed when the target is reached


@pytest.mark.parametrize("mode", ["prune", "mask", "soft", {"name": "hybrid", "steps": 3}])
def test_every_mode_goes_on_from_its_state(mode: Any) -> None:
    model, optimizer, pruner = started(mode)
    run(model, optimizer, pruner, 2)
    copied = copy.deepcopy(model)
    other = torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = pat.Pruner(
        copied, 0.5, mode=mode, example_inputs=X, optimizer=other, end_epoch=4, reg_strength=1e-2, verify=False
    )
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    first, second = run(model, optimizer, pruner, 3), run(copied, other, resumed, 3)
    assert [(r.channels, r.stage) for r in first] == [(r.channels, r.stage) for r in second]
    pruner.finalize(), resumed.finalize()
    assert same(weights(model), weights(copied))


def test_a_state_of_another_mode_is_refused() -> None:
    state = started("mask")[2].state_dict()
    with pytest.raises(pat.ConfigError, match="mode: the state was saved with 'mask', expected 'soft'"):
        started("soft")[2].load_state_dict(state)


def test_callbacks_hear_of_stages_and_of_prunes() -> None:
    heard: list[tuple[Any, ...]] = []
    options: dict[str, Any] = {
        "on_stage": lambda stage, report: heard.append((stage, report.epoch, report.stage)),
        "on_prune": lambda report: heard.append(("cut", report.epoch, report.channels)),
    }
    model, optimizer, pruner = started("prune", start_epoch=1, end_epoch=3, **options)
    reports = run(model, optimizer, pruner, 4)
    assert heard == [
        ("prune", 1, "prune"),
        ("cut", 2, reports[1].channels),
        ("cut", 3, reports[2].channels),
        ("finetune", 3, "finetune"),
    ]
    heard.clear()
    model, optimizer, pruner = started("mask", unit="step", end_epoch=2, interval=2, **options)
    train_one_epoch(model, optimizer, x=X)
    assert heard == [("cut", 2, (28, 14)), ("finetune", 2, "finetune")]
    heard.clear()
    model, optimizer, pruner = started("prune", **options)
    pruner.finalize()
    assert heard == [("finetune", 0, "finetune")]


def test_the_report_names_the_groups_with_a_statistic() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))
    for mode in ("mask", "soft", "hybrid"):
        pruner = pat.Pruner(copy.deepcopy(model), example_inputs=torch.randn(2, 6), mode=mode, end_epoch=3)
        notes = [note for note in pruner.step().notes if "statistics over masked channels" in note]
        assert len(notes) == 1
        assert notes[0].endswith("(groups 0)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": {"name": "hybrid", "steps": 0}}, r"mode: steps: expected a whole number, at least 1, got 0"),
        ({"mode": {"name": "mask", "shrink": 1}}, r"mode: shrink: expected true or false, got 1"),
        ({"mode": {"name": "soft", "step": 2}}, r"mode: 'soft' has no option 'step'; it has shrink"),
        ({"mode": {"name": "prune", "steps": 2}}, r"mode: 'prune' has no option 'steps'; it has none"),
        ({"mode": "soft", "schedule": "one_shot"}, r"mode: 'soft' expects several prunes.*choose schedule='constant'"),
        ({"on_stage": "print"}, r"on_stage: expected a function, or None, got 'print'"),
        ({"on_prune": 1}, r"on_prune: expected a function, or None, got 1"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        pat.Pruner(Small(), **options)


def test_a_configuration_may_name_a_mode_with_options() -> None:
    pruner = pat.Pruner.from_config(Small(), {"mode": {"name": "hybrid", "steps": 2}, "end_epoch": 3})
    assert pruner.mode == "hybrid"
    with pytest.raises(pat.ConfigError, match=r"^mode: 'hybrid' has no option 'stps'; did you mean 'steps'"):
        pat.Pruner.from_config(Small(), {"mode": {"name": "hybrid", "stps": 2}})


@pytest.mark.parametrize("mode", ["mask", "hybrid", {"name": "mask", "shrink": True}])
def test_averages_of_masked_channels_are_held_too(mode: Any) -> None:
    """After finalize() the moving average of the masked network is that of the pruned one."""
    ends = []
    for one in ("prune", mode):
        model, optimizer, pruner = started(one)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for _ in range(6):
            train_one_epoch(model, optimizer, x=X)
            average.update_parameters(model)
            pruner.step()
        pruner.finalize()
        ends.append(weights(average.module))
        del model, optimizer, pruner, average
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_an_average_is_zero_where_the_model_is_masked() -> None:
    model, optimizer, pruner = started("mask", schedule="one_shot", end_epoch=None, start_epoch=1)
    average = AveragedModel(model)
    train_one_epoch(model, optimizer, x=X)
    average.update_parameters(model)
    pruner.step()
    dead = (model.inner.weight.flatten(1) == 0).all(1)
    assert dead.any()
    assert (average.module.inner.weight[dead] == 0).all()
    assert (average.module.outer.weight[:, dead] == 0).all()
    assert (average.module.inner.weight[~dead] != 0).any(1).all()


def test_a_callback_that_raises_comes_after_the_prune() -> None:
    """Its error is the user's to see; the prune is done and counted, and training goes on."""

    def refuse(*_: Any) -> None:
        raise ValueError("mine")

    options: dict[str, Any] = {"schedule": "linear", "end_epoch": 2, "on_prune": refuse, "on_stage": refuse}
    model, optimizer, pruner = started("prune", **options)
    for epoch, left in ((1, 21), (2, 14)):
        train_one_epoch(model, optimizer, x=X)
        with pytest.raises(ValueError, match="mine"):
            pruner.step()
        assert (pruner.epoch, pruner.plan.n_channels) == (epoch, left)  # type: ignore[union-attr]
    train_one_epoch(model, optimizer, x=X)
    assert pruner.step().epoch == 3
