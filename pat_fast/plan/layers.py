"""PyTorch's plain layers as the one op that each of them runs.

Of a small model's forward the better part is the way to the ops: two calls for each module, and a search for each of
its tensors. What a layer is made of is read when it runs, so a model may set it on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Run = Callable[[Any, Tensor], Tensor]


def is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is one with a tensor, as :func:`run_of` says what it comes to."""
    return len(args) == 1 and not kwargs and type(args[0]) is Tensor


def run_of(layer: nn.Module) -> Run:
    """What a call of ``layer`` with one tensor comes to: its op, or the call as PyTorch makes it.

    It has to be one for which :func:`~pat_fast.plan.running.runs_one_op` holds.
    """
    if layer._backward_hooks or layer._backward_pre_hooks:
        return nn.Module._call_impl
    return _RUNS.get(type(layer), nn.Module._call_impl)


def _convolution(op: Callable[..., Tensor]) -> Run:
    def run(layer: Any, x: Tensor) -> Tensor:
        held = layer._parameters
        if layer.padding_mode != "zeros" or len(held) != 2:
            return layer._call_impl(x)
        return op(x, held["weight"], held["bias"], layer.stride, layer.padding, layer.dilation, layer.groups)

    return run


def _linear(layer: Any, x: Tensor) -> Tensor:
    held = layer._parameters
    return F.linear(x, held["weight"], held["bias"]) if len(held) == 2 else layer._call_impl(x)


def _batch_norm(layer: Any, x: Tensor) -> Tensor:
    held, kept = layer._parameters, layer._buffers
    if layer.training or len(held) != 2 or len(kept) != 3 or kept["running_mean"] is None:
        return layer._call_impl(x)
    layer._check_input_dim(x)
    cudnn = torch.backends.cudnn.enabled
    mean, variance = kept["running_mean"], kept["running_var"]
    return torch.batch_norm(x, held["weight"], held["bias"], mean, variance, False, 0.0, layer.eps, cudnn)


def _relu(layer: Any, x: Tensor) -> Tensor:
    return torch.relu_(x) if layer.inplace else torch.relu(x)


_RUNS: dict[type[nn.Module], Run] = {
    nn.Conv1d: _convolution(torch.conv1d),
    nn.Conv2d: _convolution(torch.conv2d),
    nn.Conv3d: _convolution(torch.conv3d),
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.ReLU: _relu,
    nn.ReLU6: lambda layer, x: F.hardtanh(x, layer.min_val, layer.max_val, layer.inplace),
}
