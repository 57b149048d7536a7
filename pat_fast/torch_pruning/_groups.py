"""What Torch-Pruning's groups say: which side of which layer, which indices, whose channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner import function

from ..criteria.ledger import Member
from ..plan.bind import Binding
from ..plan.types import Plan

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
# Torch-Pruning's pruning functions by what they prune.
OUT = (
    function.prune_conv_out_channels,
    function.prune_linear_out_channels,
    function.prune_depthwise_conv_out_channels,
    function.prune_depthwise_conv_in_channels,
)
IN = (function.prune_conv_in_channels, function.prune_linear_in_channels)
BOTH = (
    function.prune_batchnorm_out_channels,
    function.prune_layernorm_out_channels,
    function.prune_groupnorm_out_channels,
    function.prune_instancenorm_out_channels,
)


@dataclass(frozen=True)
class Item:
    """One entry of a group: a side (``"out"``, ``"in"``, ``"both"``) of a layer.

    ``idxs [n]`` are indices of that side, ``places [n]`` their channels, counted from 0 within the group.
    """

    layer: Any  # a module with a weight
    side: str
    idxs: Tensor
    places: Tensor


def width(group: Any) -> int:
    """How many channels a group has: those of its first entry."""
    return len(group[0][1])


def repeats(group: Any) -> list[Any] | None:
    """Where the first entry has a channel at several indices, the channel of each: ``[indices]``; else None."""
    roots = group[0].root_idxs
    return None if roots is None or len(set(roots)) == len(roots) else _places(group[0], _numbers(group))


def _numbers(group: Any) -> dict[int, int] | None:
    """The channels of root indices, counted from 0; None where they are these already.

    Scores of a whole group stand at their channel's index; those of a few channels in the order asked for.
    """
    root = list(group[0][1])
    return None if sorted(root) == list(range(len(root))) else {index: i for i, index in enumerate(root)}


def _places(item: Any, numbers: dict[int, int] | None) -> list[Any]:
    """The channels of an entry's indices, None for those that are lost."""
    return list(item.root_idxs) if numbers is None else [numbers.get(r) for r in item.root_idxs]


def items(group: Any, target_types: Sequence[type]) -> Iterator[Item]:
    """The entries of ``group`` whose layers are of ``target_types``, in Torch-Pruning's order.

    Entries are left out where Torch-Pruning has lost the channel (a root index of None), and a weight that two
    layers share counts once.
    """
    numbers = _numbers(group)
    seen = set()
    for item in group:
        layer, handler = item.dep.target.module, item.dep.handler
        side = "out" if handler in OUT else "in" if handler in IN else "both" if handler in BOTH else None
        if side is None or not isinstance(layer, tuple(target_types)) or not isinstance(layer, LAYERS + NORMS):
            continue
        places = _places(item, numbers)
        if layer.weight is None or (id(layer.weight), side) in seen or any(r is None for r in places):
            continue
        seen.add((id(layer.weight), side))
        yield Item(layer, side, torch.as_tensor(item.idxs, dtype=torch.int64), torch.as_tensor(places))


def is_depthwise(layer: Any) -> bool:
    """Whether every group of a convolution has one input (its inputs are seen in its outputs)."""
    return isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.in_channels


def dimension(layer: Any, side: str) -> int:
    """The dimension of ``layer.weight`` that holds the outputs or the inputs; 0 of a depthwise convolution."""
    if side == "both" or is_depthwise(layer):
        return 0
    outputs = int(getattr(layer, "transposed", False))
    return outputs if side == "out" else 1 - outputs


def rows(layer: Any, side: str, elements: Tensor) -> Tensor:
    """``elements``, of the weight's shape, by the indices of a side: ``[n, all that belongs to an index]``.

    A grouped convolution's dimension 1 counts within a block: ``[blocks * n, ...]`` are given.
    """
    groups = int(getattr(layer, "groups", 1))
    if is_depthwise(layer):
        return elements.reshape(int(layer.out_channels) if side == "out" else groups, -1)
    if dimension(layer, side) == 1 and groups > 1:
        return elements.unflatten(0, (groups, -1)).movedim(2, 1).flatten(0, 1).flatten(1)
    return elements.movedim(dimension(layer, side), 0).reshape(elements.shape[dimension(layer, side)], -1)


def sums(layer: Any, side: str, elements: Tensor) -> Tensor:
    """Sums of ``elements``, of the weight's shape, over all that belongs to each index of a side: ``[n]``.

    What the blocks of a grouped convolution hold at a place of dimension 1 is added up and stands at that place
    of every block, as in Torch-Pruning.
    """
    found = rows(layer, side, elements).sum(1)
    if dimension(layer, side) == 1 and getattr(layer, "groups", 1) > 1:
        return found.unflatten(0, (layer.groups, -1)).sum(0).repeat(layer.groups)
    return found


def member_order(binding: Binding, groups: Iterable[Any]) -> dict[int, list[Member]]:
    """The order in which Torch-Pruning's ``groups`` have the members of the plan's groups.

    Needed for the reductions ``"first"`` and ``"gate"``. Groups may be of any of their channels: one is enough.
    """
    names = {module: name for name, module in binding.model.named_modules()}
    plan = binding.plan
    found: dict[int, list[Member]] = {}
    for group in groups:
        named = [
            (f"{names[item.layer]}.weight", dimension(item.layer, item.side)) for item in items(group, LAYERS + NORMS)
        ]
        number = _group_of(plan, named)
        if number is not None:
            found[number] = [m for name, dim in named for m in ((name, dim), (name.removesuffix("weight") + "bias", 0))]
    return found


def _group_of(plan: Plan, members: Sequence[Member]) -> int | None:
    """The plan's group that holds the first of ``members`` that only one group holds."""
    for member in members:
        holders = [i for i, g in enumerate(plan.groups) if member in g.members]
        if len(holders) == 1:
            return holders[0]
    return None
