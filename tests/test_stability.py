"""Each option of Stability does what it says, survives a checkpoint, and is refused where it makes no sense."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

import pat_fast as pat
from pat_fast.stability import capped, recalibrate_batch_norms
from tests.helpers import Small, small_inputs
from tests.training import adamw, same, sgd, train_one_epoch, weights

X = small_inputs()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


class Scripted:
    """A criterion that scores as told, one vector of 28 for each prune; it follows what is left by ``ids``."""

    def __init__(self, *scores: Any) -> None:
        self.scores = [torch.as_tensor(s, dtype=torch.float32) for s in scores]
        self.calls = 0

    def score(self, binding: Any) -> Tensor:
        found = self.scores[min(self.calls, len(self.scores) - 1)]
        self.calls += 1
        return found[: binding.plan.n_channels]


def pruner_of(criterion: Any, model: nn.Module | None = None, **options: Any) -> pat.Pruner:
    options = {"target_sparsity": 0.5, "end_epoch": 4, "example_inputs": X, "regularizer": None} | options
    return pat.Pruner(Small() if model is None else model, importance=criterion, **options)


# Groups that have settled


def test_a_settled_group_keeps_its_ranking() -> None:
    up, down = np.arange(28.0), np.arange(28.0)[::-1].copy()
    stability = {"freeze_settled": 0.9, "settled_prunes": 2}
    options: dict[str, Any] = {"mode": "soft", "ranking": "local", "end_epoch": 6, "stability": stability}
    pruner = pruner_of(Scripted(up, up, up, down), **options)
    plan = pruner.plan
    assert plan is not None
    reports = [pruner.step() for _ in range(6)]
    kept = pruner.mask.alive.numpy()
    for group in plan.groups:  # what three prunes agreed on is what goes, whatever is said later
        size = group.channels
        assert kept[group.start : group.stop].tolist() == [False] * (size // 2) + [True] * (size // 2)
    assert any("2 of 2 groups have settled" in note for note in reports[-1].notes)
    other = pruner_of(Scripted(up, up, up, down), **options | {"stability": None})
    for _ in range(6):
        other.step()
    assert other.mask.alive[plan.groups[0].start]


def test_a_group_that_changes_its_mind_does_not_settle() -> None:
    first = np.arange(28.0)
    second = first[::-1].copy()
    stability = {"freeze_settled": 0.9, "settled_prunes": 1}
    pruner = pruner_of(Scripted(first, second, first, second), mode="soft", ranking="local", stability=stability)
    for _ in range(3):
        assert not any("settled" in note for note in pruner.step().notes)


def test_settling_follows_the_model_as_it_shrinks_and_its_state() -> None:
    stability = {"freeze_settled": 0.7, "settled_prunes": 1}
    model = Small()
    optimizer = sgd(model)
    pruner = pruner_of("group_norm", model, stability=stability, optimizer=optimizer, end_epoch=6)
    for _ in range(3):
        train_one_epoch(model, optimizer)
        report = pruner.step()
    assert any("groups have settled" in note for note in report.notes)
    again = copy.deepcopy(model)
    resumed = pruner_of("group_norm", again, stability=stability, end_epoch=6, verify=False)
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    for _ in range(3):
        assert pruner.step().changed == resumed.step().changed
    assert same(weights(model), weights(again))


# The cap


def test_a_prune_loses_no_more_than_the_cap_and_the_rest_follows_later() -> None:
    scores = torch.arange(1.0, 29.0)
    pruner = pruner_of(
        lambda b: scores[-b.plan.n_channels :], schedule="one_shot", end_epoch=None, stability={"max_lost": 0.05}
    )
    left = 28
    steps = 0
    while left > 14 and steps < 30:
        steps += 1
        report = pruner.step()
        now = report.channels[1]
        worth = scores[-left:]
        assert worth[: left - now].sum() <= 0.05 * worth.sum()
        assert now == 14 or worth[: left - now + 1].sum() > 0.05 * worth.sum()  # as much as it may
        left = now
        waits = any("max_lost (0.05) holds channels back" in note for note in report.notes)
        assert waits == (now > 14) == (report.stage != "finetune")
    assert steps > 3


def test_a_cap_counts_what_is_finite_and_left() -> None:
    scores = np.array([1.0, 2.0, 3.0, np.inf, -5.0, 4.0])
    alive = np.array([True, True, True, True, True, False])

    def keep_at(fraction: float) -> np.ndarray:
        keep = alive.copy()
        keep[[4, 0, 1, 2][: int(fraction * 4 + 1e-9)]] = False
        return keep

    keep, waits = capped(0.5, scores, alive, keep_at, 1.0)  # 3 of 6
    assert waits
    assert keep.tolist() == [False, False, True, True, False, False]
    keep, waits = capped(1.0, scores, alive, keep_at, 1.0)
    assert not waits
    assert keep.tolist() == [False, False, False, True, False, False]
    keep, waits = capped(0.01, scores, alive, keep_at, 1.0)
    assert waits
    assert keep.tolist() == [True, True, True, True, False, False]


# Batch norms


def averages(model: Small, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of what enters the norm, averaged over the batches."""
    seen = [model.stem(x).transpose(0, 1).flatten(1) for x in batches]
    return torch.stack([s.mean(1) for s in seen]).mean(0), torch.stack([s.var(1) for s in seen]).mean(0)


