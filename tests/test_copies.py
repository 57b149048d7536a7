"""A model that is copied, pickled or saved whole while a pruner works on it: the copy is a model like any other."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.training import no_hooks_left, sgd, train_one_epoch


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "masked": {"mode": "mask"},
    "activation": {"importance": "activation"},
    "activation_taylor": {"importance": "activation_taylor"},
}


def test_a_model_that_was_saved_whole_needs_no_pat_fast(tmp_path: Path) -> None:
    """In another process, which could not even import it; before the first forward, while a hook waits for one."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pruners = [pat.Pruner(model, 0.5), pat.Pruner(model, 0.5, importance="activation", example_inputs=torch.ones(2, 4))]
    assert any(m._forward_pre_hooks for m in model)
    assert model._forward_pre_hooks
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['pat_fast'] = None; import torch; "
        f"print(torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)(torch.ones(1, 4)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for pruner in pruners:
        pruner.close()
    assert json.loads(done.stdout)[0] == pytest.approx(model(torch.ones(1, 4))[0].tolist())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_copy_of_the_model_is_free(name: str, how: str) -> None:
    """Before the first forward, while statistics are gathered, and after a prune."""
    with no_hooks_left():
        model = Small()
        pruner = pat.Pruner(model, 0.5, end_epoch=3, **SETTINGS[name])
        optimizer = sgd(model)
        for epoch in range(3):
            other = COPIES[how](model)
            before = [p.detach().clone() for p in model.parameters()]
            caught = pruner.is_ready
            other(small_inputs(2)).square().mean().backward()
            assert pruner.is_ready == caught
            theirs = sgd(other)
            theirs.step()
            theirs.zero_grad()
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            del theirs
            train_one_epoch(model, optimizer)
            assert pruner.step().epoch == epoch + 1
        again = COPIES[how](model)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        fresh = pat.Pruner(again, 0.2, end_epoch=1, example_inputs=small_inputs())
        left = fresh.step().channels[1]
        fresh.close()
        assert left < pruner.plan.n_channels or name == "masked"
        pruner.close()


def test_a_copy_watches_nothing() -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, end_epoch=3, importance="activation", example_inputs=small_inputs())
    other = copy.deepcopy(model)
    other(small_inputs())
    assert not pruner.criterion._sums
    model(small_inputs())
    assert pruner.criterion._sums
    pruner.close()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pruner_is_of_one_model(way: Callable[[Any], Any]) -> None:
    pruner = pat.Pruner(Small(), 0.5, end_epoch=3)
    with pytest.raises(pat.ConfigError, match=r"cannot be copied or pickled.*save its state_dict\(\)"):
        way(pruner)
    pruner.close()
