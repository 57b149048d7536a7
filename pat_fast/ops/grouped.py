"""Sums over channels, and the penalty of their norms, each in one call where the backend has one for it.

What they do can be done with the four ops and vectors of PyTorch, and is, where a shortcut is missing: then they say
so, and their callers go the long way. Which way is taken depends on the tensors and on who watches, not on what was
called before. On the CPU sums and scores are the same to the last bit on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pat_fast.backends import DEVICES, shortcut
from pat_fast.backends.known import (
    Known,
    UnknownError,
    is_compiled,
    is_plain,
    is_reliable,
    is_watched,
)
from pat_fast.ops.functional import _check_tensors, _fail
from pat_fast.ops.memory import check_apart
from pat_fast.ops.register import bump
from pat_fast.ops.tiles import COL, ROW, TileTable


class Grouping:
    """Which slots of a table make up a channel, and which channels a group; on the CPU, for tensors on ``device``.

    Attributes:
        table: over the tensors.
        runs: ``[n, 3]`` int64: a slot, its channel, and for how many slots both go on side by side. A run lies in one
            side of a tile.
        sizes: ``[groups]`` int64, channels of each group.
        channels: how many there are.
        native: the same for the backend, which may point at the table, ``runs`` and ``sizes``.
        totals, push: the backend's ways to do the two calls below, or None.
        passed: the last ys that passed all checks, if there are some that would be recognised.
    """

    __slots__ = ("channels", "device", "native", "passed", "push", "runs", "sizes", "table", "totals")

    def __init__(self, table: TileTable, runs: Tensor, sizes: Tensor, device: torch.device) -> None:
        make = shortcut("grouping", device.type)
        self.table, self.runs, self.sizes, self.device = table, runs, sizes, device
        self.channels = int(sizes.sum())
        self.totals, self.push = (shortcut(name, device.type) for name in ("channel_totals", "group_push"))
        self.passed: _Passed | None = None
        self.native: Any = None
        if make is not None:
            self.native = make(table.table, runs, table.slots, sizes, self.channels, device)

    def __reduce__(self) -> tuple[type[Grouping], tuple[TileTable, Tensor, Tensor, torch.device]]:
        """A copy points at memory of its own."""
        return Grouping, (self.table, self.runs, self.sizes, self.device)

    @classmethod
    def of(cls, table: TileTable, slot_channel: Tensor, sizes: Tensor) -> Grouping | None:
        """Build it, or None if nothing here makes use of it.

        Args:
            slot_channel: ``[table.slots]`` int64, the channel of each slot; one that is the number of channels: none.
                On the device of the tensors.
            sizes: ``[groups]`` int64, on the CPU.

        Raises:
            OpError: the vectors do not fit the table.
        """
        device = slot_channel.device
        if device.type not in DEVICES or shortcut("grouping", device.type) is None:
            return None
        if table.shares_slots:
            _fail("tiles that name slots of their own", "a table of shared slots")
        if slot_channel.dtype != torch.int64 or slot_channel.shape != (table.slots,) or sizes.dtype != torch.int64:
            _fail(f"the channel of each of {table.slots} slots, int64", f"{list(slot_channel.shape)}")
        if sizes.dim() != 1 or sizes.device.type != "cpu" or bool((sizes < 0).any()):
            _fail("sizes of groups: a vector on the CPU, none negative", f"{list(sizes.shape)} on {sizes.device}")
        return cls(table, runs_of(table, slot_channel, int(sizes.sum())), sizes.contiguous(), device)


def runs_of(table: TileTable, slot_channel: Tensor, channels: int) -> Tensor:
    """:attr:`Grouping.runs` of a table's slots; their channels are checked.

    Raises:
        OpError: one is out of range.
    """
    of = slot_channel.cpu().numpy()
    if len(of) and not 0 <= of.min() <= of.max() <= channels:
        _fail(f"channels in [0, {channels}]", f"{of.min()} to {of.max()}")
    begins = np.ones(len(of), dtype=np.bool_)
    begins[1:] = (np.diff(of) != 1) | (of[1:] == channels)  # "none" is no neighbour of the last one
    sides = np.asarray(table.rows, dtype=np.int64).reshape(-1, table.table.shape[1])[:, [ROW, COL]]
    begins[sides[(sides >= 0) & (sides < len(of))]] = True
    starts = np.flatnonzero(begins)
    runs = np.stack([starts, of[starts], np.diff(np.append(starts, len(of)))], axis=1)
    return torch.from_numpy(np.ascontiguousarray(runs[runs[:, 1] < channels], dtype=np.int64))


def channel_totals(
    xs: Sequence[Tensor],
    grouping: Grouping,
    p: float,
    divided: bool,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor | None:
    """Sum ``|x|^p`` over all that belongs to a channel: ``[channels]`` in the accumulator dtype, or None.

    Args:
        xs: the tensors of the grouping's table.
        divided: divide the sums by their mean over the group, but by no less than the least normal number.
        meanwhile: called once, on the caller's thread, while others read ``xs``; not if None is returned. What it
            raises comes out of this call.

    A tensor that was lazily negated where it lies since the last call is summed, not refused: signs do not matter.

    Raises:
        OpError: tensors that do not fit the table.
    """
    run = grouping.totals
    if run is None or not len(xs) or is_compiled():
        return None
    xs = tuple(xs)  # which keeps them while they are read
    known = grouping.table.known.get("xs") or _looked_at(xs, grouping)
    for _ in range(2):
        if known is None:
            break
        try:
            found: Tensor = run(xs, known, grouping.native, p, divided, meanwhile)
            return found
        except UnknownError:
            known = _looked_at(xs, grouping)
    return None


class Pushed(NamedTuple):
    """The ys that are to change, each with the dtype, shape and strides of its x.

    Attributes:
        ys: they.
        places: of their xs among all, ascending.
        table: one over them, by which they are recognised; the grouping's own where all xs have a y; None: they are
            looked at one by one.
    """

    ys: Sequence[Tensor]
    places: Sequence[int]
    table: TileTable | None


def group_push(
    pushed: Callable[[], Pushed],
    xs: Sequence[Tensor],
    grouping: Grouping,
    p: float,
    alpha: float,
    strength: float,
    where: Tensor | None,
) -> bool:
    """Add ``(gamma[row] + gamma[col]) * x`` to those ``x`` that have a ``y``; False: nothing was done.

    With ``n_c`` the square root of a channel's sum of ``|x|^p``, and its extremes taken over the group,
    ``gamma_c = strength * alpha ** ((n_max - n_c) / (n_max - n_min))``; 0 for a group with a norm that is not finite.

    Args:
        pushed: called once, while others read ``xs``; not if False is returned for them. Without ys the call ends.
        xs: the tensors of the grouping's table.
        where: bool ``[channels]``: others have gamma 0.

    Raises:
        OpError: tensors that do not fit, or that overlap.
    """
    run = grouping.push
    if run is None or not len(xs) or is_compiled():
        return False
    if where is not None:
        wanted = torch.bool, (grouping.channels,), grouping.device
        if not is_plain(where) or (where.dtype, where.shape, where.device) != wanted:
            return False
        where = where.contiguous()

    xs = tuple(xs)  # which keeps them while they are read

    def checked() -> tuple[Sequence[Tensor], Sequence[int]]:
        passed = grouping.passed
        if passed is not None:
            passed.known.likes.expect()
        found = pushed()
        if not found.ys:
            raise _Nothing
        if passed is None or known is None or not passed.covers(found, known, xs):
            grouping.passed = _look(found, xs, grouping)
        bump(found.ys)
        return found.ys, found.places

    known = grouping.table.known.get("xs") or _looked_at(xs, grouping)
    for _ in range(2):
        if known is None:
            break
        try:
            run(checked, xs, known, grouping.native, p, alpha, strength, where)
        except UnknownError:
            known = _looked_at(xs, grouping)
        except _NotPlain:
            break
        except _Nothing:
            return True
        else:
            return True
    return False


class _NotPlain(Exception):
    """Some ys are more than memory of the grouping's device, or tiles overlap."""


