"""The gradient regulariser against Torch-Pruning's, against loops, and at its edges."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cases import Subject
from pat_fast import ConfigError
from pat_fast.criteria import GroupNorm
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.plan.types import is_grouped
from pat_fast.regularizers import REGULARIZED, GroupNormRegularizer
from tests.helpers import Case, Small, is_weight, small_inputs
from tests.regularizers.helpers import grads, zero_grads

STRENGTH = 1e-2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@cache
def subject(name: str) -> Subject:
    return Subject(name, small=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "densenet121", "googlenet", "conv3d"])
def test_gradients_are_torch_prunings(name: str) -> None:
    both = subject(name)
    assert {m.root for m in both.matches} == {g.root for g in both.plan.groups}
    zero_grads(both.model)
    both.pruner(tp.pruner.GroupNormPruner, both.model, reg=STRENGTH).regularize(both.model, alpha=16)
    theirs = grads(both.model)
    zero_grads(both.model)
    GroupNormRegularizer(STRENGTH, alpha=16).apply(both.binding)
    for key, ours in grads(both.model).items():
        torch.testing.assert_close(ours, theirs[key], rtol=1e-4, atol=1e-9, msg=key)
    assert sum(bool(g.any()) for g in theirs.values()) > 6


def slow_gradient(binding: Binding, name: str, gamma: Tensor, strength: float) -> Tensor:
    """What is added to the gradient of one weight, index by index."""
    tensor_map, weight = binding.plan.tensor(name), binding.tensors[name].detach()
    factor = torch.zeros_like(weight)
    for axis in tensor_map.axes:
        for index in np.flatnonzero(axis.channels >= 0).tolist():
            if is_grouped(tensor_map, axis):
                block, column = divmod(index, tensor_map.shape[1])
                rows = tensor_map.shape[0] // tensor_map.groups
                factor[block * rows : (block + 1) * rows, column] += gamma[axis.channels[index]]
            else:
                factor.select(axis.dim, index).add_(gamma[axis.channels[index]])
    return strength * factor * weight


def test_gradients_are_those_of_loops(case: Case) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    scores = GroupNorm().score(binding).sqrt()
    gamma = torch.empty_like(scores)
    for group in binding.plan.groups:
        own = scores[group.start : group.stop]
        gamma[group.start : group.stop] = 16 ** ((own.max() - own) / (own.max() - own.min()))
    start = {}
    for name, p in case.model.named_parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype)
        start[name] = p.grad.clone()
    GroupNormRegularizer(STRENGTH).apply(binding)
    mapped = {t.name for t in binding.plan.tensors}
    for name, p in case.model.named_parameters():
        owner, _, local = name.rpartition(".")
        expected = start[name]
        module = case.model.get_submodule(owner)
        if name in mapped and is_weight(local) and isinstance(module, REGULARIZED):
            expected = expected + slow_gradient(binding, name, gamma, STRENGTH)
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12, msg=name)


def small_binding(dtype: torch.dtype = torch.float64) -> tuple[Small, Binding]:
    model = Small().to(dtype)
    return model, bind(build_plan(model, small_inputs(dtype=dtype)), model)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_importances_give_no_nan(value: float) -> None:
    model, binding = small_binding()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    zero_grads(model)
    assert (GroupNormRegularizer().gamma(binding) == 1).all()
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert all(g.isfinite().all() for g in grads(model).values())
    # Equally important, every channel is pushed with gamma 1: once for the row, once for the column.
    torch.testing.assert_close(model.inner.weight.grad, 2 * STRENGTH * model.inner.weight.detach())
    torch.testing.assert_close(model.stem.weight.grad, STRENGTH * model.stem.weight.detach())


def test_gamma_goes_from_one_to_alpha_in_every_group() -> None:
    _, binding = small_binding()
    gamma = GroupNormRegularizer(alpha=5).gamma(binding)
    scores = GroupNorm().score(binding)
    for group in binding.plan.groups:
        own = slice(group.start, group.stop)
        assert (gamma[own].min().item(), gamma[own].max().item()) == pytest.approx((1, 5))
        assert gamma[own].argmax() == scores[own].argmin()


def test_weights_without_a_gradient_and_frozen_ones_are_left_alone() -> None:
    model, binding = small_binding()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    everything = grads(model)
    zero_grads(model)
    model.inner.weight.grad = None
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert model.inner.weight.grad is None
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, everything[name], rtol=0, atol=0, msg=name)
    assert not everything["inner.bias"].any()
    assert everything["head.weight"].any()
    model.zero_grad()
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert not grads(model)


def test_a_loss_scale_and_a_choice_of_channels() -> None:
    model, binding = small_binding()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    once = grads(model)
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding, scale=1024.0)
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, 1024 * once[name])
    zero_grads(model)
    where = torch.zeros(binding.plan.n_channels, dtype=torch.bool)
    outer = next(g for g in binding.plan.groups if g.root == "outer")
    where[outer.start + 2] = True
    GroupNormRegularizer(STRENGTH).apply(binding, where=where)
    torch.testing.assert_close(model.stem.weight.grad[2], once["stem.weight"][2])
    model.stem.weight.grad[2] = 0
    assert not model.stem.weight.grad.any()


def test_a_choice_of_weights() -> None:
    model, binding = small_binding()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    everything = grads(model)
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding, only={id(model.outer.weight), id(model.norm.weight)})
    for name, grad in grads(model).items():
        expected = everything[name] if name in ("outer.weight", "norm.weight") else torch.zeros_like(grad)
        assert torch.equal(grad, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_another_memory_format(dtype: torch.dtype) -> None:
    """Autograd may lay a gradient out differently from its weight; after that both agree."""
    model, binding = small_binding(dtype)
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    expected = model.inner.weight.grad
    zero_grads(model)
    model.inner.weight.grad = model.inner.weight.grad.to(memory_format=torch.channels_last)
    assert model.inner.weight.grad.stride() != model.inner.weight.stride()
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert torch.equal(model.inner.weight.grad, expected)
    assert model.inner.weight.grad.dtype == dtype


def test_weights_that_are_laid_out_otherwise_since() -> None:
    model, binding = small_binding()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    expected = grads(model)
    model.to(memory_format=torch.channels_last)
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert not model.inner.weight.is_contiguous()
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-12)


def test_masked_channels_do_not_set_the_scale() -> None:
    _, binding = small_binding()
    full = GroupNormRegularizer().gamma(binding)
    binding.alive = torch.ones(binding.plan.n_channels, dtype=torch.bool)
    worst = full.argmax()
    binding.alive[worst] = False
    gamma = GroupNormRegularizer().gamma(binding)
    group = binding.plan.groups[int(binding.plan.group_of[worst])]
    own = torch.arange(group.start, group.stop)
    own = own[own != worst]
    assert gamma[own].max().item() == pytest.approx(16)
    assert gamma.isfinite().all()


def test_any_criterion_may_say_what_is_important() -> None:
    class Backwards:
        def score(self, binding: Binding) -> Tensor:
            return -torch.arange(binding.plan.n_channels, dtype=torch.float64)

    model, binding = small_binding()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH, criterion=Backwards()).apply(binding)
    assert all(g.isfinite().all() for g in grads(model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": -1.0}, r"strength: expected a number, at least 0, got -1.0"),
        ({"strength": float("nan")}, r"strength: expected a number, at least 0, got nan"),
        ({"strength": "1e-4"}, r"strength: expected a number, at least 0, got '1e-4'"),
        ({"alpha": 0.5}, r"alpha: expected a number, at least 1, got 0.5"),
        ({"alpha": None}, r"alpha: expected a number, at least 1, got None"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupNormRegularizer(**arguments)


def torch_prunings(model: nn.Module, x: Tensor, **how: Any) -> Any:
    return tp.pruner.GroupNormPruner(
        model, x, tp.importance.MagnitudeImportance(), in_channel_groups={}, out_channel_groups={}, num_heads={}, **how
    )


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 1)], IndexError),
        ([nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3), nn.Conv2d(6, 4, 1)], (IndexError, RuntimeError)),
        ([nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1)], AttributeError),
    ],
)
def test_layers_that_torch_pruning_fails_on(layers: list[nn.Module], error: Any) -> None:
    """Against loops: test_gradients_are_those_of_loops; Torch-Pruning raises."""
    model = nn.Sequential(*layers)
    zero_grads(model)
    with pytest.raises(error):
        torch_prunings(model, IMAGE).regularize(model)
    zero_grads(model)
    binding = bind(build_plan(model, IMAGE), model)
    gamma = GroupNormRegularizer().gamma(binding)
    GroupNormRegularizer(STRENGTH).apply(binding)
    for name in (t.name for t in binding.plan.tensors if t.name.endswith("weight")):
        expected = slow_gradient(binding, name, gamma, STRENGTH)
        torch.testing.assert_close(binding.tensors[name].grad, expected, rtol=1e-5, atol=1e-9)


def test_equal_importances_of_torch_pruning_are_nan() -> None:
    model = Small()
    for p in model.parameters():
        nn.init.ones_(p)
    zero_grads(model)
    torch_prunings(model, small_inputs()).regularize(model)
    assert model.inner.weight.grad.isnan().all()


def test_alpha_is_honoured() -> None:
    """Torch-Pruning takes ``alpha`` when it is made, and regularises with 16 all the same."""
    both = subject("resnet18")
    found = []
    for alpha in (2, 8):
        zero_grads(both.model)
        both.pruner(tp.pruner.GroupNormPruner, both.model, reg=STRENGTH, alpha=alpha).regularize(both.model)
        theirs = grads(both.model)
        zero_grads(both.model)
        GroupNormRegularizer(STRENGTH, alpha=2.0**alpha).apply(both.binding)
        found.append((theirs, grads(both.model)))
    (theirs_low, ours_low), (theirs_high, ours_high) = found
    assert all(torch.equal(theirs_low[key], theirs_high[key]) for key in theirs_low)
    assert ours_high["conv1.weight"].norm() > ours_low["conv1.weight"].norm()


def test_ignored_layers_are_left_alone() -> None:
    """Torch-Pruning pushes the inputs of ignored layers."""
    model, binding = small_binding()
    zero_grads(model)
    torch_prunings(model, small_inputs(dtype=torch.float64), ignored_layers=[model.head]).regularize(model)
    assert model.head.weight.grad.any()
    zero_grads(model)
    GroupNormRegularizer(STRENGTH).apply(binding, only={id(p) for p in model.parameters()} - {id(model.head.weight)})
    assert not model.head.weight.grad.any()
    assert model.outer.weight.grad.any()


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn"])
def test_biases_are_torch_prunings(name: str) -> None:
    both = subject(name)
    zero_grads(both.model)
    both.pruner(tp.pruner.GroupNormPruner, both.model, reg=STRENGTH).regularize(both.model, alpha=16, bias=True)
    theirs = grads(both.model)
    zero_grads(both.model)
    GroupNormRegularizer(STRENGTH, alpha=16, bias=True).apply(both.binding)
    for key, ours in grads(both.model).items():
        torch.testing.assert_close(ours, theirs[key], rtol=1e-4, atol=1e-9, msg=key)
    assert any(g.any() for key, g in theirs.items() if key.endswith("bias"))


@pytest.mark.parametrize("unknown", [torch.nan, torch.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_groups_that_cannot_be_scored_are_not_pushed(unknown: float, whole: bool) -> None:
    class Blind:
        def score(self, binding: Binding) -> Tensor:
            scores = torch.arange(binding.plan.n_channels, dtype=torch.float64)
            group = binding.plan.groups[0]
            scores[group.start : group.stop if whole else group.start + 1] = unknown
            return scores

    _, binding = small_binding()
    gamma = GroupNormRegularizer(criterion=Blind()).gamma(binding)
    group = binding.plan.groups[0]
    assert (gamma[group.start : group.stop] == 0).all()
    assert (gamma[group.stop :] >= 1).all()
