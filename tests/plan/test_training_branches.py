"""What a model's code runs in training alone is put to the proof, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.dry_run import dry_run
from pat_fast.plan import Plan, bind, build_plan
from pat_fast.plan.running import Still
from pat_fast.plan.verify import verify
from pat_fast.rehearsal import rehearse
from pat_fast.surgery import prune
from tests.helpers import random_keep, small_inputs
from tests.plan.test_verify import LIES, change, spots


class WithHead(nn.Module):
    """An auxiliary head that only training uses; ``between`` comes in front of its last layer."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6 * 36, 5)
        self.head = nn.Linear(8, 5)
        self.between = between

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        MODES.append(self.training)
        x = self.norm(self.stem(x)).relu()
        out = self.head(x.mean((2, 3)))
        if not self.training:
            return out
        return out, self.last(self.between(self.drop(self.inner_norm(self.inner(x)).relu().flatten(1))))


MODES: list[bool] = []
OWN = ("inner.", "inner_norm.", "last.")


def lowered(model: nn.Module, x: Tensor) -> tuple[Plan, Still]:
    still = Still(model)
    return build_plan(model, x, still), still


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_what_only_training_uses_is_caught(lie: Callable[[np.ndarray], np.ndarray]) -> None:
    torch.manual_seed(0)
    model, x = WithHead(), small_inputs()
    plan, still = lowered(model, x)
    assert still.trains_more
    assert rehearse(plan, model, x, still=still)
    places = [(i, j) for i, j in spots(plan) if plan.tensors[i].name.startswith(OWN)]
    assert len(places) == 5
    for i, j in places:
        lying = change(plan, i, j, lie(plan.tensors[i].axes[j].channels))
        where = plan.tensors[i].name, j
        assert not rehearse(lying, model, x, still=still), where
        assert rehearse(lying, model.eval(), x), where  # in eval mode nothing uses it
        proof = verify(lying, model.train(), x, training=True)
        guilty = set(proof.wrong) or set(dry_run(lying, model, x, proof.shapes, training=True))
        assert guilty == set(plan.group_of[plan.tensors[i].axes[j].channels].tolist()), where


def test_its_groups_are_frozen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = WithHead(), small_inputs()
    honest, _ = lowered(model, x)
    number = next(i for i, t in enumerate(honest.tensors) if t.name == "inner_norm.bias")
    lying = change(honest, number, 0, np.roll(honest.tensors[number].axes[0].channels, 1))

    def lower(model: nn.Module, inputs: Tensor, still: Still) -> Plan:
        return replace(lying, notes=build_plan(model, inputs, still).notes)

    monkeypatch.setattr("pat_fast.proof.lower", lower)
    plan = pat.build_plan(model, x)
    assert [g.root for g in plan.groups] == ["stem"]
    assert ("inner", "map does not hold") in [(f.layer, f.reason[4:21]) for f in plan.frozen]


def test_it_is_run_only_where_the_trace_saw_weights_that_eval_mode_does_not_use() -> None:
    MODES.clear()
    pat.build_plan(WithHead(), small_inputs())
    assert (MODES.count(False), MODES.count(True)) == (3, 4)
    MODES.clear()
    pat.build_plan(WithHead().eval(), small_inputs())
    assert (MODES.count(False), MODES.count(True)) == (3, 0)


class OwnNorm(nn.BatchNorm2d):
    """Of no module of PyTorch's, so it is in training where the model's code is."""


def test_the_model_is_left_in_training_and_its_statistics_alone() -> None:
    model = WithHead()
    model.norm.eval()
    model.inner_norm = OwnNorm(6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    pat.build_plan(model, small_inputs())
    assert [m.training for m in model.modules()] == [m is not model.norm for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("drop", [False, True])
def test_a_size_in_its_code_is_found(drop: bool) -> None:
    def between(x: Tensor) -> Tensor:
        return F.dropout(x.view(-1, 216), 0.1 if drop else 0.0)

    plan = pat.build_plan(WithHead(between), small_inputs())
    assert [g.root for g in plan.groups] == ["stem"]
    assert "does not run when it is smaller" in next(f.reason for f in plan.frozen if f.layer == "inner")


class Fixed(torch.autograd.Function):
    """Its backward has a size in the code."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad.view(-1, 216)


def test_a_size_in_the_code_of_its_backward_is_found() -> None:
    plan = pat.build_plan(WithHead(Fixed.apply), small_inputs())
    assert [g.root for g in plan.groups] == ["stem"]
    assert "does not run when it is smaller" in next(f.reason for f in plan.frozen if f.layer == "inner")


def test_random_numbers_leave_nothing_to_compare_and_what_uses_them_is_pruned() -> None:
    torch.manual_seed(0)
    model = WithHead(lambda x: F.dropout(x, 0.3))
    plan = pat.build_plan(model, small_inputs())
    assert [g.root for g in plan.groups] == ["stem", "inner"]
    assert "group by group" not in plan.notes[-1]


class WithAuxiliary(nn.Module):
    """A head that only training uses, and one that is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.auxiliary = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
        self.head, self.other = nn.Linear(8, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.stem(x)).relu()
        out = self.head(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else out


def test_what_only_training_runs_is_pruned_along_and_what_nothing_runs_is_noted() -> None:
    model, x = WithAuxiliary(), small_inputs()
    macs = build_plan(model.eval(), x).macs()
    plan = build_plan(model.train(), x)
    assert [g.root for g in plan.groups] == ["stem", "auxiliary.0"]
    assert {f.layer for f in plan.frozen} == {"head", "auxiliary.3"}
    assert plan.macs() == macs  # of inference
    assert any("not used by this forward" in note and note.count(": other (") for note in plan.notes), plan.notes
    assert model.training
    assert not model.norm.num_batches_tracked
    prune(bind(plan, model), random_keep(plan, 0, 0.5))
    assert model.stem.out_channels == model.auxiliary[0].in_channels < 8
    sum(out.sum() for out in model(x)).backward()


class Averages(nn.Module):
    """Keeps averages that only training writes: of what passes, and of examples, which a table is written from."""

    def __init__(self, channels: int, examples: int = 5) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(channels))
        self.register_buffer("table", torch.randn(examples, channels))
        self.register_buffer("sums", torch.zeros(examples, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen.mul_(0.9).add_(x.abs().mean(0), alpha=0.1)
                self.sums.mul_(0.9).add_(torch.eye(len(x)) @ x, alpha=0.1)
                self.table.copy_(self.sums)
        return x * self.table[0]


def test_averages_that_only_training_writes_shrink_along() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Averages(8), nn.Linear(8, 3)), torch.randn(5, 6)
    before = copy.deepcopy(model.state_dict())
    plan = pat.build_plan(model, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    (group,) = plan.groups
    assert {"1.seen", "1.table", "1.sums"} <= {name for name, _ in group.members}
    prune(bind(plan, model), random_keep(plan, 0, 0.5))
    model(x).sum().backward()
    assert model[1].sums.shape == (5, model[0].out_features) != (5, 8)


def test_a_plan_of_which_nothing_is_left_may_be_proven_again() -> None:
    model, x = WithHead(), small_inputs()
    plan = build_plan(model, x)
    nothing = plan.freeze(range(len(plan.groups)), "for this test")
    assert nothing.kinds == []
    assert not nothing.verify(model, x).groups
