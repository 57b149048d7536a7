"""Averages of a model's weights (EMA, SWA) lose the channels that the model loses, and go on averaging."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

import pat_fast as pat
from pat_fast.surgery import prune
from tests.helpers import Small, small_inputs
from tests.training import Twin, adamw, masked_equals_pruned, same, sgd, train_one_epoch, weights

X = small_inputs(dtype=torch.float64)
AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "mean": AveragedModel,
    "mean, one by one": lambda m: AveragedModel(m, avg_fn=get_swa_avg_fn()),
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
}


@pytest.fixture(autouse=True)
def _no_models_of_other_tests() -> None:
    gc.collect()


def pruner(model: nn.Module, mode: str = "prune", **options: Any) -> pat.Pruner:
    return pat.Pruner(
        model, 0.5, example_inputs=X.to(next(model.parameters()).dtype), mode=mode, end_epoch=2, verify=False, **options
    )


@pytest.mark.parametrize("name", list(AVERAGES))
def test_averages_follow_and_masked_equals_pruned(name: str) -> None:
    def make(mode: str) -> Twin:
        model = Small().double()
        average = AVERAGES[name](model)
        return Twin(model, [adamw(model)], pruner(model, mode, averaged=average), average)

    def train(twin: Twin, step: int) -> Tensor:
        loss = twin.train(X, step)
        twin.extra.update_parameters(twin.model)
        return loss

    twins = masked_equals_pruned(make, train)
    for twin in twins:
        average = twin.extra.module
        assert [p.shape for p in average.parameters()] == [p.shape for p in twin.model.parameters()]
        assert [b.shape for b in average.buffers()] == [b.shape for b in twin.model.buffers()]
        assert (average.stem.out_channels, average.norm.num_features) == (twin.model.stem.out_channels,) * 2
    for a, b in zip(twins[0].extra.module.parameters(), twins[1].extra.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(t.extra.eval()(X) for t in twins), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("when", ["before the pruner", "after the pruner", "between two prunes"])
def test_averages_are_found(when: str) -> None:
    model = Small()
    optimizer = sgd(model)
    average = AveragedModel(model) if when == "before the pruner" else None
    one = pruner(model)
    if when == "after the pruner":
        average = AveragedModel(model)
    for epoch in range(3):
        train_one_epoch(model, optimizer)
        if when == "between two prunes" and epoch == 1:
            average = AveragedModel(model)
        if average is not None:
            average.update_parameters(model)
        one.step()
    assert average is not None
    assert average.module.stem.out_channels == model.stem.out_channels < 12
    average.update_parameters(model)
    update_bn([small_inputs()], average)
    assert average(small_inputs()).isfinite().all()
    assert average.module.norm.running_mean.shape == model.norm.running_mean.shape


@pytest.mark.parametrize("compiled", ["the model", "what is averaged", "what is pruned"])
def test_averages_of_compiled_models(compiled: str) -> None:
    model = Small()
    wrapped: Any = torch.compile(model, backend="eager")
    average = AveragedModel(wrapped if compiled == "what is averaged" else model)
    one = pruner(wrapped if compiled == "what is pruned" else model)
    one.step()
    assert [p.shape for p in average.parameters()] == [p.shape for p in model.parameters()]
    average.update_parameters(wrapped if compiled == "what is averaged" else model)


def test_the_average_of_another_model_is_left_alone() -> None:
    model, other = Small(), Small(width=20)
    average = AveragedModel(other)
    pruner(model).step()
    assert average.module.stem.out_channels == 20


def test_whose_average_it_is_must_be_told_where_it_cannot_be_seen() -> None:
    model = Small()
    dense = copy.deepcopy(model)
    average = AveragedModel(dense)
    optimizer = sgd(model)
    one = pruner(model)
    with pytest.warns(UserWarning, match=r"will be refused as things are: an AveragedModel fits .*pass averaged="):
        train_one_epoch(model, optimizer)
    before = weights(model)
    with pytest.raises(pat.SurgeryError, match=r"fits this model and another Small just like it.*pass averaged="):
        one.step()
    assert same(weights(model), before)
    pruner(model, averaged=[]).step()
    assert average.module.stem.out_channels == dense.stem.out_channels == 12
    assert model.stem.out_channels < 12


def test_a_copy_of_ones_own_is_pruned_when_it_is_named() -> None:
    class Teacher(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = copy.deepcopy(module).requires_grad_(False)

    model = Small()
    teachers = [Teacher(model), copy.deepcopy(model)]
    pruner(model, averaged=teachers).step()
    for teacher in teachers:
        assert [p.shape for p in teacher.parameters()] == [p.shape for p in model.parameters()]
    assert not any(p.requires_grad for p in teachers[0].parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Small(width=20)], "expected copies of the model, or modules that wrap one, got Small whose parameters have"),
        ([torch.zeros(3)], "expected modules that are copies of the model, got Tensor"),
    ],
)
def test_what_is_no_copy_is_refused(given: Any, message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        pruner(Small(), averaged=given)


def test_an_average_that_goes_away_is_forgotten_and_a_failed_prune_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    kept, dropped = AveragedModel(model), AveragedModel(model)
    one = pruner(model)
    one.step()
    del dropped
    gc.collect()
    before = weights(kept)
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules[prune.__module__], "apply_changes", lambda changes, _: 1 / (not changes))
        with pytest.raises(pat.SurgeryError, match="was undone"):
            one.step()
    assert same(weights(kept), before)
    one.step()
    assert kept.module.stem.out_channels == model.stem.out_channels


def test_stochastic_weight_averaging_with_its_schedule() -> None:
    """The recipe of PyTorch's documentation, pruned until and while the weights are averaged."""

    def make(mode: str) -> Twin:
        model = Small().double()
        optimizer = sgd(model)
        average = AveragedModel(model)
        rates = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        return Twin(model, [optimizer], pruner(model, mode, averaged=average), (average, rates))

    def train(twin: Twin, step: int) -> Tensor:
        loss = twin.train(X, step)
        if step >= 3:
            twin.extra[0].update_parameters(twin.model)
            twin.extra[1].step()
        return loss

    twins = masked_equals_pruned(make, train)
    for twin in twins:
        update_bn([X], twin.extra[0])
    torch.testing.assert_close(*(t.extra[0].eval()(X) for t in twins), rtol=1e-9, atol=1e-9)
