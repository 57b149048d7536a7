"""Group-norm importance of every channel against `tp.importance.GroupMagnitudeImportance(p=2)`."""

from __future__ import annotations

from collections.abc import Callable

from pat_fast.bench import Row


def test_importance(compare_with_tp: Callable[[str], Row]) -> None:
    assert compare_with_tp("importance").ratio is not None
