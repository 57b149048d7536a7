"""Glue to the CUDA kernels: cuts tables into blocks once, then hands over addresses.

Arguments are those of the op schemas; they were checked by the public wrappers. A call starts kernels on the
current stream, waits for nothing, and takes its working memory from PyTorch's allocator, so it can be captured
in a CUDA graph. One or two kernels do the work of an op, a few more that of a shortcut. Addresses go along with
them; if there are more than 480, a kernel for every 4000 brings them before (for every 480 if the extension was
built with a CUDA older than 12.1). The one thing that a capture cannot do is to bring a table to the device:
each table needs one call before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pat_fast.backends import kept, native
from pat_fast.backends.kept import Kept, Upload
from pat_fast.backends.known import Known, UnknownError

IndexArray = NDArray[np.int64]

_CUDA, _WHY = native.load("pat_fast._CUDA", "CUDA")


def missing() -> str | None:
    """Return why there is no CUDA extension, or None if there is one (it may still find no GPU)."""
    return _WHY


def unavailable() -> str | None:
    """Return why the CUDA kernels cannot run, or None if they can; does not initialise CUDA."""
    if _WHY is not None:
        return _WHY
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    return None if torch.cuda.device_count() else "no CUDA device"


def details() -> dict[str, Any]:
    """Return ``archs`` (compiled for), ``runtime`` (CUDA version built with) and ``devices`` (seen by it)."""
    version = _CUDA.runtime_version()
    return {
        "archs": _CUDA.archs(),
        "runtime": f"{version // 1000}.{version % 1000 // 10}",
        "devices": _CUDA.device_count(),
    }


@dataclass(frozen=True)
class Blocks:
    """Descriptions of the blocks of one table, on the device that runs them.

    ``memory`` holds them as bytes, ``of`` says how many; a reduction needs a ``workspace`` of so many entries and
    leaves a sum in ``named`` slots.
    """

    memory: Upload
    of: Any
    workspace: int = 0
    named: int = 0


_made: Kept[Blocks] = Kept()
# Graphs refer to these by address, whatever becomes of the table.
_captured: dict[int, Any] = {}


def _upload(data: bytes, device: torch.device) -> Upload:
    return Upload.of(torch.frombuffer(bytearray(data or bytes(16)), dtype=torch.uint8), device)


def _made_of(tables: Sequence[Tensor], like: Tensor, make: Callable[[], Blocks]) -> tuple[Blocks, int]:
    """Return the blocks of tables over tensors like ``like``, and their address, ready for the current stream."""
    blocks = _made.of(tables, like.device, like.element_size(), make)
    if kept.is_capturing(like.device):
        _captured[id(blocks)] = blocks
    return blocks, blocks.memory.here().data_ptr()


def _blocks_of(tiles: Tensor, like: Tensor) -> tuple[Blocks, int]:
    def make() -> Blocks:
        works, gathers, workspace = _CUDA.plan(tiles.data_ptr(), len(tiles), like.element_size())
        of = _CUDA.Blocks(len(works) // _CUDA.WORK_BYTES, len(gathers) // _CUDA.GATHER_BYTES)
        return Blocks(_upload(works + gathers, like.device), of, workspace, _named(tiles))

    return _made_of([tiles], like, make)


def _named(tiles: Tensor) -> int:
    """How many slots are sums of something."""
    rows = tiles.numpy()
    rows = rows[rows[:, 2:5].all(1)]
    starts, lengths = np.concatenate([rows[:, [8, 2]], rows[:, [9, 3]]]).T
    return len(np.unique(_ranges(starts[starts >= 0], lengths[starts >= 0])))


def _ranges(starts: IndexArray, lengths: IndexArray) -> IndexArray:
    """``start, start + 1, ...`` of each start, one after the other."""
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + within


def _moves_of(tiles: Tensor, out_tiles: Tensor, like: Tensor) -> tuple[Blocks, int]:
    def make() -> Blocks:
        moves = _CUDA.plan_moves(tiles.data_ptr(), out_tiles.data_ptr(), len(tiles), like.element_size())
        return Blocks(_upload(moves, like.device), len(moves) // _CUDA.MOVE_BYTES)

    return _made_of([tiles, out_tiles], like, make)


class _Call:
    """Addresses of a call's tensors, list after list, and where it runs: the current stream of ``device``.

    Args:
        tensors: in each list.
    """

    def __init__(self, device: torch.device, tensors: int = 0, pointers: Sequence[int] = ()) -> None:
        self.pointers = pointers
        many = len(pointers) > _CUDA.FEW  # more than go along with a launch
        self.room = torch.empty(len(pointers), dtype=torch.int64, device=device) if many else None
        room = 0 if self.room is None else self.room.data_ptr()
        self.target = _CUDA.Target(tensors, room, device.index or 0, kept.stream_of(device))

    @classmethod
    def of(cls, *lists: Sequence[Tensor]) -> _Call:
        """A call with these tensors."""
        pointers = [address for tensors in lists for address in map(Tensor.data_ptr, tensors)]
        return cls(lists[0][0].device, len(lists[0]), pointers)


def _room(like: Tensor, blocks: Blocks, slots: int, more: int = 0) -> Tensor:
    """Room for the slots of a reduction, which are 0 where it leaves no sum, and for ``more`` behind them."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    empty = torch.empty if blocks.named == slots else torch.zeros
    return empty(slots + more, dtype=dtype, device=like.device)


