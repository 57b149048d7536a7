"""Scores the slow way: index by index in float64, for any criterion made of members."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pat_fast.criteria import MemberCriterion
from pat_fast.plan import Binding
from pat_fast.plan.types import Axis, TensorMap, is_grouped
from tests.helpers import is_weight

Elements = Callable[[str, Tensor], Tensor]


def parts(tensor_map: TensorMap, axis: Axis, elements: Tensor) -> Tensor:
    """``elements`` by the indices of an axis."""
    if is_grouped(tensor_map, axis):
        return elements.unflatten(0, (tensor_map.groups, -1)).movedim(2, 1).flatten(0, 1)
    return elements.movedim(axis.dim, 0)


def members(
    binding: Binding, types: tuple[type, ...], elements: Elements, finish: Callable[[Tensor], Tensor] = lambda t: t
) -> list[list[tuple[Tensor, Tensor]]]:
    """For each group, what its members count for its channels, and which they hold: ``[channels]`` each."""
    plan = binding.plan
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plan.groups]
    for tensor_map in plan.tensors:
        module, local = binding.owner(tensor_map.name)
        if not is_weight(local) or not isinstance(module, types):
            continue
        own = elements(tensor_map.name, binding.tensors[tensor_map.name]).detach().double()
        for axis in tensor_map.axes:
            rows: dict[int, tuple[Tensor, Tensor]] = {}
            for channel, part in zip(axis.channels.tolist(), parts(tensor_map, axis, own), strict=True):
                if channel >= 0:
                    number = int(plan.group_of[channel])
                    group = plan.groups[number]
                    zeros = torch.zeros(group.channels, dtype=torch.float64)
                    row, held = rows.setdefault(number, (zeros, zeros.bool()))
                    row[channel - group.start] += finish(part.sum())
                    held[channel - group.start] = True
            for number, row in rows.items():
                found[number].append(row)
    return found


def mean_scores(
    binding: Binding,
    criterion: MemberCriterion,
    elements: Elements,
    finish: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """The mean over members, not normalised; ``inf`` where a group has none: ``[N]`` float64."""
    found = members(binding, criterion.types, elements, finish)
    scores = torch.full((binding.plan.n_channels,), torch.inf, dtype=torch.float64)
    for group, rows in zip(binding.plan.groups, found, strict=True):
        if rows:
            scores[group.start : group.stop] = torch.stack([row for row, _ in rows]).mean(0)
    return scores
