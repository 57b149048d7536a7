"""Ranks under ``DistributedDataParallel`` prune as one, started by torchrun; what each does stands in ``worker.py``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pat_fast as pat
from pat_fast.distributed import Peers, unwrapped
from tests.distributed.launch import torchrun
from tests.distributed.worker import SECONDS, SETTINGS
from tests.helpers import Small, small_inputs

EXACT = 1e-9  # of the largest gradient, in float64


def check_together(ranks: list[Any]) -> None:
    for found in ranks:
        assert found["scores differ"] == [True] * 3
        assert found["hook"]
        assert [e[1] for e in found["epochs"]] == [[28, 23], [23, 18], [18, 14], [14, 14]]
        for same, _, error in found["epochs"]:
            assert same
            assert error < EXACT


def test_two_ranks_with_other_data_prune_alike(tmp_path: Path) -> None:
    check_together(torchrun("together", tmp_path))


def test_three_ranks(tmp_path: Path) -> None:
    check_together(torchrun("together", tmp_path, ranks=3))


@pytest.mark.slow
def test_a_model_that_is_wrapped_later(tmp_path: Path) -> None:
    for found in torchrun("made_before_wrapping", tmp_path):
        for same, channels, error in found.values():
            assert same
            assert channels == 14
            assert error < EXACT


@pytest.mark.slow
def test_the_wrapper_keeps_its_settings_and_hooks(tmp_path: Path) -> None:
    hooks = {"hook": "allreduce_hook", "built-in hook": "BuiltinCommHookType.ALLREDUCE", "PowerSGD": "powerSGD_hook"}
    for found in torchrun("settings", tmp_path):
        assert list(found) == list(SETTINGS)
        for name, (same, changed, error, hook) in found.items():
            assert same, name
            assert changed == [], name
            assert error < EXACT, name
            assert hook == hooks.get(name)


@pytest.mark.slow
def test_gradients_that_were_not_reduced_yet_are_cut_and_reduced_later(tmp_path: Path) -> None:
    for found in torchrun("accumulated", tmp_path):
        assert max(found) < EXACT


REASONS = {
    "scores": "rank 1 failed.*ValueError: no data left",
    "selection": "rank 1 failed.*MemoryError: no memory",
    "other channels": "the channels to keep: expected the same on all ranks",
    "other plan": "the plan: expected the same on all ranks",
    "new tensors": "rank 1 failed.*no memory for tensors",
    "swap": "rank 1 failed.*no memory for notes",
    "what was gathered": "rank 1 failed.*no memory to go on",
    "interrupt": "rank 1 failed.*KeyboardInterrupt",
    "first rank": "rank 0 failed.*ValueError: first",
    "wrapper": "rank 1 failed.*cannot be rebuilt",
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_fails_fails_all(ranks: int, tmp_path: Path) -> None:
    found = torchrun("failures", tmp_path, ranks=ranks)
    for name, reason in REASONS.items():
        for rank, (error, unchanged, in_time, gradients) in enumerate(f["stages"][name] for f in found):
            failing = name not in ("other channels", "other plan") and rank == (name != "first rank")
            assert error, (name, rank)
            assert failing or re.match(f"SurgeryError: .*{reason}", error), (name, rank, error)
            assert unchanged, (name, rank)
            assert in_time, (name, rank)
            assert gradients < EXACT, (name, rank)
    assert all(f["went on"] for f in found)


@pytest.mark.slow
def test_a_rank_that_fails_when_all_are_pruned(tmp_path: Path) -> None:
    first, second = torchrun("after_the_swap", tmp_path)
    assert "prune 1, an error" in first or "prune 1, the end" in first
    assert "rank 1 failed, so no rank goes on (MemoryError: no memory for buckets)" in first
    assert second == "MemoryError: no memory for buckets"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one_is_late", "one_dies"])
def test_a_rank_that_does_not_come_is_named_in_time(case: str, tmp_path: Path) -> None:
    message, seconds = torchrun(case, tmp_path, fails=case == "one_dies")[0]
    assert "rank(s) 1 did not come" in message
    assert seconds < SECONDS + 4


@pytest.mark.slow
def test_ranks_out_of_step(tmp_path: Path) -> None:
    for message in torchrun("out_of_step", tmp_path):
        assert "rank 1 is at 'prune 2, the plan', rank 0 at 'prune 1, the plan'" in message


@pytest.mark.slow
def test_what_a_wrapper_cannot_take_up_is_refused(tmp_path: Path) -> None:
    for found in torchrun("refused", tmp_path):
        assert [unchanged for _, unchanged in found.values()] == [True, True]
        assert "use torch.autocast" in found["mixed"][0]
        assert "delay_all_reduce_named_params" in found["delayed"][0]


@pytest.mark.slow
def test_an_optimizer_whose_state_is_shared_out(tmp_path: Path) -> None:
    for whole, shared, given, buckets in torchrun("shared_state", tmp_path):
        assert shared == pytest.approx(whole, rel=EXACT)
        assert given == pytest.approx(whole, rel=EXACT)
        assert "parameters_as_bucket_view=False" in buckets


@pytest.mark.slow
def test_a_history_of_all_parameters_together(tmp_path: Path) -> None:
    for found in torchrun("joint_history", tmp_path):
        assert len(found) == 8
        for same, together, error in found:
            assert same
            assert together
            assert error < EXACT


def test_alone_nothing_is_asked() -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, example_inputs=small_inputs(), verify=False)
    with pruner.peers.guard("prune"):
        scores = torch.rand(28).double().numpy()
        assert (pruner.peers.mean(scores, pruner.plan, scores > 2) == scores).all()  # type: ignore[arg-type]
        pruner.peers.agree("this", b"x")
    assert isinstance(pruner.peers, Peers)
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is not model


@pytest.mark.gpu
def test_nccl(tmp_path: Path) -> None:
    """As many ranks as there are GPUs."""
    found = torchrun("on_gpus", tmp_path, ranks=min(torch.cuda.device_count(), 4))
    for same, channels, error in found:
        assert same
        assert channels == 14
        assert error < EXACT
