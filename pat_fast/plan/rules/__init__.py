"""What each ATen op does to channel labels. One small function per family; see :mod:`pat_fast.plan.labels`.

A rule gets the tracer, the op, its arguments and its result, and labels the result. Element-wise ops need no
rule: PyTorch tags them. An op without a rule is a barrier.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from . import contracting, indexing, moving, normalizing, windows
from .pointwise import elementwise
from .reducing import SPATIAL, spatial
from .registry import RULES, Rule

# Of these ops' inputs only the shape counts.
SHAPE_ONLY = {f"aten::{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")} | {
    f"aten::new_{kind}" for kind in ("zeros", "ones", "empty", "full", "empty_strided")
}


@cache
def find(func: Any) -> Rule | None:
    """The rule for ``func``, or None."""
    name = func._schema.name
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and _is_elementwise(func):
        return elementwise
    if found is None and SPATIAL.match(name):
        return spatial
    return found


def _is_elementwise(func: Any) -> bool:
    """Whether PyTorch tags ``func`` as such, or what it does in place: of ``mish`` and ``mish_`` only one is tagged."""
    if torch.Tag.pointwise in func.tags:
        return True
    packet = getattr(getattr(torch.ops, func.namespace), func._opname.removesuffix("_"), None)
    apart = getattr(packet, func._overloadname, None)
    return apart is not None and torch.Tag.pointwise in apart.tags


__all__ = ["SHAPE_ONLY", "contracting", "find", "indexing", "moving", "normalizing", "windows"]
