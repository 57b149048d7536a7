"""A forward without its heavy arithmetic.

Labels follow from which op meets which axes, not from values, so while a model is traced the results of large
products may be zeros. That is right as long as nobody looks: what comes of such zeros is remembered, and an op whose
result has a value or a shape that depends on them (``item()``, ``nonzero()``, an index by a mask) ends the attempt.
The model is traced again with all of its arithmetic then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .noted import Noted

LEAST = 2**15  # multiply-accumulates below which a product of what was computed is simply computed, too
LEAST_SKIPPED = 2**14  # elements below which an element-wise op is
CHUNK = 2**24  # elements of address space to ask for at a time: below 32 MiB, memory may be old and is cleared
# Methods that read values past the dispatcher.
READS = frozenset({"numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"})

_aten = torch.ops.aten
Zeros = Callable[..., Tensor]  # a tensor to be like, a shape, a type


class ValuesRead(Exception):
    """The forward depends on values that were not computed."""


class Hollow:
    """Stands in for large products, and watches who uses the results."""

    def __init__(self) -> None:
        self.read = False  # the attempt is void, whatever the forward made of the exception
        self._made: Noted[bool] = Noted()
        self._space: dict[Any, tuple[NDArray[Any], int]] = {}  # zeros to hand out, and how many of them were

    def run(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """Zeros in the place of ``func(*args, **kwargs)`` if that is a large product, else None."""
        shape_of = _SHAPES.get(func)
        if shape_of is None:
            return self._attention(*args) if func is _ATTENTION else None
        found = None if kwargs else shape_of(*args)
        if found is None:
            return None
        shape, work = found
        first = args[_FIRST.get(func, 0)]
        if work < LEAST and first not in self._made:
            return None
        out = self.zeros(first, shape)
        self._made[out] = True
        return out

    def zeros(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Zeros whose memory is not touched where that can be had."""
        kind = _FROM_NUMPY.get(dtype or like.dtype) if like.is_cpu else None
        if kind is None:
            return like.new_zeros(shape, dtype=dtype)
        count = math.prod(shape)
        space, used = self._space.get(kind, (None, 0))
        if space is None or used + count > len(space):
            space, used = np.zeros(max(count, CHUNK), kind), 0
        self._space[kind] = space, used + -(-count // 16) * 16
        return torch.from_numpy(space[used : used + count].reshape(shape))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, *_: Any) -> Any:
        """Attention of heads that all have one size: laid out as PyTorch does, in the order of ``q``."""
        fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[3] == k.shape[3] == v.shape[3] and q.stride(3) == 1
        if not fits or dropout or not _alike(q, k, v) or q.numel() * k.shape[2] < LEAST:
            return None
        b, h, t, d = q.shape
        by_tokens = q.stride(1) < q.stride(2)
        out = self.zeros(q, (b, t, h, d)).transpose(1, 2) if by_tokens else self.zeros(q, (b, h, t, d))
        self._made[out] = True
        return out, q.new_empty((b, t, h)).transpose(1, 2)

    def skip(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        """What stands for ``func(*args, **kwargs)`` if that is a large element-wise op on such zeros, else None."""
        how = _SKIPPED.get(func) if self._made else None
        if how is None or kwargs:
            return None
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if not isinstance(first, Tensor) or first.numel() < LEAST_SKIPPED or first not in self._made:
            return None
        return how(self.zeros, *args) if first.is_contiguous() else None

    def follow(self, func: Any, inputs: Iterable[Tensor], results: Iterable[Tensor], indices: Any) -> None:
        """Note what ``func`` made of such zeros.

        Args:
            indices: of an indexing op, None of any other.
        Raises:
            ValuesRead: it read values.
        """
        if not self._made or not self._made.any(inputs):
            return
        if _reads(func, indices):
            self.stop()
        for result in results:
            self._made[result] = True

    def look(self, value: Any) -> None:
        """Note that values are read past the dispatcher; raises :class:`ValuesRead` if they were not computed."""
        if isinstance(value, Tensor) and value in self._made:
            self.stop()

    def stop(self) -> None:
        """Give up."""
        self.read = True
        raise ValuesRead("the forward depends on the values that it computes")


def _reads(func: Any, indices: Any) -> bool:
    """Whether what ``func`` gives depends on more of its inputs than their shapes."""
    if indices is not None:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    return _reads_values(func)


@cache
def _reads_values(func: Any) -> bool:
    if func.namespace != "aten":
        return True  # nothing is known of it
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _alike(*tensors: Tensor) -> bool:
    first = tensors[0]
    dtype, device = first.dtype, first.device
    if not dtype.is_floating_point:
        return False
    return not [t for t in tensors if t.dtype is not dtype or t.layout is not torch.strided or t.device != device]


Product = tuple[tuple[int, ...], int]  # the shape of a product, and its multiply-accumulates


def _mm(a: Tensor, b: Tensor) -> Product | None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and _alike(a, b)
    return ((a.shape[0], b.shape[1]), a.numel() * b.shape[1]) if fits else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Product | None:
    found = _mm(a, b)
    return found if found is not None and _alike(a, bias) and bias.shape in (found[0][1:], found[0]) else None


def _bmm(a: Tensor, b: Tensor) -> Product | None:
    fits = a.ndim == b.ndim == 3 and a.shape[::2] == (b.shape[0], b.shape[1]) and _alike(a, b)
    return ((a.shape[0], a.shape[1], b.shape[2]), a.numel() * b.shape[2]) if fits else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Product | None:
    of_x, of_weight = x.shape, weight.shape
    enters, leaves = of_weight[1] * groups, of_weight[0]
    if transposed:
        enters, leaves = leaves, enters
    if len(of_x) != len(of_weight) or of_x[1] != enters or of_weight[0] % groups:
        return None
    if not len(stride) == len(padding) == len(dilation) == len(of_weight) - 2:
        return None
    if not _alike(x, weight, *(() if bias is None else (bias,))):
        return None
    if not (x.is_contiguous() and weight.is_contiguous()):
        return None  # the memory format of the result is for PyTorch to choose
    sizes = zip(of_x[2:], of_weight[2:], stride, padding, dilation, strict=True)
    if transposed:
        left = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sizes]
        left = [n + more for n, more in zip(left, output_padding, strict=True)]
    else:
        left = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    work = of_x[0] * math.prod(of_x[2:] if transposed else left) * weight.numel()
    return ((of_x[0], leaves, *left), work) if min(left, default=0) > 0 else None


