"""The optimizers whose state shrinks along are found, and no more of the process is searched for them than need be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pat_fast.torch_pruning as tp
from pat_fast import discovery
from tests.torch_pruning.nets import Net, X, make


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """A list that gets an entry whenever all objects of the process are gone through."""
    found: list[type] = []
    living = discovery.living

    def counted(cls: Any) -> list[Any]:
        found.append(cls)
        return living(cls)

    monkeypatch.setattr(discovery, "living", counted)
    return found


def trained(model: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, **arguments)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def fits(optimizer: torch.optim.Optimizer) -> bool:
    return all(s["momentum_buffer"].shape == p.shape for p, s in optimizer.state.items())  # type: ignore[attr-defined]


def test_one_search_for_all_groups_of_a_step(searches: list[type]) -> None:
    """What else refers to parameters (a loop's variable, autograd's graph) is no new optimizer in each group."""
    model = Net()
    everything = list(model.parameters())
    for group in make(tp, model).step(interactive=True):
        group.prune()
    assert model.conv2.out_channels == 8
    assert len(everything) == 10
    assert len(searches) == 1


def test_an_optimizer_that_comes_later_is_found(searches: list[type]) -> None:
    model = Net()
    pruner = make(tp, model, iterative_steps=3)
    everything = list(model.parameters())
    pruner.step()
    del everything
    optimizer = trained(model)
    pruner.step()
    assert fits(optimizer)
    del optimizer
    other = trained(model)
    pruner.step()
    assert fits(other)
    assert model.conv2.out_channels == 8
    trained(model)