def channel_reduce(
    xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, f: str, p: float
) -> Tensor:
    """Return the row and column sums of ``f``: ``[slots]``."""
    like, call = xs[0], _Call.of(xs, ys)
    blocks, start = _blocks_of(tiles, like)
    out = _room(like, blocks, slots)
    workspace = out.new_empty(blocks.workspace)
    dtype, func = native.DTYPES[like.dtype], native.function(f, p)
    _CUDA.reduce(call.pointers, call.target, start, blocks.of, dtype, func, p, out.data_ptr(), workspace.data_ptr())
    return out


def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    """Add ``(coef[row] + coef[col]) * x`` to ``y``."""
    if not ys:
        return
    (blocks, start), call = _blocks_of(tiles, xs[0]), _Call.of(xs, ys)
    _CUDA.axpy(call.pointers, call.target, start, blocks.of, native.DTYPES[xs[0].dtype], coef.data_ptr())


def channel_scale_(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    """Multiply ``x`` by ``scale[row] * scale[col]``; a product of 0 writes 0 even over inf and nan."""
    if not xs:
        return
    (blocks, start), call = _blocks_of(tiles, xs[0]), _Call.of(xs)
    _CUDA.scale(call.pointers, call.target, start, blocks.of, native.DTYPES[xs[0].dtype], scale.data_ptr())


def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor
) -> None:
    """Copy the rows and columns that ``index`` keeps."""
    if not outs or not xs:
        return
    (blocks, start), call = _moves_of(tiles, out_tiles, xs[0]), _Call.of(outs, xs)
    index = index.to(xs[0].device)
    _CUDA.compact(call.pointers, call.target, start, blocks.of, xs[0].element_size(), index.data_ptr())


class Groups:
    """The slots of each channel of a table and the channels of each group, on the device.

    Args:
        runs: ``[n, 3]`` int64: a slot, its channel, and for how many slots both go on side by side.
        sizes: ``[groups]`` int64, channels of each group.
    """

    def __init__(
        self, tiles: Tensor, runs: Tensor, slots: int, sizes: Tensor, channels: int, device: torch.device
    ) -> None:
        self.tiles, self.channels, self.slots, self.device = tiles, channels, slots, device
        parts = _slots_by_channel(runs.numpy(), slots, sizes.numpy(), channels)
        self._memory = Upload.of(torch.from_numpy(np.concatenate(parts)), device)
        starts = self._memory.tensor.data_ptr() + 4 * np.cumsum([0, *map(len, parts[:-1])])
        self._native = _CUDA.Groups(*starts.tolist(), channels, len(sizes), slots)

    def here(self) -> Any:
        """What kernels on the current stream take."""
        if kept.is_capturing(self._memory.here().device):
            _captured[id(self)] = self
        return self._native


