"""What the backward of a forward shows: whether it is all PyTorch's own, and which parameters it reaches."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def is_pytorchs(nodes: Iterable[Any]) -> bool:
    """Whether all steps of a backward are PyTorch's own, which take their shapes from the forward's tensors."""
    return all(map(_is_known, set(map(type, nodes))))


def reached(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the parameters that ``outputs`` depend on."""
    found: set[int] = set()
    left = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(left)
    while left:
        node = left.pop()
        if (parameter := getattr(node, "variable", None)) is not None:
            found.add(id(parameter))
        new = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= new
        left += new
    return found


@cache
def _is_known(kind: Any) -> bool:
    """Whether nodes of ``kind`` are PyTorch's own: neither a Python function's nor an extension's."""
    return not issubclass(kind, BackwardCFunction) and kind.__name__ != "CppFunction"
