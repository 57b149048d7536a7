"""The permutation test: a plan whose maps are right may shuffle its channels without moving the output.

If the maps are right, permuting the channels of a group consistently in all its tensors leaves the network's
function as it was, layer norms, softmax and all. So every group gets a random permutation at once, in
a float64 copy whose parameters all hold random values (fresh norm weights are all ones and would hide a
missing member); one forward is compared with another. If the output moved, bisection finds the groups whose
maps lie.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .lower import Call, call, output_tensors, undisturbed
from .types import Axis, IntArray, Plan, TensorMap, is_grouped

COARSE = 1e-3  # the same in single precision
TOLERANCE = 1e-6  # relative, in float64; a right plan moves the output by 1e-14, a wrong one by 1e-2


@dataclass(frozen=True)
class Verification:
    """What the permutation test found.

    ``wrong`` are the indices of groups whose maps do not hold; ``error`` is how far the output moved with all
    groups permuted, relative to its largest element; ``forwards`` is what it cost.
    """

    wrong: tuple[int, ...]
    error: float
    forwards: int


def verify(plan: Plan, model: nn.Module, example_inputs: Any, seed: int = 0) -> Verification:
    """Test all groups of ``plan`` at once, and bisect if that fails.

    The model is copied to be permuted, in float64, or in its own precision (and with a wider tolerance) if its
    code insists on that; it is not changed itself.
    """
    try:
        return _Test(plan, copy.deepcopy(model).double(), as_double(example_inputs), seed).run(TOLERANCE)
    except (RuntimeError, TypeError, ValueError):
        return _Test(plan, copy.deepcopy(model), example_inputs, seed).run(COARSE)


class _Test:
    """A copy with random values, permuted again and again from its original."""

    def __init__(self, plan: Plan, twin: nn.Module, inputs: Any, seed: int) -> None:
        self.plan, self.twin, self.inputs = plan, twin, inputs
        generator = np.random.default_rng(seed)
        _randomize(twin, plan, generator)
        named: dict[str, Tensor] = dict(twin.named_parameters(remove_duplicate=False))
        named.update(twin.named_buffers(remove_duplicate=False))
        self.tensors = [named[t.name] for t in plan.tensors]
        self.original = [t.detach().clone() for t in self.tensors]
        # Two: by bad luck one may commute with the very mistake (a cycle of few channels with a shift).
        self.permutations = [draw(plan, generator) for _ in range(2)]
        self.forwards = 0

    def outputs(self, groups: Sequence[int], permutation: IntArray) -> list[Tensor]:
        """What the copy puts out when the channels of ``groups`` have changed places."""
        self.forwards += 1
        chosen = np.isin(self.plan.group_of, groups)
        mixed = np.where(chosen, permutation, np.arange(self.plan.n_channels))
        with torch.no_grad():
            for tensor, original, tensor_map in zip(self.tensors, self.original, self.plan.tensors, strict=True):
                tensor.copy_(permuted(original, tensor_map, mixed))
        with undisturbed(self.twin), torch.no_grad():
            return [t.detach() for t in output_tensors(call(self.twin, self.inputs))]

    def run(self, tolerance: float) -> Verification:
        still = self.outputs([], self.permutations[0])

        def error(groups: Sequence[int]) -> float:
            return max(distance(still, self.outputs(groups, p)) for p in self.permutations)

        everything = list(range(len(self.plan.groups)))
        worst = error(everything) if everything else 0.0
        wrong = bisect(everything, lambda groups: error(groups) > tolerance) if worst > tolerance else []
        return Verification(tuple(wrong), worst, self.forwards)


def bisect(items: list[int], fails: Callable[[list[int]], bool]) -> list[int]:
    """The members of ``items`` that fail by themselves, given that ``items`` as a whole does.

    A set that fails although neither half does is returned whole: its members fail only together.
    """
    if len(items) == 1:
        return items
    half = len(items) // 2
    parts = [part for part in (items[:half], items[half:]) if fails(part)]
    return sorted(i for part in parts for i in bisect(part, fails)) if parts else items


def kinds(plan: Plan) -> list[tuple[int, list[list[int]]]]:
    """Units that may change places, as (group, [channels of each unit]).

    Such units hold as many indices of every axis, in the same order. A group has several kinds where its
    channels have different members (parts of a concatenation, say).
    """
    signature: list[list[tuple[int, int]]] = [[] for _ in range(plan.n_channels)]
    for number, (_, axis) in enumerate(plan.axes()):
        count = np.bincount(axis.channels[axis.channels >= 0], minlength=plan.n_channels)
        for channel in np.flatnonzero(count).tolist():
            signature[channel].append((number, int(count[channel])))
    members: dict[int, list[int]] = {}
    for channel, unit in enumerate(plan.unit.tolist()):
        members.setdefault(unit, []).append(channel)
    found: dict[Any, tuple[int, list[list[int]]]] = {}
    for channels in members.values():
        group = int(plan.group_of[channels[0]])
        kind = (group, tuple(tuple(signature[c]) for c in channels))
        found.setdefault(kind, (group, []))[1].append(channels)
    return list(found.values())


def draw(plan: Plan, generator: np.random.Generator) -> IntArray:
    """A random permutation of the channels, within what each group allows: ``[N]``.

    Units change places as a whole, with units of their kind: so blocks of grouped convolutions are respected.
    """
    permutation = np.arange(plan.n_channels)
    for _, units in kinds(plan):
        sources = np.array(units)
        permutation[sources] = sources[_derangement(len(units), generator)]
    return permutation


def _derangement(n: int, generator: np.random.Generator) -> IntArray:
    """A random permutation in which (for n > 1) everything moves: one cycle in random order."""
    order = generator.permutation(n)
    moved = np.empty(n, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def permuted(tensor: Tensor, tensor_map: TensorMap, permutation: IntArray) -> Tensor:
    """``tensor`` with its channels moved: what channel c held is now what ``permutation[c]`` held."""
    for axis in tensor_map.axes:
        order = _order(axis, permutation)
        if is_grouped(tensor_map, axis):
            width, rows = tensor_map.shape[1], tensor_map.shape[0] // tensor_map.groups
            parts = []
            for g, part in enumerate(tensor.split(rows, 0)):
                local = torch.from_numpy(order[g * width : (g + 1) * width] - g * width)
                if local.min() < 0 or local.max() >= width:  # only a wrong plan moves channels between groups
                    local = local % width
                parts.append(part.index_select(1, local.to(tensor.device)))
            tensor = torch.cat(parts, 0)
        else:
            tensor = tensor.index_select(axis.dim, torch.from_numpy(order).to(tensor.device))
    return tensor


def _order(axis: Axis, permutation: IntArray) -> IntArray:
    """For each index of an axis, the index whose content it gets: the r-th place of a channel gets the r-th
    place of the channel it takes over."""
    places = np.argsort(axis.channels, kind="stable")
    ranked = axis.channels[places]
    first = np.searchsorted(ranked, np.arange(len(permutation)))
    order = np.arange(len(axis.channels))
    live = ranked >= 0
    rank = np.arange(len(ranked)) - first[np.where(live, ranked, 0)]
    target = first[permutation[np.where(live, ranked, 0)]] + rank
    order[places[live]] = places[np.minimum(target[live], len(places) - 1)]
    return order


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest difference of two sets of outputs, relative to the largest element; inf if shapes differ."""
    if [t.shape for t in one] != [t.shape for t in two]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if not a.numel() or not a.is_floating_point():
            continue
        scale = float(a.abs().max())
        moved = float((a - b).abs().max())
        if not np.isfinite(moved) or not np.isfinite(scale):
            return float("inf")
        worst = max(worst, moved / scale if scale > 0 else moved)
    return worst