_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu.default
_SHAPES: dict[Any, Any] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.convolution.default: _convolution,
}
_FIRST = {_aten.addmm.default: 1}  # which argument the result is like


# Element-wise ops on zeros: what comes of them is as meaningless.


def _same_shape(zeros: Zeros, x: Tensor, *_: Any) -> Tensor:
    return zeros(x, x.shape)


def _in_place(zeros: Zeros, x: Tensor, *_: Any) -> Tensor:
    return x


def _pair(zeros: Zeros, a: Tensor, b: Any) -> Tensor | None:
    if isinstance(b, (int, float)):
        return zeros(a, a.shape)
    fits = isinstance(b, Tensor) and b.is_contiguous() and _alike(a, b) and _spreads(b.shape, a.shape)
    return zeros(a, a.shape) if fits else None


def _spreads(shape: Sequence[int], over: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` is broadcast to one of the shape ``over``."""
    return len(shape) <= len(over) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(over), strict=False))


def _pair_in_place(zeros: Zeros, a: Tensor, b: Any) -> Tensor | None:
    return a if isinstance(b, (int, float)) or (isinstance(b, Tensor) and _spreads(b.shape, a.shape)) else None


def _batch_norm(zeros: Zeros, x: Tensor, w: Any, b: Any, mean: Any, variance: Any, training: bool, *_: Any) -> Any:
    if training:
        return None
    nothing = x.new_empty(0)
    return zeros(x, x.shape), nothing, nothing


def _layer_norm(zeros: Zeros, x: Tensor, size: Sequence[int], *_: Any) -> Any:
    few = (*x.shape[: x.ndim - len(size)], *(1 for _ in size))
    return zeros(x, x.shape), x.new_zeros(few), x.new_zeros(few)


def _softmax(zeros: Zeros, x: Tensor, dim: int, to_float: bool) -> Tensor | None:
    return None if to_float else zeros(x, x.shape)


def _cat(zeros: Zeros, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    if not _alike(*tensors) or not all(t.is_contiguous() and t.ndim == tensors[0].ndim for t in tensors):
        return None
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return zeros(tensors[0], shape)


def _mean(zeros: Zeros, x: Tensor, dims: Sequence[int] | None, keep: bool = False) -> Tensor:
    gone = {d % x.ndim for d in dims or range(x.ndim)}
    return x.new_zeros([1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone])


def _max_pool(
    zeros: Zeros,
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil: bool = False,
) -> Any:
    if ceil or x.ndim != 4:
        return None
    k, p, d = (list(given) * (2 // len(given)) for given in (size, padding, dilation))
    s = list(stride) * (2 // len(stride)) if stride else k
    left = [(x.shape[2 + i] + 2 * p[i] - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i in range(2)]
    shape = (*x.shape[:2], *left)
    return (zeros(x, shape), zeros(x, shape, torch.int64)) if min(left) > 0 else None


_UNARY = (
    "clone", "relu", "sigmoid", "tanh", "silu", "gelu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu",
)  # fmt: skip
_SKIPPED: dict[Any, Any] = {
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten._softmax.default: _softmax,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.mean.dim: _mean,
    _aten.cat.default: _cat,
    _aten.relu_.default: _in_place,
    _aten.silu_.default: _in_place,
    _aten.hardtanh_.default: _in_place,
    _aten.hardswish_.default: _in_place,
    _aten.add.Tensor: _pair,
    _aten.mul.Tensor: _pair,
    _aten.add_.Tensor: _pair_in_place,
    _aten.mul_.Tensor: _pair_in_place,
    **{getattr(_aten, name).default: _same_shape for name in _UNARY},
}
_FROM_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16, torch.int64: np.int64}
