"""What a public op cannot see of its arguments while a graph is traced, looked at whenever the graph runs.

That is memory which is missing or shared, and the numbers in an index; all else a graph has guards for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pat_fast.backends.known import check_memory
from pat_fast.errors import OpError
from pat_fast.ops.memory import check_apart
from pat_fast.ops.tiles import COL, ROW, C, R

Row = Sequence[int]


def check_lists(rows: Sequence[Row], out_rows: Sequence[Row], index: Tensor) -> None:
    """Check the lists of kept rows and columns of a compaction; not while a CUDA graph is captured.

    Args:
        rows, out_rows: the entries of both tables.

    Raises:
        OpError: a list is not ascending, or out of bounds.
    """
    if index.is_meta or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    seen = {
        (target[start], target[size], source[size])
        for source, target in zip(rows, out_rows, strict=True)
        for size, start in ((R, ROW), (C, COL))
        if target[start] >= 0
    }
    # Waits for a GPU: a compaction is rare, and an index out of bounds would end the process.
    values = index.cpu().numpy()
    for start, size, bound in seen:
        kept = values[start : start + size]
        if size and (kept[0] < 0 or kept[-1] >= bound or (kept[1:] <= kept[:-1]).any()):
            raise OpError(
                f"expected ascending indices in [0, {bound}) at index[{start}:{start + size}]; got "
                f"{kept[:8].tolist()}{'...' if size > 8 else ''}"
            )


def _reduce(xs: Sequence[Tensor], ys: Sequence[Tensor], *_: object) -> None:
    check_memory("xs", xs)
    check_memory("ys", ys)


def _axpy(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    _reduce(xs, ys)
    check_memory("coef", [coef])
    check_apart("ys", ys, [*xs, coef])


def _scale(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    check_memory("xs", xs)
    check_memory("scale", [scale])
    check_apart("xs", xs, [scale])


def _compact(outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor) -> None:
    check_memory("outs", outs)
    check_memory("xs", xs)
    check_memory("index", [index])
    check_apart("outs", outs, [*xs, index])
    check_lists(tiles.tolist(), out_tiles.tolist(), index)


CHECKS: dict[str, Callable[..., None]] = {
    "channel_reduce": _reduce,
    "channel_axpy_": _axpy,
    "channel_scale_": _scale,
    "channel_compact": _compact,
}
"""For each op what takes its arguments and raises :class:`OpError`."""
