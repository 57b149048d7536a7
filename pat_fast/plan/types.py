"""The plan: which channels a model has, which tensors hold them, what must go together. Frozen data.

A plan names things (``"layer1.0.conv1.weight"``) and holds integer vectors; it has no live tensors, so it can
be kept, compared and computed ahead: :meth:`Plan.shrink` is the plan of the model after a prune.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from .hints import hint

ChannelArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
IndexArray = NDArray[np.int64]
IntArray = IndexArray


class Kept:
    """Which indices of a channel vector survive ``keep [N]``.

    Most axes of a plan share their vectors (a weight's rows, its bias, the norm behind it), so what is found
    for a vector is remembered for the object.
    """

    def __init__(self, keep: BoolArray) -> None:
        self.keep = keep
        self._found: dict[int, tuple[ChannelArray, IndexArray]] = {}
        self._tensors: dict[int, tuple[TensorMap, list[IndexArray], tuple[int, ...]]] = {}

    def of(self, tensor: TensorMap) -> tuple[list[IndexArray], tuple[int, ...]]:
        """For each axis of ``tensor`` the indices that stay, and the shape that is left."""
        known = self._tensors.get(id(tensor))
        if known is None:
            left = [self(a.channels) for a in tensor.axes]
            known = (tensor, left, shrunk_shape(tensor, left))
            self._tensors[id(tensor)] = known
        return known[1], known[2]

    def __call__(self, channels: ChannelArray) -> IndexArray:
        """Indices into ``channels`` that stay: kept channels and fixed positions."""
        known = self._found.get(id(channels))
        if known is None:
            known = (channels, np.flatnonzero((channels < 0) | self.keep[channels]))
            self._found[id(channels)] = known
        return known[1]


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor. ``channels [n]``: the channel of each index, -1 where it must stay.

    For dimension 1 of a grouped convolution's weight ``n`` is ``groups * shape[1]``: the indices of group
    g are ``channels[g * shape[1] : (g + 1) * shape[1]]``.
    """

    dim: int
    channels: ChannelArray
    role: str  # "out": labels what the layer puts out; "in": is summed over; "both": element-wise


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A parameter or buffer and its one or two prunable axes."""

    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    groups: int
    whole_groups: bool  # a grouped convolution that loses groups as it shrinks (depthwise), not their widths
    axes: tuple[Axis, ...]

    def kept(self, kept: Kept) -> list[IndexArray]:
        """For each axis, the indices into its channels that stay."""
        return [kept(a.channels) for a in self.axes]


@dataclass(frozen=True)
class Group:
    """Channels ``start .. stop`` of the flat space, ranked together because one layer makes them."""

    root: str  # the layer whose output channels these are, in order
    start: int
    stop: int
    layers: tuple[str, ...]  # modules that put out these channels
    members: tuple[tuple[str, int], ...]  # (tensor, dimension) pairs that hold them
    statistic: str | None = None  # a statistic over these channels: masking is then not the same as removing
    multiple: int = 1  # of which the number of channels must stay one: a kernel asks for it

    @property
    def channels(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Frozen:
    """An output axis that stays as it is, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True, eq=False)
class Width:
    """A size that a module keeps as an attribute, whether or not it has parameters: ``kept(channels) / per``.

    ``attribute`` may be one of an object that the module keeps (``"config.hidden_size"``); ``index`` is the place
    in a tuple or list, counted from the end, None for a plain integer. ``told``: the forward does not need it, others
    read it; it is left as it is where several widths of one attribute come to differ.
    """

    module: str
    attribute: str
    index: int | None
    channels: ChannelArray
    per: int = 1
    told: bool = False


