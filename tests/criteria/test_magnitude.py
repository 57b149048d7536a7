"""Criteria of the weights, against loops in float64 and against what the papers say of simple cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.criteria import FPGM, LAMP, BNScale, Magnitude
from pat_fast.plan import Binding, bind, build_plan
from tests.criteria.slow import mean_scores, members, parts
from tests.helpers import Case, Small, small_inputs


def bound(model: nn.Module) -> Binding:
    return bind(build_plan(model, small_inputs(dtype=next(model.parameters()).dtype)), model)


@pytest.mark.parametrize("p", [0.5, 1, 3])
def test_magnitude_is_that_of_loops(case: Case, p: float) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    criterion = Magnitude(p, normalizer=None)
    expected = mean_scores(binding, criterion, lambda _, weight: weight.abs().pow(p))
    torch.testing.assert_close(criterion.score(binding), expected)


def test_with_its_defaults_magnitude_is_the_group_norm(case: Case) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    scores = Magnitude().score(binding)
    scored = scores.isfinite()
    torch.testing.assert_close(scores[scored], pat.criteria.GroupNorm().score(binding)[scored])


@pytest.mark.parametrize("reduction", ["sum", "max", "prod", "first", "gate"])
def test_every_reduction_is_that_of_the_members(reduction: str) -> None:
    binding = bound(Small().double())
    scores = Magnitude(1, reduction=reduction, normalizer=None).score(binding)
    rows = members(binding, Magnitude.types, lambda _, weight: weight.abs())
    for group, own in zip(binding.plan.groups, rows, strict=True):
        table = torch.stack([row for row, _ in own])
        assert all(held.all() for _, held in own)
        found = scores[group.start : group.stop]
        if reduction in ("first", "gate"):
            # One of the members: the layer that makes the channels, or the last one.
            same = [torch.allclose(found, row) for row in table]
            assert sum(same) == 1
            assert reduction != "first" or torch.allclose(
                found, binding.tensors[f"{group.root}.weight"].detach().abs().flatten(1).sum(1)
            )
        else:
            expected = {"sum": table.sum, "max": table.amax, "prod": table.prod}[reduction](0)
            torch.testing.assert_close(found, expected)


def test_a_function_may_reduce() -> None:
    binding = bound(Small().double())
    scores = Magnitude(1, reduction=lambda rows: rows.amin(0), normalizer=None).score(binding)
    rows = members(binding, Magnitude.types, lambda _, weight: weight.abs())
    for group, own in zip(binding.plan.groups, rows, strict=True):
        expected = torch.stack([row for row, _ in own]).amin(0)
        torch.testing.assert_close(scores[group.start : group.stop], expected)


def test_bn_scales_count_and_groups_without_a_norm_stay() -> None:
    model = Small()
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-1, 0.5, 12))
    binding = bound(model)
    scores = BNScale().score(binding)
    of = {g.root: scores[g.start : g.stop] for g in binding.plan.groups}
    torch.testing.assert_close(of["outer"], model.norm.weight.detach().abs())
    assert of["inner"].isposinf().all()
    report = pat.Pruner(
        model, 0.5, "constant", importance="bn_scale", example_inputs=small_inputs(), end_epoch=1, auto=False
    ).step()
    assert [(name, after) for name, _, after in report.changed] == [("outer", 1)]
    assert model.inner.out_channels == 16
    assert "BNScale has no score for inner: it stays" in report.notes
    assert float(model.norm.weight.detach().abs()) == pytest.approx(1.0)  # the largest is what is left


def test_lamp_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 1.0, 4.0, 3.0]).reshape(4, 1, 1, 1).expand(4, 3, 1, 1))
        model[2].weight.zero_()
    scores = LAMP(p=1).score(bound(model))
    torch.testing.assert_close(scores, torch.tensor([2 / 9, 1 / 10, 1.0, 3 / 7]))


def slow_distances(binding: Binding) -> Tensor:
    plan = binding.plan
    total = torch.zeros(plan.n_channels, dtype=torch.float64)
    count = torch.zeros(len(plan.groups), dtype=torch.float64)
    for tensor_map in plan.tensors:
        module, local = binding.owner(tensor_map.name)
        if local != "weight" or not isinstance(module, FPGM.types):
            continue
        for axis in tensor_map.axes:
            rows = parts(tensor_map, axis, binding.tensors[tensor_map.name].detach().double()).flatten(1)
            of = [int(plan.group_of[c]) if c >= 0 else -1 for c in axis.channels]
            for group in set(of) - {-1}:
                count[group] += 1
            for i, channel in enumerate(axis.channels.tolist()):
                for j in range(len(rows)):
                    if channel >= 0 and of[j] == of[i]:
                        total[channel] += (rows[i] - rows[j]).square().sum().sqrt()
    return total / count.clamp_min(1)[torch.from_numpy(plan.group_of).long()]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50", "vgg16_bn", "unet"])
def test_fpgm_is_that_of_loops(name: str) -> None:
    case = Case.build(name)
    binding = bind(build_plan(case.model, case.inputs), case.model)
    scores = FPGM(normalizer=None).score(binding)
    scored = scores.isfinite()
    torch.testing.assert_close(scores[scored], slow_distances(binding)[scored], rtol=1e-5, atol=1e-8)


def test_fpgm_sees_no_masked_channels() -> None:
    model = Small().double()
    binding = bound(model)
    group = next(g for g in binding.plan.groups if "stem" in g.layers)
    binding.alive = torch.ones(binding.plan.n_channels, dtype=torch.bool)
    binding.alive[[group.start + 1, group.start + 5]] = False
    scores = FPGM(normalizer=None).score(binding)
    with torch.no_grad():
        model.stem.weight[[1, 5]] += 100
    again = FPGM(normalizer=None).score(binding)
    assert torch.equal(scores[binding.alive], again[binding.alive])
    binding.alive = None
    assert (FPGM(normalizer=None).score(binding)[group.start : group.stop] > 100).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Magnitude(0), r"p: expected a positive number \(1 or 2, say\), got 0"),
        (lambda: Magnitude(reduction="mode"), r"expected one of sum, mean"),
        (lambda: Magnitude(reduction=None), r"reduction: expected one of .* got None: a channel has one score"),
        (lambda: Magnitude(normalizer="lamb"), r"normalizer: expected one of .* did you mean 'lamp'"),
        (lambda: Magnitude(bias=1), r"bias: expected true or false, got 1"),
        (lambda: FPGM(normalizer="lamp"), r"normalizer: expected another than 'lamp', which adds up magnitudes"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        make()
