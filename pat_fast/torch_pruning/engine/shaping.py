"""Plans in Torch-Pruning's terms: free outputs, attention by index, blocks that the user has declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ...plan import Plan, build_plan
from ...plan.labels import components
from ...plan.outputs import output_tensors
from ...plan.running import call
from ...plan.types import Axis, ChannelArray, IndexArray, TensorMap, Width, WorkTerm, by_first_use, fold_fixed
from .axes import out_dim


@dataclass(frozen=True)
class Attention:
    """The projections of an attention that ``num_heads`` names, and the layer that reads what it puts out.

    ``heads``: blocks of the channel space that are heads, the key-value heads of grouped queries. Behind them come
    ``extras`` channels for each head (a head's bias table, say), head by head, that go when the head goes.
    ``whole``: its dimensions do not go one by one (rotary embeddings); a unit of the plan is a head.
    """

    projections: tuple[str, ...]
    reader: str
    heads: int
    extras: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Spec:
    """What the user says of a model, apart from what to prune.

    ``num_heads``, ``out_groups``, ``in_groups``: layer -> heads or blocks that must shrink alike.
    """

    example_inputs: Any
    forward_fn: Callable[..., Any] | None = None
    output_transform: Callable[..., Any] | None = None
    num_heads: Mapping[nn.Module, int] | None = None
    out_groups: Mapping[nn.Module, int] | None = None
    in_groups: Mapping[nn.Module, int] | None = None
    held: Sequence[Tensor] = ()  # parameters that must keep their size


def lower(model: nn.Module, spec: Spec) -> tuple[Plan, dict[str, Attention]]:
    """The plan of ``model`` as Torch-Pruning counts channels, and its attentions by the root of their group.

    Unlike :func:`pat_fast.build_plan`'s, its groups include the model's outputs: as in Torch-Pruning these are
    for ``ignored_layers`` to protect.

    Raises:
        PlanError: the forward fails on the example inputs.
    """
    with _reduced_forward(model, spec):
        plan = build_plan(model, spec.example_inputs)
    if spec.held:
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        held = [names.get(id(p)) for p in spec.held]
        stay = [i for i, g in enumerate(plan.groups) if any(name in held for name, _ in g.members)]
        plan = plan.freeze(stay, "holds a parameter that is in ignored_layers")
    paths = [name for name, _ in model.named_modules(remove_duplicate=False)]
    layers = {*paths, *(f"{path} transposed" for path in paths)}
    bare = [i for i, g in enumerate(plan.groups) if not layers.issuperset((g.root, *g.layers))]
    plan = plan.freeze(bare, "is made by a tensor of which Torch-Pruning's groups know no layer")
    plan, attentions = _by_index(model, plan, spec.num_heads or {})
    return _declared_blocks(model, plan, spec, attentions), attentions


def run(model: nn.Module, spec: Spec) -> Any:
    """The forward that the user asked for: ``forward_fn`` and ``output_transform`` as in Torch-Pruning."""
    out = call(model, spec.example_inputs) if spec.forward_fn is None else spec.forward_fn(model, spec.example_inputs)
    return out if spec.output_transform is None else spec.output_transform(out)


@contextmanager
def _reduced_forward(model: nn.Module, spec: Spec) -> Iterator[None]:
    """Let the model's forward be the user's, and put out sums: a plan freezes what a model puts out."""
    own = model.__dict__.get("forward")

    def restore() -> None:
        if own is None:
            model.__dict__.pop("forward", None)
        else:
            model.__dict__["forward"] = own

    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        restore()  # the user's forward calls the model in its turn
        outputs = output_tensors(run(model, spec))
        return [t.sum() for t in outputs if t.grad_fn is not None]

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        restore()


# Attention


def _by_index(model: nn.Module, plan: Plan, num_heads: Mapping[nn.Module, int]) -> tuple[Plan, dict[str, Attention]]:
    """Make index i of queries, keys, values and of what reads them one channel, as Torch-Pruning does.

    A plan keeps queries with keys and values with their reader apart, and holds whole heads together.
    """
    if not num_heads:
        return plan, {}
    sides = _Sides(model, plan)
    into = np.arange(plan.n_channels)
    loose = np.zeros(plan.n_channels, dtype=np.bool_)
    attentions: dict[str, Attention] = {}
    for number, group in enumerate(plan.groups):
        own = np.arange(group.start, group.stop)
        projections = [sides.names[m] for m in num_heads if number in sides.groups(m, True)]
        if not projections:
            continue
        reader = sides.reader.get(number)
        heads = len(np.unique(plan.unit[own]))
        if reader is None or heads == len(own):  # no heads that the trace has seen
            heads = max(num_heads[model.get_submodule(name)] for name in projections)
            if len(own) % heads == 0:
                attentions[group.root] = Attention(tuple(projections), reader[0] if reader else "", heads)
            continue
        extra = own[~np.isin(own, sides.made_by(projections))]
        read = own[np.isin(own, reader[1])]
        others = np.setdiff1d(own, np.concatenate([read, extra]))
        if _head_by_head(plan, extra, heads) and _pair(plan, others, read, into):
            loose[own] = True
            attentions[group.root] = Attention(tuple(projections), reader[0], heads, len(extra) // heads)
        elif all(num_heads[model.get_submodule(name)] % heads == 0 for name in projections):
            attentions[group.root] = Attention(tuple(projections), "", heads, whole=True)
    merged = merge_channels(plan, into)
    left = loose[np.unique(into)]
    unit = np.where(left, merged.n_units + np.arange(merged.n_channels), merged.unit)
    return with_units(merged, unit), attentions


class _Sides:
    """Which groups have channels on which side of which layer, and the last layer that sums over them."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.reader: dict[int, tuple[str, ChannelArray]] = {}
        self._out: dict[str, ChannelArray] = {}
        self._axes: dict[tuple[str, int], tuple[ChannelArray, set[int]]] = {}
        for tensor, axis in plan.axes():
            found = set(plan.holds(axis.channels)[2])
            self._axes[tensor.name, axis.dim] = (axis.channels, found)
            layer = tensor.name.rpartition(".")[0]
            if axis.role == "out":
                self._out[layer] = axis.channels
            if axis.role == "in" and isinstance(model.get_submodule(layer), (nn.Linear, nn.modules.conv._ConvNd)):
                self.reader.update(dict.fromkeys(found, (layer, axis.channels)))

    def made_by(self, layers: Sequence[str]) -> ChannelArray:
        """Channels along the outputs of ``layers``."""
        return np.concatenate([self._out[layer] for layer in layers if layer in self._out])

    def groups(self, module: nn.Module, out: bool) -> set[int]:
        """Groups (by number) that have channels on this side of ``module``."""
        return self._side(module, out)[1]

    def along(self, module: nn.Module, out: bool) -> ChannelArray:
        """The channels along this side of ``module``."""
        return self._side(module, out)[0]

    def _side(self, module: nn.Module, out: bool) -> tuple[ChannelArray, set[int]]:
        dim = out_dim(module) if out else 1 - out_dim(module)
        return self._axes.get((f"{self.names.get(module)}.weight", dim), (np.zeros(0, dtype=np.int32), set()))


def _head_by_head(plan: Plan, extra: IndexArray, heads: int) -> bool:
    """Whether the channels ``extra`` are one for each head, in the heads' order, or several times that."""
    if len(extra) % heads:
        return False
    rows = plan.unit[extra].reshape(-1, heads)
    return bool((rows == np.sort(rows, axis=1)).all() and all(len(np.unique(row)) == heads for row in rows))


def _pair(plan: Plan, others: IndexArray, read: IndexArray, into: IndexArray) -> bool:
    """Point the channels ``others`` at those of ``read`` at the same place of the same head, if they pair up.

    There may be none to pair: a reader of everything.
    """
    pairs = []
    for unit in np.unique(plan.unit[read]):
        left, right = others[plan.unit[others] == unit], read[plan.unit[read] == unit]
        if len(left) not in (0, len(right)) or (np.diff(right) != 1).any():
            return False
        pairs.append((left, right[: len(left)]))
    for left, right in pairs:
        into[left] = right
    return True


def merge_channels(plan: Plan, into: IndexArray) -> Plan:
    """``plan`` with channel c counted as ``into[c]``, a channel of the same group and unit."""
    left = np.unique(into)
    if len(left) == plan.n_channels:
        return plan
    number = np.searchsorted(left, into).astype(np.int32)
    known: dict[int, ChannelArray] = {}

    def renumber(channels: ChannelArray) -> ChannelArray:
        if id(channels) not in known:
            known[id(channels)] = np.where(channels < 0, np.int32(-1), number[channels]).astype(np.int32)
        return known[id(channels)]

    def renumbered(t: TensorMap) -> TensorMap:
        axes = tuple(Axis(a.dim, renumber(a.channels), a.role) for a in t.axes)
        return TensorMap(t.name, t.is_parameter, t.shape, t.groups, t.whole_groups, axes)

    bounds = np.searchsorted(left, [[g.start, g.stop] for g in plan.groups])
    unit = by_first_use(plan.unit[left])
    return replace(
        plan,
        n_channels=len(left),
        n_units=int(unit.max()) + 1,
        unit=unit,
        groups=tuple(replace(g, start=int(a), stop=int(b)) for g, (a, b) in zip(plan.groups, bounds, strict=True)),
        tensors=tuple(map(renumbered, plan.tensors)),
        work=tuple(fold_fixed(WorkTerm(w.scale, tuple(map(renumber, w.axes)))) for w in plan.work),
        widths=tuple(Width(w.module, w.attribute, w.index, renumber(w.channels), w.per, w.told) for w in plan.widths),
    )


def with_units(plan: Plan, unit: np.ndarray) -> Plan:
    """``plan`` with other units: ``unit [N]``, any numbers."""
    if not plan.n_channels:
        return plan
    ordered = by_first_use(unit)
    return replace(plan, unit=ordered, n_units=int(ordered.max()) + 1)


# Blocks


def _declared_blocks(model: nn.Module, plan: Plan, spec: Spec, attentions: Mapping[str, Attention]) -> Plan:
    """Couple what the user's ``in_channel_groups`` and ``out_channel_groups`` say must shrink alike."""
    declared = [
        (m, n, out) for of, out in ((spec.out_groups, True), (spec.in_groups, False)) for m, n in (of or {}).items()
    ]
    if not declared:
        return plan
    sides = _Sides(model, plan)
    pairs = [np.zeros((2, 0), dtype=np.int64)]
    for number, group in enumerate(plan.groups):
        if group.root in attentions:
            continue
        known = [
            (count, sides.along(module, out)) for module, count, out in declared if number in sides.groups(module, out)
        ]
        if not known:
            continue
        blocks, along = max(known, key=lambda each: each[0])
        order = np.arange(group.start, group.stop)
        if len(along) > group.channels == len(np.unique(along)):  # a layer that has its channels several times
            order = along.astype(np.int64)
        if blocks > 1 and len(order) % blocks == 0:
            block = order.reshape(blocks, -1)
            pairs.append(np.stack(np.broadcast_arrays(block[:1], block[1:])).reshape(2, -1))
    if len(pairs) == 1:
        return plan
    first = np.full(plan.n_units, plan.n_channels)
    np.minimum.at(first, plan.unit, np.arange(plan.n_channels))
    return with_units(plan, components(plan.n_channels, np.concatenate(pairs, axis=1), start=first[plan.unit]))
