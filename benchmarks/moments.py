"""A step of `pat-fast bench` where neighbours use the memory too: from the moments in which it is as fast as asked.

    python -m benchmarks.moments MODEL importance|regularize [--least GBPS] [--seconds S] [--small]

Before and after each call a buffer larger than the caches is read, as the benchmark does before; a call counts if both
times that went at no less than ``--least``. Ours, a plain pass of PyTorch over as many bytes, and Torch-Pruning's
(which counts if the memory was as fast before it: it takes longer than many a moment), after both were found to have
the same result. Medians, and how many calls they are of.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from itertools import count

import torch

from pat_fast.bench import machine
from pat_fast.bench.bandwidth import Bandwidth
from pat_fast.bench.clock import Clock, Timed
from pat_fast.bench.models import find
from pat_fast.bench.results import Mismatch
from pat_fast.bench.steps import STEPS, Step
from pat_fast.bench.subject import Subject
from pat_fast.errors import PatError

OPS = ("importance", "regularize")  # which can be called again and again
EACH = 4
"""Calls of ours and of the plain pass for one of Torch-Pruning's."""


class Moments:
    """Calls in turns, each with the rate at which memory was read around it, in GB/s."""

    def __init__(self, step: Step, least: float) -> None:
        self._clock, self._least = Clock(torch.device("cpu")), least
        plain = Bandwidth(self._clock).plain(step.moved())
        assert plain is not None  # on a CPU there is one
        self._sides: dict[str, Timed] = {"ours": step.ours(), "plain": plain, "Torch-Pruning": step.theirs()}
        self.times: dict[str, list[float]] = {name: [] for name in self._sides}
        for run in self._sides.values():
            run()

    def _rate(self) -> float:
        return self._clock.evict_bytes / self._clock.wall(self._clock.evict) / 1e6

    def gather(self, seconds: float) -> None:
        """Call them in turns for so long, each once at least, whether it counts or not.

        What is called seldom takes half as long again.

        As in the benchmark garbage is collected before each: what Torch-Pruning leaves would slow it down.
        """
        end = time.monotonic() + seconds
        for turn in count():
            if turn and time.monotonic() >= end:
                break
            for name, run in self._sides.items():
                theirs = name == "Torch-Pruning"
                if theirs and turn % EACH:
                    continue
                gc.collect()
                before, taken, after = self._rate(), self._clock.wall(run), self._rate()
                if before >= self._least and (theirs or after >= self._least):
                    self.times[name].append(taken)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--least", type=float, default=0.0, metavar="GBPS")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args(arguments)
    try:
        network, inputs = find(chosen.model, (), {}, chosen.small).build()
        step = STEPS[chosen.op](Subject(chosen.model, network, inputs))
        step.check()
    except (PatError, Mismatch) as error:
        raise SystemExit(f"error: {error}") from None
    moments = Moments(step, chosen.least)
    moments.gather(chosen.seconds)
    here = machine.describe(torch.device("cpu"))
    print(f"{here['date']}, {here['cpu']}, {here['cores']} cores, {here['threads']} threads, {here['versions']}")
    if not all(moments.times.values()):
        raise SystemExit(f"no such moments: {', '.join(f'{n} {len(t)}' for n, t in moments.times.items())}")
    found = {name: statistics.median(times) for name, times in moments.times.items()}
    told = ", ".join(f"{name} {ms:.3f} ms ({len(moments.times[name])})" for name, ms in found.items())
    ratio, most = (found["Torch-Pruning"] / found[name] for name in ("ours", "plain"))
    print(f"{chosen.model} {chosen.op} at {chosen.least:g} GB/s or more: {told}; {ratio:.1f}x, most {most:.1f}x")


if __name__ == "__main__":
    main()
