"""Weights that are no floating-point numbers: complex ones, whole ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn

import pat_fast as pat
import pat_fast.torch_pruning as tp
from pat_fast.criteria import GroupNorm
from pat_fast.plan import bind
from tests.training import Twin, masked_equals_pruned, sgd

X = torch.randn(4, 3, 20, generator=torch.Generator().manual_seed(0))


class Spectral(nn.Module):
    """A neural operator's layer: the lowest frequencies times a complex weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, 5, dtype=torch.cfloat) / inputs)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.fft.rfft(x)[:, :, :5]
        return torch.fft.irfft(torch.einsum("bix,iox->box", low, self.weight), n=x.shape[-1])


class Operator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.spectral, self.beside = nn.Conv1d(3, 12, 1), Spectral(12, 10), nn.Conv1d(12, 10, 1)
        self.alone, self.head = Spectral(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).relu()
        x = (self.spectral(x) + self.beside(x)).relu()
        return self.head(self.alone(x).relu().mean(2))


class Complex(nn.Module):
    """Layers that are complex themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 12, dtype=torch.cfloat), nn.Linear(12, 9, dtype=torch.cfloat)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.fft.fft(x.mean(1)))
        return self.head(self.second(torch.complex(x.real.relu(), x.imag.relu())).abs())


@pytest.mark.parametrize(("net", "roots"), [(Operator, {"lift", "beside", "alone"}), (Complex, {"first", "second"})])
@pytest.mark.parametrize("optimizer", [sgd, lambda model: torch.optim.Adam(model.parameters(), lr=1e-3)])
def test_complex_weights_are_scored_and_pruned_and_masked_equals_pruned(
    net: Any, roots: set[str], optimizer: Any
) -> None:
    def make(mode: str) -> Twin:
        model = net()
        pruner = pat.Pruner(model, 0.5, example_inputs=X, mode=mode, end_epoch=2, reg_strength=1e-3)
        return Twin(model, [optimizer(model)], pruner)

    pruned, _ = masked_equals_pruned(make, lambda one, step: one.train(X, step), tolerance=1e-4)
    plan = pruned.pruner.binding.plan  # type: ignore[union-attr]
    assert {g.root for g in plan.groups} == roots
    complex_ = [p for p in pruned.model.parameters() if p.is_complex() and p.ndim > 1]
    assert all(p.shape[0] * p.shape[1] < q.shape[0] * q.shape[1] for p, q in zip(
        complex_, [p for p in net().parameters() if p.is_complex() and p.ndim > 1], strict=True))  # fmt: skip


def test_a_complex_weight_counts_by_its_magnitude() -> None:
    model = Complex()
    plan = pat.build_plan(model, X)
    group = next(g for g in plan.groups if g.root == "first")
    first, second = model.first.weight.abs().square().sum(1), model.second.weight.abs().square().sum(0)
    expected = (first + second) / (first + second).mean()
    torch.testing.assert_close(GroupNorm().score(bind(plan, model))[group.start : group.stop], expected)


def test_the_drop_in_scores_complex_layers_as_torch_pruning_does() -> None:
    made = []
    for library in (original, tp):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12, dtype=torch.cfloat), nn.Linear(12, 4, dtype=torch.cfloat))
        x = torch.randn(2, 6, dtype=torch.cfloat)
        importance = library.importance.MagnitudeImportance()
        ignored = {"ignored_layers": [model[1]], "output_transform": lambda out: out.abs()}
        library.pruner.MagnitudePruner(model, x, importance=importance, **ignored).step()
        made.append(model)
    assert made[1][0].out_features == 6
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))


class Switched(nn.Module):
    """Channels that a whole number switches on and off."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(20, 12), nn.Linear(12, 5)
        self.switch = nn.Parameter(torch.ones(12).to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.mean(1)).relu() * self.switch)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("mode", ["prune", "mask", "soft", "hybrid"])
def test_whole_numbers_go_along(dtype: torch.dtype, mode: str) -> None:
    model = Switched(dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pruner = pat.Pruner(model, 0.5, example_inputs=X, mode=mode, end_epoch=2)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    assert (model.first.out_features, len(model.switch), model.switch.dtype) == (6, 6, dtype)
    assert copy.deepcopy(model)(X).shape == (4, 5)
