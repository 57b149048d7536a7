"""Torch-Pruning's way through its graph, with arrays in the place of lists of index pairs, and with an end.

The order of visits, the merging of repeated operations and the index mappings are those of
``DependencyGraph.get_pruning_group``. There an index mapping walks a Python list for every edge, and a slice that is
concatenated again (rotary embeddings) makes new indices for ever. Here indices that a layer does not have end the
walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency import Dependency
from torch_pruning.dependency import index_mapping as maps
from torch_pruning.pruner import function

from ...errors import PlanError
from ...plan.types import IndexArray

LOST = -1  # a root index that a mapping does not know


class Endless(PlanError):
    """Torch-Pruning's index mappings lead out of a layer: there is no group to be had from its graph."""


@dataclass(frozen=True)
class Visit:
    """One entry of a group: an operation on a layer, the indices ``[n]`` it is for, and their root indices ``[n]``."""

    dep: Dependency
    idxs: IndexArray
    roots: IndexArray


def walk(graph: Any, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Iterable[int]) -> list[Visit]:
    """The entries of ``graph.get_pruning_group(module, pruning_fn, idxs)``, in its order.

    Raises:
        Endless: the mappings make indices that the layers do not have.
    """
    root_node = graph.module2node[module]
    if isinstance(module, ops.TORCH_CONV) and module.groups == module.out_channels > 1:
        pruning_fn = function.prune_depthwise_conv_out_channels
    start = np.asarray(list(idxs), dtype=np.int64)
    first = Visit(Dependency(pruning_fn, pruning_fn, source=root_node, target=root_node), start, start)
    found, stack = [first], [first]
    known = {_key(first)}
    visited: set[int] = set()
    limit = 1000 + 20 * sum(len(node.dependencies) for node in graph.module2node.values())
    while stack:
        visit = stack.pop()
        visited.add(id(visit.dep.target))
        for dep in visit.dep.target.dependencies:
            if not dep.is_triggered_by(visit.dep.handler):
                continue
            new = _follow(dep, visit)
            if not len(new.idxs) or (id(dep.target) in visited and _key(new) in known):
                continue
            _check(graph, new)
            known.add(_key(new))
            found.append(new)
            stack.append(new)
        if len(found) > limit:
            raise Endless("Torch-Pruning's graph of this model leads in circles")
    return _merge(v for v in found if not _ignored(graph, v))


def _key(visit: Visit) -> tuple[Any, ...]:
    return id(visit.dep.target), visit.dep.handler, visit.idxs.tobytes(), visit.roots.tobytes()


def _ignored(graph: Any, visit: Visit) -> bool:
    return any(visit.dep.target.module is p for p in graph.ignored_params)


def _check(graph: Any, visit: Visit) -> None:
    node = visit.dep.target
    size = graph.get_out_channels(node) if graph.is_out_channel_pruning_fn(visit.dep.handler) else None
    if size is None:
        size = graph.get_in_channels(node) if graph.is_in_channel_pruning_fn(visit.dep.handler) else None
    real = node.type not in (ops.OPTYPE.OUTPUT, ops.OPTYPE.CONCAT, ops.OPTYPE.SPLIT)
    if real and size is not None and (visit.idxs.max() >= size or visit.idxs.min() < 0):
        raise Endless(f"Torch-Pruning's graph asks {node.name} for channel {int(visit.idxs.max())} of {size}")


def _follow(dep: Dependency, visit: Visit) -> Visit:
    idxs, roots = visit.idxs, visit.roots
    for mapping in dep.index_mapping:
        if mapping is not None:
            idxs, roots = _mapped(mapping, idxs, roots)
    return Visit(dep, idxs, roots)


def _mapped(mapping: Any, idxs: IndexArray, roots: IndexArray) -> tuple[IndexArray, IndexArray]:
    """What a mapping of Torch-Pruning makes of indices and root indices."""
    if isinstance(mapping, maps._FlattenIndexMapping):
        if mapping.reverse:
            pairs = np.unique(np.stack([idxs // mapping._stride, roots]), axis=1)
            return pairs[0], pairs[1]
        spread = idxs[:, None] * mapping._stride + np.arange(mapping._stride)
        return spread.reshape(-1), np.repeat(roots, mapping._stride)
    if isinstance(mapping, (maps._ConcatIndexMapping, maps._SplitIndexMapping)):
        low, high = mapping.offset[0], mapping.offset[1]
        if isinstance(mapping, maps._ConcatIndexMapping) == mapping.reverse:
            inside = (idxs >= low) & (idxs < high)
            return idxs[inside] - low, roots[inside]
        return idxs + low, roots
    if isinstance(mapping, maps._SliceIndexMapping):
        if mapping.reverse:
            return idxs * mapping.step + mapping.start, roots
        inside = (idxs >= mapping.start) & (idxs < mapping.end) & ((idxs - mapping.start) % mapping.step == 0)
        return (idxs[inside] - mapping.start) // mapping.step, roots[inside]
    hybrid = [_helpers._HybridIndex(i, r) for i, r in zip(idxs.tolist(), roots.tolist(), strict=True)]
    mapped = mapping(hybrid)
    plain = np.asarray([p.idx for p in mapped], dtype=np.int64)
    return plain, np.asarray([LOST if p.root_idx is None else p.root_idx for p in mapped], dtype=np.int64)


def _merge(visits: Iterable[Visit]) -> list[Visit]:
    """Operations that were visited more than once, as one: each index once, with its first root index."""
    merged: dict[tuple[int, Any], Visit] = {}
    for visit in visits:
        key = (id(visit.dep.target), visit.dep.handler)
        earlier = merged.get(key)
        if earlier is not None:
            idxs = np.concatenate([earlier.idxs, visit.idxs])
            roots = np.concatenate([earlier.roots, visit.roots])
            _, first = np.unique(idxs, return_index=True)
            first.sort()
            visit = Visit(earlier.dep, idxs[first], roots[first])
        merged[key] = visit
    return list(merged.values())
