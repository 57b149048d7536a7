"""Which index of which tensor counts for which channel: the book that all scores are added up from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..plan.bind import Binding, Own, Tiles, alike, blocks, by_group, is_one_block
from ..plan.types import Axis, ChannelArray, IndexArray, Plan, TensorMap, is_grouped

Member = tuple[str, int]  # a tensor and its dimension
Order = Mapping[int, Sequence[Member]]  # for a group, its members from the first to the last


@dataclass(slots=True, eq=False)
class Part:
    """The ids ``start .. start + count`` of the indices of one tensor axis."""

    tensor: TensorMap
    axis: Axis
    start: int
    count: int


class Ledger:
    """Entries (index, channel, member) of the axes of a list of tensors.

    Every index of every axis has an id; a *member* is an axis of a tensor as far as it holds channels of one
    group. An entry says that an index counts for a channel, as part of a member; where a flatten repeats
    channels, several indices of a member count for one channel. With ``pooled``, the inputs of a grouped
    convolution have one id for all blocks: what the blocks hold at that place is added up and counts for the
    channel of every block (as Torch-Pruning has it; these channels are removed together).

    Attributes:
        parts: the axes, with their ids.
        indices: number of ids.
        index, channel, member: ``[E]`` int64, on ``device``.
        members: (tensor, dimension, group) for each member.
        indices_are_entries: whether every index counts for one channel, in order.
    """

    def __init__(
        self,
        plan: Plan,
        maps: Iterable[TensorMap],
        device: torch.device,
        wanted: Callable[[TensorMap, Axis], bool] = lambda *_: True,
        pooled: bool = True,
    ) -> None:
        maps = list(maps)
        self.n_channels = plan.n_channels
        self.device = device
        self.plan = plan
        self._maps = {m.name: m for m in maps}
        self._held: dict[int, tuple[IndexArray, IndexArray, list[int], IndexArray | int]] = {}
        self.parts: list[Part] = []
        self.members: list[tuple[str, int, int]] = []
        self.indices = 0
        columns: list[list[IndexArray]] = [[np.zeros(0, np.int64)] for _ in range(3)]
        firsts: list[tuple[int, int, int]] = []  # of each axis: its first index and member, its entries
        for tensor_map in maps:
            for axis in tensor_map.axes:
                if wanted(tensor_map, axis):
                    firsts.append(self._add(tensor_map, axis, pooled, *columns))
        starts, first_members, lengths = np.array(firsts, dtype=np.int64).reshape(len(firsts), 3).T
        index, channel, member = map(np.concatenate, columns)
        index += np.repeat(starts, lengths)
        member += np.repeat(first_members, lengths)
        self.index, self.channel, self.member = (torch.from_numpy(c).to(device) for c in (index, channel, member))
        self.indices_are_entries = bool(np.array_equal(index, np.arange(self.indices)))

    def _add(
        self,
        tensor_map: TensorMap,
        axis: Axis,
        pooled: bool,
        indices: list[IndexArray],
        channels: list[IndexArray],
        members: list[IndexArray],
    ) -> tuple[int, int, int]:
        """Append an axis's entries, counted from its first index and member; these two, and how many they are."""
        shared = pooled and is_grouped(tensor_map, axis)
        part = Part(tensor_map, axis, self.indices, tensor_map.shape[1] if shared else len(axis.channels))
        self.parts.append(part)
        self.indices += part.count
        held, own, groups, which = self._groups(axis)
        indices.append(held % part.count if shared else held)
        channels.append(own)
        members.append(np.zeros(len(held), dtype=np.int64) if isinstance(which, int) else which)
        first = len(self.members)
        self.members += [(tensor_map.name, axis.dim, g) for g in groups]
        return part.start, first, len(held)

    def _groups(self, axis: Axis) -> tuple[IndexArray, IndexArray, list[int], IndexArray | int]:
        """Indices of ``axis`` that hold channels, these channels, their groups, and which of these each is of."""
        known = self._held.get(id(axis.channels))  # most axes share their vectors
        if known is None:
            known = self._held[id(axis.channels)] = self.plan.holds(axis.channels)
        return known

    def slots(self, tiles: Tiles, own: Callable[[TensorMap], Own]) -> Tensor:
        """The id of every slot of a table over the ledger's tensors; ``indices`` where it has none: ``[slots]``.

        Args:
            own: what of a tensor is in its tiles, see :meth:`Binding.own`.
        """
        starts = {(p.tensor.name, p.axis.dim): p for p in self.parts}
        found: list[NDArray[np.integer[Any]]] = [np.zeros(0, np.int64)]
        numbers = np.arange(self.indices)
        for name, tensor in zip(tiles.names, tiles.tensors, strict=True):
            tensor_map, rows, _ = own(self._maps[name])
            stride = tensor.stride()
            if rows == slice(None) and is_one_block(tensor_map, stride):
                for axis in sorted(tensor_map.axes, key=lambda a: -stride[a.dim]):
                    part = starts.get((name, axis.dim))
                    if part is not None and len(self._groups(axis)[0]) == part.count:
                        found.append(numbers[part.start : part.start + part.count])
                    elif axis.channels.max(initial=-1) >= 0:
                        found.append(self._ids(axis, part))
                continue
            # The same blocks as the table's, with ids in the place of channels.
            same = alike(tensor_map, stride) if rows == slice(None) else None
            if same is not None:
                ids = [self._ids(a, starts.get((name, a.dim))) for a in same.axes]
                found.append(by_group(ids, tensor_map.groups))
                continue
            ids = [self._ids(a, starts.get((name, a.dim))) for a in self._maps[name].axes]
            axes = tuple(
                replace(a, channels=i[rows] if a.dim == 0 else i) for a, i in zip(tensor_map.axes, ids, strict=True)
            )
            for block in blocks(tensor_map._replace(axes=axes), stride):
                found += [c for c in (block.row_channels, block.col_channels) if c is not None]
        every = np.concatenate(found)  # a copy
        every[every < 0] = self.indices
        return torch.from_numpy(every).to(tiles.slot_channel.device)

    def _ids(self, axis: Axis, part: Part | None) -> ChannelArray:
        own = self.indices if part is None else part.start + np.arange(len(axis.channels)) % part.count
        return np.where(axis.channels >= 0, own, -1).astype(np.int32)

    def prepare(self) -> None:
        """Work out ahead what a first score would."""
        _ = self.count, self.all_scored, self._outputs

    @cached_property
    def count(self) -> Tensor:
        """For each channel, the members of its group, at least 1: ``[N]`` float32."""
        return self._spread([len(of) for of in self._of_group]).float().clamp_min_(1)

    @cached_property
    def scored(self) -> Tensor:
        """Channels whose group has a member: bool ``[N]``."""
        return self._spread([len(of) for of in self._of_group]) > 0

    @cached_property
    def all_scored(self) -> bool:
        """Whether all channels are."""
        return bool(self.scored.all())

    def fill_unscored(self, values: Tensor, by: float) -> Tensor:
        """``values [N]`` with ``by`` at channels that are not scored."""
        return values if self.all_scored else values.masked_fill(~self.scored, by)

    def _spread(self, per_group: Sequence[int]) -> Tensor:
        values = np.repeat(np.asarray(per_group, np.int64), [g.channels for g in self.plan.groups])
        return torch.from_numpy(values).to(self.device)

    @cached_property
    def _of_group(self) -> list[list[int]]:
        """The members of each group, in the order of the plan."""
        found: list[list[int]] = [[] for _ in self.plan.groups]
        for number, (*_, group) in enumerate(self.members):
            found[group].append(number)
        return found

    def ordered(self, order: Order | None = None) -> list[list[int]]:
        """The members of each group from the first to the last.

        As ``order`` has them; members that it does not name, or all where it does not name the group, follow
        with the root's own output first, then in the order of the plan.
        """
        found = []
        for g, of in enumerate(self._of_group):
            root = self.plan.groups[g].root
            given = {member: place for place, member in enumerate(order.get(g, ()) if order else ())}

            def place(number: int, root: str = root, given: dict[Member, int] = given) -> tuple[int, bool, int]:
                name, dim, _ = self.members[number]
                out = (name, dim) in self._outputs and name.rpartition(".")[0] == root
                return given.get((name, dim), len(given)), not out, number

            found.append(sorted(of, key=place))
        return found

    @cached_property
    def _outputs(self) -> set[Member]:
        return {(p.tensor.name, p.axis.dim) for p in self.parts if p.axis.role != "in"}

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of a member and a channel that it holds.

        ``(cell [E] of each entry, channel [cells], member [cells])``, int64.
        """
        key = self.member * self.n_channels + self.channel
        pairs, cell = torch.unique(key, return_inverse=True)
        return cell, pairs % self.n_channels, pairs // self.n_channels

    def entries(self, values: Tensor) -> Tensor:
        """``values [indices]`` of each entry: ``[E]``."""
        return values if self.indices_are_entries else values[self.index]

    def by_cell(self, values: Tensor) -> Tensor:
        """Sums of ``values [indices]`` over what each member holds of each channel: ``[cells]``."""
        cell, channel, _ = self.cells
        return values.new_zeros(len(channel)).index_add_(0, cell, self.entries(values))

    def by_channel(self, values: Tensor) -> Tensor:
        """Sums of ``values [indices]`` over all members: ``[N]``."""
        return values.new_zeros(self.n_channels).index_add_(0, self.channel, self.entries(values))


class Book:
    """A ledger over the tensors of a binding's tiles (made under ``key``), and the slots of their tables."""

    def __init__(self, binding: Binding, key: str, tiles: tuple[Tiles, ...], **how: Any) -> None:
        names = {name for bucket in tiles for name in bucket.names}
        maps = [m for m in binding.plan.tensors if m.name in names]
        self.key, self.tiles = key, tiles
        self.ledger = Ledger(binding.plan, maps, binding.device, **how)
        self._slots = [self.ledger.slots(bucket, binding.own) for bucket in tiles]
        # Where one table has the indices in their order, nothing needs to be added up.
        self._aligned = len(tiles) == 1 and torch.equal(
            self._slots[0], torch.arange(self.ledger.indices, device=self._slots[0].device)
        )
        self._total = WeakMethod(binding.total)  # books are kept for as long as their binding lives

    @cached_property
    def is_plain(self) -> bool:
        """Whether what a channel has over all members is the sum of its slots, and every channel has a member."""
        ledger = self.ledger
        if not self._aligned or not ledger.indices_are_entries or not ledger.all_scored:
            return False
        return torch.equal(ledger.channel, self.tiles[0].slot_channel)

    @cached_property
    def named(self) -> list[Tensor]:
        """For each table, the slots that have an id: bool ``[slots]``."""
        return [ids < self.ledger.indices for ids in self._slots]

    def collect(self, slots: Sequence[Tensor]) -> Tensor:
        """Sum the slots of each table, ``slots[i] [slots]``, onto the ledger's indices: ``[indices]``."""
        found: Tensor | None = None
        for values, ids in zip(slots, self._slots, strict=True):
            own = values
            if not self._aligned:
                own = values.new_zeros(self.ledger.indices + 1).index_add_(0, ids, values)[:-1]
            own = own.to(self.ledger.device)
            found = own if found is None else found + own  # of several dtypes the wider one
        total = self._total()
        if found is None or total is None:
            return torch.zeros(0, device=self.ledger.device)
        return total(found)


_books: WeakKeyDictionary[Binding, dict[str, Book]] = WeakKeyDictionary()


def book(
    binding: Binding,
    key: str,
    wanted: Callable[[TensorMap], bool],
    axes: Callable[[TensorMap, Axis], bool] = lambda *_: True,
    pooled: bool = True,
) -> Book:
    """The book over the tensors for which ``wanted(map)`` holds; kept under ``key`` while their layout stays."""
    tiles = binding.tiles(key, lambda tensor_map, *_: wanted(tensor_map))
    kept = _books.setdefault(binding, {})
    if key not in kept or kept[key].tiles is not tiles:
        kept[key] = Book(binding, key, tiles, wanted=axes, pooled=pooled)
    return kept[key]