class _Nothing(Exception):
    """There is nothing to change."""


def _looked_at(xs: Sequence[Tensor], grouping: Grouping) -> Known | None:
    """What recognises the xs; None if some are more than memory of the grouping's device, or something watches.

    Raises:
        OpError: they do not fit the table.
    """
    if is_watched() or not is_reliable() or not _are_plain("xs", xs, grouping.table, grouping):
        return None
    return grouping.table.known.get("xs") or Known(xs)


class _Passed(NamedTuple):
    """Ys that passed all checks.

    Attributes:
        table, places: as they came with them.
        known: what recognises them.
    """

    table: TileTable
    places: Sequence[int]
    known: Known

    def covers(self, found: Pushed, known: Known, xs: Sequence[Tensor]) -> bool:
        """Whether others are like them, of the same places, and share no memory with one another nor with the xs."""
        same = found.table is self.table and found.places is self.places
        return same and self.known.are_apart(found.ys, known, xs)


def _look(found: Pushed, xs: Sequence[Tensor], grouping: Grouping) -> _Passed | None:
    """Check ys; return what stands for the checks from now on, if there is something.

    Raises:
        OpError: they do not fit, or overlap.
        _NotPlain: see there.
    """
    ys, places, table = found
    ascending = sorted(set(places))
    if list(places) != ascending or not 0 <= ascending[0] <= ascending[-1] < len(xs):
        _fail(f"ascending places below {len(xs)}", f"{places}")
    if len(ascending) != len(ys):
        _fail(f"a place for each of {len(ys)} ys", f"{len(ascending)}")
    # Where tiles overlap it may be of tensors that are not to change.
    if not _are_like(found, xs, grouping) or not grouping.table.writable:
        raise _NotPlain
    check_apart("ys", ys, [xs[i] for i in places])
    if table is None or not isinstance(places, tuple):
        return None
    known = table.known.get("ys")
    return None if known is None else _Passed(table, places, known)


def _are_like(found: Pushed, xs: Sequence[Tensor], grouping: Grouping) -> bool:
    """Whether the ys, too, are nothing but memory; they are checked against their xs."""
    ys, places, of = found
    if of is not None:
        table = grouping.table
        if of is not table and of.layouts != tuple(table.layouts[i] for i in places):
            _fail("ys with the shapes and strides of their xs", "others")
        return _are_plain("ys", ys, of, grouping) and ys[0].dtype is xs[0].dtype
    for y, x in zip(ys, (xs[i] for i in places), strict=True):
        if y.shape != x.shape or y.stride() != x.stride() or y.dtype is not x.dtype:
            _fail("ys with the dtype, shapes and strides of their xs", f"{y.dtype} {tuple(y.shape)} {y.stride()}")
    return all(is_plain(y) and y.device == grouping.device for y in ys)


def _are_plain(name: str, xs: Sequence[Tensor], table: TileTable, grouping: Grouping) -> bool:
    """Whether the tensors, which are checked, are nothing but memory of the grouping's device."""
    if not len(xs) or xs[0].device != grouping.device:
        return False
    return _check_tensors(name, xs, table) or all(map(is_plain, xs))
