"""The four ops as ``torch.library`` knows them: for each its schema, then its fake.

The contract of each op stands in :mod:`pat_fast.ops.functional`; nothing here validates. ``checked`` says that whoever
calls has looked at all that :mod:`pat_fast.ops.at_run` would look at.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = "pat_fast"
LIB = torch.library.Library(NAMESPACE, "DEF")
# A table speaks of strides, so a compiler must hand over tensors exactly as they were traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums, coefficients and scales of ``dtype`` tensors are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


LIB.define(
    "channel_reduce(Tensor[] xs, Tensor[] ys, Tensor tiles, int slots, str f, float p, *, bool checked=False) "
    "-> Tensor",
    tags=_TAGS,
)


@torch.library.register_fake(f"{NAMESPACE}::channel_reduce", lib=LIB)
def _(
    xs: list[Tensor], ys: list[Tensor], tiles: Tensor, slots: int, f: str, p: float, *, checked: bool = False
) -> Tensor:
    like = xs[0] if xs else tiles
    return like.new_empty(slots, dtype=accumulator(like.dtype))


LIB.define(
    "channel_axpy_(Tensor(a!)[] ys, Tensor[] xs, Tensor tiles, Tensor coef, *, bool checked=False) -> ()", tags=_TAGS
)


@torch.library.register_fake(f"{NAMESPACE}::channel_axpy_", lib=LIB)
def _(ys: list[Tensor], xs: list[Tensor], tiles: Tensor, coef: Tensor, *, checked: bool = False) -> None:
    return None


LIB.define("channel_scale_(Tensor(a!)[] xs, Tensor tiles, Tensor scale, *, bool checked=False) -> ()", tags=_TAGS)


@torch.library.register_fake(f"{NAMESPACE}::channel_scale_", lib=LIB)
def _(xs: list[Tensor], tiles: Tensor, scale: Tensor, *, checked: bool = False) -> None:
    return None


LIB.define(
    "channel_compact(Tensor(a!)[] outs, Tensor[] xs, Tensor tiles, Tensor out_tiles, Tensor index, *, "
    "bool checked=False) -> ()",
    tags=_TAGS,
)


@torch.library.register_fake(f"{NAMESPACE}::channel_compact", lib=LIB)
def _(
    outs: list[Tensor], xs: list[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor, *, checked: bool = False
) -> None:
    return None


OPS = ("channel_reduce", "channel_axpy_", "channel_scale_", "channel_compact")
