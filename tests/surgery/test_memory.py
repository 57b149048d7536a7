"""What a prune needs while it runs, and that nothing stays behind."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pat_fast as pat
from pat_fast.plan import bind, build_plan
from pat_fast.surgery import prune
from tests.helpers import Small, small_inputs
from tests.training import adamw, hooks, train_one_epoch


def storages() -> int:
    """Bytes of all tensors that live."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def wide(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


@pytest.mark.parametrize("share", [0.25, pytest.param(0.5, marks=pytest.mark.slow)])
def test_beside_the_model_there_are_at_most_its_new_tensors(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All new tensors are made before the first is swapped in, so that a prune can be undone without memory."""
    gc.collect()
    others = storages()
    model = wide(256)
    optimizer = adamw(model)
    x = torch.randn(4, 8)
    plan = build_plan(model, x)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    for group in plan.groups:
        keep[group.start : group.start + int(share * group.channels)] = False
    binding = bind(plan, model)
    gc.collect()
    before = storages() - others
    peak = []
    surgery = sys.modules[prune.__module__]
    change = surgery._change

    def watching(*args: Any) -> Any:
        peak.append(storages() - others)
        return change(*args)

    monkeypatch.setattr(surgery, "_change", watching)
    prune(binding, keep, [optimizer])
    gc.collect()
    after = storages() - others
    assert before < max(peak) <= before + after
    assert after < before * (1 - share)  # nothing of the old ones is left


def cycles(count: int, width: int) -> tuple[int, int, int]:
    """Prunes and trains; hooks, objects and bytes that are more afterwards than after the first few rounds."""
    marks = []
    for number in range(count):
        if number in (count // 4, count - 1):
            gc.collect()
            marks.append((hooks(nn.Identity()), len(gc.get_objects()), tracemalloc.get_traced_memory()[0]))
        torch.manual_seed(0)  # the same shapes each time: what is remembered of shapes does not grow
        model = Small(width)
        optimizer = adamw(model)
        pruner = pat.Pruner(model, 0.8, end_epoch=8, example_inputs=small_inputs(), verify=False)
        for _ in range(8):
            train_one_epoch(model, optimizer, batches=1)
            pruner.step()
    return tuple(b - a for a, b in zip(*marks, strict=True))  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [16, 125])
def test_prunes_and_trainings_leave_nothing_behind(rounds: int) -> None:
    """Eight prunes each; a thousand in all in the long one."""
    gc.collect()
    tracemalloc.start()
    try:
        more_hooks, objects, size = cycles(rounds, width=16)
    finally:
        tracemalloc.stop()
    assert more_hooks == 0
    assert objects < 3 * rounds  # far less than one object a prune
    assert size < 2000 * rounds


@pytest.mark.slow
def test_a_thousand_prunes_of_one_model_leave_nothing_behind() -> None:
    """One channel each; memory only falls."""
    model = nn.Sequential(nn.Linear(8, 1040), nn.ReLU(), nn.Linear(1040, 5))
    optimizer = adamw(model)
    x = torch.randn(4, 8)
    binding = bind(build_plan(model, x), model)
    counts, sizes = [], []
    for number in range(1000):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
        keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
        keep[number % binding.plan.n_channels] = False
        binding = prune(binding, keep, [optimizer])
        if number % 200 == 199:
            gc.collect()
            counts.append(len(gc.get_objects()))
            sizes.append(storages())
    assert model[0].out_features == 40
    assert max(counts) - min(counts) < 200
    assert sizes == sorted(sizes, reverse=True)
