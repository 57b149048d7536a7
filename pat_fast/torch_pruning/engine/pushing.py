"""Regularisers of the drop-in pruners: a strength for every channel, added to gradients in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...ops import channel_axpy_, channel_reduce
from ...plan.bind import Binding, Tiles
from ...plan.types import TensorMap
from ...regularizers import gradients

Wanted = Callable[[TensorMap, nn.Module, str], bool]

BATCHNORM = (nn.modules.batchnorm._BatchNorm,)
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, *BATCHNORM)


def parameters_of(kinds: tuple[type, ...], ignored: list[nn.Module], bias: bool) -> Wanted:
    """Weights (and biases) of layers of these kinds that are not ignored."""
    held = {id(m) for m in ignored}
    locals_ = ("weight", "bias") if bias else ("weight",)

    def wanted(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
        return local in locals_ and isinstance(owner, kinds) and id(owner) not in held and tensor_map.is_parameter

    return wanted


def push(binding: Binding, strength: Tensor, key: str, wanted: Wanted) -> None:
    """``grad += strength[channel] * weight`` for the tensors that are ``wanted`` and have a gradient.

    A weight with channels on both sides gets both terms. ``strength`` is ``[N]``; ``key`` names ``wanted``.
    """
    for tiles in binding.tiles(key, wanted):
        pushed = [t.grad is not None for t in tiles.tensors]
        if all(pushed):
            _add(binding, tiles, strength)
        elif any(pushed):
            for one, yes in zip(binding.each(tiles), pushed, strict=True):
                if yes:
                    _add(binding, one, strength)


def _add(binding: Binding, tiles: Tiles, strength: Tensor) -> None:
    channel_axpy_(gradients(tiles), tiles.tensors, tiles.table, binding.to_slots(tiles, strength, fill=0.0))


def mean_square(binding: Binding, key: str, wanted: Wanted) -> Tensor:
    """For each channel, the mean over its members of the squares of what belongs to it: ``[N]``."""
    total = torch.zeros(binding.plan.n_channels, device=binding.device)
    for tiles in binding.tiles(key, wanted):
        total += binding.to_channels(tiles, channel_reduce(tiles.tensors, tiles.table, f="pow", p=2.0)).to(total)
    return total / binding.member_count(key)


def between(binding: Binding, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Where each channel stands between the best (0) and the least important (1) of its group, and their distance.

    Both ``[N]``; NaN in a group with a NaN, 0 in a group whose channels all score alike.
    """
    low, high = binding.group_extreme(scores, "amin"), binding.group_extreme(scores, "amax")
    span = high - low
    return (high - scores) / span.where(span != 0, torch.ones_like(span)), span


def open_channels(pruner: Any) -> Tensor:
    """The channels that the pruner may prune: bool ``[N]``, on the model's device."""
    plan = pruner.engine.plan
    mask = np.zeros(plan.n_channels, dtype=np.bool_)
    for number, group in enumerate(plan.groups):
        mask[group.start : group.stop] = pruner._is_open(number)
    return torch.from_numpy(mask).to(pruner.engine.binding.device)
