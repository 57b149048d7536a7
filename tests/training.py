"""Plain training loops for tests, and what a pruner may leave behind in a model, an optimizer or the process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

import pat_fast as pat
from tests.helpers import small_inputs


def train_one_epoch(model: nn.Module, optimizer: Optimizer, batches: int = 2, x: Tensor | None = None) -> None:
    """A plain loop that knows nothing of pruning; the same data whenever it runs."""
    model.train()
    x = small_inputs() if x is None else x
    for i in range(batches):
        target = torch.arange(len(x)).add(i) % 5
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def steps(model: nn.Module, count: int, **options: Any) -> list[pat.StepReport]:
    """What so many steps of a pruner without training report; ``options`` are the pruner's."""
    pruner = pat.Pruner(model, example_inputs=small_inputs(), verify=False, **options)
    return [pruner.step() for _ in range(count)]


def hooks(model: nn.Module, *optimizers: Optimizer) -> int:
    """All hooks that a pruner could leave behind."""
    found = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    found += sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return found + sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def untouched(
    model: nn.Module, optimizer: Optimizer, error: type[Exception], message: str, act: Callable[[], Any]
) -> None:
    """``act`` fails with this message, and model, optimizer and hooks are as they were."""
    before = weights(model), copy.deepcopy(optimizer.state_dict()), hooks(model, optimizer)
    modes = [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        act()
    assert same(weights(model), before[0])
    state = optimizer.state_dict()["state"]
    assert all(torch.equal(s[k], state[i][k]) for i, s in before[1]["state"].items() for k in s)
    assert hooks(model, optimizer) == before[2]
    assert [m.training for m in model.modules()] == modes


@contextmanager
def no_hooks_left() -> Iterator[None]:
    """Fails if more process-wide hooks are there afterwards. On one thread: the models are too small for two."""
    torch.set_num_threads(1)
    before = hooks(nn.Identity())
    yield
    if hooks(nn.Identity()) > before:
        gc.collect()
    assert hooks(nn.Identity()) <= before
