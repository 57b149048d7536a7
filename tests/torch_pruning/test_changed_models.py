"""A step prunes the model as it is, whatever others have done to it since the pruner was made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pat_fast.torch_pruning as tp
from pat_fast.backends import shortcut
from tests.helpers import Small, small_inputs


def other_weights(model: Any) -> None:
    """Other parameters of the same shapes, whose order of importance is another."""
    for layer in (model.stem, model.inner):
        by = torch.linspace(0.1, 2, len(layer.weight)).view(-1, 1, 1, 1)
        layer.weight = nn.Parameter(torch.randn_like(layer.weight) * by)
        layer.weight.grad = torch.randn_like(layer.weight)


def another_layer(model: Any) -> None:
    model.inner = nn.Conv2d(model.inner.in_channels, model.inner.out_channels, 3, padding=1)
    model.inner.weight.grad = torch.randn_like(model.inner.weight)


def fewer_channels(model: Any) -> None:
    pruner(model, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.25).step()


def other_numbers(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter))


def another_layout(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def pruner(model: nn.Module, importance: Any, **options: Any) -> Any:
    return tp.pruner.BasePruner(model, small_inputs(), importance, global_pruning=True, **options)


@pytest.mark.parametrize("change", [other_weights, another_layer, fewer_channels, other_numbers, another_layout])
@pytest.mark.parametrize("importance", [tp.importance.GroupMagnitudeImportance, tp.importance.GroupTaylorImportance])
def test_a_model_that_others_have_changed(change: Callable[[Any], None], importance: Any) -> None:
    torch.manual_seed(0)
    model = Small(24)
    if importance is tp.importance.GroupMagnitudeImportance or change is not other_weights:
        model(small_inputs()).square().mean().backward()
    made_before = pruner(model, importance())
    change(model)
    other = copy.deepcopy(model)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        its.grad = None if mine.grad is None else mine.grad.clone()
    made_before.step()
    pruner(other, importance()).step()
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert model(small_inputs()).isfinite().all()


@pytest.mark.skipif(shortcut("channel_totals", "cpu") is None, reason="the C++ kernels are not in use")
@pytest.mark.parametrize("change", [None, other_weights])
def test_a_model_is_looked_at_while_its_weights_are_read(
    change: Callable[[Any], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is another one than that whose weights were read, they are read again."""
    torch.manual_seed(0)
    model = Small(24)
    made = pruner(model, tp.importance.GroupMagnitudeImportance())
    if change is not None:
        change(model)
    seen: list[str] = []
    for cls, name in ((tp.importance.GroupMagnitudeImportance, "score"), (type(made.engine), "look_ahead")):
        inner = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *args, inner=inner, name=name: (seen.append(name), inner(*args))[1])
    made.step()
    assert seen == ["look_ahead"] if change is None else ["look_ahead", "score"]
