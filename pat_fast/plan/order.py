"""The order in which Torch-Pruning visits layers as roots of groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import nn

After = Callable[[nn.Module, Any], None]


def torch_prunings_order(
    modules: Iterable[tuple[str, nn.Module]],
    forward: Callable[[After], list[torch.Tensor]],
    layers: tuple[type[nn.Module], ...],
) -> tuple[list[str], set[Any]]:
    """Names of those of the kinds ``layers`` in the order in which Torch-Pruning visits them, and the graph's nodes.

    ``forward`` runs the model of these ``modules``, calls what it is given with every module and its result, and
    returns the outputs. As in Torch-Pruning, the results of modules of the kinds that it knows say which of them made
    which node of the autograd graph, and its walk over that graph is followed. Its nodes and index maps are not made.
    The maps (slices, reshapes) are what makes its queries quadratic on DenseNet and endless on rotary embeddings, and
    they do not know shapes; pat_fast takes maps from its own trace.
    """
    module_of: dict[Any, nn.Module] = {}

    def record(module: nn.Module, out: Any) -> None:
        if type(module) not in known:
            return
        out = out[0] if isinstance(out, tuple) and not isinstance(out, _PACKED) else out
        with torch._C.DisableTorchFunction():  # to ask for a node is no part of the forward
            module_of[(out.data if isinstance(out, _PACKED) else out).grad_fn] = module

    names = {module: name for name, module in modules}
    known = {kind for kind in set(map(type, names)) if issubclass(kind, _known())}
    outputs = forward(record)
    entered: dict[nn.Module, None] = {}
    visited: set[Any] = set()
    for output in outputs:
        _visit(output.grad_fn, module_of, entered, visited)
    return [names[m] for m in entered if isinstance(m, layers) and m in names], visited


_PACKED: type[Any] = torch.nn.utils.rnn.PackedSequence


@cache
def _known() -> tuple[type, ...]:
    """The kinds of modules that Torch-Pruning has a pruner for."""
    import torch_pruning as tp  # here, so that `import pat_fast` does not cost it
    from torch_pruning import ops

    kinds: set[type] = set()
    for number in tp.DependencyGraph().REGISTERED_PRUNERS:
        found = ops.type2class(number)
        kinds.update(found if isinstance(found, tuple) else (found,))
    return tuple(kind for kind in kinds if issubclass(kind, nn.Module))


def _visit(
    root: Any, module_of: dict[Any, nn.Module], entered: dict[nn.Module, None], visited: set[Any]
) -> None:
    """Enter modules when Torch-Pruning would: the inputs of a node in their order, then on from the last of them."""
    stack = [root]
    if root in module_of:
        entered.setdefault(module_of[root])
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        for source, _ in getattr(node, "next_functions", ()):
            if source is not None:
                module = module_of.get(source)
                if module is not None:
                    entered.setdefault(module)
                stack.append(source)
