"""Running a model of any precision in double precision, one tensor at a time: no second copy of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

LOW = (torch.float32, torch.float16, torch.bfloat16)


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
    """``value`` with floating-point tensors (and types) of lower precision in float64."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.dtype in LOW else value
    return torch.float64 if isinstance(value, torch.dtype) and value in LOW else value


def _written(func: Any, args: Any) -> set[int]:
    """Positions of the arguments that the op writes to."""
    schema = func._schema
    if not schema.is_mutable:
        return set()
    given = schema.arguments[: len(args)]
    return {i for i, a in enumerate(given) if a.alias_info is not None and a.alias_info.is_write}