@dataclass(frozen=True, eq=False)
class WorkTerm:
    """``scale * prod(kept positions of each axis)`` multiply-accumulates."""

    scale: float
    axes: tuple[ChannelArray, ...]


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
    group_of: ChannelArray = field(init=False)

    def __post_init__(self) -> None:
        group_of = np.empty(self.n_channels, dtype=np.int32)
        for i, group in enumerate(self.groups):
            group_of[group.start : group.stop] = i
        object.__setattr__(self, "group_of", group_of)

    # Counts

    def params(self, keep: BoolArray | None = None) -> int:
        """Elements of all parameters, with only the channels ``keep [N]`` left."""
        kept = Kept(self._all if keep is None else keep)
        shapes = (kept.of(t)[1] for t in self.tensors if t.is_parameter)
        return self.other_params + sum(math.prod(shape) for shape in shapes)

    def macs(self, keep: BoolArray | None = None) -> int:
        """Multiply-accumulates of convolutions, linear layers and attention, per example."""
        kept = Kept(self._all if keep is None else keep)
        total = sum(term.scale * math.prod(len(kept(a)) for a in term.axes) for term in self.work)
        return round(total / self.batch)

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
        left = np.bincount(self.unit[keep], minlength=self.n_units)
        size = np.bincount(self.unit, minlength=self.n_units)
        torn = np.flatnonzero((left > 0) & (left < size))
        if torn.size:
            group = self.groups[self.group_of[np.flatnonzero(self.unit == torn[0])[0]]]
            raise PlanError(
                f"group {group.root}: keep takes {left[torn[0]]} of the {size[torn[0]]} channels of a unit; "
                "channels of a unit are kept or removed together"
            )
        home = np.empty(self.n_units, dtype=np.int64)
        home[self.unit] = self.group_of
        stay = np.bincount(home[left > 0], minlength=len(self.groups))
        for number in np.flatnonzero(stay < self.least_units_of_groups):
            raise PlanError(
                f"group {self.groups[number].root}: keep leaves {stay[number]} of {(home == number).sum()} units; at "
                f"least {self.least_units_of_groups[number]} must stay"
            )
        for group in self.groups:
            left_over = int(keep[group.start : group.stop].sum()) if group.multiple > 1 else 0
            if left_over % group.multiple:
                raise PlanError(
                    f"group {group.root}: keep leaves {left_over} channels; a kernel that reads them needs "
                    f"a multiple of {group.multiple}"
                )
        kept = Kept(keep)
        for tensor, axis in self.axes():
            least = self.least(tensor, axis)
            if len(kept(axis.channels)) < least:
                raise PlanError(
                    f"{tensor.name}: keep leaves {len(kept(axis.channels))} of the {len(axis.channels)} channels of "
                    f"dimension {axis.dim}; at least {least} must stay"
                )
        return kept

    def least_units(self, group: Group) -> int:
        """How many units of ``group`` must stay: one, or two where units are of several channels.

        With one head left, or one channel in each block, a network obeys the rules of another plan.
        """
        return int(self.least_units_of_groups[self.groups.index(group)])

    @cached_property
    def least_units_of_groups(self) -> IndexArray:
        """:meth:`least_units` of each group."""
        units = np.array([len(np.unique(self.unit[g.start : g.stop])) for g in self.groups], dtype=np.int64)
        channels = np.array([g.channels for g in self.groups], dtype=np.int64)
        multiple = np.array([g.multiple for g in self.groups], dtype=np.int64)
        return np.maximum(np.where(units == channels, 1, np.minimum(units, 2)), multiple * units // channels)

    def least(self, tensor: TensorMap, axis: Axis) -> int:
        """How many indices of ``axis`` must stay: one, or two per group of a grouped convolution.

        With one channel per group it would be a depthwise convolution, whose groups go as a whole: the rules
        of another plan.
        """
        grouped = tensor.groups > 1 and not tensor.whole_groups
        return min(len(axis.channels), 2 * tensor.groups) if grouped else 1

    def movable(self, kept: Kept) -> BoolArray:
        """The channels ``[N]`` that are channels of :meth:`shrink`'s plan, too, in the same order.

        A group's last channel has no choice left: it is fixed.
        """
        left = np.bincount(self.group_of[kept.keep], minlength=len(self.groups))
        return kept.keep & (left[self.group_of] > 1)

    def shrink(self, kept: Kept) -> Plan:
        """The plan of the model after a prune (see :meth:`check_keep`). Equal to a plan lowered afresh."""
        left = np.bincount(self.group_of[kept.keep], minlength=len(self.groups))
        movable = self.movable(kept)
        lonely = tuple(
            Frozen(g.root, 1, "one channel is left") for g, n in zip(self.groups, left.tolist(), strict=True) if n == 1
        )
        return self._renumbered(kept, movable, lonely)

    def _renumbered(self, kept: Kept, movable: BoolArray, frozen: tuple[Frozen, ...]) -> Plan:
        """The plan with the channels ``~kept`` gone and, of the rest, only ``movable [N]`` still free."""
        smaller = _Smaller(kept, np.where(movable, np.cumsum(movable) - 1, -1).astype(np.int32))
        groups, stop = [], 0
        for group in self.groups:
            count = int(movable[group.start : group.stop].sum())
            if count:
                groups.append(replace(group, start=stop, stop=stop + count))
                stop += count
        unit = by_first_use(self.unit[movable])
        tensors, fixed = [], 0
        for tensor in self.tensors:
            shrunk = smaller.tensor(tensor)
            if shrunk.axes:
                tensors.append(shrunk)
            elif shrunk.is_parameter:
                fixed += math.prod(shrunk.shape)
        widths = (replace(w, channels=smaller(w.channels)) for w in self.widths)
        work = (fold_fixed(WorkTerm(t.scale, tuple(smaller(a) for a in t.axes))) for t in self.work)
        return replace(
            self,
            n_channels=stop,
            n_units=int(unit.max()) + 1 if stop else 0,
            unit=unit,
            groups=tuple(groups),
            tensors=tuple(tensors),
            frozen=self.frozen + frozen,
            work=tuple(work),
            # What is told, all must agree on: one that is held counts as well.
            widths=tuple(w for w in widths if w.told or w.channels.max(initial=-1) >= 0),
            other_params=self.other_params + fixed,
        )

    def freeze(self, groups: Iterable[int], reason: str) -> Plan:
        """The plan with the groups of these indices left alone, for ``reason``; nothing else changes."""
        held = sorted(set(groups))
        if not held:
            return self
        keep = self._all
        movable = ~np.isin(self.group_of, held)
        frozen = tuple(Frozen(self.groups[i].root, self.groups[i].channels, reason) for i in held)
        return self._renumbered(Kept(keep), movable, frozen)

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
        for kind, channels in zip(self.kind_of_unit.tolist(), np.split(order, starts[1:]), strict=True):
            group = int(self.group_of[channels[0]])
            found.setdefault(kind, (group, []))[1].append(channels.tolist())
        return list(found.values())

    @cached_property
    def by_unit(self) -> tuple[IndexArray, IndexArray]:
        """The channels ``[N]`` with those of a unit side by side, in their order, and where each unit starts: ``[U]``.
        """
        order = np.argsort(self.unit, kind="stable")
        return order, np.flatnonzero(np.diff(self.unit[order], prepend=-1))

    @cached_property
    def kind_of_unit(self) -> IndexArray:
        """A number for each unit that is the same for those that may change places (see :attr:`kinds`): ``[U]``."""
        # Random weights tell sets of (axis, count) apart, as a hash does: no Python loop over channels.
        weights = np.random.default_rng(0)
        signature = np.zeros(self.n_channels, dtype=np.uint64)
        for _, axis in self.axes():
            held, count = self.counts(axis)
            signature[held] += stirred(count.astype(np.uint64) + weights.integers(2**63, dtype=np.uint64))
        order, starts = self.by_unit
        unit = self.unit[order]
        place = np.arange(len(order)) - starts[unit]
        of_unit = np.zeros(self.n_units, dtype=np.uint64)
        np.add.at(of_unit, unit, stirred(signature[order] + stirred(place.astype(np.uint64))))
        of_unit = stirred(of_unit + self.group_of[order[starts]].astype(np.uint64))
        return np.unique(of_unit, return_inverse=True)[1].astype(np.int64)

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
            if group.statistic:
                lines.append(f"      note: {group.statistic}")
        for frozen in self.frozen:
            lines.append(f"  frozen {frozen.layer}: {frozen.channels} channels: {frozen.reason}")
            lines.extend([f"      {text}"] if (text := hint(frozen.reason)) else [])
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def is_grouped(tensor: TensorMap, axis: Axis) -> bool:
    """Whether ``axis`` is dimension 1 of a grouped convolution, with an entry per group and index."""
    return tensor.groups > 1 and axis.dim == 1


def groups_left(tensor: TensorMap, kept: list[IndexArray]) -> int:
    """Convolution groups of ``tensor`` when the indices ``kept`` of each axis are left."""
    if not tensor.whole_groups:
        return tensor.groups
    return tensor.groups * len(kept[0]) // len(tensor.axes[0].channels)


def shrunk_shape(tensor: TensorMap, kept: list[IndexArray]) -> tuple[int, ...]:
    """Shape of ``tensor`` when the indices ``kept`` of each axis are left."""
    shape = list(tensor.shape)
    for axis, left in zip(tensor.axes, kept, strict=True):
        shape[axis.dim] = len(left) // (groups_left(tensor, kept) if is_grouped(tensor, axis) else 1)
    return tuple(shape)


def fold_fixed(term: WorkTerm) -> WorkTerm:
    """``term`` with axes that hold no channel multiplied into its scale."""
    free = [a.max(initial=-1) >= 0 for a in term.axes]
    scale = term.scale * math.prod(len(a) for a, yes in zip(term.axes, free, strict=True) if not yes)
    return WorkTerm(scale, tuple(a for a, yes in zip(term.axes, free, strict=True) if yes))


class _Smaller:
    """Channel vectors after a prune; a vector that many axes share stays shared."""

    def __init__(self, kept: Kept, renumber: ChannelArray) -> None:
        self._kept = kept
        self._renumber = renumber
        self._found: dict[int, ChannelArray] = {}

    def __call__(self, channels: ChannelArray) -> ChannelArray:
        if id(channels) not in self._found:
            left = channels[self._kept(channels)]
            self._found[id(channels)] = np.where(left < 0, np.int32(-1), self._renumber[left]).astype(np.int32)
        return self._found[id(channels)]

    def tensor(self, tensor: TensorMap) -> TensorMap:
        kept, shape = self._kept.of(tensor)
        axes = (Axis(a.dim, self(a.channels), a.role) for a in tensor.axes)
        return TensorMap(
            tensor.name,
            tensor.is_parameter,
            shape,
            groups_left(tensor, kept),
            tensor.whole_groups,
            tuple(a for a in axes if a.channels.max(initial=-1) >= 0),
        )


def by_first_use(unit: NDArray[np.integer[Any]]) -> ChannelArray:
    """Unit numbers in the order in which the channels first name them."""
    if not len(unit):
        return unit.astype(np.int32)
    _, first, inverse = np.unique(unit, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse].astype(np.int32)


def stirred(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of ``x`` stirred (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
