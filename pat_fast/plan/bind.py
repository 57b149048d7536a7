"""A plan bound to a live model: its tensors, tile tables over them, and sums back onto channels.

A binding is rebuilt after surgery; a plan never holds a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..backends.known import Known, remembered
from ..errors import OpError, PlanError
from ..ops.functional import FLOATS
from ..ops.grouped import Grouping
from ..ops.tiles import NONE, WIDTH, TileTable
from .held import Parts, Places, Seen
from .named import Named
from .running import Still
from .types import Axis, ChannelArray, Plan, TensorMap, is_grouped

Extent = tuple[int, int]  # size and stride of a dimension
Sides = tuple[Extent, list[ChannelArray | None]]  # of the tiles of each group: their extent, and the channels of each
Row = tuple[int, ...]  # of a tile table
Wanted = Callable[[TensorMap, nn.Module, str], bool]  # of a tensor, the module that holds it, its name there


def collapse(extents: Sequence[Extent], order: Sequence[int] | None = None) -> list[Extent]:
    """Merge dimensions that lie behind one another in memory; largest stride first, size 1 dropped.

    ``order`` are the strides to go by instead.
    """
    by = [stride for _, stride in extents] if order is None else order
    merged: list[tuple[int, int, int]] = []
    for (size, stride), own in sorted(zip(extents, by, strict=True), key=lambda e: -e[1]):
        if size == 1:
            continue
        if merged and merged[-1][2] == size * own:
            merged[-1] = (merged[-1][0] * size, stride, own)
        else:
            merged.append((size, stride, own))
    return [(size, stride) for size, stride, _ in merged]


class Block(NamedTuple):
    """A tile before it has slots: offset, extents of rows, columns and kernel, and their channels."""

    offset: int
    row: Extent
    col: Extent
    kernel: Extent
    row_channels: ChannelArray | None
    col_channels: ChannelArray | None
    group: int


@lru_cache(maxsize=4096)
def _rest(
    shape: tuple[int, ...], strides: tuple[int, ...], order: tuple[int, ...], dims: tuple[int, ...]
) -> tuple[list[Extent], list[Extent]]:
    """The dimensions beside rows and columns ``dims``: those to step over, and those that a tile has room for."""
    others = [d for d in range(len(shape)) if d not in dims]
    rest = collapse([(shape[d], strides[d]) for d in others], [order[d] for d in others])
    spare = 1 if len(dims) == 2 else 2
    return (rest[:-spare], rest[-spare:]) if len(rest) > spare else ([], rest)


def is_one_block(tensor_map: TensorMap, strides: Sequence[int]) -> bool:
    """Whether :func:`blocks` are one: its rows, then its columns are whole axes, the one of larger stride first."""
    if any(is_grouped(tensor_map, a) for a in tensor_map.axes):
        return False
    dims = sorted((a.dim for a in tensor_map.axes), key=lambda d: -strides[d])
    return not _rest(tensor_map.shape, tuple(strides), tuple(strides), tuple(dims))[0]


class Alike(NamedTuple):
    """The blocks of a grouped convolution's groups: extents, how far apart they begin, the axes of rows and columns."""

    row: Extent
    col: Extent
    kernel: Extent
    step: int
    axes: list[Axis]


