"""Glue to the CUDA kernels: cuts tables into blocks once, then hands over addresses.

Arguments are those of the op schemas; they were checked by the public wrappers. A call starts a fixed
number of kernels on the current stream, waits for nothing, and takes its working memory from PyTorch's
allocator, so it can be captured in a CUDA graph. The one thing that a capture cannot do is to bring a
table to the device: each table needs one call before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pat_fast.backends import kept, native
from pat_fast.backends.kept import Kept

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

    ``memory`` holds them as bytes: ``count`` for the pass over the tensors, then, from ``second`` on,
    ``second_count`` for the pass over partial sums, of which there are ``workspace``.
    """

    memory: Tensor
    stream: int
    count: int
    second: int = 0
    second_count: int = 0
    workspace: int = 0


_made: Kept[Blocks] = Kept()
# Graphs refer to these by address, whatever becomes of the table.
_captured: dict[int, Blocks] = {}


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _upload(data: bytes, device: torch.device) -> Tensor:
    # Waits for the copy, once per table: from then on every stream may read it.
    return torch.frombuffer(bytearray(data or bytes(16)), dtype=torch.uint8).to(device)


def _made_of(tables: Sequence[Tensor], like: Tensor, make: Callable[[], Blocks]) -> Blocks:
    """Return the blocks of tables over tensors like ``like``, ready for the current stream."""
    blocks = _made.of(tables, like.device, like.element_size(), make)
    if kept.is_capturing(like.device):
        _captured[id(blocks)] = blocks
    elif blocks.stream != _stream(like.device):
        blocks.memory.record_stream(torch.cuda.current_stream(like.device))
    return blocks


def _blocks_of(tiles: Tensor, like: Tensor) -> Blocks:
    def make() -> Blocks:
        works, gathers, workspace = _CUDA.plan(tiles.data_ptr(), len(tiles), like.element_size())
        count, second_count = len(works) // _CUDA.WORK_BYTES, len(gathers) // _CUDA.GATHER_BYTES
        memory = _upload(works + gathers, like.device)
        return Blocks(memory, _stream(like.device), count, len(works), second_count, workspace)

    return _made_of([tiles], like, make)


def _moves_of(tiles: Tensor, out_tiles: Tensor, like: Tensor) -> Blocks:
    def make() -> Blocks:
        moves = _CUDA.plan_moves(tiles.data_ptr(), out_tiles.data_ptr(), len(tiles), like.element_size())
        count = len(moves) // _CUDA.MOVE_BYTES
        return Blocks(_upload(moves, like.device), _stream(like.device), count)

    return _made_of([tiles, out_tiles], like, make)


class _Call:
    """Addresses of the tensors of a call, room for them on the device, and where it runs."""

    def __init__(self, *lists: Sequence[Tensor]) -> None:
        device = lists[0][0].device
        self.pointers = [t.data_ptr() for tensors in lists for t in tensors]
        self.room = torch.empty(len(self.pointers), dtype=torch.int64, device=device)
        self.target = _CUDA.Target(len(lists[0]), self.room.data_ptr(), device.index or 0, _stream(device))


def channel_reduce(
    xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, f: str, p: float
) -> Tensor:
    """Return the row and column sums of ``f``: ``[slots]``."""
    dtype = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    out = torch.zeros(slots, dtype=dtype, device=xs[0].device)
    blocks = _blocks_of(tiles, xs[0])
    call = _Call(xs, ys)
    workspace = torch.empty(blocks.workspace, dtype=dtype, device=out.device)
    start = blocks.memory.data_ptr()
    _CUDA.reduce(
        call.pointers,
        call.target,
        start,
        blocks.count,
        start + blocks.second,
        blocks.second_count,
        native.DTYPES[xs[0].dtype],
        native.function(f, p),
        p,
        out.data_ptr(),
        workspace.data_ptr(),
    )
    return out


def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    """Add ``(coef[row] + coef[col]) * x`` to ``y``."""
    if not ys:
        return
    blocks, call = _blocks_of(tiles, ys[0]), _Call(ys, xs)
    _CUDA.axpy(
        call.pointers,
        call.target,
        blocks.memory.data_ptr(),
        blocks.count,
        native.DTYPES[ys[0].dtype],
        coef.data_ptr(),
    )


def channel_scale_(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    """Multiply ``x`` by ``scale[row] * scale[col]``; a product of 0 writes 0 even over inf and nan."""
    if not xs:
        return
    blocks, call = _blocks_of(tiles, xs[0]), _Call(xs)
    _CUDA.scale(
        call.pointers,
        call.target,
        blocks.memory.data_ptr(),
        blocks.count,
        native.DTYPES[xs[0].dtype],
        scale.data_ptr(),
    )


def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor
) -> None:
    """Copy the rows and columns that ``index`` keeps."""
    if not outs or not xs:
        return
    blocks, call = _moves_of(tiles, out_tiles, xs[0]), _Call(outs, xs)
    index = index.to(xs[0].device)
    _CUDA.compact(
        call.pointers,
        call.target,
        blocks.memory.data_ptr(),
        blocks.count,
        xs[0].element_size(),
        index.data_ptr(),
    )


OPS = {
    "channel_reduce": channel_reduce,
    "channel_axpy_": channel_axpy_,
    "channel_scale_": channel_scale_,
    "channel_compact": channel_compact,
}
