"""A forward without its heavy arithmetic.

Labels follow from which op meets which axes, not from values, so while a model is traced the results of large
products may be zeros. That is right as long as nobody looks: what comes of such zeros is remembered, and an op whose
result has a value or a shape that depends on them (``item()``, ``nonzero()``, an index by a mask) ends the attempt.
The model is traced again with all of its arithmetic then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LEAST = 2**20  # multiply-accumulates below which an op is simply run
# Methods that read values past the dispatcher.
READS = frozenset({"numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "storage", "__dlpack__"})

_aten = torch.ops.aten


class ValuesRead(Exception):
    """The forward depends on values that were not computed."""


class Hollow:
    """Stands in for large products, and watches who uses the results."""

    def __init__(self) -> None:
        self.read = False  # the attempt is void, whatever the forward made of the exception
        self._made = WeakTensorKeyDictionary()

    def run(self, func: Any, args: Sequence[Any]) -> Tensor | None:
        """Zeros in the place of ``func(*args)`` if that is a large product, else None."""
        shape = _SHAPES[func](*args) if func in _SHAPES else None
        if shape is None:
            return None
        out = args[_FIRST.get(func, 0)].new_zeros(shape)
        self._made[out] = True
        return out

    def follow(self, func: Any, inputs: Iterable[Tensor], results: Iterable[Tensor], indices: Any) -> None:
        """Note what ``func`` made of such zeros.

        Args:
            indices: of an indexing op, None of any other.
        Raises:
            ValuesRead: it read values.
        """
        if not self._made or not any(t in self._made for t in inputs):
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
    if func.namespace != "aten":
        return True  # nothing is known of it
    if indices is not None:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _alike(*tensors: Tensor) -> bool:
    first = tensors[0]
    return first.is_floating_point() and all(
        t.dtype == first.dtype and t.device == first.device and t.layout is torch.strided for t in tensors
    )


def _mm(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and _alike(a, b)
    return (a.shape[0], b.shape[1]) if fits and a.numel() * b.shape[1] >= LEAST else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> tuple[int, ...] | None:
    shape = _mm(a, b)
    return shape if shape is not None and _alike(a, bias) and bias.shape in ((shape[1],), shape) else None


def _bmm(a: Tensor, b: Tensor) -> tuple[int, ...] | None:
    fits = a.ndim == b.ndim == 3 and a.shape[::2] == (b.shape[0], b.shape[1]) and _alike(a, b)
    return (a.shape[0], a.shape[1], b.shape[2]) if fits and a.numel() * b.shape[2] >= LEAST else None


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
) -> tuple[int, ...] | None:
    dims = weight.ndim - 2
    lists = (stride, padding, dilation)
    if transposed or x.ndim != weight.ndim or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(len(given_list) != dims for given_list in lists) or not _alike(*given):
        return None
    if not (x.is_contiguous() and weight.is_contiguous()):
        return None  # the memory format of the result is for PyTorch to choose
    sizes = zip(x.shape[2:], weight.shape[2:], *lists, strict=True)
    left = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    work = x.shape[0] * math.prod(left) * weight.numel()
    return (x.shape[0], weight.shape[0], *left) if min(left, default=0) > 0 and work >= LEAST else None


_SHAPES: dict[Any, Any] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.convolution.default: _convolution,
}
_FIRST = {_aten.addmm.default: 1}  # which argument the result is like
