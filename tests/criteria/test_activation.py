"""Activation statistics against what the layers were really given."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.criteria import Activation
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.surgery import prune
from tests.helpers import random_keep


class Net(nn.Module):
    """Reads channels in every way: a convolution, a grouped and a depthwise one, a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(16, 12, 1, groups=2)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.wide(self.deep(x).relu()).relu()
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def inputs(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


def bound(model: nn.Module) -> Binding:
    return bind(build_plan(model, inputs()), model)


def statistic(name: str, x: Tensor) -> Tensor:
    """Of ``[elements, channels]``."""
    if name == "mean":
        return x.abs().mean(0)
    return x.std(0, correction=0) if name == "std" else (x != 0).double().mean(0)


@pytest.mark.parametrize("name", ["mean", "std", "apoz"])
def test_statistics_are_those_of_what_layers_read(name: str) -> None:
    model = Net().double()
    binding = bound(model)
    criterion = Activation(name, decay=1.0, reduction="sum", normalizer=None)
    criterion.attach(binding)
    seen: dict[str, list[Tensor]] = {}
    for layer in ("deep", "wide", "head"):
        getattr(model, layer).register_forward_pre_hook(
            lambda m, x, layer=layer: seen.setdefault(layer, []).append(x[0].detach())
        )
    for seed in range(3):  # two forwards make one step
        model(inputs(seed))
        if seed == 1:
            criterion.observe(binding)
    model.eval()(inputs(9) + 100)  # does not count
    for found in seen.values():
        found.pop()
    # Steps of unequal size count alike: the first holds two forwards, the second, still open, one.
    scores = criterion.score(binding)
    found_steps = {layer: (torch.cat(xs[:2]), xs[2]) for layer, xs in seen.items()}

    def expected(layer: str) -> Tensor:
        channels = [x.movedim(1, -1).flatten(0, -2) for x in found_steps[layer]]
        if name != "std":
            return torch.stack([statistic(name, x) for x in channels]).mean(0)
        first = torch.stack([x.mean(0) for x in channels]).mean(0)
        return (torch.stack([x.square().mean(0) for x in channels]).mean(0) - first.square()).sqrt()

    of = {g.root: scores[g.start : g.stop] for g in binding.plan.groups}
    assert set(of) == {"wide", "deep"}
    torch.testing.assert_close(of["wide"], expected("head").reshape(12, 4).mean(1))
    # A depthwise convolution makes two of each of the stem's channels, and reads it.
    torch.testing.assert_close(of["deep"], expected("wide").reshape(8, 2).mean(1) + expected("deep"))
    criterion.detach()
    assert len(model.deep._forward_pre_hooks) == 1  # this test's


def test_steps_follow_the_model_through_a_prune() -> None:
    model = Net().double()
    binding = bound(model)
    criterion = Activation("std", normalizer=None)
    criterion.attach(binding)
    for seed in range(2):
        model(inputs(seed))
        criterion.observe(binding)
    before = criterion.score(binding)
    plan, keep = binding.plan, random_keep(binding.plan, 1)
    movable = plan.movable(plan.check_keep(keep))
    smaller = prune(binding, keep)
    criterion.shrink(plan, keep)
    torch.testing.assert_close(criterion.score(smaller), before[torch.from_numpy(movable)], rtol=1e-5, atol=1e-7)
    criterion.attach(smaller)
    model(inputs(5))
    criterion.observe(smaller)
    assert not torch.equal(criterion.score(smaller), before[torch.from_numpy(movable)])


def test_a_copy_of_the_model_does_not_count() -> None:
    model = Net().double()
    binding = bound(model)
    criterion = Activation()
    criterion.attach(binding)
    copy.deepcopy(model)(inputs())
    with pytest.raises(pat.PlanError, match="has seen no training forward"):
        criterion.score(binding)


def test_the_pruner_takes_its_hooks_off() -> None:
    model = Net()
    x = inputs().float()

    def count() -> int:
        return sum(len(m._forward_pre_hooks) for m in model.modules())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = pat.Pruner(model, 0.3, importance="activation", example_inputs=x, end_epoch=2, optimizer=optimizer)
    assert count() > 0
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).sum().backward()
        optimizer.step()
        pruner.step()
    assert pruner.done
    assert count() == 0
    again = pat.Pruner(Net(), 0.3, importance="activation", example_inputs=x, end_epoch=2)
    other = again.model
    del again
    assert sum(len(m._forward_pre_hooks) for m in other.modules()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "var"}, r"statistic: expected one of mean, std, apoz, got 'var'"),
        ({"decay": "x"}, r"decay: expected a number in \[0, 1\], got 'x'"),
        ({"window": 1.5}, r"window: expected a whole number, at least 1, or None"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        Activation(**options)
