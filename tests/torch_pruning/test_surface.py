"""Everything that Torch-Pruning has under its names is there under ours."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch_pruning as original

import pat_fast.torch_pruning as tp

MODULES = ["", *(m.name[len("torch_pruning") :] for m in pkgutil.walk_packages(original.__path__, "torch_pruning."))]
PRUNERS = ["BasePruner", "MetaPruner", "MagnitudePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"]


# What Torch-Pruning's modules import for their own use from Python's library.
HELPERS = {"OrderedDict"}


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
    assert {n for n in public(theirs) if not inspect.ismodule(getattr(theirs, n))} - HELPERS <= public(ours)


def test_the_version_is_torch_prunings() -> None:
    assert (tp.__version__, tp.__author__) == (original.__version__, original.__author__)


def test_modules_are_reached_by_attribute() -> None:
    assert tp.pruner.importance is tp.importance
    assert tp.pruner.algorithms.scheduler.linear_scheduler(0.5, 2) == [0.0, 0.25, 0.5]
    assert tp.utils.benchmark is original.utils.benchmark
    assert tp.prune_conv_out_channels == original.prune_conv_out_channels
    assert tp.DependencyGraph is original.DependencyGraph
    assert tp.save is original.save


def described(value: Any) -> Any:
    """A default as it is compared: our shared defaults cannot be written to, None in the place of an empty dict."""
    return None if value == {} else tuple(value) if isinstance(value, list) else value


def parameters(called: Any) -> list[tuple[str, Any]]:
    """Names and defaults of what ``called`` takes; what a pruner hands on in ``*args`` is what its base takes."""
    found = [(p.name, described(p.default)) for p in inspect.signature(called).parameters.values()]
    if inspect.isclass(called) and [name for name, _ in found[-2:]] == ["args", "kwargs"]:
        found = [*found[:-2], *parameters(called.__base__)[3:]]
    return found


def pairs(name: str) -> Iterator[tuple[str, Any, Any]]:
    """What Torch-Pruning's module ``name`` holds that is called, methods of classes too, and ours; not what is one."""
    theirs = importlib.import_module("torch_pruning" + name)
    ours = importlib.import_module("pat_fast.torch_pruning" + name)
    for of in sorted(n for n in public(theirs) - HELPERS if not inspect.ismodule(getattr(theirs, n))):
        one, two = getattr(theirs, of), getattr(ours, of)
        if one is two or not callable(one):
            continue
        yield of, one, two
        if inspect.isclass(one):
            for method in sorted(public(one)):
                yield f"{of}.{method}", getattr(one, method), getattr(two, method)


# Where a default says something else: in Torch-Pruning the constructor's ``alpha`` is ignored.
OTHERWISE = {("GroupNormPruner.regularize", "alpha"): None}


@pytest.mark.parametrize("name", MODULES)
def test_every_name_takes_the_same_arguments(name: str) -> None:
    for where, theirs, ours in pairs(name):
        if not callable(theirs):
            assert ours == theirs, where
            continue
        expected = [(n, OTHERWISE.get((where, n), default)) for n, default in parameters(theirs)]
        assert parameters(ours)[: len(expected)] == expected, where


def test_names_that_are_not_compared_are_the_same_objects() -> None:
    compared = {where.partition(".")[0] for name in MODULES for where, *_ in pairs(name)}
    importances = {n for n in public(original.importance) if n.endswith("Importance")} - {"Importance"}
    assert compared == {*PRUNERS, *importances}


@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_are_of_torch_prunings_kind(name: str) -> None:
    ours, theirs = getattr(tp.pruner, name), getattr(original.pruner, name)
    assert ours is not theirs
    assert issubclass(ours, original.pruner.BasePruner)


def test_every_difference_names_tests_that_are_there() -> None:
    root = Path(__file__).parents[2]
    named, file = 0, ""
    for line in (root / "docs" / "differences.md").read_text().splitlines():
        section = re.match(r"In `(test_\w+\.py)`", line)
        file = section[1] if section else file
        for path, name in re.findall(r"`(?:([\w/]+\.py)::)?(test_\w+)`", line):
            where = root / (path if path.startswith("tests/") else f"tests/torch_pruning/{path or file}")
            assert f"def {name}(" in where.read_text(), (where, name)
            named += 1
    assert named > 60
