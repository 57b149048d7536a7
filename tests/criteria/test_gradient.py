"""Taylor, movement and Hessian scores against loops over autograd's gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.criteria import Hessian, Movement, Taylor
from pat_fast.criteria.accumulator import Accumulator
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.surgery import prune
from tests.criteria.slow import mean_scores
from tests.helpers import Case, Small, random_keep, small_inputs
from tests.training import sgd


def bound(model: nn.Module) -> Binding:
    return bind(build_plan(model, small_inputs(dtype=next(model.parameters()).dtype)), model)


def backward(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(4, 3, 8, 8, generator=generator).to(dtype)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()


def fake_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def product(binding: Binding) -> Any:
    return lambda name, weight: weight * weight.grad


HOW = {
    "abs": (lambda name, w: (w * w.grad).abs(), lambda t: t),
    "joint": (lambda name, w: w * w.grad, torch.abs),
    "signed": (lambda name, w: w * w.grad, torch.neg),
}


@pytest.mark.parametrize("how", list(HOW))
def test_taylor_is_that_of_loops(case: Case, how: str) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    fake_gradients(case.model, 0)
    criterion = Taylor(how, normalizer=None)
    expected = mean_scores(binding, criterion, *HOW[how])
    torch.testing.assert_close(criterion.score(binding), expected)
    criterion.observe(binding)
    torch.testing.assert_close(criterion.score(binding), expected)


def test_signed_taylor_is_the_rise_of_the_loss() -> None:
    """Shrinking a channel's weights by a little raises the loss by as much times the score."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 4)).double()
    binding = bound(model)
    backward(model)
    scores = Taylor("signed", reduction="first").score(binding)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def loss() -> float:
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), torch.arange(4)))

    before = loss()
    for channel in range(6):
        weight = model[0].weight.detach().clone()
        with torch.no_grad():
            model[0].weight[channel] *= 1 - 1e-6
        assert (loss() - before) / 1e-6 == pytest.approx(float(scores[channel]), rel=1e-3, abs=1e-7)
        with torch.no_grad():
            model[0].weight.copy_(weight)


@pytest.mark.parametrize(("decay", "window"), [(1.0, None), (0.5, None), (0.0, None), (1.0, 2), (0.5, 3)])
def test_steps_are_averaged_with_decay(decay: float, window: int | None) -> None:
    model = Small().double()
    binding = bound(model)
    criterion = Taylor(decay=decay, window=window, normalizer=None)
    single = []
    for step in range(5):
        fake_gradients(model, step)
        single.append(Taylor(normalizer=None).score(binding))
        criterion.observe(binding, scale=1.0)
    newest_first = single[::-1][:window]
    weights = [decay**age for age in range(len(newest_first))]
    expected = sum(w * s for w, s in zip(weights, newest_first, strict=True)) / sum(weights)
    torch.testing.assert_close(criterion.score(binding), expected)


@pytest.mark.parametrize("make", [lambda: Taylor(decay=0.7, normalizer=None), lambda: Taylor(window=2), Hessian])
def test_optimizers_that_step_apart_and_a_loss_scale_change_nothing(make: Any) -> None:
    model = Small().double()
    binding = bound(model)
    together, apart = make(), make()
    halves = [{id(p) for p in list(model.parameters())[i::2]} for i in range(2)]
    for step in range(3):
        fake_gradients(model, step)
        together.observe(binding)
        for parameter in model.parameters():
            parameter.grad *= 1024
        for half in halves:
            apart.observe(binding, scale=1024.0, only=half)
    torch.testing.assert_close(apart.score(binding), together.score(binding))


def test_frozen_parameters_do_not_count() -> None:
    model = Small().double()
    model.inner.weight.requires_grad_(False)
    binding = bound(model)
    backward(model)
    criterion = Taylor(normalizer=None)
    model.inner.weight.grad = None
    found = criterion.score(binding)
    group = next(g for g in binding.plan.groups if g.root == "inner")
    only = (model.outer.weight * model.outer.weight.grad).abs().sum((0, 2, 3))
    torch.testing.assert_close(found[group.start : group.stop], only.detach())


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_hessian_is_that_of_loops(decay: float) -> None:
    model = Small().double()
    binding = bound(model)
    criterion = Hessian(decay, normalizer=None)
    total: dict[str, Tensor] = {}
    weight = 0.0
    for step in range(3):
        fake_gradients(model, step)
        criterion.observe(binding)
        weight = weight * decay + 1
        for name, p in model.named_parameters():
            total[name] = total.get(name, torch.zeros_like(p)) * decay + p.grad**2
    expected = mean_scores(binding, criterion, lambda name, w: w**2 * total[name] / weight / 2)
    torch.testing.assert_close(criterion.score(binding), expected)


