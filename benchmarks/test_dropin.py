"""`pat_fast.torch_pruning` against Torch-Pruning, as a script sees them: building a pruner, and its `step()`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import nn

import pat_fast.torch_pruning as dropin
from benchmarks.cases import classifier, num_heads, quiet
from benchmarks.conftest import Measure
from benchmarks.zoo import ZOO, Inputs, randomize_
from pat_fast.bench import Mismatch
from pat_fast.bench.clock import Timed
from pat_fast.bench.steps import RATIO, Step

MODELS = ("resnet50", "densenet121", "vit_s16", "vgg16_bn")


class Script:
    """What a user of either library writes: a pruner that halves the channels of a model in one global step."""

    def __init__(self, name: str, small: bool) -> None:
        entry = ZOO[name]
        self.name = name
        self.inputs: Inputs = entry.example(small)
        self.model = randomize_(entry.small() if small else entry.build(), 0).eval()

    def pruner(self, library: Any, model: nn.Module) -> Any:
        """Torch-Pruning's default dicts are shared by all pruners of the process, so both get some of their own."""
        with quiet():
            return library.pruner.BasePruner(
                model,
                self.inputs,
                importance=library.importance.GroupMagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=RATIO,
                ignored_layers=[classifier(model)],
                num_heads=num_heads(model),
                in_channel_groups={},
                out_channel_groups={},
            )

    def check(self) -> None:
        """Raise `Mismatch` unless one step leaves equal weights."""
        theirs, ours = copy.deepcopy(self.model), copy.deepcopy(self.model)
        self.pruner(original, theirs).step()
        self.pruner(dropin, ours).step()
        got = ours.state_dict()
        for name, value in theirs.state_dict().items():
            norm = isinstance(theirs.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
            same = got[name].shape == value.shape and (
                # Torch-Pruning leaves the weights of a layer norm in the order of a set.
                torch.equal(got[name].sort().values, value.sort().values) if norm else torch.equal(got[name], value)
            )
            if not same:
                raise Mismatch(f"{name} differs after the step ({tuple(got[name].shape)}, {tuple(value.shape)})")

    def moved(self) -> int:
        """Bytes that any implementation of a step must move."""
        pruned = copy.deepcopy(self.model)
        self.pruner(dropin, pruned).step()
        before = {name: t.shape for name, t in self.model.state_dict().items()}
        shrunk = [t for name, t in pruned.state_dict().items() if t.shape != before[name]]
        if not shrunk:
            raise Mismatch("nothing was pruned")
        return sum(2 * t.numel() * t.element_size() for t in shrunk)

    def step(self, library: Any) -> Timed:
        return self.pruner(library, copy.deepcopy(self.model)).step

    def construct(self, library: Any) -> Timed:
        return partial(self.pruner, library, self.model)


CASES: dict[str, Callable[[Script, Any], Timed]] = {"drop-in step": Script.step, "drop-in construct": Script.construct}


@pytest.fixture(scope="module", params=MODELS)
def script(request: pytest.FixtureRequest) -> Script:
    return Script(request.param, small=request.config.getoption("--small"))


@pytest.mark.parametrize("op", CASES)
def test_dropin(op: str, script: Script, measure: Measure) -> None:
    theirs, ours = (partial(CASES[op], script, library) for library in (original, dropin))
    step = Step(op, "copy", ours, script.moved, theirs, script.check, "all", slow=True)
    assert measure(script.name, step).ratio is not None
