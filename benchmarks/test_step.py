"""Scoring, global ranking and removing half of the channels against `tp.pruner.BasePruner.step`."""

from __future__ import annotations

from collections.abc import Callable

from pat_fast.bench import Row


def test_step(compare_with_tp: Callable[[str], Row]) -> None:
    assert compare_with_tp("step").ratio is not None
