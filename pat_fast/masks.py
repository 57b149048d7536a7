"""Masks: channels that are held at zero, so that the network computes what the pruned one would."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .ops import channel_scale_
from .ops.tiles import COL, ROW, TENSOR, C, R
from .plan.bind import Binding, Tiles
from .plan.types import TensorMap
from .surgery.optimizer import check_state, state_tensors


def _is_parameter(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    return tensor_map.is_parameter


class Mask:
    """Which channels live, and the upkeep that holds the others at zero.

    Weights, gradients and optimizer state of a masked channel are zero, rows and columns alike; the network
    then computes what the pruned one would, except where a norm takes a statistic over the channels
    (:attr:`Group.statistic`). Batch norms keep running statistics of masked channels; they have no effect.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.alive = torch.ones(binding.plan.n_channels, dtype=torch.bool, device=binding.device)

    @property
    def is_active(self) -> bool:
        """Whether any channel is masked."""
        return not bool(self.alive.all())

    @torch.no_grad()
    def set(self, alive: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Mask the channels ``~alive [N]``: zero their weights, gradients and optimizer state.

        Raises:
            SurgeryError: an optimizer keeps state of unknown layout; nothing was changed.
        """
        optimizers = list(optimizers)
        check_state(optimizers)
        tiles = self.binding.tiles("parameters", _is_parameter)
        states = [
            (name, state)
            for one in tiles
            for name, tensor in zip(one.names, one.tensors, strict=True)
            if isinstance(tensor, nn.Parameter)
            for state in state_tensors(optimizers, tensor, name)
        ]
        self.alive = self.binding.alive = alive.to(self.binding.device)
        self.hold_weights()
        self.hold_gradients()
        for name, state in states:
            if not state.factored:  # factored statistics decay by themselves: the gradients are zero
                self._zero(name, state.tensor)

    def hold_weights(self) -> None:
        """Zero the weights of masked channels. Call after every optimizer step."""
        for tiles in self.binding.tiles("parameters", _is_parameter):
            channel_scale_(tiles.tensors, tiles.table, self._scale(tiles))

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Zero the gradients of masked channels. Call before every optimizer step.

        Sparse gradients (of embeddings) stay as they are: the weights are cleared after the step.
        """
        for tiles in self.binding.tiles("parameters", _is_parameter):
            grads = [t.grad for t in tiles.tensors]
            if all(g is not None and g.stride() == t.stride() for g, t in zip(grads, tiles.tensors, strict=True)):
                channel_scale_([g for g in grads if g is not None], tiles.table, self._scale(tiles))
            else:
                for name, grad in zip(tiles.names, grads, strict=True):
                    if grad is not None and grad.layout == torch.strided:
                        self._zero(name, grad)

    def _scale(self, tiles: Tiles) -> Tensor:
        scale = self.binding.to_slots(tiles, self.alive.float(), fill=1.0)
        for number, name in enumerate(tiles.names):
            dim = self._direction(name)
            if dim is None:
                continue
            stride = tiles.tensors[number].stride()
            side, size = (ROW, R) if stride[dim] == max(stride) else (COL, C)
            for entry in tiles.table.rows:
                if entry[TENSOR] == number and entry[side] >= 0:
                    scale[entry[side] : entry[side] + entry[size]] = 1
        return scale

    def _direction(self, name: str) -> int | None:
        """The dimension along which tensor ``name`` holds directions, whose lengths stand apart (weight norm).

        A direction of length zero is none: where the length is zero, so is the weight. None for other tensors.
        """
        module, local = self.binding.owner(name)
        lengths = module._parameters.get({"weight_v": "weight_g", "original1": "original0"}.get(local, ""))
        if lengths is None or lengths.ndim != self.binding.tensors[name].ndim:
            return None
        return next((d for d, size in enumerate(lengths.shape) if size != 1), None)

    def _zero(self, name: str, tensor: Tensor) -> None:
        """Zero the masked channels of one tensor with the shape of parameter ``name``."""
        one = self.binding.like(name, tensor)
        channel_scale_(one.tensors, one.table, self._scale(one))
