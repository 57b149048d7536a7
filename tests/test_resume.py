"""A training that is killed and goes on in a new process, from the dense definition; and files that are no good."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import pat_fast as pat
from pat_fast import resume
from tests.distributed.launch import ROOT, environment
from tests.helpers import Small, small_inputs
from tests.resuming import CASES
from tests.training import adamw, same, train_one_epoch, weights


def run(folder: Path, *arguments: object) -> int:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.resuming", str(folder), *map(str, arguments)]
    options: dict[str, Any] = {"env": environment(), "cwd": ROOT, "timeout": 300, "check": False}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-4000:]
    return done.returncode


def killed_and_resumed(folder: Path, case: str, kills: list[int]) -> None:
    assert run(folder / "whole", case) == 0
    for kill in kills:
        assert run(folder / "killed", case, kill) == -signal.SIGKILL
        assert not (folder / "killed/result.json").exists()
    assert run(folder / "killed", case) == 0
    whole, resumed = (json.loads((folder / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert resumed == whole
    assert whole["widths"] != [p.shape[0] for p in Small().parameters()] or case == "masks"


def test_a_killed_training_goes_on_to_the_bit(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, "plain", [3])


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_killed_twice(case: str, tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, case, [2, 5])


# In one process


def begun(width: int = 12, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, pat.Pruner]:
    model = Small(width)
    return model, (optimizer := adamw(model)), pat.Pruner(model, 0.5, end_epoch=4, verify=False, optimizer=optimizer)


def trained(epochs: int = 2) -> tuple[nn.Module, torch.optim.Optimizer, pat.Pruner]:
    model, optimizer, pruner = begun()
    for _ in range(epochs):
        train_one_epoch(model, optimizer)
        pruner.step()
    return model, optimizer, pruner


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizer, pruner = trained()
    path = tmp_path / "deep" / "training.pt"
    pat.save_training(path, model=model, optimizer=optimizer, pruner=pruner, extra={"epoch": 2})
    return path


def test_a_dense_model_takes_the_state_of_a_pruned_one() -> None:
    model, optimizer, pruner = trained()
    dense, its_optimizer, its_pruner = begun()
    its_pruner.load_state_dict(pruner.state_dict())  # before the first forward
    dense.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert its_pruner.epoch == 2
    assert (dense.stem.out_channels, dense.inner.in_channels) == (model.stem.out_channels, model.inner.in_channels)
    for _ in range(3):
        for one, two in ((model, optimizer), (dense, its_optimizer)):
            train_one_epoch(one, two)
        assert pruner.step().channels == its_pruner.step().channels
    assert same(weights(dense), weights(model))
    assert its_pruner.done


def test_no_mask_is_set_that_was_not_set() -> None:
    """With one, even if nothing is masked, scores and pushes are computed another way: their last bits differ."""
    runs = [pat.Pruner(Small(), 0.5, mode="soft", end_epoch=4, example_inputs=small_inputs()) for _ in range(2)]
    runs[0].step()
    runs[1].load_state_dict(runs[0].state_dict())
    assert runs[1].binding is not None
    assert runs[1].binding.alive is None
    for _ in range(3):
        runs[0].step()
    runs[1].load_state_dict(runs[0].state_dict())
    assert runs[1].mask is not None
    assert runs[1].mask.is_active


def test_a_state_that_waits_for_the_first_forward_is_the_state() -> None:
    _, _, pruner = trained()
    _, _, other = begun()
    state = pruner.state_dict()
    other.load_state_dict(state)
    assert other.state_dict().keys() == state.keys()
    assert other.state_dict()["epoch"] == 2


def test_a_plan_of_the_dense_model_is_made_anew() -> None:
    model, _, pruner = trained()
    dense, optimizer, other = begun()
    train_one_epoch(dense, optimizer)  # there is a plan now
    assert other.plan is not None or other.is_ready
    other.load_state_dict(pruner.state_dict())
    assert other.plan is not None
    assert other.plan.n_channels == pruner.plan.n_channels  # type: ignore[union-attr]
    assert [p.shape for p in dense.parameters()] == [p.shape for p in model.parameters()]


def test_parameters_keep_their_identity_and_memory_format() -> None:
    model, _, pruner = trained()
    dense = Small().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = list(dense.parameters())
    assert resume.fit(dense, resume.structure_of(model))
    assert all(a is b for a, b in zip(dense.parameters(), before, strict=True))
    assert dense.inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert not resume.fit(dense, resume.structure_of(model))
    assert pruner.epoch == 2


def test_averages_of_the_weights_shrink_too(tmp_path: Path) -> None:
    model, optimizer, pruner = trained(1)
    ema = AveragedModel(model)
    path = tmp_path / "training.pt"
    pat.save_training(path, model=model, optimizer=optimizer, pruner=pruner, ema=ema)
    dense, its_optimizer, its_pruner = begun()
    its_ema = AveragedModel(dense)
    pat.load_training(path, model=dense, optimizer=its_optimizer, pruner=its_pruner, ema=its_ema)
    assert same(weights(its_ema), weights(ema))
    its_ema.update_parameters(dense)


def test_random_numbers_go_on(tmp_path: Path) -> None:
    import random

    import numpy as np

    pat.save_training(tmp_path / "t", model=nn.Linear(2, 2))
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    pat.load_training(tmp_path / "t", model=nn.Linear(2, 2))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn


# Files that are refused


def refused(path: Path, message: str, width: int = 12, **change: Any) -> None:
    model, optimizer, pruner = begun(width)
    before = weights(model)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner, **change}
    with pytest.raises(pat.CheckpointError, match=message):
        pat.load_training(path, **{name: part for name, part in parts.items() if part is not None})
    assert same(weights(model), before)
    assert not optimizer.state
    assert pruner.epoch == 0


def test_truncated_and_altered_files(saved: Path) -> None:
    good = saved.read_bytes()
    for length in (0, 10, len(good) // 2, len(good) - 1):
        saved.write_bytes(good[:length])
        refused(saved, "truncated")
    for place in (0, 100, len(good) // 2, len(good) - 100):
        saved.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        refused(saved, "was altered")
    saved.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(saved, "was altered")
    saved.write_bytes(good + b"x")
    refused(saved, "truncated")
    saved.unlink()
    refused(saved, "cannot read")


def test_files_of_others(saved: Path) -> None:
    refused(saved, "expected the parts model, optimizer, pruner", pruner=None)
    refused(saved, "cannot be a pruned 6", width=6)
    head = nn.Sequential(Small())
    refused(saved, "does not fit", model=head)
    refused(saved, "expected parameter groups of", optimizer=adamw(nn.Linear(2, 2)))
    other = torch.optim.SGD(begun(12)[0].parameters(), 0.1)
    refused(saved, "optimizer: expected AdamW, as in the file, got SGD, which needs 'dampening', too", optimizer=other)


class Sneaky:
    """What pickle would run."""

    def __reduce__(self) -> Any:
        return (print, ("ran",))


class Odd(nn.Module):
    def get_extra_state(self) -> Any:
        return Sneaky()

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_would_run_code_is_not_written_and_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.pt"
    with pytest.raises(pat.CheckpointError, match="only be read by running code"):
        pat.save_training(path, model=Odd())
    assert list(tmp_path.iterdir()) == []
    with path.open("w+b") as file:  # with a good checksum
        torch.save({"parts": {"model": Sneaky()}, "structures": {}, "random": {}, "extra": {}}, file)
        length = file.tell()
        file.write(resume.MAGIC + length.to_bytes(8, "big") + resume._checksum(file, length))
    with pytest.raises(pat.CheckpointError, match="cannot read"):
        pat.load_training(path, model=nn.Linear(1, 1))
    assert "ran" not in capsys.readouterr().out


def test_a_good_file_stays_when_the_next_cannot_be_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = saved.read_bytes()

    def full(number: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(resume.os, "fsync", full)
    with pytest.raises(pat.CheckpointError, match="no space left"):
        pat.save_training(saved, model=nn.Linear(2, 2))
    assert saved.read_bytes() == good
    assert list(saved.parent.iterdir()) == [saved]
    with pytest.raises(pat.CheckpointError, match="expected something with a state_dict, got int"):
        pat.save_training(saved, epoch=3)
    with pytest.raises(pat.CheckpointError, match="extra: expected a dict of plain values, got list"):
        pat.save_training(saved, extra=[3])  # type: ignore[arg-type]
    with pytest.raises(pat.ConfigError, match=r"state: expected what state_dict\(\) gave, got int"):
        pat.Pruner(nn.Linear(2, 2), end_epoch=1).load_state_dict(3)  # type: ignore[arg-type]


def test_states_of_before_structures_were_kept_need_the_pruned_model() -> None:
    _, _, pruner = trained()
    state = pruner.state_dict()
    del state["structure"]
    fresh = pat.Pruner(Small(), 0.5, end_epoch=4, verify=False, example_inputs=small_inputs())
    with pytest.raises(pat.PlanError, match="load the pruned model first"):
        fresh.load_state_dict(state)
