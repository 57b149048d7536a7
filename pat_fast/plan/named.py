"""The tensors of a live model that a plan names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import PlanError
from .running import Still
from .types import Plan


class Named:
    """The tensors of ``model`` that ``plan`` names, and the modules that hold them.

    Args:
        plan: what names them.
        model: where they are looked for.
        still: what is known of the model as it is.
        after: the same before a prune: its modules and names stay, and are not looked for again.
    Raises:
        PlanError: the model has no such tensor, or one of another shape (it was changed since).
    """

    def __init__(self, plan: Plan, model: nn.Module, still: Still | None = None, after: Named | None = None) -> None:
        self.plan = plan
        self.model = model
        if after is None:
            still = still or Still(model)
            self.modules: dict[str, Any] = dict(still.every)
            named = dict((*still.parameters, *still.buffers))
            self._names: dict[int, list[str]] = {}
            for name, tensor in named.items():
                self._names.setdefault(id(tensor), []).append(name)
        else:
            named = after.tensors
            self.modules, self._names = after.modules, after._names
        self.tensors: dict[str, Tensor] = {}
        for tensor_map in plan.tensors:
            found = named.get(tensor_map.name)
            if found is None or found.shape != tensor_map.shape:
                got = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
                raise PlanError(
                    f"{tensor_map.name}: the plan expects shape {tensor_map.shape}, the model has {got}; "
                    "build a new plan after changing the model"
                )
            self.tensors[tensor_map.name] = found
        self.derived: dict[str, Any] = {}  # what other parts have worked out for these tensors, by their keys

    def module(self, path: str) -> nn.Module:
        """The module of this name in the model."""
        return self.modules[path]

    def owner(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds tensor ``name``, and the tensor's name in it."""
        path, _, local = name.rpartition(".")
        return self.modules[path], local

    def aliases(self, name: str) -> list[str]:
        """All names of tensor ``name``: more than one when it is tied."""
        return self._names[id(self.tensors[name])]

    def owners(self, name: str) -> list[tuple[nn.Module, str]]:
        """All modules that hold tensor ``name``, and its name in each."""
        return [self.owner(n) for n in self.aliases(name)]
