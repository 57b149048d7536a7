"""Everything that Torch-Pruning has under its names is there under ours."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch_pruning as original

import pat_fast.torch_pruning as tp

MODULES = ["", *(m.name[len("torch_pruning") :] for m in pkgutil.walk_packages(original.__path__, "torch_pruning."))]
PRUNERS = ["BasePruner", "MetaPruner", "MagnitudePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"]


def public(module: Any) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def own(module: ModuleType) -> set[str]:
    """Public names that are Torch-Pruning's: not what the module imports for its own use from elsewhere."""
    listed = set(getattr(module, "__all__", ()))
    return listed | {
        name
        for name in public(module)
        if not inspect.ismodule(value := getattr(module, name)) and getattr(value, "__module__", "") == module.__name__
    }


@pytest.mark.parametrize("name", MODULES)
def test_public_names(name: str) -> None:
    theirs = importlib.import_module("torch_pruning" + name)
    ours = importlib.import_module("pat_fast.torch_pruning" + name)
    assert own(theirs) <= public(ours)


def test_modules_are_reached_by_attribute() -> None:
    assert tp.pruner.importance is tp.importance
    assert tp.pruner.algorithms.scheduler.linear_scheduler(0.5, 2) == [0.0, 0.25, 0.5]
    assert tp.utils.benchmark is original.utils.benchmark
    assert tp.prune_conv_out_channels == original.prune_conv_out_channels
    assert tp.DependencyGraph is original.DependencyGraph
    assert tp.save is original.save


@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_take_the_same_arguments(name: str) -> None:
    ours, theirs = getattr(tp.pruner, name), getattr(original.pruner, name)
    assert ours is not theirs
    assert issubclass(ours, original.pruner.BasePruner)
    expected = list(inspect.signature(theirs).parameters)
    got = [p for p in inspect.signature(ours).parameters if p not in ("args", "kwargs")]
    base = list(inspect.signature(tp.pruner.BasePruner).parameters)
    # What a regularising pruner does not name it passes on, in the same order.
    assert (
        [*got, *base[3:]][: len(expected)] == expected
        if name not in ("BasePruner", "MetaPruner", "MagnitudePruner")
        else (got[: len(expected)] == expected)
    )
    methods = {m for m in public(theirs) if callable(getattr(theirs, m))}
    assert methods <= public(ours)
