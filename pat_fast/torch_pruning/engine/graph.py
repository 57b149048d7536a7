"""The graph that a drop-in pruner shows: Torch-Pruning's, traced when asked for, with groups from the plan."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import DependencyGraph, Group, Node

from ...errors import ConfigError, PatError, PlanError
from ...plan.outputs import output_tensors
from ...plan.running import undisturbed
from ...plan.types import BoolArray
from . import layerwise
from .arguments import check_customized, checked_indices
from .groups import GroupMaker, Root
from .planned import Standings
from .shaping import Spec, run
from .state import Engine, whole_units

History = list[list[Any]]


@dataclass(frozen=True)
class Noted:
    """The prunes of a step: of which groups, and the channels of the plan that went ``[N]``."""

    of: Standings
    lost: BoolArray

    def entries(self) -> History:
        """As Torch-Pruning has them: indices are those after the prunes that stand before."""
        keep = np.ones(len(self.lost), dtype=np.bool_)
        found: History = []
        for stands in self.of.in_order:
            (name, out, axis), gone = stands.side, self.lost[stands.own]
            start, stop = stands.group.start, stands.group.stop
            if not gone.any():
                continue
            if len(axis) == len(gone) and axis[0] == start and (np.diff(axis) == 1).all():
                idxs = np.flatnonzero(gone)
            else:
                own = np.flatnonzero((axis >= start) & (axis < stop))
                earlier = np.cumsum((axis >= 0) & ~keep[axis])
                idxs = own[gone[axis[own] - start]]
                idxs = idxs - earlier[idxs]
            found.append([name, out, idxs.tolist()])
            keep[start:stop] &= ~gone
        return found


class LiveGraph(DependencyGraph):
    """A ``tp.DependencyGraph`` of the model as it is now.

    Nodes are traced at the first use and again after a prune. Groups have Torch-Pruning's layers in its order,
    and the plan's indices; their ``prune()`` keeps parameters and optimizers. Groups with a customised layer or
    an ``nn.MultiheadAttention``, which a plan cannot express, are Torch-Pruning's own, and keep them, too.
    """

    engine: Engine
    CUSTOMIZED_PRUNERS: dict[Any, Any]
    IGNORED_LAYERS_IN_TRACING: list[Any]

    def __init__(self, model: nn.Module, spec: Spec, customized: Mapping[Any, Any] | None, unwrapped: Any) -> None:
        self._nodes: dict[Any, Node] = {}
        self._traced: tuple[int, int, int] | None = None
        super().__init__()
        self.model = model
        self.verbose = False
        self._spec = spec
        self._unwrapped = [tuple(p) for p in (unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped or ())]
        self._module2name: dict[Any, str] = {module: name for name, module in model.named_modules()}
        # By identity: the engine counts who refers to a parameter.
        self._param_names = {id(p): name for name, p in model.named_parameters()}
        self.ignored_params = list(spec.held)
        for kind, pruner in (customized or {}).items():
            self.register_customized_layer(kind, pruner)
        self.maker = GroupMaker(self)
        self.layerwise_prunes = 0
        self.foreign: tuple[Any, int, bool] | None = None  # see layerwise.any_foreign

    # Tracing

    @property
    def module2node(self) -> dict[Any, Node]:
        """Layers (and operations) to nodes, of the model as it is."""
        if self._traced != self._state():
            self.refresh()
        return self._nodes

    @module2node.setter
    def module2node(self, nodes: dict[Any, Node]) -> None:
        self._nodes = nodes

    def _state(self) -> tuple[int, int, int]:
        engine = self.__dict__.get("engine")
        return (
            (0, 0, self.layerwise_prunes) if engine is None else (engine.lowered, engine.pruned, self.layerwise_prunes)
        )

    def refresh(self) -> None:
        """Trace the model as it is.

        Raises:
            PlanError: the model does not run, or Torch-Pruning cannot graph it.
        """
        self._traced = self._state()
        self.IGNORED_LAYERS_IN_TRACING = []
        try:
            with undisturbed(self.model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.build_dependency(
                    self.model,
                    None,
                    forward_fn=lambda model, _: _in_autograd(run(model, self._spec)),
                    unwrapped_parameters=list(self._unwrapped),
                    ignored_params=list(self._spec.held),
                    verbose=False,
                )
        except Exception as error:
            self._traced = None
            raise PlanError(
                f"Torch-Pruning cannot graph the model as it is ({type(error).__name__}: {error}); if heads were "
                "pruned, set the sizes that the attention keeps as attributes first"
            ) from error
        for node in self._nodes.values():
            if node.module in self.CUSTOMIZED_PRUNERS:
                node.type = ops.OPTYPE.CUSTOMIZED

    def _trace(self, *args: Any, **kwargs: Any) -> dict[Any, Node]:
        customized = self.CUSTOMIZED_PRUNERS
        types = {kind: p for kind, p in customized.items() if isinstance(kind, type)}
        single = {id(module) for module in customized if not isinstance(module, type)}
        self.CUSTOMIZED_PRUNERS = {**types, _one_of(single): None} if single else types
        try:
            return super()._trace(*args, **kwargs)
        finally:
            self.CUSTOMIZED_PRUNERS = customized

    # Layers

    def register_customized_layer(self, layer_type_or_instance: Any, layer_pruner: Any) -> None:
        """See ``tp.DependencyGraph``; raises :class:`ConfigError` for a pruner without the four methods."""
        check_customized(self.model, layer_type_or_instance, layer_pruner)
        super().register_customized_layer(layer_type_or_instance, layer_pruner)

    def get_pruner_of_module(self, module: Any) -> Any:
        """The layer pruner of ``module``: of this very module, of its class, or Torch-Pruning's."""
        if self.CUSTOMIZED_PRUNERS and isinstance(module, nn.Module):
            for key in (module, *type(module).__mro__):
                if key in self.CUSTOMIZED_PRUNERS:
                    return self.CUSTOMIZED_PRUNERS[key]
        return self.REGISTERED_PRUNERS.get(ops.module2type(module))

    def is_customized(self, module: Any) -> bool:
        """Whether the user has given a pruner for ``module``."""
        if not self.CUSTOMIZED_PRUNERS:
            return False
        return any(self.get_pruner_of_module(module) is p for p in self.CUSTOMIZED_PRUNERS.values())

    def get_out_channels(self, module_or_node: Any) -> int | None:
        """Output channels, None for what has none."""
        return self._channels(module_or_node, "get_out_channels")

    def get_in_channels(self, module_or_node: Any) -> int | None:
        """Input channels, None for what has none."""
        return self._channels(module_or_node, "get_in_channels")

    def _channels(self, target: Any, method: str) -> int | None:
        module = target.module if isinstance(target, Node) else target
        pruner = self.get_pruner_of_module(module)
        if pruner is None:
            return None
        node = target if isinstance(target, Node) else self._nodes.get(module)
        if node is None or not hasattr(pruner, "pruning_dim"):
            return getattr(pruner, method)(module)
        before = pruner.pruning_dim  # layer pruners are shared by all graphs of the process
        pruner.pruning_dim = node.pruning_dim
        try:
            return getattr(pruner, method)(module)
        finally:
            pruner.pruning_dim = before

    def is_bare(self, owner: nn.Module) -> bool:
        """Whether parameters of ``owner`` belong to no layer that Torch-Pruning knows."""
        pruner = self.get_pruner_of_module(owner)
        return pruner is None or pruner is self.REGISTERED_PRUNERS[ops.OPTYPE.ELEMENTWISE]

    def node_of(self, module: Any) -> Node:
        """The node of a layer or parameter; a loose one if Torch-Pruning's graph has none."""
        node = self._nodes.get(module)
        return Node(module, None, self.name_of(module)) if node is None else node

    def name_of(self, module: Any) -> str:
        """The name of a layer or parameter in the model."""
        return (
            self._param_names.get(id(module), "") if isinstance(module, Tensor) else self._module2name.get(module, "")
        )

    # Groups

    def get_pruning_group(self, module: nn.Module, pruning_fn: Callable[..., Any], idxs: Any) -> Group:
        """The group that pruning ``idxs`` of ``module`` needs.

        Raises:
            ConfigError: the module is not in the model, or ``pruning_fn`` is not one of its operations, or an index
                is out of range.
            PlanError: some of these channels cannot be pruned; the message says why.
        """
        self.engine.current()
        root = self._checked_root(module, pruning_fn)
        n = self._channels(module, "get_out_channels" if root.out else "get_in_channels")
        wanted = checked_indices(self.name_of(module) or type(module).__name__, idxs, n)
        if layerwise.is_foreign(self, module):
            return layerwise.group(self, module, root.pruning_fn, wanted)
        axis = self.engine.axes.of(module, root.out)
        if axis is None or (axis[wanted] < 0).any():
            own = layerwise.group_if_foreign(self, module, root.pruning_fn, wanted)
            if own is not None:
                return own
            raise PlanError(f"{self.name_of(module)}: {self._why(module, axis, wanted)}")
        channels = np.flatnonzero(whole_units(self.engine.plan, axis[wanted].astype(np.int64)))
        order = list(dict.fromkeys([*axis[wanted].tolist(), *channels.tolist()]))
        return self.maker.of_layer(root, np.asarray(order, dtype=np.int64))

    def whole_layer(self, module: nn.Module, pruning_fn: Callable[..., Any]) -> Group:
        """The group of all channels of ``module`` that can be pruned, for importances; raises as above."""
        self.engine.current()
        root = self._checked_root(module, pruning_fn)
        axis = self.engine.axes.of(module, root.out)
        if axis is None or not (axis >= 0).any():
            n = self._channels(module, "get_out_channels" if root.out else "get_in_channels")
            return self.get_pruning_group(module, pruning_fn, range(n or 0))
        channels = np.asarray(list(dict.fromkeys(axis[axis >= 0].tolist())), dtype=np.int64)
        return self.maker.of_layer(root, channels, by_position=True)

    def _checked_root(self, module: Any, pruning_fn: Any) -> Root:
        if not isinstance(module, (nn.Module, nn.Parameter)) or not (
            module in self._module2name or id(module) in self._param_names
        ):
            raise ConfigError(
                f"{type(module).__name__} is not a layer of this model; pass one of its modules (as in "
                "model.named_modules())"
            )
        pruner = self.get_pruner_of_module(module)
        outs: list[Any] = [getattr(pruner, "prune_out_channels", None)]
        ins: list[Any] = [getattr(pruner, "prune_in_channels", None)]
        if ops.module2type(module) == ops.OPTYPE.DEPTHWISE_CONV:  # Torch-Pruning takes a convolution's operations, too
            conv = self.REGISTERED_PRUNERS[ops.OPTYPE.CONV]
            outs, ins = [*outs, conv.prune_out_channels, conv.prune_in_channels], []
        if pruning_fn not in (*outs, *ins) or pruner is self.REGISTERED_PRUNERS[ops.OPTYPE.ELEMENTWISE]:
            raise ConfigError(
                f"{self.name_of(module)} is a {type(module).__name__}, which "
                f"{getattr(pruning_fn, '__name__', pruning_fn)} of "
                f"{type(getattr(pruning_fn, '__self__', None)).__name__} does not prune; pass an operation of "
                f"{type(pruner).__name__}, or register a pruner for the layer with customized_pruners"
            )
        out = pruning_fn in outs
        layer: Any = module  # a bare parameter is a layer, too
        return Root(layer, outs[0] if out else pruning_fn, out)

    def _why(self, module: Any, axis: np.ndarray | None, wanted: list[int]) -> str:
        name = self.name_of(module)
        reasons = [f.reason for f in self.engine.plan.frozen if f.layer == name]
        which = "its channels" if axis is None else f"channels {[i for i in wanted if axis[i] < 0][:8]}"
        return f"{which} cannot be pruned: {reasons[0] if reasons else 'no layer that can shrink makes them'}"

    def get_all_groups(
        self,
        ignored_layers: Sequence[Any] = (),
        root_module_types: Sequence[type] = (ops.TORCH_CONV, ops.TORCH_LINEAR),
    ) -> Iterator[Group]:
        """All groups with all of their channels, except those that ``ignored_layers`` protects."""
        self.engine.current()
        ignored = {id(m) for layer in ignored_layers if isinstance(layer, nn.Module) for m in layer.modules()}
        kinds = tuple(k for k in ignored_layers if isinstance(k, type))
        for i, group in enumerate(self.engine.plan.groups):
            if self.is_open(group.root, i, ignored, kinds, tuple(root_module_types)):
                yield self.maker.whole(i)
        yield from layerwise.all_groups(self, ignored, kinds, tuple(root_module_types))

    def is_open(
        self, root: str, number: int, ignored: set[int], kinds: tuple[type, ...], roots: tuple[type, ...]
    ) -> bool:
        """Whether the plan's group ``number`` starts at a layer of ``roots`` and holds no ignored layer's outputs."""
        modules, group = self.engine.binding.modules, self.engine.plan.groups[number]
        if not any(isinstance(modules[name], roots) for name in group.layers):
            return False
        return not any(id(m) in ignored or isinstance(m, kinds) for m in self.putting_out(number))

    def putting_out(self, number: int) -> list[nn.Module]:
        """Layers that put out channels of the plan's group ``number``: those that make them and their norms."""
        engine = self.engine
        group = engine.plan.groups[number]
        found = {id(m): m for m in (engine.binding.modules[name] for name in group.layers)}
        for name, _ in group.members:
            owner, _local = engine.binding.owner(name)
            if not isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)) and not self.is_bare(owner):
                found[id(owner)] = owner
        return list(found.values())

    # History

    @property
    def _pruning_history(self) -> History:
        """What Torch-Pruning keeps under this name; lists of indices are made when they are asked for."""
        while self._noted:
            self._history += self._noted.pop(0).entries()
        return self._history

    @_pruning_history.setter
    def _pruning_history(self, history: History) -> None:
        self._history = history
        self._noted: list[Noted] = []

    def note(self, noted: Noted) -> None:
        """Note a step."""
        self._noted.append(noted)

    def history_entry(self, root: Root, gone: BoolArray) -> list[Any]:
        """What Torch-Pruning notes of a prune: the root layer, whether its outputs went, and which."""
        axis = self.engine.axes.of(root.module, root.out)
        assert axis is not None
        return [self.name_of(root.module), root.out, np.flatnonzero((axis >= 0) & gone[axis]).tolist()]

    def record(self, entry: list[Any]) -> None:
        """Note a prune."""
        self._pruning_history.append(entry)

    def load_pruning_history(self, pruning_history: History) -> None:
        """Prune as a history says, and go on from it.

        Raises:
            ConfigError: it names a layer that the model does not have, or an index out of range.
        """
        for name, out, idxs in pruning_history:
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                raise ConfigError(
                    f"pruning history: the model has no layer {name!r}; was it saved from another?"
                ) from None
            pruner = self.get_pruner_of_module(module)
            self.get_pruning_group(module, pruner.prune_out_channels if out else pruner.prune_in_channels, idxs).prune()


class _Instances(type):
    members: set[int]

    def __instancecheck__(cls, instance: object) -> bool:
        return id(instance) in cls.members


def _one_of(members: set[int]) -> type:
    """A class for ``isinstance`` that stands for single modules."""
    return _Instances("Customized", (), {"members": members})


def _in_autograd(out: Any) -> list[Tensor]:
    """The tensors of an output that a backward starts from."""
    found = [t for t in output_tensors(out) if t.grad_fn is not None]
    if not found:
        raise PatError("no output of the model takes part in autograd")
    return found
