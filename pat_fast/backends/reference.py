"""The ops in plain PyTorch: dull, obviously right, on any device. Oracle of the tests and fallback.

Arguments are those of the op schemas; they were checked by the public wrappers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _view(x: Tensor, row: list[int]) -> Tensor:
    """Return the tile ``[R, C, K]`` of ``x`` that one row of a table describes."""
    _, offset, r, c, k, sr, sc, sk, _, _ = row
    return x.as_strided((r, c, k), (sr, sc, sk), x.storage_offset() + offset)


def _values(x: Tensor, y: Tensor | None, f: str, p: float) -> Tensor:
    """Return ``f`` of every element, in the accumulator dtype."""
    x = x.to(_accumulator(x.dtype))
    if f == "pow":
        return x.abs() if p == 1 else x.square() if p == 2 else x.abs().pow(p)
    assert y is not None
    xy = x * y.to(x.dtype)
    return {"mul": lambda: xy, "absmul": xy.abs, "sqmul": lambda: x * xy}[f]()


@torch.no_grad()
def channel_reduce(
    xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, f: str, p: float
) -> Tensor:
    """Return the row and column sums of ``f``: ``[slots]``."""
    like = xs[0] if xs else tiles
    out = torch.zeros(slots, dtype=_accumulator(like.dtype), device=like.device)
    for row in tiles.tolist():
        at, r, c, row_slot, col_slot = row[0], row[2], row[3], row[8], row[9]
        values = _values(_view(xs[at], row), _view(ys[at], row) if ys else None, f, p)
        if row_slot >= 0:
            out[row_slot : row_slot + r] = values.sum((1, 2))
        if col_slot >= 0:
            out[col_slot : col_slot + c] = values.sum((0, 2))
    return out


def _per_slot(slots: Tensor, row: list[int], default: float) -> tuple[Tensor, Tensor]:
    """Return the entries of ``slots`` for a tile's rows ``[R, 1, 1]`` and columns ``[1, C, 1]``."""
    r, c, row_slot, col_slot = row[2], row[3], row[8], row[9]
    missing = slots.new_full((1,), default)
    rows = slots[row_slot : row_slot + r] if row_slot >= 0 else missing
    cols = slots[col_slot : col_slot + c] if col_slot >= 0 else missing
    return rows.reshape(-1, 1, 1), cols.reshape(1, -1, 1)


@torch.no_grad()
def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    """Add ``(coef[row] + coef[col]) * x`` to ``y``."""
    for row in tiles.tolist():
        y, x = _view(ys[row[0]], row), _view(xs[row[0]], row)
        rows, cols = _per_slot(coef, row, 0.0)
        y.copy_(y.to(coef.dtype) + (rows + cols) * x.to(coef.dtype))


@torch.no_grad()
def channel_scale_(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    """Multiply ``x`` by ``scale[row] * scale[col]``; a product of 0 writes 0 even over inf and nan."""
    for row in tiles.tolist():
        x = _view(xs[row[0]], row)
        rows, cols = _per_slot(scale, row, 1.0)
        product = rows * cols
        x.copy_((x.to(scale.dtype) * product).masked_fill(product == 0, 0))


@torch.no_grad()
def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor
) -> None:
    """Copy the rows and columns that ``index`` keeps."""
    for source, target in zip(tiles.tolist(), out_tiles.tolist(), strict=True):
        kept = _view(xs[source[0]], source)
        r, c, row_list, col_list = target[2], target[3], target[8], target[9]
        if row_list >= 0:
            kept = kept.index_select(0, index[row_list : row_list + r].to(kept.device))
        if col_list >= 0:
            kept = kept.index_select(1, index[col_list : col_list + c].to(kept.device))
        _view(outs[target[0]], target).copy_(kept)


OPS = {
    "channel_reduce": channel_reduce,
    "channel_axpy_": channel_axpy_,
    "channel_scale_": channel_scale_,
    "channel_compact": channel_compact,
}
