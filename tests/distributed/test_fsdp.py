"""Sharded models on real ranks; what each does stands in ``sharded.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pat_fast.distributed.fsdp import rows_of
from tests.distributed.launch import torchrun


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_models_are_pruned_as_whole_ones(ranks: int, tmp_path: Path) -> None:
    for found in torchrun("follows", tmp_path, ranks=ranks, worker="sharded"):
        for error, same, channels, shapes in found.values():
            assert error < 1e-10
            assert same
            assert 0 < channels < 18
            assert shapes


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_pruner_follows_a_sharded_model_as_a_whole_one(ranks: int, tmp_path: Path) -> None:
    for found in torchrun("pruner_follows", tmp_path, ranks=ranks, worker="sharded"):
        for name, (error, same, reports) in found.items():
            assert error < 1e-12, name
            assert same, name
            assert all(one == other for one, other in reports), name
            assert reports[-1][0][1] < reports[0][0][0], name


@pytest.mark.slow
def test_networks_of_the_zoo_are_pruned_sharded_as_whole(tmp_path: Path) -> None:
    for found in torchrun("networks", tmp_path, worker="sharded"):
        for name, (error, sharded, whole) in found.items():
            assert error < 1e-12, name
            assert sharded == whole, name


@pytest.mark.slow
def test_a_prune_of_shards_that_fails_is_undone(tmp_path: Path) -> None:
    for rank, found in enumerate(torchrun("undone", tmp_path, worker="sharded")):
        for where, (said, unchanged, error, same) in found.items():
            assert "no more" in said, (where, rank)
            assert unchanged, (where, rank)
            assert error < 1e-12, where
            assert same, where


@pytest.mark.slow
def test_a_loss_from_before_a_prune_cannot_be_backpropagated(tmp_path: Path) -> None:
    for found in torchrun("old_losses", tmp_path, worker="sharded"):
        for said, error in found.values():
            assert len(said) == 2
            assert all("computed before the model was pruned" in reason for reason in said)
            assert error < 1e-12


@pytest.mark.slow
def test_mixed_precision_and_going_on_after_sharding(tmp_path: Path) -> None:
    for (_, left), dtype in torchrun("lowered", tmp_path, worker="sharded"):
        assert left < 18
        assert dtype == "torch.float32"
    for error, epoch, said in torchrun("resumed", tmp_path, worker="sharded"):
        assert error < 1e-12
        assert epoch == 4
        assert "before fully_shard" in said


@pytest.mark.slow
def test_what_cannot_be_sharded_or_agreed_is_said(tmp_path: Path) -> None:
    for found in torchrun("refused", tmp_path, worker="sharded"):
        expected = [
            "shard the whole model, or prune before sharding", "the channels to keep: expected the same on all ranks",
            "importance: expected one of GroupNorm", "got Function", "got BNScaleRegularizer", "target: layers of",
            "got FPGM", "averaged: Small is an average", "gradients that were not reduced yet",
            *["LBFGS keeps vectors over all parameters together, which cannot be cut where the parameters are"] * 2,
        ]  # fmt: skip
        for (said, unchanged), text in zip(found, expected, strict=True):
            assert text in said
            assert unchanged


@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_rows_are_those_of_a_chunk(size: int) -> None:
    for ranks in (1, 2, 3, 5):
        chunks = [c.tolist() for c in torch.arange(size).chunk(ranks)]
        found = [np.arange(*rows_of(size, ranks, r)).tolist() for r in range(ranks)]
        assert [f for f in found if f] == chunks
