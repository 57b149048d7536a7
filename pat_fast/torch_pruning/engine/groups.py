"""Groups as Torch-Pruning has them, made from the plan: layers in its order, indices from the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch_pruning import _helpers
from torch_pruning.dependency import Dependency, Group

from ...errors import PatError, PlanError, SurgeryError
from ...plan.types import Axis, IndexArray, Plan, TensorMap
from ...plan.types import Group as PlannedGroup
from . import layerwise
from .axes import VIRTUAL, positions
from .state import whole_units
from .walk import Endless, Visit, walk

if TYPE_CHECKING:
    from .graph import LiveGraph

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Root:
    """The operation that a group of the plan starts from, as in Torch-Pruning."""

    module: nn.Module
    pruning_fn: Operation
    out: bool


class PlanGroup(Group):
    """A ``tp.Group`` over channels of the plan. Its :meth:`prune` keeps parameters and optimizers.

    ``idxs`` of an entry are the indices of its layer; ``root_idxs`` count the channels from 0 where the group
    is whole (as importances need them), and are indices of the root layer in a group that is about to be pruned.
    Entries without a layer (additions, activations, concatenations) repeat the root's indices.

    A group whose entries were changed by hand (``group[i] = (dep, [])``, say) is pruned as its entries say, layer by
    layer.

    Attributes:
        born: lifelong names of the channels, in the order of the root's indices.
    """

    def __init__(self, graph: LiveGraph, root: Root, born: IndexArray) -> None:
        super().__init__()
        self._DG = graph
        self.root = root
        self.born = born
        self.lowered = graph.engine.lowered
        self.made: list[tuple[Any, int]] = []

    def close(self) -> PlanGroup:
        """Note the entries: what is changed from now on is the user's doing."""
        self.made = [(item, len(item.idxs)) for item in self._group]
        return self

    def _is_as_made(self) -> bool:
        return len(self._group) == len(self.made) and all(
            item is own and len(own.idxs) == n for item, (own, n) in zip(self._group, self.made, strict=True)
        )

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's channels, or those at ``idxs`` of its root layer, with all that belongs to them.

        Raises:
            ConfigError: an index is out of range.
            PlanError: the model was changed by other means since the group was made.
            SurgeryError: the prune was refused; model and optimizers are as they were.
        """
        group = self if idxs is None else self._DG.get_pruning_group(self.root.module, self.root.pruning_fn, idxs)
        group.remove(record_history)

    def remove(self, record_history: bool) -> None:
        engine = self._DG.engine
        engine.current()
        if self.lowered != engine.lowered:
            raise PlanError("the model was changed since this group was made; ask for the group again")
        channels = engine.now(self.born)
        if not len(channels):
            raise SurgeryError(f"{self._DG.name_of(self.root.module)}: the channels of this group are gone already")
        gone = whole_units(engine.plan, channels)
        if not self._is_as_made():
            layerwise.prune_entries(self._DG, [_helpers.GroupItem(*item) for item in self._group], record_history)
            return
        entry = self._DG.history_entry(self.root, gone)
        engine.prune(~gone)
        if record_history:
            self._DG.record(entry)


@dataclass(frozen=True)
class Structure:
    """The entries of a group without their indices."""

    root: Root
    deps: tuple[Dependency, ...]


class GroupMaker:
    """Makes :class:`PlanGroup` objects; remembers which layers a group has, since pruning does not change that."""

    def __init__(self, graph: LiveGraph) -> None:
        self.graph = graph
        self._known: dict[tuple[int, str], Structure] = {}
        self._roots: dict[tuple[int, str], Root] = {}
        self._of_plan: tuple[Plan, list[list[tuple[TensorMap, Axis]]]] | None = None

    def root(self, group: PlannedGroup) -> Root:
        """Where Torch-Pruning starts: the first layer that makes the channels, or an attention's reader."""
        graph = self.graph
        key = (graph.engine.lowered, group.root)
        if key not in self._roots:
            attention = graph.engine.attentions.get(group.root)
            reader = attention.reader if attention is not None else ""
            module = graph.model.get_submodule(reader or group.root.removesuffix(" transposed"))
            pruner = graph.get_pruner_of_module(module)
            operation = pruner.prune_in_channels if reader else pruner.prune_out_channels
            self._roots[key] = Root(module, operation, not reader)
        return self._roots[key]

    def structure(self, number: int) -> Structure:
        """The entries of the plan's group ``number``, in Torch-Pruning's order where its graph is right."""
        engine = self.graph.engine
        group = engine.plan.groups[number]
        key = (engine.lowered, group.root)
        if key not in self._known:
            root = self.root(group)
            own = np.arange(group.start, group.stop)
            deps = self._walked(root, own)
            self._known[key] = Structure(root, tuple(deps if deps is not None else self._made(root, own)))
        return self._known[key]

    def whole(self, number: int) -> PlanGroup:
        """The plan's group ``number`` with all of its channels, for importances."""
        group = self.graph.engine.plan.groups[number]
        return self._group(self.structure(number), np.arange(group.start, group.stop), by_position=True)

    def parts(self, number: int) -> list[tuple[PlanGroup, IndexArray]]:
        """The plan's group ``number`` as an importance can score it, and the channels that the scores are of.

        A group of the plan whose units span the outputs of several layers is several groups of Torch-Pruning. Where the
        root layer has a channel several times (a gate and its values in one layer), scores may be of its indices.
        """
        group, root = self.graph.engine.plan.groups[number], self.structure(number).root
        own = np.arange(group.start, group.stop)
        if np.isin(own, self._axis(root.module, root.out)).all():
            return [(self.whole(number), own)]
        found = []
        roots = [self.graph.model.get_submodule(name) for name in group.layers]
        for module in dict.fromkeys(roots):
            root = Root(module, self.graph.get_pruner_of_module(module).prune_out_channels, True)
            part = own[np.isin(own, self._axis(module, True))]
            if len(part) and self._scorable(root, part):
                found.append((self.of_layer(root, part, by_position=True), part))
                own = np.setdiff1d(own, part)
        return found

    def _scorable(self, root: Root, own: IndexArray) -> bool:
        """Whether the layer ``root`` has every channel of ``own`` once: importances count channels by its indices."""
        along = self._axis(root.module, root.out)
        return int(np.isin(along, own).sum()) == len(own) == len(np.intersect1d(along, own))

    def part(self, number: int, channels: IndexArray) -> PlanGroup:
        """Some channels of the plan's group ``number``, for pruning."""
        return self._group(self.structure(number), channels, by_position=False)

    def of_layer(self, root: Root, channels: IndexArray, by_position: bool = False) -> PlanGroup:
        """Channels of any groups, starting from the layer ``root``."""
        deps = self._walked(root, channels)
        structure = Structure(root, tuple(deps if deps is not None else self._made(root, channels)))
        return self._group(structure, channels, by_position)

    def _group(self, structure: Structure, channels: IndexArray, by_position: bool) -> PlanGroup:
        engine, root = self.graph.engine, structure.root
        made = PlanGroup(self.graph, root, engine.born[channels])
        n = engine.plan.n_channels
        numbers = np.arange(len(channels))
        if not by_position:
            along = self._axis(root.module, root.out)
            first = np.zeros(n, dtype=np.int64)
            held = np.flatnonzero(along >= 0)[::-1]
            first[along[held]] = held
            numbers = first[channels]
        for dep in structure.deps:
            axis = None if isinstance(dep.target.module, VIRTUAL) else self._of(dep)
            if axis is None:
                self._add(made, dep, numbers, numbers)
                continue
            place = positions(axis, channels, n)
            idxs = np.flatnonzero(place >= 0)
            if len(idxs):
                self._add(made, dep, idxs, numbers[place[idxs]])
        return made.close()

    @staticmethod
    def _add(group: PlanGroup, dep: Dependency, idxs: IndexArray, roots: IndexArray) -> None:
        item = _helpers.GroupItem(dep, idxs.tolist())
        item.root_idxs = roots.tolist()
        group._group.append(item)

    def _of(self, dep: Dependency) -> np.ndarray | None:
        out = self.graph.is_out_channel_pruning_fn(dep.handler)
        return self.graph.engine.axes.of(dep.target.module, out, dep.target.pruning_dim)

    def _axis(self, module: nn.Module, out: bool) -> np.ndarray:
        axis = self.graph.engine.axes.of(module, out)
        return np.zeros(0, dtype=np.int32) if axis is None else axis

    # Which layers

    def _walked(self, root: Root, own: IndexArray) -> list[Dependency] | None:
        """The entries as Torch-Pruning's graph has them; None if it disagrees with the plan."""
        along = self._axis(root.module, root.out)
        start = np.flatnonzero(np.isin(along, own))
        try:
            visits = walk(self.graph, root.module, root.pruning_fn, start)
        except Endless:
            return None
        except PatError:  # no graph of this model
            return None
        real = [v for v in visits if not isinstance(v.dep.target.module, VIRTUAL)]
        if not all(self._agrees(v, own, along) for v in real) or self._forgets(real, own):
            return None
        return [v.dep for v in visits]

    def _agrees(self, visit: Visit, own: IndexArray, along: np.ndarray) -> bool:
        axis = self._of(visit.dep)
        if axis is None or visit.idxs.max() >= len(axis):
            return isinstance(visit.dep.target.module, nn.PReLU)  # one slope for all channels
        if visit.roots.min() < 0:
            return set(axis[visit.idxs].tolist()) <= set(own.tolist())
        same = bool((axis[visit.idxs] == along[visit.roots]).all())
        return same and len(visit.idxs) == int(np.isin(axis, own).sum())

    def _forgets(self, visits: Iterable[Visit], own: IndexArray) -> bool:
        """Whether a layer with a weight that the plan knows in these channels was not visited."""
        seen = {id(v.dep.target.module) for v in visits}
        return any(id(m) not in seen for m, _ in self._layers(own))

    def _layers(self, own: IndexArray) -> Iterator[tuple[nn.Module | Tensor, bool]]:
        """The layers (and bare parameters) that hold channels of ``own``, with the side: True for outputs."""
        engine = self.graph.engine
        known: set[tuple[int, bool]] = set()
        members = self._members()
        groups = np.unique(engine.plan.group_of[own]).tolist()
        wanted = np.zeros(engine.plan.n_channels + 1, dtype=np.bool_)  # the last entry is for -1
        wanted[own] = True
        for tensor, axis in (member for g in groups for member in members[g]):
            if not wanted[axis.channels].any():
                continue
            for owner, local in engine.binding.owners(tensor.name):
                bare = self.graph.is_bare(owner)
                target = engine.binding.tensors[tensor.name] if bare else owner
                out = axis.role != "in"
                if (bare or local == "weight" or axis.role == "both") and (id(target), out) not in known:
                    known.add((id(target), out))
                    yield target, out

    def _members(self) -> list[list[tuple[TensorMap, Axis]]]:
        """For each group of the plan, the tensor axes that hold channels of it."""
        plan = self.graph.engine.plan
        if self._of_plan is None or self._of_plan[0] is not plan:
            found: list[list[tuple[TensorMap, Axis]]] = [[] for _ in plan.groups]
            for tensor, axis in plan.axes():
                for number in np.unique(plan.group_of[axis.channels[axis.channels >= 0]]).tolist():
                    found[number].append((tensor, axis))
            self._of_plan = (plan, found)
        return self._of_plan[1]

    def _made(self, root: Root, own: IndexArray) -> list[Dependency]:
        """The entries straight from the plan, the root first."""
        start = self.graph.node_of(root.module)
        deps = [Dependency(root.pruning_fn, root.pruning_fn, source=start, target=start)]
        for target, out in self._layers(own):
            if target is root.module and out == root.out:
                continue
            pruner = self.graph.get_pruner_of_module(target)
            handler = pruner.prune_out_channels if out else pruner.prune_in_channels
            deps.append(Dependency(root.pruning_fn, handler, source=start, target=self.graph.node_of(target)))
        return deps
