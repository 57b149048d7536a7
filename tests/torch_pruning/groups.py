"""Torch-Pruning's groups, and plans made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cases import quiet
from pat_fast.plan import Plan
from pat_fast.plan.types import Axis, Group, TensorMap
from pat_fast.torch_pruning._groups import LAYERS, NORMS, dimension, is_depthwise, items, width


def groups_of(model: nn.Module, inputs: Any, ignored: Sequence[nn.Module] = ()) -> list[Any]:
    """All groups that Torch-Pruning sees."""
    with quiet():
        graph = tp.DependencyGraph().build_dependency(model, inputs)
    return list(graph.get_all_groups(ignored_layers=list(ignored)))


def plan_of(groups: Sequence[Any], model: nn.Module) -> Plan:
    """A plan whose channels are exactly those of Torch-Pruning's groups, for scoring only.

    What Torch-Pruning knows, a lowered plan may know better (heads); here both speak of the same channels.
    """
    names = {module: name for name, module in model.named_modules()}
    channels: dict[tuple[str, int], np.ndarray] = {}
    roles: dict[tuple[str, int], str] = {}
    layers: dict[str, nn.Module] = {}
    members: list[list[tuple[str, int]]] = []
    start = 0
    bounds = []
    for group in groups:
        members.append([])
        for item in items(group, LAYERS + NORMS):
            for local in ("weight", "bias"):
                tensor = getattr(item.layer, local, None)
                if tensor is None or (local == "bias" and item.side == "in"):
                    continue
                name, dim = f"{names[item.layer]}.{local}", 0 if local == "bias" else dimension(item.layer, item.side)
                blocks = getattr(item.layer, "groups", 1) if dim == 1 else 1
                found = channels.setdefault((name, dim), np.full(tensor.shape[dim] * blocks, -1, np.int32))
                assert (found[item.idxs] == -1).all(), "an index belongs to two groups"
                found[item.idxs] = start + item.places.numpy()
                roles[name, dim] = item.side
                layers[name] = item.layer
                members[-1].append((name, dim))
        bounds.append((start, start + width(group)))
        start += width(group)
    tensors = []
    for name in dict.fromkeys(name for name, _ in channels):
        axes = tuple(Axis(d, channels[n, d], roles[n, d]) for n, d in sorted(channels) if n == name)
        layer, local = layers[name], name.rpartition(".")[2]
        blocks = getattr(layer, "groups", 1) if local == "weight" else 1
        tensor = getattr(layer, local)
        tensors.append(TensorMap(name, True, tuple(tensor.shape), blocks, is_depthwise(layer), axes))
    made = tuple(
        Group(f"{i}: {names[g[0].dep.target.module]}", *bound, (), tuple(own))
        for i, (g, bound, own) in enumerate(zip(groups, bounds, members, strict=True))
    )
    unit = np.arange(start, dtype=np.int32)
    return Plan(start, start, unit, made, tuple(tensors), (), (), (), 1, 0)


def randomize_grads_(model: nn.Module, seed: int = 0) -> None:
    """Positive gradients, which may stand for a curvature, too."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (0.1 + torch.rand(p.shape, generator=generator)).to(p)


def close(ours: Tensor, theirs: Tensor, what: str, rtol: float, atol: float = 0.0) -> None:
    """Equal to ``rtol``, or to ``atol`` times the largest score."""
    assert ours.shape == theirs.shape, what
    atol *= float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs.to(ours), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}")


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def norm_chain() -> nn.Sequential:
    return chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def one_group(model: nn.Module, inputs: Any, root: nn.Module) -> Any:
    return next(g for g in groups_of(model, inputs) if g[0].dep.target.module is root)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def members(importance: Any, group: Any) -> Tensor:
    """Scores of each member: ``[members, channels]``."""
    importance.group_reduction, importance.normalizer = None, None
    return importance(group)
