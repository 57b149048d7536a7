"""Network slimming against Torch-Pruning's, and where that is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cases import Subject
from pat_fast import ConfigError
from pat_fast.plan import bind, build_plan
from pat_fast.regularizers import BNScaleRegularizer
from tests.helpers import Small, small_inputs
from tests.regularizers.helpers import grads, zero_grads

STRENGTH = 1e-2


@pytest.mark.parametrize("group_lasso", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "resnext50"])
def test_gradients_are_torch_prunings(name: str, group_lasso: bool) -> None:
    both = Subject(name, small=True)
    theirs = both.pruner(tp.pruner.BNScalePruner, both.model, reg=STRENGTH, group_lasso=group_lasso)
    theirs._groups = [g for g in theirs._groups if any(is_norm(i.dep.target.module) for i in g)]
    zero_grads(both.model)
    theirs.regularize(both.model)
    expected = grads(both.model)
    zero_grads(both.model)
    BNScaleRegularizer(STRENGTH, group_lasso).apply(both.binding)
    for key, grad in grads(both.model).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-9, msg=key)
    assert sum(bool(g.any()) for g in expected.values()) > 6


def is_norm(module: Any) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


class Joined(nn.Module):
    """A batch norm over the channels of two groups, and a group without any."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(10)
        self.three, self.four = nn.Conv2d(10, 5, 1), nn.Conv2d(5, 2, 1)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.four(self.three(self.norm(torch.cat([self.one(x), self.two(x)], 1))))


def test_group_lasso_behind_a_concatenation_and_without_norms() -> None:
    """Torch-Pruning: wrong shapes behind the concatenation, None + float for the group without a norm."""
    model, x = Joined(), torch.randn(2, 3, 8, 8)
    theirs = tp.pruner.BNScalePruner(
        model, x, tp.importance.BNScaleImportance(), group_lasso=True, in_channel_groups={}, out_channel_groups={},
        num_heads={},
    )  # fmt: skip
    zero_grads(model)
    groups = theirs._groups
    for module, error in ((model.one, RuntimeError), (model.three, TypeError)):
        theirs._groups = [g for g in groups if g[0].dep.target.module is module]
        with pytest.raises(error):
            theirs.regularize(model)
    zero_grads(model)
    BNScaleRegularizer(STRENGTH, group_lasso=True).apply(bind(build_plan(model, x), model))
    weight = model.norm.weight.detach()
    torch.testing.assert_close(model.norm.weight.grad, STRENGTH * weight / (weight.square() + 1e-9).sqrt())
    assert not model.three.weight.grad.any()


def test_sign_reaches_norms_that_no_group_holds() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 2, 3))
    nn.init.normal_(model[0].weight)
    zero_grads(model)
    BNScaleRegularizer(STRENGTH).apply(bind(build_plan(model, torch.randn(2, 3, 8, 8)), model))
    torch.testing.assert_close(model[0].weight.grad, STRENGTH * model[0].weight.detach().sign())


@pytest.mark.parametrize("group_lasso", [False, True])
def test_a_loss_scale_a_choice_of_channels_and_of_parameters(group_lasso: bool) -> None:
    model = Small()
    nn.init.normal_(model.norm.weight)
    binding = bind(build_plan(model, small_inputs()), model)
    regularizer = BNScaleRegularizer(STRENGTH, group_lasso)
    zero_grads(model)
    regularizer.apply(binding)
    once = model.norm.weight.grad
    zero_grads(model)
    regularizer.apply(binding, scale=64.0)
    torch.testing.assert_close(model.norm.weight.grad, 64 * once)
    zero_grads(model)
    where = torch.zeros(binding.plan.n_channels, dtype=torch.bool)
    where[next(g for g in binding.plan.groups if g.root == "outer").start + 2] = True
    regularizer.apply(binding, where=where)
    assert model.norm.weight.grad.nonzero().tolist() == [[2]]
    torch.testing.assert_close(model.norm.weight.grad[2], once[2])
    zero_grads(model)
    regularizer.apply(binding, only=())
    assert not model.norm.weight.grad.any()
    model.zero_grad()
    regularizer.apply(binding)
    assert model.norm.weight.grad is None


def test_a_strength_that_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="strength: expected a number, at least 0"):
        BNScaleRegularizer(-1.0)
