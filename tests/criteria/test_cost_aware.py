"""Importance against MACs, and what channels cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pat_fast as pat
from pat_fast.cost import channel_macs
from pat_fast.criteria import MACAware, Magnitude, Movement, Taylor
from pat_fast.plan import Binding, bind, build_plan
from tests.helpers import Case, Small, small_inputs


def test_the_cost_of_a_channel_is_what_its_removal_saves(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    rng = np.random.default_rng(0)
    cost = channel_macs(plan)
    twice = {c for term in plan.work for c in _in_two_axes(term.axes)}
    for channel in rng.permutation(plan.n_channels)[:30].tolist():
        keep[channel] = False
        saved = plan.macs() - plan.macs(keep)
        keep[channel] = True
        if channel in twice:
            assert cost[channel] >= saved - 1
        else:
            assert cost[channel] == pytest.approx(saved, abs=1)  # macs() rounds


def _in_two_axes(axes: tuple[Any, ...]) -> set[int]:
    seen, found = set(), set()
    for axis in axes:
        own = set(axis[axis >= 0].tolist())
        found |= seen & own
        seen |= own
    return found


def test_costs_are_those_of_the_living() -> None:
    plan = build_plan(Small(), small_inputs())
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    keep[:4] = False
    cost = channel_macs(plan, keep)
    assert not cost[:4].any()
    keep[5] = False
    before = keep.copy()
    before[5] = True
    assert cost[5] >= plan.macs(before) - plan.macs(keep) - 1


class Flat:
    """All channels alike."""

    def score(self, binding: Binding) -> Tensor:
        return torch.ones(binding.plan.n_channels)


@pytest.mark.parametrize("how", ["product", "sum"])
def test_dear_channels_go_first(how: str) -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    scores = MACAware(Flat(), 1.0, how).score(binding)
    cost = torch.from_numpy(channel_macs(binding.plan))
    share = (cost / cost.mean()).float()
    torch.testing.assert_close(scores, 1 / share if how == "product" else 1 - share)
    plain = Magnitude().score(binding)
    same = MACAware(Magnitude(), 0.0, how).score(binding)
    assert torch.equal(same.argsort(), plain.argsort())


def test_it_watches_for_its_criterion() -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    inner = Taylor()
    criterion = MACAware(inner, 0.5)
    model(small_inputs()).sum().backward()
    criterion.observe(binding)
    state = criterion.state_dict(binding)
    scores = criterion.score(binding)
    model.zero_grad()
    other = MACAware(Taylor(), 0.5)
    other.load_state_dict(state, binding)
    torch.testing.assert_close(other.score(binding), scores)
    criterion.reset()
    assert not inner.histories[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MACAware(Flat(), -1), r"weight: expected a number, at least 0, got -1"),
        (lambda: MACAware(Flat(), how="ratio"), r"how: expected one of product, sum, got 'ratio'"),
        (lambda: MACAware(3), r"criterion: expected an object with score\(binding\), got 3"),  # type: ignore[arg-type]
        (lambda: MACAware(Movement()), r"how: expected 'sum' with Movement, whose scores may be negative"),
        (lambda: MACAware(Magnitude(normalizer="gaussian")), r"how: expected 'sum' with Magnitude"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        make()
