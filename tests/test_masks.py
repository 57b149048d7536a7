"""Masked channels are zero in weights, gradients and optimizer state, and stay so while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pat_fast as pat
from pat_fast.masks import Mask
from pat_fast.plan import Binding, bind, build_plan
from tests.helpers import Case, Small, masked_copy, random_keep, small_inputs
from tests.training import adamw, same, sgd, steps, train_one_epoch, weights


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


def masked(model: nn.Module, inputs: Any, seed: int = 0) -> tuple[Mask, np.ndarray]:
    """A mask over ``model`` that is not set yet, and what to keep."""
    plan = build_plan(model, inputs)
    return Mask(bind(plan, model)), random_keep(plan, seed, ratio=0.5)


def test_weights_are_zero_index_by_index(case: Case) -> None:
    mask, keep = masked(case.model, case.inputs)
    expected = weights(masked_copy(case.model, mask.binding.plan, keep))
    assert not mask.is_active
    mask.set(torch.from_numpy(keep), [])
    assert mask.is_active
    assert same(weights(case.model), expected)


def test_gradients_are_zero_index_by_index(case: Case) -> None:
    mask, keep = masked(case.model, case.inputs)
    mask.set(torch.from_numpy(keep), [])
    ones = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in ones.parameters():
            p.fill_(1)
    expected = dict(masked_copy(ones, mask.binding.plan, keep).named_parameters())
    for number, p in enumerate(case.model.parameters()):
        p.grad = torch.ones_like(p)
        if number % 2 and p.ndim == 4:  # autograd may choose another layout
            p.grad = p.grad.to(memory_format=torch.channels_last)
    mask.hold_gradients()
    for name, p in case.model.named_parameters():
        assert torch.equal(p.grad, expected[name]), name


def inner_and_its_mask(optimizer: Callable[[nn.Module], Optimizer]) -> tuple[Small, Optimizer, Mask, Tensor]:
    """A trained model, and a mask that lets only every other channel of ``inner`` live."""
    model = Small()
    trained = optimizer(model)
    train_one_epoch(model, trained)
    mask = Mask(bind(build_plan(model, small_inputs()), model))
    alive = torch.ones(mask.binding.plan.n_channels, dtype=torch.bool)
    group = next(g for g in mask.binding.plan.groups if g.root == "inner")
    alive[group.start : group.stop : 2] = False
    return model, trained, mask, alive


@pytest.mark.parametrize("make", [adamw, sgd, lambda m: torch.optim.Adam(m.parameters(), amsgrad=True)])
def test_state_is_zero_where_masked_and_untouched_elsewhere(make: Callable[[nn.Module], Optimizer]) -> None:
    model, optimizer, mask, alive = inner_and_its_mask(make)
    before = copy.deepcopy(optimizer.state[model.outer.weight])
    mask.set(alive, [optimizer])
    state = optimizer.state[model.outer.weight]
    assert state.keys() == before.keys()
    for key, value in state.items():
        if value.ndim:
            assert (value[:, ::2] == 0).all(), key
            assert torch.equal(value[:, 1::2], before[key][:, 1::2]), key
            assert before[key][:, ::2].any()
        else:
            assert torch.equal(value, before[key])


def test_a_dead_channel_is_cleared_of_inf_and_nan() -> None:
    model, _, mask, alive = inner_and_its_mask(sgd)
    with torch.no_grad():
        model.inner.weight[0] = float("nan")
        model.inner.bias[2] = float("inf")
    mask.set(alive, [])
    assert (model.inner.weight[::2] == 0).all()
    assert (model.inner.bias[::2] == 0).all()
    assert model(small_inputs()).isfinite().all()


def test_missing_gradients_are_no_trouble() -> None:
    model, _, mask, alive = inner_and_its_mask(sgd)
    model.zero_grad()
    model.outer.weight.grad = torch.ones_like(model.outer.weight)
    mask.set(alive, [])
    assert model.inner.weight.grad is None
    assert (model.outer.weight.grad[:, ::2] == 0).all()
    assert (model.outer.weight.grad[:, 1::2] == 1).all()


def test_sparse_gradients_are_left_to_the_weights() -> None:
    """Rows of an embedding that were not looked up have no gradient to clear; the weights are cleared after."""
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    ids = torch.tensor([1, 3, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pat.Pruner(model, 0.5, end_epoch=1, mode="mask", example_inputs=ids, ranking="local")
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).sum().backward()
        optimizer.step()
        pruner.step()
    assert int((model[0].weight == 0).all(0).sum()) == 4
    optimizer.zero_grad()  # physical pruning refuses sparse gradients
    pruner.finalize()
    assert model[0].weight.shape == (9, 4)


def test_factored_state_is_left_to_decay() -> None:
    model, optimizer, mask, alive = inner_and_its_mask(lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2))
    before = copy.deepcopy(optimizer.state[model.inner.weight])
    mask.set(alive, [optimizer])
    assert torch.equal(optimizer.state[model.inner.weight]["row_var"], before["row_var"])
    assert (model.inner.weight[::2] == 0).all()


def test_unknown_state_is_refused_before_anything_changes() -> None:
    model, optimizer, mask, alive = inner_and_its_mask(adamw)
    optimizer.state[model.outer.weight]["sketch"] = torch.randn(3)
    before = weights(model)
    with pytest.raises(pat.SurgeryError, match=r"AdamW keeps state 'sketch' for outer.weight"):
        mask.set(alive, [optimizer])
    assert same(weights(model), before)
    assert not mask.is_active


def test_the_binding_knows_who_lives() -> None:
    """Scores are divided by the mean over the living, as they would be after a prune."""
    model, _, mask, alive = inner_and_its_mask(sgd)
    mask.set(alive, [])
    held = pat.criteria.GroupNorm().score(mask.binding)[alive]
    pruned = copy.deepcopy(model)
    binding: Binding = pat.surgery.prune(bind(mask.binding.plan, pruned), alive)
    torch.testing.assert_close(held, pat.criteria.GroupNorm().score(binding), rtol=1e-6, atol=0)


# As a mode of the pruner


def test_whatever_an_optimizer_does_the_dead_stay_dead() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                p += torch.randn_like(p)

    model = Small()
    optimizer = Noisy(model.parameters(), lr=0.1)
    pruner = pat.Pruner(model, 0.5, end_epoch=1, mode="mask", ranking="local")
    for _ in range(3):
        train_one_epoch(model, optimizer)
        pruner.step()
        assert int((model.inner.weight.flatten(1) == 0).all(1).sum()) == 8


class Fickle:
    """A criterion to which zero weights mean nothing, and that thinks the opposite each time."""

    sign = 1.0

    def score(self, binding: Binding) -> Tensor:
        self.sign = -self.sign
        return self.sign * torch.arange(binding.plan.n_channels, dtype=torch.float32)


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_what_is_masked_stays_masked_whatever_it_scores_later(ranking: str) -> None:
    pruner = pat.Pruner(
        Small(), 0.6, "linear", example_inputs=small_inputs(), end_epoch=4, mode="mask", ranking=ranking,
        importance=Fickle(),
    )  # fmt: skip
    dead = torch.zeros(28, dtype=torch.bool)
    for epoch in range(1, 5):
        report = pruner.step()
        now = ~pruner.mask.alive
        assert now[dead].all()
        dead = now
        assert report.channels[1] == int((~dead).sum())
        assert ranking == "local" or report.channels[1] == int(28 * (1 - 0.15 * epoch) + 1e-9)


@pytest.mark.parametrize("make", [adamw, sgd])
def test_masked_channels_stay_zero_until_finalize_removes_them(make: Callable[[nn.Module], Optimizer]) -> None:
    model = Small().double()
    optimizer = make(model)
    x = small_inputs(dtype=torch.float64)
    pruner = pat.Pruner(model, target_sparsity=0.5, end_epoch=3, mode="mask", reg_strength=1e-2)
    shapes = [p.shape for p in model.parameters()]
    for _ in range(5):
        train_one_epoch(model, optimizer, x=x)
        report = pruner.step()
        assert [p.shape for p in model.parameters()] == shapes
    assert report.channels == (14, 14)
    assert report.params[1] < report.dense_params == sum(p.numel() for p in model.parameters())
    train_one_epoch(model, optimizer, x=x)
    dead = (model.inner.weight.flatten(1) == 0).all(1)
    assert 0 < dead.sum() < 16
    assert (model.outer.weight[:, dead] == 0).all()
    assert (model.inner.bias[dead] == 0).all()
    expected = model.eval()(x)
    final = pruner.finalize()
    assert (final.stage, final.channels, final.params[1]) == ("finetune", (14, 14), report.params[1])
    assert sum(p.numel() for p in model.parameters()) == report.params[1]
    assert model.inner.out_channels == 16 - dead.sum()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    before = weights(model)
    train_one_epoch(model, optimizer, x=x)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert pruner.step().channels == (14, 14)


def test_mask_mode_chooses_what_prune_mode_chooses_and_local_macs_never_revive() -> None:
    """With a target in MACs and local ranking, what was masked stays masked at every step."""
    for ranking in ("local", "global"):
        options = {"target_sparsity": 0.8, "mac_target": 0.4, "ranking": ranking}
        pruned, masked = Small(width=24), Small(width=24)
        masked.load_state_dict(pruned.state_dict())
        gone = steps(pruned, 10, **options)
        held = steps(masked, 10, mode="mask", **options)
        assert [r.channels for r in gone] == [r.channels for r in held]
        assert [r.macs for r in gone] == [r.macs for r in held]
        assert gone[-1].macs[1] <= 0.4 * gone[-1].dense_macs
        assert int((masked.inner.weight.flatten(1) != 0).any(1).sum()) == pruned.inner.out_channels


def test_a_statistic_over_masked_channels_is_noted() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    pruner = pat.Pruner(model, example_inputs=torch.randn(2, 6), mode="mask")
    assert any("a norm takes statistics over masked channels" in note for note in pruner.step().notes)


def test_a_length_that_is_divided_by_is_named_when_scores_are_nan() -> None:
    class ByHand(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)

    model = nn.Sequential(ByHand(6, 24), nn.ReLU(), ByHand(24, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = pat.Pruner(model, 0.5, example_inputs=torch.randn(2, 6), mode="mask", optimizer=optimizer, end_epoch=3)
    pruner.step()
    model(torch.randn(2, 6)).square().sum().backward()
    optimizer.step()
    with pytest.raises(pat.PatError, match=r"divide channels by their own length \(0\).*0 / 0"):
        pruner.step()
