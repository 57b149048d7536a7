"""The plan: which channels a model has, which tensors hold them, what must go together. Frozen data.

A plan names things (``"layer1.0.conv1.weight"``) and holds integer vectors; it has no live tensors, so it can
be kept, compared and computed ahead: :meth:`Plan.shrink` is the plan of the model after a prune.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError

ChannelArray = NDArray[np.int32]


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

    def kept(self, keep: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """For each axis, the indices into ``channels`` that survive ``keep [N]``."""
        return [np.flatnonzero((a.channels < 0) | keep[a.channels]) for a in self.axes]


@dataclass(frozen=True)
class Group:
    """Channels ``start .. stop`` of the flat space, ranked together because one layer makes them."""

    root: str  # the layer whose output channels these are, in order
    start: int
    stop: int
    layers: tuple[str, ...]  # modules that put out these channels
    members: tuple[tuple[str, int], ...]  # (tensor, dimension) pairs that hold them
    statistic: str | None = None  # a statistic over these channels: masking is then not the same as removing

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
    """A size that a normalisation layer keeps as an attribute, whether or not it has parameters.

    ``dim`` counts from the end of a layer norm's ``normalized_shape``; None for the other norms.
    """

    module: str
    dim: int | None
    channels: ChannelArray


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

    def params(self, keep: NDArray[np.bool_] | None = None) -> int:
        """Elements of all parameters, with only the channels ``keep [N]`` left."""
        keep = self._all if keep is None else keep
        total = self.other_params
        for tensor in self.tensors:
            if tensor.is_parameter:
                total += math.prod(shrunk_shape(tensor, tensor.kept(keep)))
        return total

    def macs(self, keep: NDArray[np.bool_] | None = None) -> int:
        """Multiply-accumulates of convolutions, linear layers and attention, per example."""
        if keep is None:
            keep = self._all
        total = 0.0
        for term in self.work:
            count = term.scale
            for axis in term.axes:
                count *= int(((axis < 0) | keep[axis]).sum())
            total += count
        return round(total / self.batch)

    @property
    def _all(self) -> NDArray[np.bool_]:
        return np.ones(self.n_channels, dtype=np.bool_)

    # Changes

    def check_keep(self, keep: NDArray[np.bool_]) -> None:
        """Raise :class:`PlanError` unless ``keep`` takes whole units and empties no axis."""
        if keep.shape != (self.n_channels,) or keep.dtype != np.bool_:
            raise PlanError(
                f"keep must be a bool vector with one entry for each of the {self.n_channels} channels, "
                f"got shape {keep.shape}, dtype {keep.dtype}"
            )
        kept = np.bincount(self.unit[keep], minlength=self.n_units)
        size = np.bincount(self.unit, minlength=self.n_units)
        torn = np.flatnonzero((kept > 0) & (kept < size))
        if torn.size:
            group = self.groups[self.group_of[np.flatnonzero(self.unit == torn[0])[0]]]
            raise PlanError(
                f"group {group.root}: keep takes {kept[torn[0]]} of the {size[torn[0]]} channels of a unit; "
                "channels of a unit are kept or removed together"
            )
        for tensor in self.tensors:
            for axis, left in zip(tensor.axes, tensor.kept(keep), strict=True):
                least = self.least(tensor, axis)
                if left.size < least:
                    raise PlanError(
                        f"{tensor.name}: keep leaves {left.size} of the {len(axis.channels)} channels of dimension "
                        f"{axis.dim}; at least {least} must stay"
                    )

    def least(self, tensor: TensorMap, axis: Axis) -> int:
        """How many indices of ``axis`` must stay: one, or two per group of a grouped convolution.

        With one channel per group it would be a depthwise convolution, whose groups go as a whole: the rules
        of another plan.
        """
        grouped = tensor.groups > 1 and not tensor.whole_groups
        return min(len(axis.channels), 2 * tensor.groups) if grouped else 1

    def shrink(self, keep: NDArray[np.bool_]) -> Plan:
        """The plan of the model after the channels ``~keep`` are gone. Equal to a plan lowered afresh.

        Raises :class:`PlanError` as :meth:`check_keep` does.
        """
        self.check_keep(keep)
        per_group = np.add.reduceat(keep, [g.start for g in self.groups]) if self.groups else np.zeros(0, np.int64)
        movable = keep & (per_group[self.group_of] > 1)  # a group's last channel has no choice left: it is fixed
        renumber = np.where(movable, np.cumsum(movable) - 1, -1).astype(np.int32)
        groups, lonely, stop = [], [], 0
        for group, count in zip(self.groups, per_group.tolist(), strict=True):
            if count > 1:
                groups.append(replace(group, start=stop, stop=stop + count))
                stop += count
            else:
                lonely.append(Frozen(group.root, 1, "one channel is left"))
        units, unit = np.unique(self.unit[movable], return_inverse=True)
        tensors, fixed = [], 0
        for tensor in self.tensors:
            smaller = _shrink_tensor(tensor, keep, renumber)
            if smaller.axes:
                tensors.append(smaller)
            elif smaller.is_parameter:
                fixed += math.prod(smaller.shape)
        widths = (replace(w, channels=_shrink_channels(w.channels, keep, renumber)) for w in self.widths)
        return replace(
            self,
            n_channels=stop,
            n_units=len(units),
            unit=by_first_use(unit),
            groups=tuple(groups),
            tensors=tuple(tensors),
            frozen=self.frozen + tuple(lonely),
            work=tuple(_shrink_term(t, keep, renumber) for t in self.work),
            widths=tuple(w for w in widths if (w.channels >= 0).any()),
            other_params=self.other_params + fixed,
        )

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

    def describe(self) -> str:
        """A few lines for people: groups, members, what is frozen and why."""
        lines = [
            f"{self.n_channels} channels in {len(self.groups)} groups, {self.n_units} units; "
            f"{self.params():,} parameters, {self.macs():,} MACs per example"
        ]
        for group in self.groups:
            units = len(np.unique(self.unit[group.start : group.stop]))
            of = "" if units == group.channels else f" in {units} units"
            lines.append(f"  {group.root}: {group.channels} channels{of}, {len(group.members)} members")
            lines.extend(f"      {name} dim {dim}" for name, dim in group.members)
            if group.statistic:
                lines.append(f"      note: {group.statistic}")
        lines.extend(f"  frozen {f.layer}: {f.channels} channels: {f.reason}" for f in self.frozen)
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)


def is_grouped(tensor: TensorMap, axis: Axis) -> bool:
    """Whether ``axis`` is dimension 1 of a grouped convolution, with an entry per group and index."""
    return tensor.groups > 1 and axis.dim == 1


def groups_left(tensor: TensorMap, kept: list[NDArray[np.int64]]) -> int:
    """Convolution groups of ``tensor`` when the indices ``kept`` of each axis are left."""
    if not tensor.whole_groups:
        return tensor.groups
    return tensor.groups * len(kept[0]) // len(tensor.axes[0].channels)


def shrunk_shape(tensor: TensorMap, kept: list[NDArray[np.int64]]) -> tuple[int, ...]:
    """Shape of ``tensor`` when the indices ``kept`` of each axis are left."""
    shape = list(tensor.shape)
    for axis, left in zip(tensor.axes, kept, strict=True):
        shape[axis.dim] = len(left) // (groups_left(tensor, kept) if is_grouped(tensor, axis) else 1)
    return tuple(shape)


def fold_fixed(term: WorkTerm) -> WorkTerm:
    """``term`` with axes that hold no channel multiplied into its scale."""
    scale = term.scale * math.prod(len(a) for a in term.axes if (a < 0).all())
    return WorkTerm(scale, tuple(a for a in term.axes if (a >= 0).any()))


def _shrink_tensor(tensor: TensorMap, keep: NDArray[np.bool_], renumber: ChannelArray) -> TensorMap:
    kept = tensor.kept(keep)
    axes = tuple(
        replace(a, channels=_renumbered(a.channels[k], renumber)) for a, k in zip(tensor.axes, kept, strict=True)
    )
    return replace(
        tensor,
        shape=shrunk_shape(tensor, kept),
        groups=groups_left(tensor, kept),
        axes=tuple(a for a in axes if (a.channels >= 0).any()),
    )


def _shrink_term(term: WorkTerm, keep: NDArray[np.bool_], renumber: ChannelArray) -> WorkTerm:
    return fold_fixed(WorkTerm(term.scale, tuple(_shrink_channels(a, keep, renumber) for a in term.axes)))


def _shrink_channels(channels: ChannelArray, keep: NDArray[np.bool_], renumber: ChannelArray) -> ChannelArray:
    return _renumbered(channels[(channels < 0) | keep[channels]], renumber)


def _renumbered(channels: ChannelArray, renumber: ChannelArray) -> ChannelArray:
    return np.where(channels < 0, np.int32(-1), renumber[channels]).astype(np.int32)


def by_first_use(unit: NDArray[np.int64]) -> ChannelArray:
    """Unit numbers in the order in which the channels first name them."""
    _, first, inverse = np.unique(unit, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[inverse].astype(np.int32)
