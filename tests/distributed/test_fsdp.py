"""Sharded models on real ranks; what each does stands in ``sharded.py``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pat_fast.distributed.fsdp import rows_of
from tests.distributed.launch import torchrun


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_models_are_pruned_as_whole_ones(ranks: int, tmp_path: Path) -> None:
    for found in torchrun("follows", tmp_path, ranks=ranks, worker="sharded"):
        for error, same, channels, shapes in found.values():
            assert error < 1e-10
            assert same
            assert 0 < channels < 18
            assert shapes


@pytest.mark.slow
def test_what_cannot_be_sharded_or_agreed_is_said(tmp_path: Path) -> None:
    for whole, differ, pruner in torchrun("refused", tmp_path, worker="sharded"):
        assert "shard the whole model, or prune before sharding" in whole[0]
        assert "the channels to keep: expected the same on all ranks" in differ[0]
        assert "DTensor" in pruner[0]
        assert whole[1]
        assert differ[1]


@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_rows_are_those_of_a_chunk(size: int) -> None:
    for ranks in (1, 2, 3, 5):
        chunks = [c.tolist() for c in torch.arange(size).chunk(ranks)]
        found = [np.arange(*rows_of(size, ranks, r)).tolist() for r in range(ranks)]
        assert [f for f in found if f] == chunks
