"""Holding the drop-in against Torch-Pruning: the same model, the same arguments, step by step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as original
from torch import nn

import pat_fast.torch_pruning as tp
from benchmarks.cases import num_heads

NEAR = 1e-6  # scores that are nearer to one another (relative) may be ranked either way


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass
class Outcome:
    """What two runs had in common.

    Attributes:
        steps: steps that were the same.
        near: choices that differ although both are right: Torch-Pruning's scores were nearer than ``NEAR``.
        permuted: norms whose weights Torch-Pruning put out of order (a set's order) and the drop-in did not.
    """

    steps: int = 0
    near: list[str] = field(default_factory=list)
    permuted: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.steps} steps, {len(self.near)} near ties, {len(self.permuted)} norms in a set's order"


Arguments = Callable[[nn.Module], dict[str, Any]]


def last_linear(model: nn.Module) -> nn.Module:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)][-1]


def build(library: Any, model: nn.Module, inputs: Any, arguments: dict[str, Any], kind: str = "BasePruner") -> Any:
    """A pruner of ``library`` with its own importance and the classifier ignored.

    Torch-Pruning gets dicts of its own, not those that its pruners share.
    """
    arguments = {
        "importance": library.importance.GroupMagnitudeImportance(),
        "ignored_layers": [last_linear(model)],
        "num_heads": num_heads(model),
        "in_channel_groups": {},
        "out_channel_groups": {},
        **arguments,
    }
    with quiet():
        return getattr(library.pruner, kind)(model, inputs, **arguments)


def compare(
    model: nn.Module, inputs: Any, steps: int, arguments: Arguments, theirs: dict[str, Any] | None = None
) -> Outcome:
    """Run both for ``steps`` steps; fails at the first difference that is not excused.

    After a choice that differs because Torch-Pruning's own scores are all but equal, the drop-in goes on from the model
    that Torch-Pruning has made.

    Args:
        theirs: other arguments for Torch-Pruning's pruner (our importance, where its own does not count all layers).
    """
    ours, other = copy.deepcopy(model), copy.deepcopy(model)
    mine = build(tp, ours, inputs, {"iterative_steps": steps, **arguments(ours)})
    its = build(original, other, inputs, {"iterative_steps": steps, **arguments(other), **(theirs or {})})
    outcome = Outcome()
    for step in range(steps):
        scores = _scores(its)
        known = len(its.pruning_history()), len(mine.pruning_history())
        with quiet():
            its.step()
            mine.step()
        expected = [entry for entry in its.pruning_history()[known[0] :] if entry[2]]
        got = mine.pruning_history()[known[1] :]
        if expected != got:
            apart = _apart(scores, expected, got)
            assert apart < NEAR, f"step {step + 1}: {_first_difference(expected, got)} (scores {apart:.1e} apart)"
            outcome.near.append(f"step {step + 1}: {apart:.1e}")
            before = mine
            ours = copy.deepcopy(model)
            mine = build(tp, ours, inputs, {"iterative_steps": steps, **arguments(ours)})
            mine.load_pruning_history([entry for entry in its.pruning_history() if entry[2]])
            mine.current_step = step + 1
            mine._scope_initial_channels = before._scope_initial_channels
        _same_weights(ours, other, step, outcome)
        outcome.steps += 1
    print(outcome)
    return outcome


def _scores(pruner: Any) -> dict[str, torch.Tensor]:
    """Torch-Pruning's scores for every channel of a group's root; of blocks that go together, their mean."""
    with quiet():
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        found = {}
        for group in groups:
            if pruner._is_atten_group(group)[0]:
                group = pruner._downstream_node_as_root_if_attention(group) or group
            scores = pruner.estimate_importance(group)
            if scores is not None:
                blocks = pruner._get_channel_groups(group)
                name = pruner.DG._module2name[group[0].dep.target.module]
                found[name] = scores.view(blocks, -1).mean(0).repeat(blocks) if blocks > 1 else scores
    return found


def _apart(scores: dict[str, torch.Tensor], expected: list[Any], got: list[Any]) -> float:
    """How far apart, relatively, the scores of the channels are of which one side took some and the other the others.

    Infinite where the choices differ in more than which channels of all go.
    """
    theirs, mine = _chosen(expected), _chosen(got)
    if theirs is None or mine is None or not (theirs ^ mine) or len(theirs) != len(mine):
        return float("inf")
    contested = sorted(float(scores[name][i]) for name, i in theirs ^ mine)
    return (contested[-1] - contested[0]) / max(abs(contested[-1]), 1e-30)


def _chosen(history: list[Any]) -> set[tuple[str, int]] | None:
    """(root, channel) pairs; None where a root appears twice, so that its indices are not those before the step."""
    names = [name for name, _, _ in history]
    return {(name, i) for name, _, idxs in history for i in idxs} if len(names) == len(set(names)) else None


def _first_difference(expected: list[Any], got: list[Any]) -> str:
    for one, two in zip(expected, got, strict=False):
        if one != two:
            return f"Torch-Pruning {one}, drop-in {two}"
    return f"Torch-Pruning {expected[len(got) :]}, drop-in {got[len(expected) :]}"


def _same_weights(ours: nn.Module, theirs: nn.Module, step: int, outcome: Outcome) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, f"step {step + 1}: {name}"
        if torch.equal(got[name], value):
            continue
        norm = theirs.get_submodule(name.rpartition(".")[0])
        same_values = torch.equal(got[name].sort().values, value.sort().values) if value.ndim == 1 else False
        assert same_values, f"step {step + 1}: {name}"
        assert isinstance(norm, nn.LayerNorm), f"step {step + 1}: {name}"
        outcome.permuted.append(f"step {step + 1}: {name}")
        with torch.no_grad():
            dict(theirs.named_parameters())[name].copy_(got[name])
