"""The ledger's sums and the reductions of whole plans, index by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pat_fast import ConfigError
from pat_fast.criteria import REDUCTIONS, Ledger, reduce_members, reduce_rows
from pat_fast.criteria.ledger import book
from pat_fast.ops import channel_reduce
from pat_fast.plan import bind, build_plan
from pat_fast.plan.types import is_grouped
from tests.helpers import Case, Small, small_inputs


def weights(case: Case, pooled: bool) -> tuple[Any, Any]:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    tally = book(binding, f"weights {pooled}", lambda m: m.is_parameter, pooled=pooled)
    return binding, tally


def slow_members(binding: Any, tally: Any, pooled: bool) -> tuple[np.ndarray, np.ndarray]:
    """``(scores, held) [members, N]``: what each member holds of each channel, index by index."""
    plan, ledger = binding.plan, tally.ledger
    scores = np.zeros((len(ledger.members), plan.n_channels))
    held = np.zeros(scores.shape, dtype=bool)
    row = {member: i for i, member in enumerate(ledger.members)}
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter:
            continue
        weight = binding.tensors[tensor_map.name].detach().double().abs()
        for axis in tensor_map.axes:
            if is_grouped(tensor_map, axis):
                parts = weight.unflatten(0, (tensor_map.groups, -1)).movedim(2, 1).flatten(0, 1).flatten(1).sum(1)
                if pooled:
                    parts = parts.view(tensor_map.groups, -1).sum(0).repeat(tensor_map.groups)
            else:
                parts = weight.movedim(axis.dim, 0).reshape(weight.shape[axis.dim], -1).sum(1)
            for channel, value in zip(axis.channels.tolist(), parts.tolist(), strict=True):
                if channel >= 0:
                    member = row[tensor_map.name, axis.dim, int(plan.group_of[channel])]
                    scores[member, channel] += value
                    held[member, channel] = True
    return scores, held


@pytest.mark.parametrize("pooled", [True, False])
def test_reductions_are_those_of_loops(case: Case, pooled: bool) -> None:
    binding, tally = weights(case, pooled)
    values = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=1.0) for t in tally.tiles])
    scores, held = slow_members(binding, tally, pooled)
    order = tally.ledger.ordered()
    for how in (*REDUCTIONS, lambda rows: rows.prod(0) + rows[0] * rows[-1]):
        found = reduce_members(values, tally.ledger, how)
        for group, members in zip(binding.plan.groups, order, strict=True):
            own = slice(group.start, group.stop)
            rows = torch.from_numpy(scores[members, own])
            expected = reduce_rows(rows, torch.from_numpy(held[members, own]), how)
            torch.testing.assert_close(found[own], expected, rtol=1e-9, atol=0, msg=f"{group.root} {how}")


def test_rows() -> None:
    rows = torch.tensor([[1.0, 0.0, 5.0], [3.0, 0.0, 0.0]])
    covers = torch.tensor([[True, False, True], [True, False, False]])
    expected: dict[Any, list[float]] = {
        "sum": [4, 0, 5],
        "mean": [2, 0, 2.5],
        "max": [3, 0, 5],
        "prod": [3, 1, 5],
        "first": [1, 0, 5],
        "gate": [3, 0, 0],
    }
    for how, values in expected.items():
        torch.testing.assert_close(reduce_rows(rows, covers, how), torch.tensor(values, dtype=torch.float32), msg=how)
    negative = torch.tensor([[-1.0, 0.0, -5.0], [-3.0, 0.0, 0.0]])
    torch.testing.assert_close(reduce_rows(negative, covers, "max"), torch.tensor([-1.0, 0.0, -5.0]))
    assert reduce_rows(rows, covers, None) is rows


def test_an_order_may_be_given() -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    tally = book(binding, "weights", lambda m: m.name.endswith("weight"))
    outer = next(i for i, g in enumerate(binding.plan.groups) if g.root == "outer")
    own = slice(binding.plan.groups[outer].start, binding.plan.groups[outer].stop)
    values = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=2.0) for t in tally.tiles])
    inputs = model.inner.weight.detach().square().sum((0, 2, 3))
    scale = model.norm.weight.detach().square()
    order = {outer: [("inner.weight", 1), ("head.weight", 1)]}
    torch.testing.assert_close(reduce_members(values, tally.ledger, "first", order)[own], inputs)
    everything = {outer: [*order[outer], ("outer.weight", 0), ("stem.weight", 0), ("norm.weight", 0)]}
    torch.testing.assert_close(reduce_members(values, tally.ledger, "gate", everything)[own], scale)
    root = model.outer.weight.detach().square().sum((1, 2, 3))
    torch.testing.assert_close(reduce_members(values, tally.ledger, "first")[own], root)


def test_books_follow_the_memory_layout() -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)

    def scores() -> Tensor:
        tally = book(binding, "weights", lambda m: m.name.endswith("weight"))
        return reduce_members(
            tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=2.0) for t in tally.tiles]),
            tally.ledger,
            "max",
        )

    before = scores()
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(scores(), before)


def test_several_dtypes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    plan = build_plan(model, torch.randn(2, 4))
    model[1].double()
    binding = bind(plan, model)
    tally = book(binding, "weights", lambda m: m.name.endswith("weight"))
    values = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=1.0) for t in tally.tiles])
    assert values.dtype == torch.float64
    expected = model[0].weight.detach().abs().sum(1).double() + model[1].weight.detach().abs().sum(0)
    torch.testing.assert_close(reduce_members(values, tally.ledger, "sum"), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", ["avg", 3, ""])
def test_unknown_reductions(how: Any) -> None:
    with pytest.raises(ConfigError, match="group_reduction: expected one of sum, mean"):
        reduce_rows(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), how)


def test_functions_must_return_one_score_a_channel() -> None:
    rows, covers = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ConfigError, match=r"from \(2, 3\) \(members, channels\)"):
        reduce_rows(rows, covers, lambda r: r.sum(1))


def test_a_ledger_of_nothing() -> None:
    model = Small()
    plan = build_plan(model, small_inputs())
    ledger = Ledger(plan, [], torch.device("cpu"))
    assert not ledger.scored.any()
    assert (reduce_members(torch.zeros(0), ledger, "mean") == 0).all()
