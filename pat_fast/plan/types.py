"""The plan: which channels a model has, which tensors hold them, what must go together. Frozen data.

A plan names things (``"layer1.0.conv1.weight"``) and holds integer vectors; it has no live tensors, so it can
be kept, compared and computed ahead: :meth:`Plan.shrink` is the plan of the model after a prune.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..errors import PlanError
from .flat import Holdings, Kept, Shapes, Vectors, groups_left, is_grouped, shrunk_shape, units_above
from .hints import hint
from .kinds import kinds_of_units
from .parts import Axis, Frozen, Group, TensorMap, Width, WorkTerm

__all__ = [
    "Axis", "Frozen", "Group", "Kept", "Plan", "TensorMap", "Width", "WorkTerm", "by_first_use", "fold_fixed",
    "groups_left", "is_grouped", "shrunk_shape",
]  # fmt: skip

ChannelArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.int64]
IntArray = IndexArray

# Why a group stays that prunes have brought down to its least.
LONE, LONE_UNIT = "one channel is left", "one unit is left"
# Why hidden units stay that a projection has no fewer of.
PROJECTED = "hidden_size must stay above proj_size: PyTorch takes equal sizes for no projection"


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that pruning needs to know about a model's structure.

    ``unit [N]`` names, for every channel, the unit it belongs to: channels of a unit are removed together or
    not at all (the j-th channel of every block of a grouped convolution).
    """

    n_channels: int
    n_units: int
    unit: ChannelArray
    groups: tuple[Group, ...]
    tensors: tuple[TensorMap, ...]
    frozen: tuple[Frozen, ...]
    work: tuple[WorkTerm, ...]
    widths: tuple[Width, ...]
    batch: int  # examples in the inputs that were traced
    other_params: int  # elements of parameters that hold no channel
    notes: tuple[str, ...] = ()
    remembered: tuple[tuple[str, str], ...] = ()  # (module, attribute): forwards leave tensors of channels there
    group_of: ChannelArray = field(init=False)

    def __post_init__(self) -> None:
        sizes = [group.channels for group in self.groups]
        group_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        object.__setattr__(self, "group_of", group_of)

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was derived from them knows vectors by identity, which a copy does not keep."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    # Counts

    def params(self, keep: BoolArray | None = None) -> int:
        """Elements of all parameters, with only the channels ``keep [N]`` left."""
        sizes = self.shapes.sizes if keep is None else self.shapes.left(Kept(keep, self.vectors))[0]
        return self.other_params + int(sizes[self._is_parameter].prod(1).sum())

    def macs(self, keep: BoolArray | None = None) -> int:
        """Multiply-accumulates of convolutions, linear layers and attention, per example."""
        counts = self.vectors.lengths if keep is None else Kept(keep, self.vectors).counts
        scale, axes = self._work
        products = np.append(counts, 1)[axes].prod(1).tolist()
        return round(sum(s * n for s, n in zip(scale, products, strict=True)) / self.batch)

    @cached_property
    def vectors(self) -> Vectors:
        """The channel vectors of all axes, widths and terms of work."""
        tensors = (a.channels for _, a in self.axes())
        return Vectors((*tensors, *(w.channels for w in self.widths), *(a for t in self.work for a in t.axes)))

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of ``tensors`` as arrays."""
        return Shapes.of(self.tensors, self.vectors)

    @cached_property
    def _is_parameter(self) -> BoolArray:
        return np.array([t.is_parameter for t in self.tensors], dtype=np.bool_)

    @cached_property
    def _work(self) -> tuple[list[float], IndexArray]:
        """The terms' scales, and the vectors of their axes ``[W, M]``, filled up with one after the last."""
        number, none = self.vectors.number, len(self.vectors.arrays)
        most = max((len(t.axes) for t in self.work), default=0)
        rows = [[*(number[id(a)] for a in t.axes), *[none] * (most - len(t.axes))] for t in self.work]
        return [t.scale for t in self.work], np.array(rows, dtype=np.int64).reshape(len(rows), most)

    @property
    def _all(self) -> BoolArray:
        return np.ones(self.n_channels, dtype=np.bool_)

    # Changes

    def check_keep(self, keep: BoolArray) -> Kept:
        """Raise :class:`PlanError` unless ``keep`` takes whole units and leaves enough of every axis."""
        if keep.shape != (self.n_channels,) or keep.dtype != np.bool_:
            raise PlanError(
                f"keep must be a bool vector with one entry for each of the {self.n_channels} channels, "
                f"got shape {keep.shape}, dtype {keep.dtype}"
            )
        if self.n_units < self.n_channels:
            left = self._left_of_units(keep)
            for unit in np.flatnonzero((left > 0) & (left < self.unit_size)):
                group = self.groups[self.group_of[np.flatnonzero(self.unit == unit)[0]]]
                raise PlanError(
                    f"group {group.root}: keep takes {left[unit]} of the {self.unit_size[unit]} channels of a unit; "
                    "channels of a unit are kept or removed together"
                )
        stay = self._units_left(keep)
        least = self.least_units_beside(keep)
        for number in np.flatnonzero(stay < least):
            why = f" ({PROJECTED})" if self.groups[number].above else ""
            raise PlanError(
                f"group {self.groups[number].root}: keep leaves {stay[number]} of "
                f"{(self.unit_home == number).sum()} units; at least {least[number]} must stay{why}"
            )
        for group in self._in_multiples:
            left_over = int(keep[group.start : group.stop].sum())
            if left_over % group.multiple:
                raise PlanError(
                    f"group {group.root}: keep leaves {left_over} channels; a kernel that reads them needs "
                    f"a multiple of {group.multiple}"
                )
        kept, shapes = Kept(keep, self.vectors), self.shapes
        for place in np.flatnonzero(kept.counts[shapes.vector] < shapes.least):
            tensor, vector = self.tensors[shapes.tensor[place]], shapes.vector[place]
            raise PlanError(
                f"{tensor.name}: keep leaves {kept.counts[vector]} of the {self.vectors.lengths[vector]} channels of "
                f"dimension {shapes.dim[place]}; at least {shapes.least[place]} must stay"
            )
        return kept

    def _left_of_units(self, keep: BoolArray) -> IndexArray:
        """How many channels of each unit are in ``keep [N]``: ``[U]``."""
        return np.bincount(self.unit[keep], minlength=self.n_units)

    def _units_left(self, keep: BoolArray) -> IndexArray:
        """How many units of each group have channels in ``keep [N]``: ``[G]``."""
        if self.n_units == self.n_channels:
            return np.add.reduceat(keep, self.bounds[:-1], dtype=np.int64)
        return np.bincount(self.unit_home[self._left_of_units(keep) > 0], minlength=len(self.groups))

    @cached_property
    def _in_multiples(self) -> list[Group]:
        """The groups that must stay a multiple of something."""
        return [g for g in self.groups if g.multiple > 1]

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The groups' roots."""
        return tuple(g.root for g in self.groups)

    @cached_property
    def bounds(self) -> IndexArray:
        """Where each group's channels start, and the end of the last ``[G + 1]``."""
        return np.array([0, *(g.stop for g in self.groups)], dtype=np.int64)

    @cached_property
    def unit_size(self) -> IndexArray:
        """Channels of each unit: ``[U]``."""
        return np.bincount(self.unit, minlength=self.n_units)

    @cached_property
    def unit_home(self) -> IndexArray:
        """The group of each unit, the last of several: ``[U]``."""
        home = np.zeros(self.n_units, dtype=np.int64)
        home[self.unit] = self.group_of
        return home

    @cached_property
    def group_units(self) -> IndexArray:
        """Units that each group has channels of ``[G]``."""
        if self.n_units == self.n_channels:
            return np.array([g.channels for g in self.groups], dtype=np.int64)
        if (self.unit_home[self.unit] == self.group_of).all():  # no unit is of two groups
            return np.bincount(self.unit_home, minlength=len(self.groups))
        pairs = np.unique(self.group_of.astype(np.int64) * self.n_units + self.unit)
        return np.bincount(pairs // self.n_units, minlength=len(self.groups))

    def unit_step(self, group: Group) -> int:
        """Units that ``group`` loses at a time, so that its channels stay a multiple of what its kernels need."""
        size = group.channels // int(self.group_units[self.group_of[group.start]])
        return group.multiple // math.gcd(group.multiple, size)

    def least_units(self, group: Group) -> int:
        """How many units of ``group`` must stay: one, a multiple its kernels need, more than are projected to."""
        return int(self.least_units_of_groups[self.group_of[group.start]])

    @cached_property
    def least_units_of_groups(self) -> IndexArray:
        """:meth:`least_units` of each group."""
        return self.least_units_beside(self._all)

    def least_units_beside(self, keep: BoolArray) -> IndexArray:
        """:meth:`least_units` of each group where ``keep [N]`` is left of the projections."""
        if not self._above:
            return self._one_step
        least = self._one_step.copy()
        for number, tensor in self._above:
            least[number] = max(least[number], units_above(tensor, self.unit, keep))
        return least

    @cached_property
    def _above(self) -> list[tuple[int, TensorMap]]:
        """The groups that are projected, and by what."""
        return [(number, self.tensor(name)) for number, g in enumerate(self.groups) for name in g.above]

    @cached_property
    def _one_step(self) -> IndexArray:
        """One unit of each group, or as many as its kernels need a multiple of."""
        units = self.group_units
        channels = np.array([g.channels for g in self.groups], dtype=np.int64)
        multiple = np.array([g.multiple for g in self.groups], dtype=np.int64)
        return np.maximum(1, multiple * units // channels)

    def least(self, tensor: TensorMap, axis: Axis) -> int:
        """How many indices of ``axis`` must stay: one, or two per group of a grouped convolution.

        With one channel per group it would be a depthwise convolution, whose groups go as a whole: the rules
        of another plan.
        """
        grouped = tensor.groups > 1 and not tensor.whole_groups
        return min(len(axis.channels), 2 * tensor.groups) if grouped else 1

    def movable(self, kept: Kept) -> BoolArray:
        """The channels ``[N]`` that are channels of :meth:`shrink`'s plan, too, in the same order.

        A group's last unit has no choice left: it is fixed.
        """
        return kept.keep & (self._units_left(kept.keep) > 1)[self.group_of]

    def shrink(self, kept: Kept) -> Plan:
        """The plan of the model after a prune (see :meth:`check_keep`). Equal to a plan lowered afresh.

        But for one thing: a view of one head looks like no heads, so a plan lowered afresh may take the channels
        inside the last head for units of their own. Here the last unit stays whole.
        """
        movable = self.movable(kept)
        left = np.bincount(self.group_of[kept.keep & ~movable], minlength=len(self.groups))
        lonely = tuple(
            Frozen(g.root, n, LONE if n == 1 else LONE_UNIT)
            for g, n in zip(self.groups, left.tolist(), strict=True)
            if n
        )
        return self._renumbered(kept, movable, lonely)

    def lone(self) -> dict[str, int]:
        """Channels of the groups that prunes have left one unit, by their roots."""
        return {f.layer: f.channels for f in self.frozen if f.reason in (LONE, LONE_UNIT)}

    def _renumbered(self, kept: Kept, movable: BoolArray, frozen: tuple[Frozen, ...]) -> Plan:
        """The plan with the channels ``~kept`` gone and, of the rest, only ``movable [N]`` still free."""
        if kept.vectors is not self.vectors:
            kept = Kept(kept.keep, self.vectors)
        number = np.append(np.where(movable, np.cumsum(movable) - 1, -1), -1).astype(np.int32)  # the last is for -1
        vectors = Vectors.split(number[self.vectors.channels[kept.positions]], kept.bounds)
        place, after = self.vectors.number, vectors.arrays
        counts = np.bincount(self.group_of[movable], minlength=len(self.groups)).tolist()
        groups, stop = [], 0
        for g, count in zip(self.groups, counts, strict=True):
            if count:
                rules = g.statistic, g.multiple, g.above
                groups.append(Group(g.root, stop, stop + count, g.layers, g.members, *rules))
                stop += count
        unit = by_first_use(self.unit[movable])
        free, lengths = vectors.free.tolist(), vectors.lengths.tolist()
        # What is told, all must agree on: one that is held counts as well.
        widths = (
            Width(w.module, w.attribute, w.index, after[place[id(w.channels)]], w.per, w.told)
            for w in self.widths
            if w.told or free[place[id(w.channels)]]
        )
        work = []
        for term in self.work:
            axes = [place[id(a)] for a in term.axes]
            scale = term.scale * math.prod(lengths[i] for i in axes if not free[i])
            work.append(WorkTerm(scale, tuple(after[i] for i in axes if free[i])))
        sizes, conv_groups = self.shapes.left(kept)
        shapes = self.shapes.smaller(sizes, conv_groups, vectors)
        tensors = self._smaller_tensors(self.shapes.tuples(sizes), conv_groups.tolist(), vectors)
        fixed = self._is_parameter.copy()
        fixed[shapes.rows] = False
        plan = replace(
            self,
            n_channels=stop,
            n_units=int(unit.max()) + 1 if stop else 0,
            unit=unit,
            groups=tuple(groups),
            tensors=tuple(tensors),
            frozen=self.frozen + frozen,
            work=tuple(work),
            widths=tuple(widths),
            other_params=self.other_params + int(sizes[fixed].prod(1).sum()),
        )
        plan.__dict__.update(vectors=vectors, shapes=shapes)
        return plan

    def _smaller_tensors(
        self, shapes: list[tuple[int, ...]], groups: list[int], vectors: Vectors
    ) -> Iterator[TensorMap]:
        """The maps of tensors of ``shapes`` that still hold channels; axes that are alike are one object."""
        place, after, free = self.vectors.number, vectors.arrays, vectors.free.tolist()
        known: dict[tuple[int, int, str], Axis | None] = {}
        for tensor, shape, count in zip(self.tensors, shapes, groups, strict=True):
            axes = []
            for a in tensor.axes:
                key = (id(a.channels), a.dim, a.role)
                if key not in known:
                    number = place[key[0]]
                    known[key] = Axis(a.dim, after[number], a.role) if free[number] else None
                axis = known[key]
                if axis is not None:
                    axes.append(axis)
            if axes:
                yield TensorMap(tensor.name, tensor.is_parameter, shape, count, tensor.whole_groups, tuple(axes))

    def freeze(self, groups: Iterable[int], reason: str) -> Plan:
        """The plan with the groups of these indices left alone, for ``reason``; nothing else changes."""
        held = sorted(set(groups))
        if not held:
            return self
        keep = self._all
        movable = ~np.isin(self.group_of, held)
        frozen = tuple(Frozen(self.groups[i].root, self.groups[i].channels, reason) for i in held)
        return self._renumbered(Kept(keep, self.vectors), movable, frozen)

    def verify(self, model: nn.Module, example_inputs: Any) -> Plan:
        """The plan, put to the proof on ``model`` once more: what does not hold is frozen, with the reason.

        As :func:`pat_fast.build_plan` does, of any plan and at any time: after prunes, of a plan of one's own. A note
        says what it cost.

        Args:
            model: the model that this is the plan of, as it is now; it is left as it was.
            example_inputs: as for :func:`pat_fast.build_plan`.
        Raises:
            PlanError: the model has no such tensors (it was changed since), or its forward fails on these inputs.
        """
        return type(self)._prove(self, model, example_inputs)

    _prove: ClassVar[Callable[[Plan, nn.Module, Any], Plan]]  # set by pat_fast/proof.py, which stands on this module

    # Looking things up

    def tensor(self, name: str) -> TensorMap:
        """The map of tensor ``name``; KeyError if it holds no channel."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise KeyError(name)

    def axes(self) -> Iterator[tuple[TensorMap, Axis]]:
        """All (tensor, axis) pairs."""
        for tensor in self.tensors:
            for axis in tensor.axes:
                yield tensor, axis

    def holds(self, channels: ChannelArray) -> tuple[IndexArray, IndexArray, list[int], IndexArray | int]:
        """Indices of a vector of the plan that hold channels, these channels, their groups, and which of these each is
        of (0 where there is one)."""
        return self._holdings.of(self.vectors.number[id(channels)])

    @cached_property
    def _holdings(self) -> Holdings:
        return Holdings(self.vectors, self.group_of, len(self.groups))

    def counts(self, axis: Axis) -> tuple[ChannelArray, IndexArray]:
        """The channels of ``axis``, each once, and how many of its indices each has."""
        found = self._counts.get(id(axis.channels))
        if found is None:
            channels = axis.channels[axis.channels >= 0]
            ascending = len(channels) < 2 or bool((np.diff(channels) > 0).all())
            once = np.ones(len(channels), dtype=np.int64)
            found = (channels, once) if ascending else np.unique(channels, return_counts=True)
            self._counts[id(axis.channels)] = found
        return found

    @cached_property
    def _counts(self) -> dict[int, tuple[ChannelArray, IndexArray]]:
        return {}

    @cached_property
    def kinds(self) -> list[tuple[int, list[list[int]]]]:
        """Units that may change places, as (group, [channels of each unit]).

        Such units hold as many indices of every axis, in the same order. A group has several kinds where its
        channels have different members (parts of a concatenation, say).
        """
        order, starts = self.by_unit
        found: dict[int, tuple[int, list[list[int]]]] = {}
        units = np.split(order, starts[1:]) if len(starts) else []
        for kind, channels in zip(self.kind_of_unit.tolist(), units, strict=True):
            group = int(self.group_of[channels[0]])
            found.setdefault(kind, (group, []))[1].append(channels.tolist())
        return list(found.values())

    @cached_property
    def by_unit(self) -> tuple[IndexArray, IndexArray]:
        """The channels ``[N]`` with those of a unit side by side, in their order, and where each unit starts: ``[U]``.
        """
        ascending = bool((np.diff(self.unit) >= 0).all())
        order = np.arange(self.n_channels) if ascending else np.argsort(self.unit, kind="stable")
        return order, np.flatnonzero(np.diff(self.unit[order], prepend=-1))

    @cached_property
    def kind_of_unit(self) -> IndexArray:
        """A number for each unit that is the same for those that may change places (see :attr:`kinds`): ``[U]``."""
        return kinds_of_units(self.vectors, self.shapes.vector, self.unit, self.group_of, *self.by_unit)

    def remarks(self, group: Group) -> list[str]:
        """What else there is to say of ``group``."""
        found = [f"at least {self.least_units(group)} units stay: {PROJECTED}"] if group.above else []
        return [*found, f"note: {group.statistic}"] if group.statistic else found

    def describe(self) -> str:
        """A few lines for people: groups, members, what is frozen and why."""
        lines = [
            f"{self.n_channels} channels in {len(self.groups)} groups, {self.n_units} units; "
            f"{self.params():,} parameters, {self.macs():,} MACs per example"
        ]
        for group in self.groups:
            units = len(np.unique(self.unit[group.start : group.stop]))
            of = "" if units == group.channels else f" in {units} units"
            of += f", kept in multiples of {group.multiple}" if group.multiple > 1 else ""
            lines.append(f"  {group.root}: {group.channels} channels{of}, {len(group.members)} members")
            lines.extend(f"      {name} dim {dim}" for name, dim in group.members)
            lines.extend(f"      {line}" for line in self.remarks(group))
        for frozen in self.frozen:
            lines.append(f"  frozen {frozen.layer}: {frozen.channels} channels: {frozen.reason}")
            lines.extend([f"      {text}"] if (text := hint(frozen.reason)) else [])
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def fold_fixed(term: WorkTerm) -> WorkTerm:
    """``term`` with axes that hold no channel multiplied into its scale."""
    free = [a.max(initial=-1) >= 0 for a in term.axes]
    scale = term.scale * math.prod(len(a) for a, yes in zip(term.axes, free, strict=True) if not yes)
    return WorkTerm(scale, tuple(a for a, yes in zip(term.axes, free, strict=True) if yes))


def by_first_use(unit: NDArray[np.integer[Any]]) -> ChannelArray:
    """Unit numbers in the order in which the channels first name them."""
    if not len(unit):
        return unit.astype(np.int32)
    first = np.full(int(unit.max()) + 1, -1, dtype=np.int64)
    first[unit[::-1]] = np.arange(len(unit))[::-1]  # what is assigned last stays
    used = np.flatnonzero(first >= 0)
    rank = np.empty(len(first), dtype=np.int32)
    rank[used[np.argsort(first[used], kind="stable")]] = np.arange(len(used), dtype=np.int32)
    return rank[unit]