@pytest.mark.parametrize("mode", ["prune", "mask"])
@pytest.mark.parametrize("kind", ["loader", "function", "pairs"])
def test_batch_norms_are_recalibrated_after_a_prune(mode: str, kind: str) -> None:
    batches = [small_inputs() + i for i in range(5)]
    given: Any = {"loader": batches, "function": lambda: iter(batches), "pairs": [(b, b) for b in batches]}[kind]
    model = Small()
    pruner = pruner_of("group_norm", model, mode=mode, batches=given, stability={"recalibrate": 3}, start_epoch=1)
    before = model.norm.running_mean.clone()
    pruner.step()
    assert torch.equal(model.norm.running_mean, before)  # nothing was pruned
    model.eval()
    model.norm.train()
    pruner.step()
    mean, variance = averages(model, batches[:3])
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert model.norm.training
    assert not model.training
    assert model.norm.momentum == 0.1


def test_recalibration_leaves_gradients_random_state_and_modes_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))
    model(X).sum().backward()
    model[3].eval()
    gradient, state = model[0].weight.grad.clone(), torch.get_rng_state()
    recalibrate_batch_norms(model, [X])
    assert torch.equal(model[0].weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, True, True, False]


# Rewinding


@pytest.mark.parametrize("at", ["target", "prune"])
def test_the_learning_rate_goes_back(at: str) -> None:
    model = Small()
    optimizer = adamw(model)
    scheduler = CosineAnnealingLR(optimizer, 10)
    stability = {"rewind_to": 1, "rewind_at": at}
    pruner = pruner_of("group_norm", model, optimizer=optimizer, scheduler=scheduler, stability=stability)
    plain = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    reference = CosineAnnealingLR(plain, 10)
    expected = [reference.get_last_lr()[0]]
    for _ in range(8):
        plain.step()
        reference.step()
        expected.append(reference.get_last_lr()[0])
    seen, notes = [], []
    for _ in range(7):
        train_one_epoch(model, optimizer)
        scheduler.step()
        notes.append(any("the learning rate is back at step 1" in n for n in pruner.step().notes))
        seen.append(optimizer.param_groups[0]["lr"])
    if at == "target":
        assert notes == [False, False, False, True, False, False, False]
        assert seen == pytest.approx(expected[1:4] + expected[1:5])
    else:
        assert notes == [False, True, True, True, False, False, False]
        assert seen == pytest.approx([expected[1]] * 4 + expected[2:5])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-2]


def test_rewinding_to_the_beginning_without_a_scheduler_and_its_state() -> None:
    model = Small()
    optimizer = sgd(model)
    pruner = pruner_of("group_norm", model, stability={"rewind_to": 0}, end_epoch=3)
    for _ in range(2):
        train_one_epoch(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= 0.1
            group["momentum"] = 0.5
        pruner.step()
    state = copy.deepcopy(pruner.state_dict())
    resumed = pruner_of("group_norm", model, stability={"rewind_to": 0}, end_epoch=3, optimizer=optimizer)
    pruner.close()
    resumed.load_state_dict(state)
    assert "lr" in state["stability"]["rewind"]["optimizers"][0][0]
    resumed.step()
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.05, 0.9)


# What is refused


def endless() -> Iterator[Tensor]:
    yield X


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stability": {"freeze_setled": 0.9}}, r"unknown option 'freeze_setled'; did you mean 'freeze_settled'"),
        ({"stability": {"freeze_settled": 1.5}}, r"stability: freeze_settled: expected a number in \(0, 1\], or None"),
        ({"stability": {"max_lost": 0}}, r"stability: max_lost: expected a number in \(0, 1\], or None, got 0"),
        ({"stability": {"settled_prunes": 0}}, r"stability: settled_prunes: expected a whole number, at least 1"),
        ({"stability": {"recalibrate": 0}}, r"recalibrate: expected a whole number, at least 1, or None, got 0"),
        ({"stability": {"rewind_to": -1}}, r"rewind_to: expected a whole number, at least 0, or None, got -1"),
        ({"stability": {"rewind_to": 0, "rewind_at": "end"}}, r"rewind_at: expected 'target' or 'prune', got 'end'"),
        ({"stability": 3}, r"stability: expected a Stability, an object with its options or None, got 3"),
        ({"stability": {"freeze_settled": 0.9}, "schedule": "one_shot"}, r"freeze_settled expects several prunes"),
        ({"stability": {"max_lost": 0.1}, "mode": "soft"}, r"max_lost expects channels that go for good"),
        ({"stability": {"rewind_to": 5}, "end_epoch": 5}, r"rewind_to expects a step before end_epoch \(5\).* got 5"),
        ({"stability": {"recalibrate": 2}}, r"recalibrate needs the pruner's batches="),
        ({"batches": [X]}, r"batches: expected None without stability=\{'recalibrate': n\}"),
        ({"stability": {"recalibrate": 2}, "batches": 7}, r"batches: expected a loader or a function .* got int"),
        ({"stability": {"recalibrate": 2}, "batches": endless()}, r"batches: expected what can be read again"),
        ({"scheduler": LambdaLR(sgd(Small()), lambda e: 1.0)}, r"scheduler: expected None without stability"),
        ({"stability": {"rewind_to": 1}, "scheduler": 3}, r"scheduler: expected a learning-rate scheduler, got int"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        pat.Pruner(Small(), **{"end_epoch": 9 if options.get("schedule") != "one_shot" else None} | options)


def test_a_configuration_may_hold_it() -> None:
    given = {"end_epoch": 5, "stability": {"max_lost": 0.1, "rewind_to": 2}}
    pruner = pat.Pruner.from_config(Small(), given)
    assert pruner.stability == pat.Stability(max_lost=0.1, rewind_to=2)
    with pytest.raises(pat.ConfigError, match=r"^stability: max_lost: expected a number in \(0, 1\]"):
        pat.Pruner.from_config(Small(), {"stability": {"max_lost": 2}})
