"""Taylor expansion per example, held against one backward for each example."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.criteria import ActivationTaylor
from pat_fast.plan import bind, build_plan
from tests.helpers import Small, small_inputs


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).relu()).relu().mean((2, 3)))


def by_hand(model: Chain, x: Tensor) -> list[Tensor]:
    """For each hidden layer the mean over examples of ``|sum x dL/dx|``, example by example."""
    sums = [torch.zeros(6).double(), torch.zeros(5).double()]
    for n in range(len(x)):
        a = model.one(x[n : n + 1]).relu()
        b = model.two(a).relu().mean((2, 3))
        # A mean over the batch: each example's gradient is a part of it.
        loss = nn.functional.cross_entropy(model.out(b), torch.tensor([n % 4])) / len(x)
        for place, (value, grad) in enumerate(zip((a, b), torch.autograd.grad(loss, (a, b)), strict=True)):
            sums[place] += (value * grad)[0].flatten(1).sum(1).abs() if place == 0 else (value * grad)[0].abs()
    return [s / len(x) for s in sums]


def test_examples_do_not_cancel() -> None:
    torch.manual_seed(0)
    model, x = Chain().double(), small_inputs(6, torch.float64)
    binding = bind(build_plan(model, x), model)
    criterion = ActivationTaylor(normalizer=None)
    criterion.attach(binding)
    nn.functional.cross_entropy(model(x), torch.arange(6) % 4).backward()
    criterion.observe(binding)
    found = criterion.score(binding)
    criterion.detach()
    for group in binding.plan.groups:
        expected = by_hand(model, x)[0 if group.root == "one" else 1].detach()
        torch.testing.assert_close(found[group.start : group.stop].double(), expected, rtol=1e-5, atol=1e-9)


def test_several_backwards_are_one_step_and_eval_does_not_count() -> None:
    torch.manual_seed(0)
    model, x = Chain().double(), small_inputs(4, torch.float64)
    binding = bind(build_plan(model, x), model)
    scores = []
    for batches in ([x], [x[:2], x[2:]]):
        criterion = ActivationTaylor(normalizer=None)
        criterion.attach(binding)
        for part in batches:
            target = torch.zeros(len(part), dtype=torch.long)
            (nn.functional.cross_entropy(model(part), target) * len(part) / 4).backward()
        model.eval()
        model(x).sum().backward()
        model.train()
        criterion.observe(binding)
        scores.append(criterion.score(binding))
        criterion.detach()
    torch.testing.assert_close(scores[0], scores[1])


def test_by_name_through_prunes_and_a_resume() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options: dict[str, Any] = {"importance": "activation_taylor", "example_inputs": small_inputs(), "end_epoch": 3}
    pruner = pat.Pruner(model, 0.5, optimizer=optimizer, **options)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(small_inputs()), torch.arange(4)).backward()
        optimizer.step()
        report = pruner.step()
        again = pat.Pruner(model, 0.5, optimizer=optimizer, **options)
        again.load_state_dict(pruner.state_dict())
        if not again.done:
            torch.testing.assert_close(again.criterion.score(again.binding), pruner.criterion.score(pruner.binding))  # type: ignore[arg-type]
        again.close()
    assert report.channels[1] == 14
    with pytest.raises(pat.PlanError, match="ActivationTaylor has seen no training forward"):
        pat.Pruner(Small(), 0.5, "one_shot", **{**options, "end_epoch": None}).step()
