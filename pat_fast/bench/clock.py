"""Timing calls on one device, from cold caches unless told otherwise."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NOISY = 0.3
"""Times whose quartiles lie farther apart than this share of their median are noise."""
EVICT_MEBIBYTES = {"cpu": 128, "cuda": 1024}
WARMUP = 3

Timed = Callable[[], object]
Prepare = Callable[[], Timed]
"""Called untimed before every run; returns the function to time."""


@dataclass(frozen=True)
class Sample:
    """Times of one call, in milliseconds."""

    times: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Their median."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """From the lower to the upper quartile (of fewer than four: from the least to the most), of the median."""
        if len(self.times) < 4:
            low, high = min(self.times), max(self.times)
        else:
            low, _, high = statistics.quantiles(self.times, n=4)
        return (high - low) / self.ms

    @property
    def is_noisy(self) -> bool:
        return self.spread > NOISY


class Clock:
    """Times calls; before each, a buffer larger than the caches is read.

    What a call returns is let go of when its time has been taken: who calls it keeps that.

    Args:
        rounds: timed calls of each function.
        mebibytes: size of that buffer; by default enough for the kind of device.
        cold: False: before each call of :meth:`compare` comes another, untimed, instead, which warms the caches.
    """

    def __init__(
        self, device: torch.device, rounds: int = 15, mebibytes: int | None = None, *, cold: bool = True
    ) -> None:
        self.device, self.rounds, self.cold = device, rounds, cold
        self.is_cuda = device.type == "cuda"
        size = mebibytes or EVICT_MEBIBYTES.get(device.type, 128)
        self._buffer: Tensor = torch.ones(size * 2**18, device=device)  # zeros may be one page, many times

    def evict(self) -> None:
        """Leave nothing in the caches that a timed call could find there, or would have to write back."""
        self._buffer.sum()

    @property
    def evict_bytes(self) -> int:
        """What that reads."""
        return self._buffer.numel() * self._buffer.element_size()

    def compare(self, sides: Mapping[str, Prepare], rounds: int | None = None) -> dict[str, Sample]:
        """Time all sides by the wall clock in turns, in changing order; a call ends when the device has ended."""
        times: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(1 + (rounds or self.rounds)):
            for name in list(sides) if i % 2 == 0 else reversed(list(sides)):
                run = sides[name]()
                gc.collect()
                if self.cold:
                    self.evict()
                else:
                    run()
                taken = self.wall(run)
                if i > 0:  # the first round warms up
                    times[name].append(taken)
                del run
        return {name: Sample(tuple(found)) for name, found in times.items()}

    def sample(self, run: Timed) -> Sample:
        """Time one function: on a GPU between two events, so that starting it costs nothing if the host is ahead."""
        for _ in range(WARMUP):
            run()
        times = []
        for _ in range(self.rounds):
            # While a GPU reads this, the host gets ahead of it.
            self.evict()
            times.append(self._events(run) if self.is_cuda else self.wall(run))
        return Sample(tuple(times))

    def replayed(self, run: Timed) -> Sample | None:
        """Time the replay of ``run`` captured in a CUDA graph: the device's time alone. None where that fails."""
        if not self.is_cuda:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            print(f"not captured: {error}", file=sys.stderr)
            return None
        return self.sample(graph.replay)

    def best(self, run: Timed, rounds: int) -> float:
        """Return the least milliseconds of several runs, caches as they are."""
        run()
        return min(self._events(run) if self.is_cuda else self.wall(run) for _ in range(rounds))

    def _events(self, run: Timed) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        kept = run()
        end.record()
        end.synchronize()
        del kept
        return start.elapsed_time(end)

    def wall(self, run: Timed) -> float:
        """Time one call by the wall clock, caches as they are; it ends when the device has ended: milliseconds."""
        self._wait()
        start = time.perf_counter()
        kept = run()
        self._wait()
        taken = (time.perf_counter() - start) * 1e3
        del kept
        return taken

    def _wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
