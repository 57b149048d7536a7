"""Where and how strongly regularisers push: coupled, decoupled, warmed up, under a loss scale, accumulating."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

import pat_fast as pat
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.regularizers import BNScaleRegularizer, GroupNormRegularizer, GrowingRegularizer, Penalty
from tests.helpers import Small, small_inputs

KINDS: dict[str, Callable[..., Penalty]] = {
    "group_norm": GroupNormRegularizer,
    "growing": GrowingRegularizer,
    "bn_scale": BNScaleRegularizer,
    "bn_lasso": lambda **options: BNScaleRegularizer(group_lasso=True, **options),
}


def backward(model: nn.Module, x: Tensor, scale: float = 1.0) -> None:
    (nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 5) * scale).backward()


def trained(
    regularizer: Any,
    make: Callable[[nn.Module], Optimizer],
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    train: Callable[[nn.Module, Optimizer, pat.Pruner], None] | None = None,
    **options: Any,
) -> nn.Module:
    """A model after some steps of training with a regulariser; ``train`` is one step."""
    torch.manual_seed(0)
    model = Small().to(dtype)
    optimizer = make(model)
    x = small_inputs(dtype=dtype)
    options = {"auto": True, **options}
    pruner = pat.Pruner(
        model, regularizer=regularizer, optimizer=optimizer, example_inputs=x, end_epoch=5, verify=False, **options
    )
    for _ in range(steps):
        if train is not None:
            train(model, optimizer, pruner)
        else:
            optimizer.zero_grad()
            backward(model, x)
            optimizer.step()
    pruner.close()
    return model


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def two_rates(model: nn.Module) -> Optimizer:
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.02}, {"params": rest}], lr=0.1)


def momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


# Decoupled


@pytest.mark.parametrize("make", [sgd, two_rates])
@pytest.mark.parametrize("kind", list(KINDS))
def test_decoupled_is_coupled_for_plain_sgd(kind: str, make: Callable[[nn.Module], Optimizer]) -> None:
    strength = 1e-4
    coupled = trained(KINDS[kind](strength=strength), make)
    decoupled = trained(KINDS[kind](strength=strength, decoupled=True), make)
    without = trained(None, make)
    # Up to the product of a row's and a column's factor: (lr * strength * alpha)^2, times three steps.
    assert distance(coupled, decoupled) < 4 * 3 * (0.1 * strength * 16) ** 2
    assert distance(coupled, without) > 100 * distance(coupled, decoupled)
    assert distance(coupled, without) > 1e-7


@pytest.mark.parametrize("make", [momentum, adam])
@pytest.mark.parametrize("kind", list(KINDS))
def test_decoupled_does_not_go_through_the_optimizer(kind: str, make: Callable[[nn.Module], Optimizer]) -> None:
    coupled = trained(KINDS[kind](strength=1e-3), make)
    decoupled = trained(KINDS[kind](strength=1e-3, decoupled=True), make)
    assert distance(coupled, decoupled) > 1e-6


def test_decoupled_is_the_decay_of_adamw() -> None:
    """A group norm with alpha 1 pushes every channel alike: a tensor with one side is decayed as by AdamW."""

    def adamw(decay: float) -> Callable[[nn.Module], Optimizer]:
        return lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=decay)

    ours = trained(GroupNormRegularizer(0.1, alpha=1.0, decoupled=True), adamw(0.0), steps=1)
    theirs = trained(None, adamw(0.1), steps=1)
    torch.testing.assert_close(ours.norm.weight, theirs.norm.weight, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.head.weight, theirs.head.weight, rtol=1e-8, atol=0)


def test_decoupled_needs_a_learning_rate() -> None:
    model = Small()
    regularizer = {"name": "group_norm", "decoupled": True}
    pruner = pat.Pruner(model, regularizer=regularizer, example_inputs=small_inputs(), auto=False, end_epoch=2)
    backward(model, small_inputs())
    with pytest.raises(pat.ConfigError, match="expected an optimizer, whose learning rate it goes by; pass optimizer="):
        pruner.regularize()
    before = model.stem.weight.detach().clone()
    pruner.regularize(optimizer=sgd(model))
    assert not torch.equal(before, model.stem.weight)


def test_what_an_optimizer_does_not_hold_is_left_alone() -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    backward(model, small_inputs())
    before = copy.deepcopy(model)
    GroupNormRegularizer(1.0, decoupled=True).before_step(binding, {id(model.stem.weight): 0.1})
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert changed == ["stem.weight"]


# Warm-up


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_strength_rises_in_a_line(kind: str, decoupled: bool) -> None:
    model = Small().double()
    binding = bind(build_plan(model, small_inputs(dtype=torch.float64)), model)
    backward(model, small_inputs(dtype=torch.float64))
    lr = {id(p): 0.1 for p in model.parameters()}
    start = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    regularizer = KINDS[kind](strength=1e-6, warmup=4, decoupled=decoupled)
    moved = []
    for _ in range(6):
        model.load_state_dict(start)
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g.clone()
        regularizer.apply(binding)
        regularizer.before_step(binding, lr)
        step = (model.norm.weight.grad - grads[1]) * 0.1 if not decoupled else start["norm.weight"] - model.norm.weight
        moved.append(float(step.detach().abs().sum()))
    assert moved[5] > 0
    assert [m / moved[5] for m in moved] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-5)


def test_warm_up_counts_steps_of_one_optimizer_and_is_saved() -> None:
    model = Small()
    params = list(model.parameters())
    one, two = torch.optim.SGD(params[:3], lr=0.1), torch.optim.SGD(params[3:], lr=0.1)
    options: dict[str, Any] = {"example_inputs": small_inputs(), "end_epoch": 4, "verify": False}
    options["regularizer"] = {"name": "group_norm", "warmup": 10}
    pruner = pat.Pruner(model, **options)
    for _ in range(3):
        backward(model, small_inputs())
        one.step()
        two.step()
    assert isinstance(pruner.regularizer, Penalty)
    assert pruner.regularizer.steps == 3
    assert pruner.regularizer.factor == 0.3
    again = pat.Pruner(model, **options)
    again.load_state_dict(pruner.state_dict())
    assert isinstance(again.regularizer, Penalty)
    assert again.regularizer.factor == 0.3
    pruner.close()
    again.close()


# Loss scales and several backwards


def plain(model: nn.Module, optimizer: Optimizer, pruner: pat.Pruner) -> None:
    optimizer.zero_grad()
    backward(model, small_inputs())
    optimizer.step()


def scaled(unscale: bool, manual: bool = False) -> Callable[[nn.Module, Optimizer, pat.Pruner], None]:
    scaler = GradScaler(device="cpu", init_scale=1024.0)

    def step(model: nn.Module, optimizer: Optimizer, pruner: pat.Pruner) -> None:
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(small_inputs()), torch.arange(4) % 5)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if manual:
            pruner.regularize(scaler, optimizer)
        scaler.step(optimizer)
        scaler.update()
        if manual:
            pruner.hold(optimizer)

    return step


REGULARIZERS: list[Any] = [
    {"name": "group_norm", "strength": 1e-2},
    {"name": "bn_scale", "strength": 1e-2},
    {"name": "group_norm", "strength": 1e-2, "decoupled": True},
    {"name": "proximal", "strength": 1e-2},
]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_strength_is_right_under_a_loss_scale(
    regularizer: dict[str, Any], unscale: bool, manual: bool, fused: bool
) -> None:
    def make(model: nn.Module) -> Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)

    if manual and not unscale and regularizer.get("decoupled"):
        with pytest.raises(pat.ConfigError, match=r"call scaler.unscale_\(optimizer\) first"):
            trained(dict(regularizer), make, 1, torch.float32, scaled(False, True), auto=False)
        return
    expected = trained(dict(regularizer), make, 3, torch.float32, plain)
    found = trained(dict(regularizer), make, 3, torch.float32, scaled(unscale, manual), auto=not manual)
    without = trained(None, make, 3, torch.float32, plain)
    assert distance(expected, found) < 1e-6
    assert distance(without, found) > 1e-4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_a_step_that_is_skipped_changes_nothing(regularizer: dict[str, Any], fused: bool) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    options: dict[str, Any] = {"optimizer": optimizer, "example_inputs": small_inputs(), "verify": False}
    pruner = pat.Pruner(model, regularizer=dict(regularizer), end_epoch=2, **options)
    scaler = GradScaler(device="cpu", init_scale=1024.0)
    scaler.scale(model(small_inputs()).sum()).backward()
    model.stem.weight.grad[0] = torch.inf  # type: ignore[index]
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scaler.update()
    optimizer.zero_grad()
    scaler.scale(model(small_inputs()).sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(before[0], model.stem.weight)
    pruner.close()


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_it_is_applied_once_for_several_backwards(regularizer: dict[str, Any]) -> None:
    def accumulated(model: nn.Module, optimizer: Optimizer, pruner: pat.Pruner) -> None:
        optimizer.zero_grad()
        for _ in range(4):
            backward(model, small_inputs(), 0.25)
        optimizer.step()

    expected = trained(dict(regularizer), sgd, 3, torch.float32, plain)
    found = trained(dict(regularizer), sgd, 3, torch.float32, accumulated)
    assert distance(expected, found) < 1e-5  # the batch norm's statistics move four times, the outputs do not
    assert distance(found, trained(None, sgd, 3, torch.float32, plain)) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup: expected a whole number, at least 0, got -1"),
        ({"warmup": 1.5}, "warmup: expected a whole number"),
        ({"decoupled": 1}, "decoupled: expected true or false, got 1"),
        ({"strength": -1}, "strength: expected a number, at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    for kind in KINDS.values():
        with pytest.raises(pat.ConfigError, match=message):
            kind(**{"strength": 1e-4, **options})


class Plain(Penalty):
    """One that a user writes."""

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        for tensor in binding.tensors.values():
            if tensor.grad is not None:
                tensor.grad += self.strength * factor * tensor


def test_what_is_added_has_no_history() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3))
    binding = bind(build_plan(model, (torch.randn(1, 3, 8, 8),)), model)
    for penalty in (Plain(0.1), *(make(strength=0.1) for make in KINDS.values())):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        penalty.apply(binding)
        assert not any(p.grad.requires_grad for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", [*KINDS, "bias"])
def test_a_compiled_function_may_regularise(kind: str) -> None:
    """With graph breaks. The gradients are views, as DDP makes them: for Dynamo their strides are symbols."""
    torch._dynamo.reset()
    layers = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3, groups=4), nn.ConvTranspose2d(64, 96, 2)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 50), nn.Linear(50, 10)
    model = nn.Sequential(*layers, nn.BatchNorm2d(96), *head)
    binding = bind(build_plan(model, (torch.randn(1, 3, 10, 10),)), model)
    penalty = GroupNormRegularizer(0.1, bias=True) if kind == "bias" else KINDS[kind](strength=0.1)

    def penalise(x: Tensor) -> Tensor:
        penalty.apply(binding)
        return x + 1

    def added(run: Callable[[Tensor], Tensor]) -> list[Any]:
        for parameter in model.parameters():
            parameter.grad = torch.zeros(parameter.numel()).as_strided(parameter.shape, parameter.stride())
        assert run(torch.zeros(3)).tolist() == [1, 1, 1]
        return [p.grad for p in model.parameters()]

    expected = added(penalise)
    compiled = torch.compile(penalise, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(added(compiled), expected)