def test_hessian_predicts_the_loss_at_a_minimum() -> None:
    """Of a linear regression with unit noise, the Fisher matrix is the Hessian: removal costs w^2 F / 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1, bias=False)).double()
    binding = bind(build_plan(model, torch.randn(2, 3).double()), model)
    x = torch.randn(50, 3).double()
    with torch.no_grad():
        target = model(x) + torch.tensor([1.0, -1.0]).repeat(25)[:, None]
    criterion = Hessian(normalizer=None, reduction="gate")
    for row in range(50):
        model.zero_grad()
        (0.5 * (model(x[row : row + 1]) - target[row : row + 1]) ** 2).sum().backward()
        criterion.observe(binding)
    hidden = model[0](x).detach()
    expected = model[1].weight[0].detach() ** 2 * hidden.square().mean(0) / 2
    torch.testing.assert_close(criterion.score(binding), expected)


WATCHING = {
    "taylor": lambda: Taylor(normalizer=None),
    "window": lambda: Taylor(window=2, normalizer=None),
    "movement": lambda: Movement(),
}


@pytest.mark.parametrize("name", list(WATCHING))
@pytest.mark.parametrize("model_name", ["resnet18", "mobilenet_v2", "resnext50", "vgg16_bn"])
def test_what_was_gathered_survives_surgery(model_name: str, name: str) -> None:
    case = Case.build(model_name)
    binding = bind(build_plan(case.model, case.inputs), case.model)
    criterion = WATCHING[name]()
    for step in range(3):
        fake_gradients(case.model, step)
        criterion.observe(binding)
    before = criterion.score(binding)
    for seed in range(2):  # a prune of what was pruned
        plan, keep = binding.plan, random_keep(binding.plan, seed)
        movable = plan.movable(plan.check_keep(keep))
        binding = prune(binding, keep)
        criterion.shrink(plan, keep)
        # Sums over a channel's weights were taken when they were seen, so nothing changes for those that are left.
        before = before[torch.from_numpy(movable)]
        scored = criterion.score(binding).isfinite()
        torch.testing.assert_close(criterion.score(binding), before)
        assert scored.any()
    for parameter in case.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    criterion.observe(binding)
    assert not torch.equal(criterion.score(binding), before)


def test_the_fisher_sums_survive_surgery_as_an_optimizers_state() -> None:
    case = Case.build("resnet18")
    binding = bind(build_plan(case.model, case.inputs), case.model)
    criterion = Hessian(normalizer=None)
    for step in range(2):
        fake_gradients(case.model, step)
        criterion.observe(binding)
    plan, keep = binding.plan, random_keep(binding.plan, 0)
    masked = copy.deepcopy(criterion.state_dict(binding))
    smaller = prune(binding, keep, criterion.accumulators)
    criterion.shrink(plan, keep)
    for accumulator in criterion.accumulators:
        assert isinstance(accumulator, Accumulator)
        for tensor, entry in accumulator.state.items():
            assert entry["sum"].shape == tensor.shape
    name = "layer1.0.conv1.weight"
    rows = [torch.from_numpy(k) for k in plan.tensor(name).kept(plan.check_keep(keep))]
    expected = masked["accumulators"][0][name]["sum"][rows[0]][:, rows[1]]
    assert torch.equal(criterion.accumulators[0].state[smaller.tensors[name]]["sum"], expected)
    assert criterion.score(smaller).shape == (smaller.plan.n_channels,)


def test_without_shrinking_a_history_is_refused() -> None:
    model = Small()
    binding = bound(model)
    criterion = Taylor()
    backward(model)
    criterion.observe(binding)
    smaller = prune(binding, random_keep(binding.plan, 0, 0.5))
    with pytest.raises(pat.PlanError, match="the model was pruned without it; call shrink"):
        criterion.score(smaller)
    criterion.reset()
    backward(model)
    assert criterion.score(smaller).shape == (smaller.plan.n_channels,)


@pytest.mark.parametrize("criterion", [Taylor(), Movement(), Hessian()])
def test_without_gradients_there_is_no_score(criterion: Any) -> None:
    with pytest.raises(pat.PlanError, match=r"gradients.* train for a step before pruner.step\(\)"):
        criterion.score(bound(Small()))


def test_the_regulariser_and_its_strength_do_not_count() -> None:
    """The pruner shows a criterion the gradients before it adds to them."""
    model = Small().double()
    twin = copy.deepcopy(model)
    pruner = pat.Pruner(
        model,
        0.5,
        importance=Taylor(normalizer=None),
        reg_strength=10.0,
        example_inputs=small_inputs(dtype=torch.float64),
        end_epoch=3,
        optimizer=sgd(model),
        auto=False,
    )
    backward(model)
    backward(twin)
    pruner.regularize()
    expected = Taylor(normalizer=None).score(bound(twin))
    assert pruner.binding is not None
    torch.testing.assert_close(pruner.criterion.score(pruner.binding), expected)
    assert not torch.allclose(model.inner.weight.grad, twin.inner.weight.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Taylor("absolute"), r"how: expected one of abs, joint, signed, got 'absolute'; did you mean 'abs'"),
        (lambda: Taylor(decay=1.5), r"decay: expected a number in \[0, 1\], got 1.5"),
        (lambda: Taylor(window=0), r"window: expected a whole number, at least 1, or None, got 0"),
        (lambda: Taylor(decay=0, window=3), r"decay: expected above 0 with a window of 3"),
        (lambda: Taylor("signed", normalizer="mean"), r"these scores may be negative, and a mean near zero"),
        (lambda: Taylor("signed", reduction="prod"), r"reduction: expected another than 'prod'"),
        (lambda: Movement(normalizer="lamp"), r"these scores may be negative, and it divides by sums"),
        (lambda: Hessian(decay=-1), r"decay: expected a number in \[0, 1\], got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        make()


def test_a_step_that_overflowed_is_not_seen() -> None:
    """A fused optimizer skips it inside its step; a loss scale that it still has to take out is taken out."""
    model, twin = Small().double(), Small().double()
    twin.load_state_dict(model.state_dict())
    x = small_inputs(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    pruner = pat.Pruner(model, 0.5, importance=Taylor(decay=1.0), example_inputs=x, optimizer=optimizer, end_epoch=3)
    assert pruner.binding is not None
    backward(model, 1)
    for parameter in model.parameters():
        parameter.grad *= torch.inf
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    model.zero_grad()
    with pytest.raises(pat.PlanError, match="has seen none"):
        pruner.criterion.score(pruner.binding)
    backward(model, 2)
    backward(twin, 2)
    for parameter in model.parameters():
        parameter.grad *= 8.0
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(pruner.criterion.score(pruner.binding), Taylor().score(bound(twin)))
