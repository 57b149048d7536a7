"""Making tensors, some at a time, so that the first can be written while others are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..backends.native import empty_strided_cpu

FIRST, MOST = 8, 64
"""How many are made at first, for what waits for them, and later: each time costs a call."""


def fresh(
    xs: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    outs: list[Tensor],
    *,
    watched: bool,
) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
    """Append to ``outs`` a tensor for each of ``xs``, of their dtype and device; yield parts of both.

    Args:
        watched: whether modes must see how they are made.
    """
    # No name here for what is new: the traceback of an error would keep it.
    like = xs[0]
    dtype, device = like.dtype, like.device
    kinds: tuple[Iterator[Any], ...] = ()
    make: Any = partial(torch.empty_strided, dtype=dtype, device=device)
    if empty_strided_cpu is not None and device.type == "cpu" and not watched:
        make, kinds = empty_strided_cpu, (repeat(dtype),)  # two thirds of the time of those of many more arguments
    elif type(like) is Tensor:
        make = like.new_empty_strided
    at, some = 0, FIRST
    while at < len(xs):
        part = slice(at, at + some)
        outs += map(make, shapes[part], strides[part], *kinds)
        yield outs[part], xs[part]
        at, some = at + some, min(2 * some, MOST)
