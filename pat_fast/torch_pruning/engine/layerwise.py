"""Groups that a plan cannot express, pruned layer by layer with layer pruners, parameters and optimizers kept.

A customised layer pruner is a black box that puts new parameters into a layer. It is run on a copy whose tensors
hold the numbers of their elements: what it leaves there says which elements to keep of the parameter, its gradient
and its optimizer state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, Group

from ...errors import PatError, SurgeryError
from ...surgery.optimizer import joint_states, state_tensors
from ...surgery.prune import set_tensor
from .axes import VIRTUAL, out_dim
from .walk import LOST, Endless, Visit, walk

if TYPE_CHECKING:
    from .graph import LiveGraph

FOREIGN = (nn.MultiheadAttention,)
Operation = Callable[..., Any]


def is_foreign(graph: LiveGraph, module: Any) -> bool:
    """Whether only a layer pruner knows how to prune ``module``."""
    return isinstance(module, FOREIGN) or graph.is_customized(module)


def any_foreign(graph: LiveGraph) -> bool:
    """Whether the model has such a layer."""
    engine = graph.__dict__.get("engine")
    if engine is None:  # not yet, while the pruner is built
        return any(is_foreign(graph, m) for m in graph.model.modules())
    modules, known = engine.binding.modules, graph.foreign
    if known is None or known[0] is not modules or known[1] != len(graph.CUSTOMIZED_PRUNERS):
        found = any(is_foreign(graph, m) for m in modules.values())
        known = graph.foreign = (modules, len(graph.CUSTOMIZED_PRUNERS), found)
    return known[2]


class LayerwiseGroup(Group):
    """A ``tp.Group`` of Torch-Pruning's making whose :meth:`prune` keeps parameters and optimizers."""

    def __init__(self, graph: LiveGraph, visits: Sequence[Visit]) -> None:
        super().__init__()
        self._DG = graph
        for visit in visits:
            item = _helpers.GroupItem(visit.dep, visit.idxs.tolist())
            item.root_idxs = [None if r == LOST else r for r in visit.roots.tolist()]
            self._group.append(item)

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """See ``tp.Group.prune``. Raises :class:`SurgeryError` with model and optimizers as they were."""
        dep = self._group[0].dep
        if idxs is not None:
            self._DG.get_pruning_group(dep.target.module, dep.handler, idxs).prune(record_history=record_history)
            return
        prune_entries(self._DG, self._group, record_history)


def prune_entries(graph: LiveGraph, entries: Sequence[Any], record_history: bool) -> None:
    """Prune the layer of each entry of a group, one after another, at the entry's own indices.

    Raises:
        SurgeryError: a layer could not be pruned; model and optimizers are as they were.
    """
    first = entries[0]
    root, dep = graph.name_of(first.dep.target.module), first.dep
    optimizers = graph.engine.optimizers()
    for joint in joint_states(optimizers):
        raise SurgeryError(
            f"{root}: a group that is pruned layer by layer cannot be in a history of all parameters together, as "
            f"{type(joint.optimizer).__name__} keeps it; use an optimizer with element-wise state"
        )
    undo: list[Undo] = []
    try:
        for dep, own in entries:
            if len(own):
                _prune_layer(graph, dep, own, optimizers, undo)
    except BaseException as error:
        for step in reversed(undo):
            step()
        if isinstance(error, PatError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"{graph.name_of(dep.target.module)}: its layer pruner failed ({type(error).__name__}: {error}); "
            "the prune was undone, the model and its optimizers are as they were"
        ) from error
    graph.layerwise_prunes += 1
    if record_history:
        graph.record([root, graph.is_out_channel_pruning_fn(first.dep.handler), list(first.idxs)])


def group(graph: LiveGraph, module: nn.Module, pruning_fn: Operation, idxs: Sequence[int]) -> LayerwiseGroup:
    """The group of these indices, from Torch-Pruning's graph."""
    return LayerwiseGroup(graph, walk(graph, module, pruning_fn, idxs))


