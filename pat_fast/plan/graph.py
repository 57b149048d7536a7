"""Torch-Pruning's own graph of a model, for scripts that query one."""

from __future__ import annotations

from typing import Any

from torch import nn

from .running import call, undisturbed


def dependency_graph(model: nn.Module, example_inputs: Any) -> Any:
    """A Torch-Pruning ``DependencyGraph`` of ``model``, which is left as it was."""
    import torch_pruning as tp

    with undisturbed(model):
        graph = tp.DependencyGraph()
        graph.build_dependency(model, example_inputs, forward_fn=call, verbose=False)
    return graph
