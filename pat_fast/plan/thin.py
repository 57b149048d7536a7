"""A large model that computes what a small one does: weights that are zero but for a few rows and columns.

A :class:`Thin` tensor is a small tensor and where its rows and columns stand in the large one. :class:`Standing` runs a
model as if its parameters were such tensors, without writing to them or making them: linear layers, convolutions and
embeddings compute with the small tensor, other functions get the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST = 4096  # elements below which a weight is simply filled in
POOL = 131101  # a prime, so that rows of a longer tensor do not repeat
# What the large tensor says of itself is right as it is.
_PLAIN = {getattr(Tensor, a).__get__ for a in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")}
_PLAIN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}


class Thin:
    """``small`` scattered over a tensor of ``shape``: index ``i`` of dimension ``dim`` stands at ``places[dim][i]``.

    A dimension that is not in ``places`` is as it is. ``columns`` are those of each block of a grouped convolution,
    for dimension 1, ``[groups, width]``. Elements beside it are ``fill``.
    """

    def __init__(
        self, small: Tensor, shape: Sequence[int], places: dict[int, Tensor], columns: Tensor | None, fill: float
    ) -> None:
        self.small, self.shape, self.places, self.columns, self.fill = small, tuple(shape), places, columns, fill
        self._full: Tensor | None = None

    def full(self) -> Tensor:
        """The large tensor."""
        if self._full is None:
            self._full = self._scattered()
        return self._full

    def _scattered(self) -> Tensor:
        out = self.small
        if self.columns is not None:
            rows = out.shape[0] // len(self.columns)
            parts = [self._spread(out[i * rows : (i + 1) * rows], 1, c) for i, c in enumerate(self.columns)]
            out = torch.cat(parts)
        for dim, places in self.places.items():
            out = self._spread(out, dim, places)
        return out

    def _spread(self, value: Tensor, dim: int, places: Tensor) -> Tensor:
        shape = list(value.shape)
        shape[dim] = self.shape[dim]
        return value.new_full(shape, self.fill).index_copy_(dim, places, value)


class Standing(TorchFunctionMode):
    """Functions that are given a tensor of ``stand_ins`` (by its id) compute with what stands in for it."""

    def __init__(self, stand_ins: dict[int, Thin]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN:
            return func(*args, **kwargs)
        short = _SHORT.get(func)
        if short is not None:
            at, run = short
            weight = args[at] if len(args) > at else kwargs.get("weight")
            thin = self._stand_ins.get(id(weight))
            if thin is not None and weight.numel() >= LEAST:
                rest = self._filled(args[:at]), self._filled(args[at + 1 :]), self._filled(kwargs)
                out = run(func, thin, *rest)
                if out is not None:
                    return out
        return func(*self._filled(args), **self._filled(kwargs))

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            thin = self._stand_ins.get(id(value))
            return value if thin is None else thin.full()
        if type(value) in (tuple, list):
            return type(value)(self._filled(v) for v in value)
        if type(value) is dict:
            return {k: self._filled(v) for k, v in value.items()}
        return value


def _linear(func: Any, thin: Thin, before: Any, after: Any, kwargs: Any) -> Tensor | None:
    """``linear(x, weight, bias)`` or ``conv(x, weight, bias, ...)``."""
    dim = -1 if func is F.linear else 1
    if "weight" in kwargs or len(before) != 1 or thin.columns is not None:
        return None
    x, bias = before[0], after[0] if after else kwargs.get("bias")
    if thin.shape[1] != x.shape[dim] or (dim == 1 and x.ndim != len(thin.shape)):
        return None  # a grouped convolution; one example without a batch
    if 1 in thin.places:
        x = x.index_select(dim, thin.places[1])
    rest = {k: v for k, v in kwargs.items() if k != "bias"}
    y = func(x, thin.small, None, *after[1:], **rest)
    if 0 in thin.places:
        shape = list(y.shape)
        shape[dim] = thin.shape[0]
        y = y.new_zeros(shape).index_copy_(dim, thin.places[0], y)
    return y if bias is None else y.add_(bias if dim == -1 else bias.reshape(-1, *[1] * (y.ndim - 2)))


def _embedding(func: Any, thin: Thin, before: Any, after: Any, kwargs: Any) -> Tensor | None:
    """``torch.embedding(weight, indices)``."""
    if set(thin.places) != {1} or "weight" in kwargs:
        return None
    y = func(thin.small, *after, **kwargs)
    return y.new_zeros((*y.shape[:-1], thin.shape[1])).index_copy_(-1, thin.places[1], y)


_SHORT: dict[Any, tuple[int, Callable[..., Tensor | None]]] = {
    F.linear: (1, _linear),
    torch.conv1d: (1, _linear),
    torch.conv2d: (1, _linear),
    torch.conv3d: (1, _linear),
    torch.embedding: (0, _embedding),
}


class Values:
    """Random values that no mistake hides behind: no two alike, and of a scale that keeps activations in bounds."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pool = torch.randn(POOL, generator=generator)
        squashed = torch.tanh(pool)
        pools = {"weight": pool, "scale": 1.0 + 0.5 * squashed, "bias": 0.5 + 0.25 * squashed}
        self._pools = {kind: torch.cat([values, values]) for kind, values in pools.items()}
        self._at = 0

    def like(self, tensor: Tensor, shape: Sequence[int], name: str, fan_in: int) -> Tensor:
        """Values in ``shape`` for the parameter or buffer ``tensor`` called ``name``."""
        if len(shape) > 1:
            return self._take("weight", shape, tensor).mul_(max(fan_in, 1) ** -0.5)
        scale = name.endswith("running_var") or "weight" in name.rpartition(".")[2]
        return self._take("scale" if scale else "bias", shape, tensor)  # biases keep a ReLU from hiding its channels

    def _take(self, kind: str, shape: Sequence[int], like: Tensor) -> Tensor:
        count = torch.Size(shape).numel()
        self._at = (self._at + 7919) % POOL
        found = self._pools[kind][self._at : self._at + POOL]
        found = found.repeat(-(-count // POOL))[:count] if count > POOL else found[:count].clone()
        return found.reshape(shape).to(like.device, like.dtype)
