"""`python -m benchmarks.accuracy.own [TASK ...]`: what pat_fast costs in a training, and what it could gain without.

CPU seconds of one thread, seed 0, the epochs of the full run: a training by `pat`; what of it is spent in the pruner's
construction, hooks and prunes; the same recipe by `tp iterative`. The last column is what the ratio would be for a
pruner that costs nothing: no other reaches more with this recipe.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, on the clock
from torch.optim import Optimizer

from .__main__ import FULL
from .recipes import start
from .tasks import TASKS

RATIOS = (2, 4, 8)


class Meter:
    """Adds up the CPU time of functions; of calls within calls, the outer ones'."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            self._depth += 1
            try:
                return run(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.process_time() - begun

        return measured


def train(task: str, method: str, ratio: float, meter: Meter) -> float:
    """CPU seconds of a training; what of it is the pruner's goes to the meter."""
    torch.manual_seed(0)
    TASKS[task].data()
    begun = time.process_time()
    run, finish = meter.around(start)(TASKS[task], method, ratio, 0, FULL[task][0])
    if run.after_epoch is not None:
        run.after_epoch = meter.around(run.after_epoch)
    run.train()
    meter.around(finish)()
    return time.process_time() - begun


def measured_hooks(register: Callable[..., Any], meter: Meter) -> Callable[..., Any]:
    """`register`, a method of optimizers, with the hooks that it is given measured."""
    return lambda optimizer, hook: register(optimizer, meter.around(hook))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.own", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(FULL)} (all)")
    tasks = parser.parse_args(argv).tasks or list(FULL)
    unknown = [task for task in tasks if task not in FULL]
    if unknown:
        parser.error(f"TASK: expected names out of {', '.join(FULL)}; got {', '.join(unknown)}")
    torch.set_num_threads(1)
    meter = Meter()
    # The pruner's part in every step are its hooks on the optimizer's.
    for name in ("register_step_pre_hook", "register_step_post_hook"):
        setattr(Optimizer, name, measured_hooks(getattr(Optimizer, name), meter))
    sums = [0.0, 0.0, 0.0]
    print("| task | MACs | pat | of it its own | tp iterative | times | without its own |")
    print("|---|---|---|---|---|---|---|")

    def line(name: str, macs: str, ours: float, own: float, theirs: float) -> None:
        print(
            f"| {name} | {macs} | {ours:.2f} | {own:.2f} ({own / ours:.0%}) | {theirs:.2f} | {theirs / ours:.2f} | "
            f"{theirs / (ours - own):.2f} |",
            flush=True,
        )

    for task in tasks:
        train(task, "pat", RATIOS[0], Meter())  # warms up
        for ratio in RATIOS:
            meter.seconds = 0.0
            ours = train(task, "pat", ratio, meter)
            own = meter.seconds
            theirs = train(task, "tp iterative", ratio, Meter())
            sums = [a + b for a, b in zip(sums, (ours, own, theirs), strict=True)]
            line(TASKS[task].title, f"{ratio}x fewer", ours, own, theirs)
    line("all", "", *sums)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
