"""What is made of tile tables lives as long as they do, and is not made during a capture."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from pat_fast.backends import kept
from pat_fast.backends.kept import Kept
from pat_fast.errors import BackendError

CPU, META = torch.device("cpu"), torch.device("meta")


def test_made_once_for_each_key_device_and_set_of_tables() -> None:
    things: Kept[int] = Kept()
    made = itertools.count()
    a, b = torch.zeros(2, 10), torch.zeros(2, 10)  # equal, but not the same
    asked = [([a], CPU, 4), ([a], CPU, 2), ([a], META, 4), ([b], CPU, 4), ([b, a], CPU, 4), ([a, a], CPU, 4)]
    first = [things.of(*one, lambda: next(made)) for one in asked]
    assert first == list(range(6))
    assert [things.of(*one, lambda: next(made)) for one in asked] == first


def test_it_goes_with_either_table() -> None:
    for gone in (0, 1):
        things: Kept[torch.Tensor] = Kept()
        tables = [torch.zeros(1, 10), torch.zeros(1, 10)]
        seen: list[int] = []
        value = torch.zeros(1)
        things.of(tables, CPU, 0, lambda value=value: value)
        del tables[gone]
        gc.collect()
        tables.insert(gone, torch.zeros(1, 10))
        things.of(tables, CPU, 0, lambda seen=seen: seen.append(1) or torch.ones(1))
        assert seen
        assert len(things) == 1


def test_nothing_is_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    things: Kept[str] = Kept()
    table, other = torch.zeros(1, 10), torch.zeros(1, 10)
    things.of([table], CPU, 0, lambda: "old")
    monkeypatch.setattr(kept, "is_capturing", lambda device: True)
    assert things.of([table], CPU, 0, lambda: "new") == "old"
    with pytest.raises(BackendError, match="run the step once before the capture"):
        things.of([other], CPU, 0, lambda: "new")
