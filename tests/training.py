"""Plain training loops for tests, and what a pruner may leave behind in a model, an optimizer or the process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

import pat_fast as pat
from pat_fast.discovery import retire_hooks
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


@dataclass
class Twin:
    """A model in training under a pruner; ``extra`` is whatever else its script keeps."""

    model: nn.Module
    optimizers: list[Optimizer]
    pruner: pat.Pruner
    extra: Any = None

    def train(self, x: Tensor, step: int) -> Tensor:
        """The plainest step there is; LBFGS takes the loss and its gradients itself."""

        def gradients() -> Tensor:
            loss = nn.functional.cross_entropy(self.model(x), torch.arange(len(x)).add(step) % 5)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            return loss

        loss = gradients()
        for optimizer in self.optimizers:
            optimizer.step(*([gradients] if isinstance(optimizer, torch.optim.LBFGS) else []))
        return loss.detach()


def masked_equals_pruned(
    make: Callable[[str], Twin],
    train: Callable[[Twin, int], Tensor],
    steps: int = 8,
    prune_after: tuple[int, ...] = (2, 5),
    tolerance: float = 1e-9,
    state_too: bool = True,
) -> list[Twin]:
    """Two runs of a script, one pruned, one masked, stay together step for step; returns them, both pruned.

    After each prune what is trained is what the optimizers hold, their groups are as they were and their state fits.
    """
    torch.manual_seed(0)
    first = make("prune")
    torch.manual_seed(0)
    twins = [first, make("mask")]
    settings = [_settings(t.optimizers) for t in twins]
    for step in range(steps):
        losses = [train(twin, step) for twin in twins]
        torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance, msg=f"loss of step {step}: {losses}")
        if step in prune_after:
            reports = [twin.pruner.step() for twin in twins]
            assert reports[0].channels == reports[1].channels
            assert reports[0].channels[0] > reports[0].channels[1]
            for twin in twins:
                check_alive(twin)
    for twin, before in zip(twins, settings, strict=True):
        assert [len(held) for held, _ in before] == [len(held) for held, _ in _settings(twin.optimizers)]
        assert all(a is b for (x, _), (y, _) in zip(before, _settings(twin.optimizers), strict=True) for a, b in
                   zip(x, y, strict=True))  # fmt: skip
    assert [s for _, s in _settings(twins[0].optimizers)] == [s for _, s in _settings(twins[1].optimizers)]
    twins[1].pruner.finalize()
    for (name, a), b in zip(twins[0].model.named_parameters(), twins[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)
        for one, two in zip(*(t.optimizers for t in twins), strict=True):
            for key, value in one.state.get(a, {}).items() if state_too else ():
                if isinstance(value, (Tensor, list)):
                    torch.testing.assert_close(value, two.state[b][key], rtol=tolerance, atol=tolerance)
    return twins


def _settings(optimizers: list[Optimizer]) -> list[tuple[list[Tensor], dict[str, Any]]]:
    """The parameters of each group, and everything else that the group says (a copy)."""
    groups = [group for o in optimizers for group in o.param_groups]
    return [(list(g["params"]), copy.deepcopy({k: v for k, v in g.items() if k != "params"})) for g in groups]


def check_alive(twin: Twin) -> None:
    """The optimizers hold exactly the model's trained parameters, and their state fits them."""
    held = [id(p) for o in twin.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in twin.model.parameters() if p.requires_grad)
    for optimizer in twin.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            check_vectors(optimizer)
            continue
        for p in twin.model.parameters():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    fits = all(a in (1, b) for a, b in zip(value.shape, p.shape, strict=True))
                    assert fits, (key, value.shape, p.shape)


def vectors(optimizer: Optimizer) -> list[Tensor]:
    """What LBFGS keeps for all parameters together; empty before its first step."""
    state = optimizer.state.get(optimizer.param_groups[0]["params"][0], {})
    found = [state.get("d"), state.get("prev_flat_grad"), *state.get("old_dirs", ()), *state.get("old_stps", ())]
    return [vector for vector in found if vector is not None]


def check_vectors(optimizer: Optimizer) -> None:
    """LBFGS has a history, one of its parameters as they are."""
    length = sum(p.numel() * (2 if p.is_complex() else 1) for p in optimizer.param_groups[0]["params"])
    assert {vector.shape for vector in vectors(optimizer)} == {(length,)}
    assert optimizer._params is optimizer.param_groups[0]["params"]  # type: ignore[attr-defined]
    assert optimizer._numel() == length  # type: ignore[attr-defined]


@contextmanager
def no_hooks_left() -> Iterator[None]:
    """Fails if more process-wide hooks are there afterwards. On one thread: the models are too small for two."""
    torch.set_num_threads(1)
    retire_hooks([])
    before = hooks(nn.Identity())
    yield
    if hooks(nn.Identity()) > before:
        gc.collect()
        retire_hooks([])
    assert hooks(nn.Identity()) <= before
