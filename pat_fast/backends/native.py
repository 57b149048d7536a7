"""What the glue to both compiled extensions shares: loading them, and the numbers that stand for dtypes and functions.

The numbers are those of ``DType`` and ``Func`` in ``csrc/cpu/engine.h``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_FUNCS = {"pow": 2, "mul": 3, "absmul": 4, "sqmul": 5}
_POWERS = {1.0: 0, 2.0: 1}
# What code that Inductor generated makes its tensors with, past the dispatcher; None where PyTorch does not have it.
empty_strided_cpu: Any = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cpu", None)


def load(name: str, what: str) -> tuple[Any, str | None]:
    """Return the extension, and None or why it cannot be imported."""
    # torch is imported by now, so that both use one OpenMP runtime and its threads.
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        return None, f"the {what} extension is not there ({error})"


def function(f: str, p: float) -> int:
    """Return the number of an element-wise function; common powers have one of their own."""
    return _POWERS.get(p, _FUNCS["pow"]) if f == "pow" else _FUNCS[f]


def empty(length: int, dtype: torch.dtype) -> Tensor:
    """Return a vector in the memory of the CPU, whose numbers are whatever stands there; no mode sees it made."""
    if empty_strided_cpu is None:
        return torch.empty(length, dtype=dtype, device="cpu")
    made: Tensor = empty_strided_cpu((length,), (1,), dtype)
    return made