def _slots_by_channel(runs: IndexArray, slots: int, sizes: IndexArray, channels: int) -> list[NDArray[np.int32]]:
    """Where each channel's slots begin, these slots, each group's first channel, each slot's channel."""
    slot, channel = (_ranges(runs[:, i], runs[:, 2]) for i in (0, 1))
    order = np.lexsort((slot, channel))
    starts = np.searchsorted(channel[order], np.arange(channels + 1))
    of = np.full(slots, -1)
    of[slot] = channel
    return [part.astype(np.int32) for part in (starts, slot[order], np.append(0, np.cumsum(sizes)), of)]


def _summing(call: _Call, like: Tensor, groups: Groups, p: float) -> tuple[tuple[Any, ...], Tensor]:
    """What both calls below begin with: arguments of the kernels, and room for the sums of slots."""
    blocks, start = _blocks_of(groups.tiles, like)
    dtype, func = native.DTYPES[like.dtype], native.function("pow", p)
    arguments = call.pointers, call.target, start, blocks.of, dtype, func, p, groups.here()
    return arguments, _room(like, blocks, groups.slots, blocks.workspace)


def _compare(xs: Sequence[Tensor], known: Known, groups: Groups) -> None:
    if known.device != groups.device:
        raise UnknownError
    known.compare(xs)


def channel_totals(
    xs: Sequence[Tensor],
    known: Known,
    groups: Groups,
    p: float,
    divided: bool,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """Return the sums of ``|x|^p`` over channels ``[channels]``, if ``divided`` by their means over the groups.

    ``meanwhile`` is called while the device is at it.

    Raises:
        UnknownError: see :meth:`Known.compare`.
    """
    _compare(xs, known, groups)
    call = _Call.of(xs)
    arguments, slots = _summing(call, xs[0], groups, p)
    totals = slots.new_empty(groups.channels)
    _CUDA.totals(*arguments, divided, totals.data_ptr(), slots.data_ptr())
    if meanwhile is not None:
        meanwhile()
    return totals


def group_push(
    ys: Callable[[], tuple[Sequence[Tensor], Sequence[int]]],
    xs: Sequence[Tensor],
    known: Known,
    groups: Groups,
    p: float,
    alpha: float,
    strength: float,
    where: Tensor | None,
) -> None:
    """Add ``(gamma[row] + gamma[col]) * x`` to ``y``, for the ys and their places among the xs.

    The ys are asked for when the xs have been looked at.

    Raises:
        UnknownError: see :meth:`Known.compare`.
    """
    _compare(xs, known, groups)
    to = [0] * len(xs)
    held, places = ys()  # until they are handed over: their owner may let go of them, and others be given the memory
    for y, place in zip(held, places, strict=True):
        to[place] = y.data_ptr()
    call = _Call(xs[0].device, len(xs), [*map(Tensor.data_ptr, xs), *to])
    arguments, slots = _summing(call, xs[0], groups, p)
    values, chosen = slots.new_empty(groups.channels), 0 if where is None else where.data_ptr()
    _CUDA.push(*arguments, alpha, strength, chosen, values.data_ptr(), slots.data_ptr())


OPS = {
    "channel_reduce": channel_reduce,
    "channel_axpy_": channel_axpy_,
    "channel_scale_": channel_scale_,
    "channel_compact": channel_compact,
}
SHORTCUTS: dict[str, Callable[..., Any]] = {
    "grouping": Groups,
    "channel_totals": channel_totals,
    "group_push": group_push,
}
"""A few launches where the four ops and vectors of PyTorch would take dozens; see :mod:`pat_fast.ops.grouped`."""