def alike(tensor_map: TensorMap, strides: Sequence[int]) -> Alike | None:
    """What :func:`blocks` are, if they are one for each group and both sides of all of them hold channels; else None.

    So they are nearly always, and can be listed all at once.
    """
    axes = sorted(tensor_map.axes, key=lambda a: -strides[a.dim])
    if len(axes) != 2 or not any(is_grouped(tensor_map, a) for a in axes):
        return None
    outer, inner = _rest(tensor_map.shape, tuple(strides), tuple(strides), tuple(a.dim for a in axes))
    groups = tensor_map.groups
    if outer or not all((a.channels.reshape(groups, -1).max(1, initial=-1) >= 0).all() for a in axes):
        return None
    row, col = ((len(a.channels) // groups, strides[a.dim]) for a in axes)
    return Alike(row, col, inner[0] if inner else (1, 1), tensor_map.shape[0] // groups * strides[0], axes)


def by_group(axes: Sequence[NDArray[Any]], groups: int) -> NDArray[Any]:
    """What ``axes`` have for the first group, then what they have for the second, and so on."""
    return np.concatenate([axis.reshape(groups, -1) for axis in axes], axis=1).reshape(-1)


def blocks(tensor_map: TensorMap, strides: Sequence[int], order: Sequence[int] | None = None) -> list[Block]:
    """The tiles ``[R, C, K]`` of a tensor with these strides; one per group of a grouped convolution.

    Rows are the axis with the larger stride, so that a row of a dense tensor is one run of memory. Of one axis
    alone, the rows are what lies farther apart than it, if there is any. ``order`` are the strides to go by instead
    (those of the tensor that this one is copied from).
    """
    shape = tensor_map.shape
    if len(shape) == 1 and len(tensor_map.axes) == 1:
        own = tensor_map.axes[0].channels
        return [Block(0, (len(own), strides[0]), (1, 1), (1, 1), _if_any(own), None, 0)]
    order = strides if order is None else order
    by_dim = {a.dim: a for a in tensor_map.axes}
    grouped = any(is_grouped(tensor_map, a) for a in tensor_map.axes)
    if grouped:
        by_dim.setdefault(0, Axis(0, np.full(shape[0], -1, np.int32), "both"))
    dims = sorted(by_dim, key=lambda d: -order[d])
    outer, inner = _rest(shape, tuple(strides), tuple(order), tuple(dims))
    farther = any(n > 1 and stride > order[dims[0]] for n, stride in zip(shape, order, strict=True))
    groups = tensor_map.groups if grouped else 1
    sides: list[Sides] = [_side(by_dim[d].channels, groups, strides[d]) for d in dims]
    others: list[Sides] = [(extent, [None] * groups) for extent in inner]
    if len(sides) == 1 and others and not outer and farther:
        sides = [others.pop(0), *sides]
    elif len(sides) == 1 and len(others) == 2:
        sides.append(others.pop(0))
    sides.append(((1, 1), [None] * groups))  # a tile has two
    (row, row_channels), (col, col_channels) = sides[:2]
    kernel = others[0][0] if others else (1, 1)
    step = shape[0] // groups * strides[0]  # from a group to the next
    found = []
    for steps in product(*(range(size) for size, _ in outer)):
        offset = sum(step * stride for step, (_, stride) in zip(steps, outer, strict=True))
        for group, (r, c) in enumerate(zip(row_channels, col_channels, strict=True)):
            found.append(Block(offset + group * step, row, col, kernel, r, c, group))
    return found


def _side(channels: ChannelArray, groups: int, stride: int) -> Sides:
    """A side of the tiles of all groups."""
    each = [channels] if groups == 1 else [*channels.reshape(groups, -1)]
    return (len(each[0]), stride), [_if_any(own) for own in each]


def _if_any(channels: ChannelArray) -> ChannelArray | None:
    return channels if len(channels) and (channels[0] >= 0 or channels.max() >= 0) else None


@dataclass(frozen=True)
class Tiles:
    """Tensors of one device and dtype, their tile table, and the channel of every slot.

    ``slot_channel [slots]`` int64 on the tensors' device; a slot without a channel holds ``n_channels``, and ``full``
    says that there is none.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    table: TileTable
    slot_channel: Tensor
    full: bool

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, the table's or their likes, lie in memory as the table has it."""
        return self.table.fits(tensors)


def has_floats(owner: nn.Module, local: str, or_complex: bool = False) -> bool:
    """Whether the numbers of a module's tensor are such as the ops take: neither complex nor whole."""
    tensor = owner._parameters.get(local, owner._buffers.get(local))
    return tensor is None or tensor.dtype in FLOATS or (or_complex and tensor.is_complex())


def magnitudes(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """``tensors`` of one dtype, of complex ones the absolute values."""
    return [t.detach().abs() for t in tensors] if len(tensors) and tensors[0].is_complex() else tensors


class Own(NamedTuple):
    """What of a tensor a process has: the map of these rows, which of the tensor's they are, and their tensor."""

    map: TensorMap
    rows: slice
    tensor: Tensor


class Binding(Named):
    """The tensors of ``model`` that ``plan`` names, what they were when they were bound, and tiles over them.

    ``after`` is a binding to the same model before a prune; see :class:`Named` for the rest.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        after: Binding | None = None,
        still: Still | None = None,
    ) -> None:
        super().__init__(plan, model, still, after)
        self._parts: Parts = Parts.of(self.modules.values()) if after is None else after._parts
        self._shapes = [m.shape for m in plan.tensors]
        self._seen = Seen.of(self.tensors.values())
        self._known: Known | None = None  # set once the tensors are recognised to be as they were seen
        whole = after is not None and len(after.tensors) == len(self.tensors)
        self.places: Places = after.places if after is not None and whole else self._places()
        self.device = next((t.device for t in self.tensors.values()), torch.device("cpu"))
        self.group_of = torch.from_numpy(plan.group_of.astype(np.int64)).to(self.device)
        self.group_size = torch.tensor([g.channels for g in plan.groups], dtype=torch.int64, device=self.device)
        self.alive: Tensor | None = None  # bool [N] while channels are masked
        self._members: dict[str, Tensor] = {}
        self._cache: dict[str, tuple[Tiles, ...]] = {}
        self._groupings: dict[str, tuple[Tiles, torch.dtype, Grouping | None]] = {}

    def remember(self) -> None:
        """Look at the tensors, to recognise them in one call from now on; see :mod:`pat_fast.backends.known`."""
        tensors = list(self.tensors.values())
        known = remembered(tensors) if tensors and self.is_true else None
        if known is not None:
            self._known, self._seen = known, Seen.of(tensors)

    def _are_known(self) -> bool:
        """Whether the tensors surely have the shapes, and are all else, that they were when they were looked at."""
        return self._known is not None and self._known.matches([*self.tensors.values()])

    def look(self) -> Seen:
        """What the tensors are now; not to be written to."""
        return self._seen if self._are_known() else Seen.of(self.tensors.values())

    @property
    def is_true(self) -> bool:
        """Whether the tensors still have the shapes that the plan knows."""
        return self._are_known() or [t.shape for t in self.tensors.values()] == self._shapes

    def _places(self) -> Places:
        found = Places([], [], [])
        for name, tensor in self.tensors.items():
            for module, local in self.owners(name):
                found.spaces.append(module._parameters if local in module._parameters else module._buffers)
                found.names.append(local)
                found.tensors.append(tensor)
        return found

    def is_current(self) -> bool:
        """Whether the model has the modules and tensors that were bound, where they were and of the plan's shapes."""
        return (self._are_known() or (self.is_true and self._is_here())) and self._is_whole()

    def _is_whole(self) -> bool:
        return self._parts.are_true() and self.places.are_true()

    def has_moved(self) -> bool:
        """Whether tensors are other objects now, or elsewhere, or of another dtype, as after ``model.to(...)``.

        The modules that hold them are the same.
        """
        return not self.places.are_true() or not self._is_here()

    def _is_here(self) -> bool:
        return [(t.device, t.dtype) for t in self.tensors.values()] == self._seen.kinds

    def follow(self, now: Binding) -> Binding:
        """``now``, a binding of the same plan made since.

        Raises:
            PlanError: names share a tensor that did not, or not any more.
        """
        for name in self.tensors:
            if self.aliases(name) != now.aliases(name):
                raise PlanError(
                    f"{name} was {' = '.join(self.aliases(name))} and is {' = '.join(now.aliases(name))} now: tied or "
                    "untied since the plan was made; make a new plan, or pruner"
                )
        return now

    def check(self) -> None:
        """Raise :class:`PlanError` if the model was changed since by others."""
        for tensor_map, tensor in () if self.is_true else zip(self.plan.tensors, self.tensors.values(), strict=True):
            if tensor.shape != tensor_map.shape:
                raise PlanError(
                    f"{tensor_map.name} has shape {tuple(tensor.shape)}, the plan expects {tensor_map.shape}: the "
                    "model was changed since the plan was bound (by another pruner?); build a new plan, or pruner"
                )
        if not self._is_whole():
            raise PlanError(
                "modules or tensors of the model were replaced: the model was changed since the plan was bound; build "
                "a new plan, or pruner"
            )

    def tiles(self, key: str, wanted: Wanted, look: bool = True) -> tuple[Tiles, ...]:
        """Tile tables over the tensors for which ``wanted(map, owner, local name)`` holds.

        Kept under ``key``; made anew when a tensor's memory layout has changed since. Without a ``look`` that is left
        to find out for the op that they are for.
        """
        cached = self._cache.get(key)
        if cached is not None and (not look or all(tiles.fit(tiles.tensors) for tiles in cached)):
            return cached
        buckets: dict[tuple[torch.device, torch.dtype], list[TensorMap]] = {}
        for tensor_map in self.plan.tensors:
            tensor = self.tensors[tensor_map.name]
            if wanted(tensor_map, *self.owner(tensor_map.name)):
                buckets.setdefault((tensor.device, tensor.dtype), []).append(tensor_map)
        made = tuple(self._tabulate(maps) for maps in buckets.values())
        self._cache[key] = made
        return made

    def part(self, key: str, wanted: Wanted, only: Collection[int] | None) -> tuple[Tiles, ...]:
        """:meth:`tiles` of those tensors alone whose ``id`` is in ``only``; of all by default."""
        every = self.tiles(key, wanted)
        if only is None:
            return every
        others = [n for made in every for n, t in zip(made.names, made.tensors, strict=True) if id(t) not in only]
        if not others:
            return every
        # A table of its own: what an optimizer holds does not change from step to step.
        return self.tiles(
            f"{key} without {', '.join(others)}", lambda m, *of: m.name not in others and wanted(m, *of)
        )

    def own(self, tensor_map: TensorMap) -> Own:
        """What of a tensor is in its tiles. Here all of it."""
        return Own(tensor_map, slice(None), self.tensors[tensor_map.name])

    def known(self, by_id: Any) -> Any:
        """A set of (or dict by) the ``id`` of parameters, with those of the tensors in tiles added. Here the same."""
        return by_id

    def total(self, values: Tensor) -> Tensor:
        """What sums over tiles come to, over all processes that have some. Here there is one."""
        return values

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Around what reads or writes the gradients of the tiles' tensors."""
        yield

    def each(self, tiles: Tiles) -> Iterator[Tiles]:
        """``tiles``, one tensor at a time."""
        for name in tiles.names:
            yield self.tiles(f"one: {name}", lambda m, *_, name=name: m.name == name)[0]

    def like(self, name: str, tensor: Tensor) -> Tiles:
        """A table over ``tensor``, which has the shape of the plan's tensor ``name``."""
        return self._tabulate([self.plan.tensor(name)], [tensor])

    def _tabulate(self, maps: list[TensorMap], given: list[Tensor] | None = None) -> Tiles:
        tensors = [self.tensors[m.name] for m in maps] if given is None else given
        tiles: list[Row] = []
        slots: list[ChannelArray] = []
        at = 0
        for i, (tensor_map, tensor) in enumerate(zip(maps, tensors, strict=True)):
            strides = tensor.stride()
            same = alike(tensor_map, strides)
            if same is not None:
                (r, sr), (c, sc), (k, sk) = same.row, same.col, same.kernel
                for group in range(tensor_map.groups):
                    tiles.append((i, group * same.step, r, c, k, sr, sc, sk, at, at + r))
                    at += r + c
                slots.append(by_group([a.channels for a in same.axes], tensor_map.groups))
                continue
            for block in blocks(tensor_map, strides):
                starts = []
                for channels in (block.row_channels, block.col_channels):
                    starts.append(at if channels is not None else NONE)
                    if channels is not None:
                        slots.append(channels)
                        at += len(channels)
                (r, sr), (c, sc), (k, sk) = block.row, block.col, block.kernel
                tiles.append((i, block.offset, r, c, k, sr, sc, sk, *starts))
        channel = np.concatenate([np.zeros(0, np.int32), *slots]).astype(np.int64)
        without = channel < 0
        channel[without] = self.plan.n_channels
        rows = torch.from_numpy(np.array(tiles, dtype=np.int64).reshape(len(tiles), WIDTH))
        table = TileTable(rows, tensors, slots=at)
        slot_channel = torch.from_numpy(channel).to(tensors[0].device)
        return Tiles(tuple(m.name for m in maps), tuple(tensors), table, slot_channel, not without.any())

    def at_once(self, key: str, wanted: Wanted, call: Callable[[Tiles, Grouping, bool], Any]) -> Any:
        """``call(tiles, grouping, looked)`` on :meth:`tiles`, if they are one table that has a grouping; else None.

        It looks at the tensors itself: the tables made last are tried as they are. Where it finds that they do not
        fit, it is made again with tables that do.
        """
        known = self._groupings.get(key)
        if known is not None and known[2] is not None and self.alive is None:
            try:
                return call(known[0], known[2], False)
            except OpError:
                pass
        self.tiles(key, wanted, look=False)
        if self.grouping(key) is None:
            return None
        tiles, grouping = self.tiles(key, wanted), self.grouping(key)
        return None if grouping is None else call(tiles[0], grouping, True)

    def grouping(self, key: str) -> Grouping | None:
        """Channels and groups of the tiles made under ``key``, for what does a whole step in one call.

        None where that cannot be: values of channels depend on more than one table, or some channels do not count.
        """
        cached = self._cache[key]
        if len(cached) != 1 or self.alive is not None:
            return None
        known, tiles = self._groupings.get(key), cached[0]
        dtype = tiles.tensors[0].dtype  # as it is now
        if known is None or known[0] is not tiles or known[1] is not dtype:
            found = None
            if not dtype.is_complex:
                sizes = torch.tensor([g.channels for g in self.plan.groups], dtype=torch.int64, device="cpu")
                found = Grouping.of(tiles.table, tiles.slot_channel, sizes)
            known = self._groupings[key] = (tiles, dtype, found)
        return known[2]

    def to_channels(self, tiles: Tiles, values: Tensor) -> Tensor:
        """Sum ``values [slots]`` onto channels: ``[N]``."""
        sums = values.new_zeros(self.plan.n_channels + (not tiles.full))
        return self.total(sums.scatter_add_(0, tiles.slot_channel, values)[: self.plan.n_channels])

    def to_slots(self, tiles: Tiles, values: Tensor, fill: float) -> Tensor:
        """Spread ``values [N]`` over slots; slots without a channel get ``fill``."""
        dtype = torch.float64 if tiles.tensors[0].dtype == torch.float64 else torch.float32
        padded = values.to(tiles.slot_channel.device, dtype)
        if not tiles.full:
            padded = torch.cat([padded, padded.new_full((1,), fill)])
        return padded.index_select(0, tiles.slot_channel)  # several times as fast as brackets

    def member_count(self, key: str) -> Tensor:
        """For each channel, how many axes of its group are among the tiles made under ``key``: ``[N]``."""
        if key not in self._members:
            names = {name for tiles in self._cache[key] for name in tiles.names}
            count = [sum(name in names for name, _ in g.members) for g in self.plan.groups]
            per_group = torch.tensor(count, dtype=torch.float32, device=self.device).clamp_min_(1)
            self._members[key] = self.spread(per_group)
        return self._members[key]

    def spread(self, per_group: Tensor) -> Tensor:
        """``per_group [groups]`` at each channel: ``[N]``."""
        return per_group.index_select(0, self.group_of)

    def over_groups(self, values: Tensor, how: str) -> Tensor:
        """``"mean"``, ``"max"`` or ``"min"`` of ``values [N]`` over the living channels of each group: ``[groups]``.

        NaN if one of them is.
        """
        if self.alive is None:
            return torch.segment_reduce(values, how, lengths=self.group_size, unsafe=True)
        neutral = {"mean": 0.0, "max": -torch.inf, "min": torch.inf}[how]
        living = values.masked_fill(~self.alive, neutral)
        found = torch.segment_reduce(living, how, lengths=self.group_size, unsafe=True)
        if how != "mean":
            return found
        share = torch.segment_reduce(self.alive.to(values), how, lengths=self.group_size, unsafe=True)
        return found / share


def bind(plan: Plan, model: nn.Module) -> Binding:
    """Bind ``plan`` to the live tensors of ``model``; see :class:`Binding`."""
    return Binding(plan, model)
