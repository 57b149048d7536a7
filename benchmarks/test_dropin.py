"""`pat_fast.torch_pruning` against Torch-Pruning, as a script sees them: building a pruner, and its `step()`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch_pruning as original

import pat_fast.torch_pruning as dropin
from benchmarks.conftest import Measure
from benchmarks.dropin import GOALS, Script
from pat_fast.bench.clock import Timed
from pat_fast.bench.steps import Step

CASES: dict[str, Callable[[Script, Any], Timed]] = {"drop-in step": Script.step, "drop-in construct": Script.construct}


@pytest.fixture(scope="module", params=[*GOALS])
def script(request: pytest.FixtureRequest) -> Script:
    return Script(request.param, small=request.config.getoption("--small"))


@pytest.mark.parametrize("op", CASES)
def test_dropin(op: str, script: Script, measure: Measure) -> None:
    theirs, ours = (partial(CASES[op], script, library) for library in (original, dropin))
    step = Step(op, "copy", ours, script.moved, theirs, script.check, "all", slow=True)
    assert measure(script.name, step).ratio is not None
