"""The registry of rules, and what several of them use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from ..labels import Factors, IntArray, varying
from ..trace import Tracer, tensors

Rule = Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any], Any], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen ops ``names`` (without ``aten::``), all their overloads included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten::{name}"] = function
        return function

    return register


def outputs(out: Any) -> list[Tensor]:
    return tensors(out)


def nth(dim: int, tensor: Tensor) -> int:
    return dim % max(tensor.ndim, 1)


def extents(tensor: Tensor) -> list[int]:
    """Sizes of ``tensor``, 1 where it is expanded: what is repeated there fits any size."""
    if tensor.is_contiguous():
        return list(tensor.shape)
    return [1 if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]


def note(tr: Tracer, factors: Sequence[IntArray], what: str) -> None:
    for factor in factors:
        tr.slots.note(factor, f"{what} over the channels ({tr.where()})")


def held(tr: Tracer, factors: Sequence[IntArray], dims: Sequence[int], reason: str) -> Factors:
    """Labels of what mixes the places along ``dims``, which must stay: from there on they are those of the first."""
    left = []
    for factor in factors:
        for dim in dims:
            if dim in varying(factor):
                tr.pin(factor, dim, reason)
                factor = factor.take([0], axis=dim)
        if factor.size > 1:
            left.append(factor)
    return tuple(left)


def arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments by name; None for those not given."""
    return {name: args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(_names(func))}


@cache
def _names(func: Any) -> list[str]:
    return [a.name for a in func._schema.arguments]
