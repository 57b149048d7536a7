"""`pat_fast.torch_pruning` against Torch-Pruning, as a script sees them, and what no implementation can be faster than.

    python -m benchmarks.dropin [MODEL ...] [--rounds N] [--construct]

For each model: the milliseconds of a global step that halves the channels, Torch-Pruning's beside ours after both were
found to leave equal weights, and a floor measured in the same run. The floor is what is left when nothing is decided:
read every scored weight once; for each tensor that shrinks allocate a new one and fill it by a plain copy of as many
bytes, page faults of fresh memory included; give it to the parameter; let go of the old ones.
With ``--construct``: milliseconds of building each kind of pruner. "others" is the share of a core that other processes
had meanwhile: what was measured beside much of it says little.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning as original
from torch import nn

import pat_fast.torch_pruning as dropin
from benchmarks.cases import classifier, num_heads, quiet
from benchmarks.zoo import ZOO, Inputs, randomize_
from pat_fast.bench import Mismatch, machine
from pat_fast.bench.clock import Clock, Timed
from pat_fast.bench.steps import RATIO
from pat_fast.ops import channel_reduce

GOALS = {"resnet50": 12, "densenet121": 100, "vit_s16": 40, "vgg16_bn": 15}
BUILT = (*GOALS, "resnet18", "mobilenet_v2", "regnet_y_400mf", "convnext_tiny", "googlenet")
KINDS = ("BasePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner")


class Script:
    """What a user of either library writes: a pruner that halves the channels of a model in one global step."""

    def __init__(self, name: str, small: bool) -> None:
        entry = ZOO[name]
        self.name = name
        self.inputs: Inputs = entry.example(small)
        self.model = randomize_(entry.small() if small else entry.build(), 0).eval()

    def pruner(self, library: Any, model: nn.Module, kind: str = "BasePruner") -> Any:
        """Torch-Pruning's default dicts are shared by all pruners of the process, so both get some of their own."""
        with quiet():
            return getattr(library.pruner, kind)(
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

    def moved(self) -> dict[str, int]:
        """Bytes that any implementation of a step must move."""
        pruned = copy.deepcopy(self.model)
        self.pruner(dropin, pruned).step()
        shrunk = [t for _, t in self.shrunk(pruned)]
        if not shrunk:
            raise Mismatch("nothing was pruned")
        return {"copy": sum(2 * t.numel() * t.element_size() for t in shrunk)}

    def shrunk(self, pruned: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What a prune has made smaller: the tensors before and after."""
        pairs = zip(self.model.state_dict().values(), pruned.state_dict().values(), strict=True)
        return [(one, two) for one, two in pairs if one.shape != two.shape]

    def step(self, library: Any) -> Timed:
        return self.pruner(library, copy.deepcopy(self.model)).step

    def construct(self, library: Any, kind: str = "BasePruner") -> Timed:
        return partial(self.pruner, library, self.model, kind)


class Floor:
    """The parts of the floor of a script's step, each a preparation for the clock."""

    def __init__(self, script: Script) -> None:
        self.script = script
        pruned = copy.deepcopy(script.model)
        pruner = script.pruner(dropin, pruned)
        pruner.importance.score(pruner.engine.binding)
        (self._tiles,) = next(iter(pruner.engine.binding._cache.values()))
        self._scored = [torch.empty_strided(t.shape, t.stride()).fill_(1.0) for t in self._tiles.tensors]
        pruner.step()
        self._pairs = script.shrunk(pruned)
        self._sources = [torch.ones_like(after) for _, after in self._pairs]

    def read(self) -> Timed:
        """Every scored weight, once."""
        return lambda: channel_reduce(self._scored, self._tiles.table)

    def copy(self) -> Timed:
        """What is left of each tensor, into a new one."""
        made: list[torch.Tensor] = []
        return lambda: made.extend([torch.empty_like(t).copy_(t) for t in self._sources])

    def put(self) -> Timed:
        """A new tensor into each parameter or buffer."""
        owners = [nn.Parameter(before, requires_grad=False) for before, _ in self._pairs]
        new = list(self._sources)

        def run() -> None:
            for owner, data in zip(owners, new, strict=True):
                owner.data = data

        return run

    def release(self) -> Timed:
        """The old ones back to the system."""
        return [before.clone() for before, _ in self._pairs].clear


PARTS = ("read", "copy", "put", "release")


def steps(names: Sequence[str], clock: Clock) -> str:
    """A table of steps."""
    head = ["model", "Torch-Pruning", "here", "ratio", "goal", *PARTS, "floor", "ratio at the floor", "others"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in names:
        watch = machine.Watch()
        script = Script(name, small=False)
        script.check()
        floor = Floor(script)
        found = clock.compare({"theirs": partial(script.step, original), "ours": partial(script.step, dropin)})
        least = {part: clock.compare({part: getattr(floor, part)})[part].ms for part in PARTS}
        theirs, ours, bottom = found["theirs"].ms, found["ours"].ms, sum(least.values())
        goal = f"{GOALS[name]}" if name in GOALS else ""
        columns = [name, f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}", goal]
        columns += [f"{ms:.2f}" for ms in (*least.values(), bottom)] + [f"{theirs / bottom:.1f}", beside(watch)]
        lines.append("| " + " | ".join(columns) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def constructions(names: Sequence[str], clock: Clock) -> str:
    """A table of what building pruners takes: Torch-Pruning's, ours, the ratio."""
    lines = ["| model | " + " | ".join(KINDS) + " | others |", "|---" * (len(KINDS) + 2) + "|"]
    for name in names:
        watch = machine.Watch()
        script = Script(name, small=False)
        columns = [name]
        for kind in KINDS:
            sides = {"theirs": original, "ours": dropin}
            found = clock.compare({s: partial(script.construct, library, kind) for s, library in sides.items()})
            theirs, ours = found["theirs"].ms, found["ours"].ms
            columns.append(f"{theirs:.0f} / {ours:.0f} = {theirs / ours:.1f}")
        columns.append(beside(watch))
        lines.append("| " + " | ".join(columns) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def beside(watch: machine.Watch) -> str:
    """What others have had of the cores since; nothing where the system does not say."""
    found: dict[str, Any] = {}
    watch.note(found)
    return "" if found["others"] is None else f"{found['others'] + found['stolen']:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--construct", action="store_true")
    args = parser.parse_args()
    clock = Clock(torch.device("cpu"), args.rounds)
    here = machine.describe(torch.device("cpu"))
    table = constructions(args.models or BUILT, clock) if args.construct else steps(args.models or [*GOALS], clock)
    print(f"\n{here['date']}, {here['cpu']}, {here['cores']} cores, {here['threads']} threads, {here['versions']}\n")
    print(table)


if __name__ == "__main__":
    main()
