"""The precision in which a model is compared with itself.

Double, whatever its own is, one tensor at a time: no second copy of its weights. Or single, as the processor has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DOUBLE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}


@contextmanager
def in_single() -> Iterator[None]:
    """Let a GPU multiply single precision as it is, not rounded to the ten bits of TF32, as it does in convolutions.

    Both sides of a comparison would be rounded, each by kernels of its own shapes.
    """
    settings = _rounding()
    try:
        _put((put, exact) for put, _, exact in settings)
        yield
    finally:
        _put((put, before) for put, before, _ in settings)


def _put(settings: Iterable[tuple[Callable[[Any], None], Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two ways to set this PyTorch advises the other
        for put, value in settings:
            put(value)


def _rounding() -> list[tuple[Callable[[Any], None], Any, Any]]:
    """The settings that allow TF32: how to set each, what it is, what it has to be.

    PyTorch has two ways to set them, and refuses to read in the one what was set in the other.
    """
    cudnn: Any = torch.backends.cudnn
    found: list[tuple[Callable[[Any], None], Any, Any]]
    try:
        products = torch.get_float32_matmul_precision()
        found = [
            (partial(setattr, cudnn, "allow_tf32"), cudnn.allow_tf32, False),
            (torch.set_float32_matmul_precision, products, "highest"),
        ]
    except RuntimeError:
        ops = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
        found = [(partial(setattr, op, "fp32_precision"), op.fp32_precision, "ieee") for op in ops]
    return [(put, now, exact) for put, now, exact in found if now not in (exact, "none")]


class InDouble(TorchDispatchMode):
    """Every op computes in float64 and returns float64, whatever precision its inputs have.

    Weights are converted where an op reads them. What the code asks to be of another floating-point type is made in
    float64, too. For forwards without gradients.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _written(func, args)
        args = tuple(a if i in written else tree_map(as_double, a) for i, a in enumerate(args))
        out = func(*args, **tree_map(as_double, kwargs or {}))
        # What is made from nothing (zeros, an arange) has the default type; an op in place returns its argument.
        return out if written else tree_map(as_double, out)


def as_double(value: Any) -> Any:
    """``value`` with floating-point and complex tensors (and types) of lower precision in double precision."""
    if isinstance(value, Tensor):
        return value.to(DOUBLE[value.dtype]) if value.dtype in DOUBLE else value
    return DOUBLE.get(value, value) if isinstance(value, torch.dtype) else value


def _written(func: Any, args: Any) -> set[int]:
    """Positions of the arguments that the op writes to."""
    schema = func._schema
    if not schema.is_mutable:
        return set()
    given = schema.arguments[: len(args)]
    return {i for i, a in enumerate(given) if a.alias_info is not None and a.alias_info.is_write}
