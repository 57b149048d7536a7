"""The order in which Torch-Pruning visits layers as roots of groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from .walk import named_modules


def torch_prunings_order(
    model: nn.Module, forward: Callable[[], list[torch.Tensor]], layers: tuple[type[nn.Module], ...]
) -> list[str]:
    """Names of the modules of the kinds ``layers`` in the order in which Torch-Pruning visits them.

    ``forward`` runs ``model`` and returns its outputs. Torch-Pruning's own hooks say which module made which node of
    the autograd graph, and its walk is followed here; its index maps are not made. The maps (slices, reshapes) are what
    makes its queries quadratic on DenseNet and endless on rotary embeddings, and they do not know shapes; pat_fast
    takes maps from its own trace.
    """
    graph = _graph()()
    names = {module: name for name, module in named_modules(model)}
    found = graph._trace(model, None, lambda *_: forward(), output_transform=None)
    return [names[m] for m in found if isinstance(m, layers) and m in names]


@cache
def _graph() -> Any:
    import torch_pruning as tp  # here, so that `import pat_fast` does not cost it

    class Graph(tp.DependencyGraph):
        """Torch-Pruning's graph without edges, and without nodes that are not of a module."""

        def __init__(self) -> None:
            super().__init__()
            self.unwrapped_parameters: list[Any] = []

        def _trace_computational_graph(
            self, module2node: Any, output: Any, gradfn2module: Any, reused: Any, visited: Any = ()
        ) -> None:
            """Enter modules in ``module2node`` when Torch-Pruning would: a node's inputs in order, the last first."""
            stack = [output.grad_fn]
            _enter(stack[0], gradfn2module, module2node)
            while stack:
                node = stack.pop()
                if node in visited:
                    continue
                visited.add(node)
                for source, _ in getattr(node, "next_functions", ()):
                    if source is not None:
                        _enter(source, gradfn2module, module2node)
                        stack.append(source)

    return Graph


def _enter(node: Any, module_of: dict[Any, nn.Module], entered: dict[nn.Module, Any]) -> None:
    module = module_of.get(node)
    if module is not None:
        entered.setdefault(module, None)
