"""Measuring: interleaved timings, the machine's bandwidth, rows and the table they make.

A row carries a ratio only if its case's equality test passed first on the very inputs that are timed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pat_fast.ops import Tile, TileTable, channel_axpy_, channel_reduce

NOISY = 1.5
"""A row whose upper and lower quartile differ by more than this factor is marked as noisy."""

Timed = Callable[[], object]
Prepare = Callable[[], Timed]
"""Called untimed before every run; returns the function to time."""


class Mismatch(Exception):
    """pat_fast and Torch-Pruning disagree on the same inputs: there is nothing to compare."""


@dataclass(frozen=True)
class Case:
    """One operation on one model, done by both.

    Attributes:
        op: "importance", "regularize" or "step".
        model: name in the zoo.
        groups: what was compared, e.g. "35/36": groups that both know, of Torch-Pruning's.
        traffic: which bandwidth bounds the operation: "read", "copy" or "axpy".
        check: compares results and returns the bytes that any implementation must move; raises `Mismatch`.
        tp: prepares a run of Torch-Pruning.
        ours: prepares a run of pat_fast.
        slow: prepared anew for every run, at some cost: measure fewer rounds.
    """

    op: str
    model: str
    groups: str
    traffic: str
    check: Callable[[], int]
    tp: Prepare
    ours: Prepare
    slow: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, rates in GB/s (1e9 bytes).

    Without equality only `problem` is set.
    """

    op: str
    model: str
    groups: str
    traffic: str
    problem: str = ""
    tp_ms: float | None = None
    ours_ms: float | None = None
    ratio: float | None = None
    gbps: float | None = None
    peak_gbps: float | None = None
    share: float | None = None
    noisy: bool = False


class Bandwidth:
    """Best rates that this process reached on buffers larger than any cache, GB/s by kind of traffic.

    Counted are the bytes that the operation names: n for a read, 2n for a copy, 3n for `y += a * x`.
    PyTorch's ops and pat_fast's compete; `probe` is called before every case, so that one busy moment does
    not lower the peak.

    Args:
        mebibytes: size of each of the two buffers.

    Attributes:
        rates: best rate for "read", "copy" and "axpy".
        winners: the function that reached it.
    """

    def __init__(self, mebibytes: int = 256) -> None:
        self.rates: dict[str, float] = {}
        self.winners: dict[str, str] = {}
        rows = mebibytes * 256
        x = torch.ones(rows, 1024)
        y = torch.zeros_like(x)
        n = x.numel() * x.element_size()
        tiles = TileTable.from_tiles([x], [Tile(0, 0, (rows, 1024, 1), (1024, 1, 1), 0, rows)])
        coef = torch.full((tiles.slots,), 1e-6)
        self.candidates: list[tuple[str, str, int, Timed]] = [
            ("read", "torch.sum", n, x.sum),
            ("read", "torch.amax", n, x.amax),
            ("read", "torch.dot", n, lambda: torch.dot(x.view(-1), x.view(-1))),
            ("read", "channel_reduce", n, lambda: channel_reduce([x], tiles)),
            ("copy", "Tensor.copy_", 2 * n, lambda: y.copy_(x)),
            ("axpy", "Tensor.add_", 3 * n, lambda: y.add_(x, alpha=1e-6)),
            ("axpy", "channel_axpy_", 3 * n, lambda: channel_axpy_([y], [x], tiles, coef)),
        ]
        self.probe(rounds=5)

    def probe(self, rounds: int = 1) -> None:
        """Time every candidate; better rates replace the known ones."""
        for kind, name, moved, run in self.candidates:
            run()
            rate = moved / min(_seconds(run) for _ in range(rounds)) / 1e9
            if rate > self.rates.get(kind, 0.0):
                self.rates[kind], self.winners[kind] = rate, name

    def __str__(self) -> str:
        return ", ".join(f"{k} {r:.1f} GB/s ({self.winners[k]})" for k, r in self.rates.items())


def _seconds(run: Timed) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Evictor:
    """Writes a buffer larger than the caches, so that neither side finds the other's data there."""

    def __init__(self, mebibytes: int = 128) -> None:
        self.buffer: Tensor = torch.zeros(mebibytes * 2**18)

    def __call__(self) -> None:
        self.buffer.add_(1.0)


def interleave(
    first: Prepare, second: Prepare, rounds: int, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Run both alternately, in changing order, with cold caches; seconds of each round."""
    evict = Evictor()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(warmup + rounds):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            run = (first, second)[side]()
            gc.collect()
            evict()
            seconds = _seconds(run)
            if i >= warmup:
                times[side].append(seconds)
            del run
    return times


def _spread(times: list[float]) -> float:
    if len(times) < 4:
        return max(times) / min(times)
    low, _, high = statistics.quantiles(times, n=4)
    return high / low


def measure(case: Case, bandwidth: Bandwidth, rounds: int) -> Row:
    """Check a case, then time it: medians of interleaved runs. A case that fails its check gets no times."""
    row = Row(case.op, case.model, case.groups, case.traffic)
    try:
        moved = case.check()
    except Mismatch as problem:
        return replace(row, problem=str(problem))
    except Exception as error:  # either side may fail on a model: that is a finding, not the end of the run
        return replace(row, problem=f"{type(error).__name__}: {error}")
    bandwidth.probe()
    tp, ours = interleave(case.tp, case.ours, max(3, rounds // 3) if case.slow else rounds)
    tp_s, ours_s = statistics.median(tp), statistics.median(ours)
    return with_share(
        replace(
            row,
            tp_ms=tp_s * 1e3,
            ours_ms=ours_s * 1e3,
            ratio=tp_s / ours_s,
            gbps=moved / ours_s / 1e9,
            noisy=max(_spread(tp), _spread(ours)) > NOISY,
        ),
        bandwidth,
    )


def with_share(row: Row, bandwidth: Bandwidth) -> Row:
    """The row with its share of the bandwidth as known now."""
    if row.gbps is None:
        return row
    peak = bandwidth.rates[row.traffic]
    return replace(row, peak_gbps=peak, share=row.gbps / peak)


HEADER = ("operation", "model", "groups", "TP ms", "pat_fast ms", "ratio", "GB/s", "share of bandwidth")


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.op, row.model, row.groups)
    if row.ratio is None or row.share is None:
        return (*start, f"not compared: {row.problem}", "", "", "", "")
    share = f"{row.share:.0%} of {row.traffic} {row.peak_gbps:.1f}" + ("  (noisy)" if row.noisy else "")
    return (
        *start,
        f"{row.tp_ms:.1f}",
        f"{row.ours_ms:.2f}",
        f"{row.ratio:.1f}x",
        f"{row.gbps:.1f}",
        share,
    )


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text; a row without a ratio says why."""
    lines = [HEADER, *(_cells(row) for row in rows)]
    # A problem is a sentence: it may run over the columns that it leaves empty.
    widths = [max(len(c[i]) for c in lines if c[-1] or i < 3) for i in range(len(HEADER))]
    out = []
    for cells in lines:
        left = [c.ljust(w) for c, w in zip(cells[:3], widths[:3], strict=True)]
        if cells[-1]:
            right = [c.rjust(w) for c, w in zip(cells[3:7], widths[3:7], strict=True)]
            out.append("  ".join([*left, *right, cells[7]]))
        else:
            out.append("  ".join([*left, cells[3]]))
    return "\n".join(out)