def group_if_foreign(
    graph: LiveGraph, module: nn.Module, pruning_fn: Operation, idxs: Sequence[int]
) -> LayerwiseGroup | None:
    """:func:`group`, or None if no layer of it needs this."""
    if not any_foreign(graph):
        return None
    try:
        found = group(graph, module, pruning_fn, idxs)
    except Endless:
        return None
    return found if _holds_foreign(graph, found) else None


def _holds_foreign(graph: LiveGraph, found: Group) -> bool:
    return any(is_foreign(graph, dep.target.module) for dep, _ in found)


def all_groups(
    graph: LiveGraph, ignored: set[int], kinds: tuple[type, ...], roots: tuple[type, ...]
) -> Iterator[LayerwiseGroup]:
    """All groups that hold such a layer, in Torch-Pruning's order, with all of their channels."""
    if not any_foreign(graph):
        return
    visited: set[int] = set()
    for module in [m for m in graph.module2node if isinstance(m, nn.Module)]:
        held = id(module) in ignored or isinstance(module, kinds) or module in graph.IGNORED_LAYERS_IN_TRACING
        if held or not isinstance(module, roots) or id(module) in visited:
            continue
        size = graph.get_out_channels(module)
        if size is None:
            continue
        try:
            found = group(graph, module, graph.get_pruner_of_module(module).prune_out_channels, range(size))
        except Endless:
            continue
        outs = [dep.target.module for dep, _ in found if graph.is_out_channel_pruning_fn(dep.handler)]
        visited.update(id(m) for m in outs)
        protected = any(id(m) in ignored or isinstance(m, kinds) for m in outs)
        if not protected and _holds_foreign(graph, found):
            yield found


def broken(graph: LiveGraph, whole: Group) -> str | None:
    """A layer with a layer pruner of its own that has as many channels as the root, not all of which ``whole`` holds.

    On the way to it Torch-Pruning's graph has lost them: it takes a slice of the height for one of the channels, say.
    """
    for dep, idxs in whole:
        if is_foreign(graph, dep.target.module):
            out = graph.is_out_channel_pruning_fn(dep.handler)
            has = (graph.get_out_channels if out else graph.get_in_channels)(dep.target.module)
            if len(set(idxs)) < len(whole[0].idxs) == has:
                return graph.name_of(dep.target.module)
    return None


def members(graph: LiveGraph) -> frozenset[tuple[str, int]]:
    """(tensor, dimension) pairs that these groups hold: none of the plan's business."""
    found: set[tuple[str, int]] = set()
    for each in all_groups(graph, set(), (), (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)):
        for dep, _ in each:
            module = dep.target.module
            if isinstance(module, Tensor):
                found.add((graph.name_of(module), dep.target.pruning_dim % module.ndim))
            elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not is_foreign(graph, module):
                out = graph.is_out_channel_pruning_fn(dep.handler)
                found.add((f"{graph.name_of(module)}.weight", out_dim(module) if out else 1 - out_dim(module)))
            elif not isinstance(module, VIRTUAL):
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    found.update((f"{graph.name_of(module)}.{name}", d) for d in range(tensor.ndim))
    return frozenset(found)


# One layer


Undo = Callable[[], None]


@dataclass(frozen=True)
class _Cut:
    """A tensor of a layer and the elements of it that stay: flat indices, in the shape that they will have."""

    tensor: Tensor
    name: str
    kept: Tensor


