"""What all regularisers share: adding ``coefficient of the channel * weight`` to the gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from ..ops import channel_axpy_
from ..plan.bind import Binding, Tiles
from ..plan.types import TensorMap


class Regularizer(Protocol):
    """Anything that adds to gradients."""

    def apply(
        self,
        binding: Binding,
        scale: float = 1.0,
        where: Tensor | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Add to the gradients, before the optimizer's step.

        Args:
            scale: a loss scale that is still in the gradients.
            where: bool ``[N]``, the channels to push; all by default.
            only: ``id`` of the parameters to push; all by default.
        """
        ...


Wanted = Callable[[TensorMap, nn.Module, str], bool]
NORMS = (nn.modules.batchnorm._BatchNorm,)
REGULARIZED = (nn.modules.conv._ConvNd, nn.Linear, *NORMS)


def is_regularized(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of convolutions, linear layers and batch norms."""
    return local == "weight" and isinstance(owner, REGULARIZED) and tensor_map.is_parameter


def is_regularized_bias(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Biases of the same."""
    return local == "bias" and isinstance(owner, REGULARIZED) and tensor_map.is_parameter


def is_norm_weight(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of batch norms."""
    return local == "weight" and isinstance(owner, NORMS) and tensor_map.is_parameter


@torch.no_grad()
def push(binding: Binding, key: str, wanted: Wanted, gamma: Tensor, only: Collection[int] | None = None) -> None:
    """``g += gamma[c] * w`` for what belongs to channel c, by row and by column; without a gradient: nothing.

    Args:
        key: under which the tables of the tensors that ``wanted`` names are kept.
        gamma: ``[N]``.
        only: ``id`` of the tensors to push; all by default.
    """
    held = () if only is None else tuple(name for name, t in binding.tensors.items() if id(t) not in only)
    if held:  # a table of its own: what is held does not change from step to step
        every, wanted = wanted, lambda m, *of: m.name not in held and every(m, *of)
        key = f"{key} without {', '.join(held)}"
    for tiles in binding.tiles(key, wanted):
        pushed = [t.grad is not None for t in tiles.tensors]
        if all(pushed):
            _add(binding, tiles, gamma)
        elif any(pushed):
            for one, yes in zip(binding.each(tiles), pushed, strict=True):
                if yes:
                    _add(binding, one, gamma)


def push_layers(binding: Binding, gamma: Tensor, bias: bool, only: Collection[int] | None = None) -> None:
    """:func:`push` the weights of convolutions, linear layers and batch norms, with ``bias`` their biases too."""
    push(binding, "regularized", is_regularized, gamma, only)
    if bias:
        push(binding, "regularized biases", is_regularized_bias, gamma, only)


def _add(binding: Binding, tiles: Tiles, gamma: Tensor) -> None:
    coef = binding.to_slots(tiles, gamma, fill=0.0)
    channel_axpy_(gradients(tiles), tiles.tensors, tiles.table, coef)


def gradients(tiles: Tiles) -> list[Tensor]:
    """The gradients of ``tiles.tensors``, in the memory layout of their parameters (changed if need be)."""
    found = []
    for tensor in tiles.tensors:
        grad = tensor.grad
        assert grad is not None
        if grad.stride() != tensor.stride():
            grad = torch.empty_like(tensor).copy_(grad)
            tensor.grad = grad
        found.append(grad)
    return found


def without_nan_groups(binding: Binding, values: Tensor) -> Tensor:
    """``values [N]`` with 0 for all channels of a group that has a NaN: what cannot be scored is not pushed."""
    bad = torch.isnan(values)
    if binding.alive is not None:
        bad &= binding.alive
    poisoned = torch.zeros(len(binding.plan.groups), dtype=torch.bool, device=values.device)
    poisoned[binding.group_of[bad]] = True
    return values.masked_fill(poisoned[binding.group_of], 0.0)
