"""Growing regularisation against Torch-Pruning's, and where that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cases import Subject
from pat_fast import ConfigError, PlanError
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.regularizers import GrowingRegularizer
from pat_fast.surgery import prune
from tests.helpers import Small, random_keep, small_inputs
from tests.regularizers.helpers import grads, zero_grads

HOW = {"strength": 1e-2, "delta": 3e-2}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "densenet121", "googlenet"])
def test_gradients_are_torch_prunings(name: str, bias: bool) -> None:
    both = Subject(name, small=True)
    theirs = both.pruner(tp.pruner.GrowingRegPruner, both.model, reg=HOW["strength"], delta_reg=HOW["delta"])
    ours = GrowingRegularizer(**HOW, bias=bias)
    for _ in range(2):
        theirs.update_reg()
        ours.grow(both.binding)
    zero_grads(both.model)
    theirs.regularize(both.model, bias=bias)
    expected = grads(both.model)
    zero_grads(both.model)
    ours.apply(both.binding)
    modules = both.model.named_modules()
    norms = {f"{n}.{p}" for n, m in modules if isinstance(m, nn.BatchNorm2d) for p in ("weight", "bias")}
    compared = 0
    for key, grad in grads(both.model).items():
        if key in norms:  # Torch-Pruning adds to a copy
            assert not expected[key].any()
            assert grad.any() == (bias or key.endswith("weight"))
        else:
            torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-9, msg=key)
            compared += bool(grad.any())
    assert compared > 6


def small() -> tuple[Small, Binding]:
    model = Small().double()
    return model, bind(build_plan(model, small_inputs(dtype=torch.float64)), model)


def test_scales_of_batch_norms_are_pushed_with_their_channels_strength() -> None:
    model, binding = small()
    nn.init.normal_(model.norm.weight)
    regularizer = GrowingRegularizer(**HOW)
    regularizer.grow(binding)
    zero_grads(model)
    regularizer.apply(binding)
    outer = next(g for g in binding.plan.groups if g.root == "outer")
    own = regularizer.strengths(binding)[outer.start : outer.stop].double()
    torch.testing.assert_close(model.norm.weight.grad, own * model.norm.weight.detach(), rtol=1e-6, atol=0)


def test_strengths_grow_fastest_for_the_least_important() -> None:
    _, binding = small()
    regularizer = GrowingRegularizer(**HOW)
    for _ in range(3):
        regularizer.grow(binding)
    scores, strengths = regularizer.criterion.score(binding), regularizer.strengths(binding)
    for group in binding.plan.groups:
        own = slice(group.start, group.stop)
        assert strengths[own].max().item() == pytest.approx(HOW["strength"] + 3 * HOW["delta"], rel=1e-5)
        assert strengths[own].min().item() == pytest.approx(HOW["strength"], rel=1e-5)
        assert strengths[own].argmax() == scores[own].argmin()
    regularizer.reset()
    assert (regularizer.strengths(binding) == torch.tensor(HOW["strength"])).all()


def test_strengths_survive_a_prune() -> None:
    """Torch-Pruning's update_regularizer() starts anew."""
    model, binding = small()
    regularizer = GrowingRegularizer(**HOW)
    regularizer.grow(binding)
    before = regularizer.strengths(binding)
    keep = random_keep(binding.plan, seed=0)
    inner = next(g for g in binding.plan.groups if g.root == "inner")
    keep[inner.start : inner.stop] = False
    keep[inner.start + 5] = True  # the last of its group: no channel of the next plan
    smaller = prune(binding, keep)
    regularizer.shrink(binding.plan, keep)
    left = torch.from_numpy(keep)
    left[inner.start + 5] = False
    assert torch.equal(regularizer.strengths(smaller), before[left])
    assert len(left) > int(left.sum()) > 0
    zero_grads(model)
    regularizer.apply(smaller)

    both = Subject("resnet18", small=True)
    theirs = both.pruner(tp.pruner.GrowingRegPruner, both.model)
    theirs.update_reg()
    assert any(len(r.unique()) > 1 for r in theirs.group_reg.values())
    theirs.update_regularizer()
    assert all(len(r.unique()) == 1 for r in theirs.group_reg.values())


def test_strengths_of_another_plan() -> None:
    _, binding = small()
    regularizer = GrowingRegularizer()
    regularizer.grow(binding)
    with pytest.raises(PlanError, match=r"call shrink\(plan, keep\)"):
        regularizer.apply(prune(binding, random_keep(binding.plan, seed=0)))


def test_strengths_are_saved() -> None:
    _, binding = small()
    first, second = GrowingRegularizer(), GrowingRegularizer()
    second.load_state_dict(first.state_dict())
    first.grow(binding)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.strengths(binding), second.strengths(binding))
    second.grow(binding)
    assert not torch.equal(first.strengths(binding), second.strengths(binding))


def test_strengths_follow_the_model_to_another_device() -> None:
    _, binding = small()
    regularizer = GrowingRegularizer(**HOW)
    assert regularizer.strengths(binding).device.type == "cpu"
    binding.device = torch.device("meta")
    assert regularizer.strengths(binding).device.type == "meta"


def test_groups_without_scores_do_not_grow() -> None:
    class Blind:
        def score(self, binding: Binding) -> Tensor:
            scores = torch.arange(binding.plan.n_channels, dtype=torch.float64)
            scores[binding.plan.groups[0].start] = torch.nan
            return scores

    _, binding = small()
    regularizer = GrowingRegularizer(**HOW, criterion=Blind())
    regularizer.grow(binding)
    group = binding.plan.groups[0]
    strengths = regularizer.strengths(binding)
    assert (strengths[group.start : group.stop] == torch.tensor(HOW["strength"])).all()
    assert (strengths[group.stop :] > torch.tensor(HOW["strength"])).any()


def test_ignored_layers_are_left_alone() -> None:
    """Of ignored layers, Torch-Pruning pushes the inputs."""
    model, binding = small()
    theirs = tp.pruner.GrowingRegPruner(
        model, small_inputs(dtype=torch.float64), tp.importance.MagnitudeImportance(), ignored_layers=[model.head],
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    zero_grads(model)
    theirs.regularize(model)
    assert model.head.weight.grad.any()
    zero_grads(model)
    head = {id(p) for p in model.head.parameters()}
    GrowingRegularizer(**HOW).apply(binding, only={id(p) for p in model.parameters()} - head)
    assert not model.head.weight.grad.any()
    assert model.stem.weight.grad.any()


@pytest.mark.parametrize("arguments", [{"strength": -1.0}, {"delta": float("nan")}, {"delta": "1"}])
def test_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a number, at least 0"):
        GrowingRegularizer(**arguments)
