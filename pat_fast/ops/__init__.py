"""The four ops on which every pruning operation rests; see :mod:`pat_fast.ops.functional`."""

from __future__ import annotations

from pat_fast.ops.functional import channel_axpy_, channel_compact, channel_reduce, channel_scale_
from pat_fast.ops.register import register
from pat_fast.ops.schema import accumulator
from pat_fast.ops.tiles import NONE, Tile, TileTable

__all__ = [
    "NONE",
    "Tile",
    "TileTable",
    "accumulator",
    "channel_axpy_",
    "channel_compact",
    "channel_reduce",
    "channel_scale_",
]

register()
