"""What the memory of a device delivers, measured in the run that is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ..ops import Tile, TileTable, channel_axpy_, channel_reduce, channel_scale_
from .clock import Clock, Timed

DRIFT = 0.3
"""Rates that fall by more than this share, from the best to the worst look at them, are told of."""
MEBIBYTES = {"cpu": 256, "cuda": 1024}


PLAIN: dict[str, tuple[str, int, Callable[[Tensor, Tensor], object]]] = {
    "copy": ("Tensor.copy_", 2, lambda x, y: y.copy_(x)),
    "read": ("torch.sum", 1, lambda x, y: x.sum()),
    "scale": ("Tensor.mul_", 2, lambda x, y: y.mul_(0.999)),
    "axpy": ("Tensor.add_", 3, lambda x, y: y.add_(x, alpha=1e-6)),
}
"""For each kind of traffic PyTorch's op of two buffers: its name, and how often the bytes of one buffer count."""


class Bandwidth:
    """Best rates that this process reached on buffers larger than any cache, GB/s (1e9 bytes) by kind of traffic.

    Counted are the bytes that the operation names: n for a read, 2n for a copy and for ``x *= s``, 3n for
    ``y += a * x``. PyTorch's ops and pat_fast's compete. A GPU's other rates are not looked at: all is held against
    its copy.

    Args:
        mebibytes: size of each of the two buffers; by default enough for the kind of device.

    Attributes:
        rates: best rate by kind: "copy", and on the CPU "read", "scale" and "axpy".
        winners: the function that reached it.
    """

    def __init__(self, clock: Clock, mebibytes: int | None = None) -> None:
        self.rates: dict[str, float] = {}
        self.winners: dict[str, str] = {}
        self._clock = clock
        self._seen: dict[str, list[float]] = {}
        rows = (mebibytes or MEBIBYTES.get(clock.device.type, 256)) * 256
        x = torch.ones(rows, 1024, device=clock.device)
        y = torch.zeros_like(x)
        self._x, self._y = x.view(-1), y.view(-1)
        n = x.numel() * x.element_size()
        self._candidates: list[tuple[str, str, int, Timed]] = [
            (kind, name, times * n, partial(op, x, y))
            for kind, (name, times, op) in PLAIN.items()
            if kind == "copy" or not clock.is_cuda
        ]
        if not clock.is_cuda:
            tiles = TileTable.from_tiles([x], [Tile(0, 0, (rows, 1024, 1), (1024, 1, 1), 0, rows)])
            coef = torch.full((tiles.slots,), 1e-6)
            scale = torch.full((tiles.slots,), 1 + 1e-6)  # not 1: that would not be work
            self._candidates += [
                ("read", "torch.amax", n, x.amax),
                ("read", "torch.dot", n, lambda: torch.dot(x.view(-1), x.view(-1))),
                ("read", "channel_reduce", n, lambda: channel_reduce([x], tiles)),
                ("scale", "channel_scale_", 2 * n, lambda: channel_scale_([y], tiles, scale)),
                ("axpy", "channel_axpy_", 3 * n, lambda: channel_axpy_([y], [x], tiles, coef)),
            ]
        self.probe(rounds=5)

    def kind(self, traffic: str) -> str:
        """The kind of traffic that an operation is held against."""
        return traffic if traffic in self.rates else "copy"

    def probe(self, rounds: int = 1) -> None:
        """Time every candidate; better rates replace the known ones.

        Called before every case, so that one busy moment does not lower the peak.
        """
        best: dict[str, float] = {}
        for kind, name, moved, run in self._candidates:
            rate = moved / self._clock.best(run, rounds) / 1e6
            best[kind] = max(rate, best.get(kind, 0.0))
            if rate > self.rates.get(kind, 0.0):
                self.rates[kind], self.winners[kind] = rate, name
        for kind, rate in best.items():
            self._seen.setdefault(kind, []).append(rate)

    def plain(self, moved: Mapping[str, int]) -> Timed | None:
        """PyTorch's own way to move as many bytes of each kind in float32, over one buffer and with nothing else to do.

        None on a GPU, where all is held against the copy.
        """
        if self._clock.is_cuda:
            return None
        parts: list[Timed] = []
        for kind, bytes_moved in moved.items():
            _, times, op = PLAIN[kind]
            n = bytes_moved // (4 * times)
            for start in range(0, n, len(self._x)):
                size = min(len(self._x), n - start)
                parts.append(partial(op, self._x[:size], self._y[:size]))

        def run() -> None:
            for part in parts:
                part()

        return run

    def drift(self) -> str:
        """Say so if what memory delivers changed while this process measured: others use it, unseen by the cores."""
        ranges = {kind: (min(rates), max(rates)) for kind, rates in self._seen.items()}
        moved = [f"{k} {low:.1f} to {high:.1f} GB/s" for k, (low, high) in ranges.items() if low < (1 - DRIFT) * high]
        return f"the memory was not the same all along: {', '.join(moved)}; shares are of the best" if moved else ""

    def __str__(self) -> str:
        return ", ".join(f"{k} {r:.1f} GB/s ({self.winners[k]})" for k, r in self.rates.items())
