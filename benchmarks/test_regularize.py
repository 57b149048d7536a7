"""The group-norm penalty's gradient against `tp.pruner.GroupNormPruner.regularize`."""

from __future__ import annotations

from collections.abc import Callable

from pat_fast.bench import Row


def test_regularize(compare_with_tp: Callable[[str], Row]) -> None:
    assert compare_with_tp("regularize").ratio is not None
