"""Torch-Pruning's words for an axis, "this operation on this layer", and the plan's channels along it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch_pruning import ops

from ...plan.bind import Binding
from ...plan.types import Axis, ChannelArray, TensorMap

VIRTUAL = (
    ops._ConcatOp, ops._SplitOp, ops._UnbindOp, ops._ReshapeOp, ops._SliceOp, ops._OutputOp, ops._ElementWiseOp,
    ops._ExpandOp, ops._CustomizedOp,
)  # fmt: skip
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def is_depthwise(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution with a group for each output: its two sides are pruned as one."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def out_dim(module: nn.Module) -> int:
    """Dimension of ``module.weight`` that holds its output channels."""
    embeds = isinstance(module, nn.Embedding) or getattr(module, "transposed", False)
    return 1 if embeds and not is_depthwise(module) else 0


class Axes:
    """Looks up the channels along the axes of a binding's layers."""

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self._maps: dict[int, TensorMap] = {id(binding.tensors[t.name]): t for t in binding.plan.tensors}
        self._widths: dict[int, ChannelArray] = {
            id(binding.module(w.module)): w.channels for w in binding.plan.widths if w.index in (None, -1)
        }

    def of(self, module: nn.Module | Tensor, out: bool, dim: int = -1) -> ChannelArray | None:
        """Channels along the outputs (or inputs) of ``module``, ``dim`` of a bare parameter; None if it has none.

        -1 stands where the plan has no channel.
        """
        if isinstance(module, Tensor):
            return self._axis(module, dim % max(module.ndim, 1))
        if isinstance(module, NORMS) and id(module) in self._widths:
            return self._widths[id(module)]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return None
        if isinstance(module, (*NORMS, nn.PReLU)):
            return self._axis(weight, weight.ndim - 1)
        if isinstance(module, nn.Embedding) or is_depthwise(module):
            return self._axis(weight, out_dim(module))
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            return self._axis(weight, out_dim(module) if out else 1 - out_dim(module))
        return None

    def _axis(self, tensor: Tensor, dim: int) -> ChannelArray | None:
        found = self._maps.get(id(tensor))
        axis: Axis | None = None if found is None else next((a for a in found.axes if a.dim == dim), None)
        return None if axis is None else axis.channels


def positions(channels: ChannelArray, within: np.ndarray, n_channels: int) -> np.ndarray:
    """Where each entry of the vector ``channels`` stands in the list ``within``; -1 for those that are not in it."""
    place = np.full(n_channels + 1, -1, dtype=np.int64)  # the last entry is for -1
    place[within] = np.arange(len(within))
    return place[channels]


def to_tensor(array: np.ndarray, like: Tensor) -> Tensor:
    """``array`` as a tensor on ``like``'s device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