def as_double(example_inputs: Any) -> Any:
    """Example inputs with floating-point tensors in float64."""
    if isinstance(example_inputs, Call):
        return Call(as_double(example_inputs.args), as_double(example_inputs.kwargs))
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, example_inputs
    )


def _randomize(model: nn.Module, plan: Plan, generator: np.random.Generator) -> None:
    """Random values that keep activations in range: matrices by fan-in, vectors around 0 or 1."""
    noise = torch.Generator().manual_seed(int(generator.integers(2**31)))
    mapped = {t.name for t in plan.tensors}
    tensors: list[tuple[str, Tensor, bool]] = [(n, p, True) for n, p in model.named_parameters()]
    tensors += [(n, b, n in mapped) for n, b in model.named_buffers()]
    with torch.no_grad():
        for name, tensor, ours in tensors:
            if not ours or not tensor.is_floating_point():
                continue
            local = name.rpartition(".")[2]
            random = torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
            if local == "running_var" or (tensor.ndim == 1 and "weight" in local):
                random = 1.0 + 0.5 * torch.tanh(random)
            elif tensor.ndim > 1:
                random = random / max(tensor[0].numel(), 1) ** 0.5
            else:
                random = 0.5 + 0.25 * torch.tanh(random)  # biases that keep a ReLU from hiding its channels
            tensor.copy_(random)
