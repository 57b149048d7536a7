"""What a script has around a call of the pruner's, or does between two of them, does not matter in it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.training import Twin, adamw, masked_equals_pruned, same, sgd, train_one_epoch, untouched, weights

AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
}


def run(around: Callable[[], AbstractContextManager[Any]], given: bool) -> tuple[pat.StepReport, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Small()
    optimizer = adamw(model)
    options: dict[str, Any] = {"example_inputs": small_inputs()} if given else {}
    pruner = pat.Pruner(model, 0.5, end_epoch=3, **options)
    for _ in range(4):
        train_one_epoch(model, optimizer)
        with around():
            report = pruner.step()
    assert not any(p.is_inference() for p in model.parameters())
    return report, weights(model)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", list(AROUND))
def test_a_step_does_the_same_whatever_is_around_it(name: str, given: bool) -> None:
    expected, plain = run(nullcontext, given)
    report, found = run(AROUND[name], given)
    assert report.channels == expected.channels
    assert report.macs == expected.macs
    assert same(found, plain)


@pytest.mark.parametrize("name", list(AROUND)[:3])
def test_a_plan_is_the_same_whatever_is_around_it(name: str) -> None:
    model, x = Small(), small_inputs()
    expected = pat.build_plan(model, x)
    with AROUND[name]():
        plan = pat.build_plan(model, x)
    assert [(g.root, g.members) for g in plan.groups] == [(g.root, g.members) for g in expected.groups]


def test_threads_take_turns() -> None:
    model = Small(width=48)
    pruner = pat.Pruner(model, 0.5, "linear", end_epoch=24, example_inputs=small_inputs(), verify=False)
    errors: list[Exception] = []

    def steps() -> None:
        for _ in range(8):
            try:
                pruner.step()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=steps) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert pruner.epoch == 24
    assert pruner.plan.n_channels == 50  # type: ignore[union-attr]
    train_one_epoch(model, adamw(model))


@pytest.mark.parametrize("importance", ["group_norm", "taylor", "activation"])
def test_a_model_in_another_dtype_goes_on(importance: str) -> None:
    """``to()`` puts other buffers in the places of a module's."""

    def make(mode: str) -> Twin:
        model = Small()
        pruner = pat.Pruner(
            model, 0.5, example_inputs=small_inputs(), mode=mode, end_epoch=2, importance=importance, verify=False
        )
        return Twin(model, [torch.optim.SGD(model.parameters(), lr=0.05)], pruner)

    def train(one: Twin, step: int) -> Tensor:
        if step == 4:
            one.model.double()
        return one.train(small_inputs(dtype=torch.float64 if step >= 4 else torch.float32), step).double()

    for one in masked_equals_pruned(make, train, tolerance=1e-5):
        assert one.model.norm.running_mean.dtype == one.model.stem.weight.dtype == torch.float64


class Normed(nn.Module):
    """No buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.norm(self.enter(x)).relu())


def test_some_layers_in_another_dtype() -> None:
    model, x = Normed(), torch.randn(4, 5)
    pruner = pat.Pruner(model, 0.5, end_epoch=3, example_inputs=x)
    pruner.step()
    model.bfloat16()
    model.norm.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        h = model.enter(x.bfloat16())
        model.leave(model.norm(h.float()).relu().bfloat16()).square().mean().backward()
        optimizer.step()
        pruner.step()
    assert model.norm.weight.dtype == torch.float32
    assert model.leave.weight.shape == (5, 8)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two, self.leave = (nn.Linear(*s) for s in ((5, 9), (9, 9), (9, 9), (9, 5)))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.two(self.one(self.enter(x).relu()).relu()).relu())


def test_parameters_that_are_replaced_by_others_of_their_shape() -> None:
    """They are followed; weights that are untied thereby are not what the plan says."""
    model, x = Small(), small_inputs()
    pruner = pat.Pruner(model, 0.5, end_epoch=2, example_inputs=x)
    pruner.step()
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())
    pruner.step()
    assert model.inner.weight.shape == (model.inner.out_channels, model.inner.in_channels, 3, 3)
    model(x).sum().backward()

    tied = Tied()
    pruner = pat.Pruner(tied, 0.5, end_epoch=2, example_inputs=torch.randn(4, 5))
    tied.two.weight = nn.Parameter(tied.two.weight.detach().clone())
    said = r"one.weight was one.weight = two.weight and is one.weight now"
    untouched(tied, sgd(tied), pat.PlanError, said, pruner.step)


@pytest.mark.parametrize("given", [False, True])
def test_a_state_from_before_a_prune_is_refused_by_name(given: bool) -> None:
    """PyTorch loads it, and fails in the step without saying where."""
    model = Small()
    optimizer = adamw(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=3, optimizer=optimizer if given else None)
    train_one_epoch(model, optimizer)
    old = copy.deepcopy(optimizer.state_dict())
    pruner.step()
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(old)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(pat.SurgeryError, match=r"AdamW state 'exp_avg' of \w+.\w+ has .* loaded that was saved before"):
        train_one_epoch(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.load_state_dict(good)
    train_one_epoch(model, optimizer)
    pruner.step()
    train_one_epoch(model, optimizer)
