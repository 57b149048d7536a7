"""The modules and tensors of a model by name, in PyTorch's order, without a generator for every level of nesting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn


def named_modules(model: nn.Module, once: bool = True) -> list[tuple[str, nn.Module]]:
    """As ``model.named_modules(remove_duplicate=once)``."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if once:
            if id(module) in seen:
                return
            seen.add(id(module))
        found.append((name, module))
        prefix = name + "." if name else ""
        for local, child in module._modules.items():
            if child is not None:
                visit(prefix + local, child)

    visit("", model)
    return found


def named_tensors(
    modules: Iterable[tuple[str, nn.Module]], kind: Literal["_parameters", "_buffers"]
) -> list[tuple[str, Tensor]]:
    """The parameters or buffers of ``modules``, with all of their names."""
    found = []
    for name, module in modules:
        if held := getattr(module, kind):
            prefix = name + "." if name else ""
            found += [(prefix + local, t) for local, t in held.items() if t is not None]
    return found
