"""Tiles in every memory layout, inside a larger buffer whose other elements must never change."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from pat_fast.ops import NONE, Tile, TileTable

ORDERS = tuple("".join(order) for order in itertools.permutations("rck"))
"""Axes from the farthest apart to the nearest: rck is a plain weight, rkc channels_last, crk transposed."""
SIZES = ((1, 1, 1), (1, 5, 3), (5, 1, 9), (2, 3, 2), (17, 3, 1), (3, 17, 9), (5, 2, 70), (64, 129, 1))
SLOTS = ("both", "rows", "cols", "none")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SENTINEL = 42.0


@dataclass
class Made:
    """A tensor ``x`` of shape ``[R, C, K]`` inside the flat buffer ``base``, and its tile."""

    base: Tensor
    x: Tensor
    sizes: tuple[int, int, int]
    strides: tuple[int, int, int]

    def tile(self, slots: str, start: int = 0, tensor: int = 0) -> Tile:
        """Return the tile whose slots are ``slots`` (one of SLOTS), from slot ``start`` on."""
        row = start if slots in ("both", "rows") else NONE
        col = start + (self.sizes[0] if slots == "both" else 0) if slots in ("both", "cols") else NONE
        return Tile(tensor, 0, self.sizes, self.strides, row, col)

    def table(self, slots: str = "both", start: int = 0, length: int | None = None) -> TileTable:
        return TileTable.from_tiles([self.x], [self.tile(slots, start)], length)

    def twin(self, fill: float | None = None) -> Made:
        """Return another tensor of the same layout: a copy, or filled with ``fill``."""
        base = self.base.clone()
        x = base.as_strided(self.sizes, self.strides, self.x.storage_offset())
        if fill is not None:
            x.fill_(fill)
        return Made(base, x, self.sizes, self.strides)

    def outside(self) -> Tensor:
        """Return the elements of the buffer that are not in the tensor."""
        inside = torch.zeros(self.base.shape, dtype=torch.bool, device=self.base.device)
        inside.as_strided(self.sizes, self.strides, self.x.storage_offset()).fill_(True)
        return self.base[~inside]


def make(
    sizes: tuple[int, int, int],
    order: str = "rck",
    gap: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Made:
    """Make a random tensor with its axes in ``order`` and ``gap`` unused elements after every run."""
    step, steps = 1, {}
    for axis in reversed(order):
        steps[axis] = step
        step = step * sizes["rck".index(axis)] + gap
    strides = (steps["r"], steps["c"], steps["k"])
    margin = 3
    values = torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    base = torch.full((step + 2 * margin,), SENTINEL, dtype=dtype, device=device)
    x = base.as_strided(sizes, strides, margin)
    x.copy_(values)
    return Made(base, x, sizes, strides)
