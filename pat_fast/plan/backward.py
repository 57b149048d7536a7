"""Whether the backward of a forward is all PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch.autograd.function import BackwardCFunction


def is_pytorchs(nodes: Iterable[Any]) -> bool:
    """Whether all steps of a backward are PyTorch's own, which take their shapes from the forward's tensors."""
    return all(map(_is_known, set(map(type, nodes))))


@cache
def _is_known(kind: Any) -> bool:
    """Whether nodes of ``kind`` are PyTorch's own: neither a Python function's nor an extension's."""
    return not issubclass(kind, BackwardCFunction) and kind.__name__ != "CppFunction"