def _prune_layer(
    graph: LiveGraph, dep: Dependency, idxs: Sequence[int], optimizers: list[Optimizer], undo: list[Undo]
) -> None:
    module = dep.target.module
    if isinstance(module, VIRTUAL):
        return  # the graph is traced again
    name = graph.name_of(module)
    if isinstance(module, Tensor):
        keep = np.setdiff1d(np.arange(module.shape[dep.target.pruning_dim]), idxs)
        kept = _numbered(module).index_select(dep.target.pruning_dim, torch.from_numpy(keep))
        _shrink(_Cut(module, name, kept.long()), optimizers, undo)
        return
    double, before = _numbered_copy(module)
    pruner = dep.handler.__self__
    dim = getattr(pruner, "pruning_dim", None)
    pruner.pruning_dim = dep.target.pruning_dim
    try:
        dep.handler(double, list(idxs))
    finally:
        pruner.pruning_dim = dim
    cuts = list(_cuts(module, double, name))
    for cut in cuts:
        _shrink(cut, optimizers, undo)
    _copy_attributes(module, double, before, undo)


def _numbered(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)


def _numbered_copy(module: nn.Module) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A copy of ``module`` whose tensors hold the numbers of their elements, and the attributes of its modules."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None and id(tensor) not in memo:
                numbers = _numbered(tensor)
                numbered: Any = nn.Parameter(numbers) if isinstance(tensor, nn.Parameter) else numbers
                memo[id(tensor)] = numbered
    double = copy.deepcopy(module, memo)
    return double, [dict(part.__dict__) for part in double.modules()]


def _cuts(module: nn.Module, double: nn.Module, name: str) -> Iterator[_Cut]:
    mine = dict([*module.named_parameters(), *module.named_buffers()])
    its = dict([*double.named_parameters(), *double.named_buffers()])
    if mine.keys() != its.keys():
        raise SurgeryError(
            f"{name}: its layer pruner leaves tensors {sorted(its)}, expected {sorted(mine)}; a layer pruner must keep "
            "the names of a layer's parameters and buffers"
        )
    for local, tensor in mine.items():
        kept = its[local].detach()
        if (
            kept.dtype != torch.float64
            or kept.frac().any()
            or (kept.numel() and not 0 <= kept.min() <= kept.max() < tensor.numel())
        ):
            raise SurgeryError(
                f"{name}.{local}: its layer pruner computes new values; it must select elements of the old tensor (by "
                "indexing), so that gradients and optimizer state can follow"
            )
        if kept.shape != tensor.shape:
            yield _Cut(tensor, f"{name}.{local}", kept.long())


def _shrink(cut: _Cut, optimizers: list[Optimizer], undo: list[Undo]) -> None:
    tensor, data, grad = cut.tensor, cut.tensor.data, cut.tensor.grad

    def gather(source: Tensor) -> Tensor:
        return source.detach().reshape(-1)[cut.kept.to(source.device)]

    states = state_tensors(optimizers, tensor, cut.name) if isinstance(tensor, nn.Parameter) else []
    if any(s.factored for s in states):
        raise SurgeryError(
            f"{cut.name}: a layer that is pruned by its own layer pruner cannot have factored optimizer state; use an "
            "optimizer with element-wise state"
        )
    undo.append(lambda: set_tensor(tensor, data, grad))
    set_tensor(tensor, gather(data), None if grad is None else gather(grad))
    for state in states:
        entry = state.optimizer.state[tensor]
        undo.append(lambda entry=entry, state=state: entry.__setitem__(state.key, state.tensor))  # type: ignore[misc]
        entry[state.key] = gather(state.tensor)


def _copy_attributes(module: nn.Module, double: nn.Module, before: list[dict[str, Any]], undo: list[Undo]) -> None:
    """Set what the layer pruner has set: attributes of the copy that are other objects now."""
    for mine, its, old in zip(module.modules(), double.modules(), before, strict=True):
        for key, value in its.__dict__.items():
            if key not in nn.Module().__dict__ and (key not in old or value is not old[key]):
                held, was = key in mine.__dict__, mine.__dict__.get(key)
                undo.append(_restorer(mine, key, held, was))
                mine.__dict__[key] = value


def _restorer(module: nn.Module, key: str, held: bool, was: Any) -> Undo:
    def restore() -> None:
        if held:
            module.__dict__[key] = was
        else:
            module.__dict__.pop(key, None)

    return restore
