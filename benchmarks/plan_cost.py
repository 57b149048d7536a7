"""What a plan and its proof cost, beside Torch-Pruning's graph and groups and beside what no plan can do without.

    python -m benchmarks.plan_cost [models ...] [--rounds 8] [--threads 1] [--cpu-time] [--small] [--json out.json]

Models are those of the zoo. For each, in turns in one process:

- ``forward``: the model on its example inputs, in eval mode without gradients, no more;
- ``hooked``: what lowering cannot do without: the forward with zeros in the place of large products, under a dispatch
  mode, one function around all modules and, but for layers that run one op, a function mode that do nothing else;
- ``lowering``: ``pat_fast.plan.build_plan``, the plan without its proof;
- ``sums``: what the proof cannot do without: two forwards of as small a model on as small inputs, with nothing of ours
  around them (three and a backward where a statistic of channels is written out in the model's code);
- ``proven``: ``pat_fast.build_plan``, the plan with its proof;
- ``torch-pruning``: ``build_dependency`` and ``list(get_all_groups())``; none if they fail, or take longer than
  ``--patience`` seconds.

Times are medians of ``--rounds``, in milliseconds (the least of them go to the JSON file, too). ``--cpu-time`` counts
the seconds that the process ran, for machines where others run beside it; with one thread and nobody else it is the
same.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pat_fast as pat
from benchmarks.zoo import ZOO
from pat_fast.bench.subject import at_most, differentiable, quiet
from pat_fast.errors import in_a_line
from pat_fast.latency import table
from pat_fast.plan import Plan
from pat_fast.plan import build_plan as lower
from pat_fast.plan.hollow import Hollow
from pat_fast.plan.layers import is_plain
from pat_fast.plan.outputs import fixed_outputs
from pat_fast.plan.running import Still, call, calls_made_by
from pat_fast.proof import smaller_inputs
from pat_fast.rehearsal import Rehearsal

COLUMNS = ("forward", "hooked", "lowering", "sums", "proven", "torch-pruning")


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    """Lowering's mode without labels."""

    def __init__(self) -> None:
        super().__init__()
        self._hollow = Hollow()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._hollow.run(func, args, kwargs)
        out = self._hollow.skip(func, args, kwargs) if out is None else out
        return func(*args, **kwargs) if out is None else out


def hooked(model: nn.Module, inputs: Any) -> None:
    """A forward as lowering runs it, with nothing done on the way."""
    still = Still(model)

    def through(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = still.of_one_op.get(id(module))
        if run is None or not is_plain(args, kwargs):
            return module._call_impl(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return run(module, args[0])

    with torch.enable_grad(), calls_made_by(model.modules(), through), _Functions(), _Ops():
        call(model, inputs)


def sums(plan: Plan, model: nn.Module, inputs: Any, clock: Callable[[], float]) -> float:
    """Seconds that the arithmetic of the proof takes: that of the smaller model, as often as it takes it."""
    smaller = smaller_inputs(inputs)
    rehearsal = Rehearsal(plan, model, [smaller] * (smaller is not None) + [inputs], 0)
    few = rehearsal.few(0)
    written_out = np.array([g.statistic is not None for g in plan.groups], dtype=np.bool_)[plan.group_of]
    rounds = [(few, 2, False)]
    if not rehearsal.by_norms:
        rounds = [(few | written_out, 2, False), (few, 1, True)]
    taken = 0.0
    for keep, times, backward in rounds:
        with rehearsal.made(keep):
            for example in rehearsal.inputs:  # the first that the model takes
                try:
                    call(model, example)
                    break
                except Exception:
                    continue
            start = clock()
            for _ in range(times):
                with torch.set_grad_enabled(backward):
                    out = call(model, example)
            if backward:
                sum(t.float().sum() for t in fixed_outputs(out)).backward()
            taken += clock() - start
    return taken


def torch_prunings(model: nn.Module, inputs: Any, patience: float) -> None:
    """Torch-Pruning's graph and groups."""
    with quiet(), at_most(patience, "Torch-Pruning"):
        graph = tp.DependencyGraph().build_dependency(model, inputs, output_transform=differentiable)
        list(graph.get_all_groups())


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The times of one model: least and median of each column, in milliseconds."""
    torch.manual_seed(0)
    entry = ZOO[name]
    model, inputs = (entry.small() if given.small else entry.build()).eval(), entry.example(given.small)
    clock = time.process_time if given.cpu_time else time.perf_counter
    plan = lower(model, inputs)

    def timed(run: Callable[[], object]) -> Callable[[], float]:
        def once() -> float:
            start = clock()
            run()
            return clock() - start

        return once

    def forward() -> None:
        with torch.no_grad():
            call(model, inputs)

    columns: dict[str, Callable[[], float]] = {
        "forward": timed(forward),
        "hooked": timed(lambda: hooked(model, inputs)),
        "lowering": timed(lambda: lower(model, inputs)),
        "sums": lambda: sums(plan, model, inputs, clock),
        "proven": timed(lambda: pat.build_plan(model, inputs)),
        "torch-pruning": timed(lambda: torch_prunings(model, inputs, given.patience)),
    }
    times: dict[str, list[float]] = {column: [] for column in columns}
    problem = ""
    for turn in range(given.rounds + 1):  # the first warms up
        for column in list(columns):
            gc.collect()
            try:
                taken = columns[column]()
            except Exception as error:
                if column != "torch-pruning":
                    raise
                problem = in_a_line(error)
                del columns[column]
                continue
            if turn:
                times[column].append(taken * 1e3)
    least = {column: min(found) if found and column in columns else math.nan for column, found in times.items()}
    median = {c: statistics.median(found) if found and c in columns else math.nan for c, found in times.items()}
    notes = [note for note in pat.build_plan(model, inputs).notes if "verified" in note]
    return {"model": name, "ms": least, "median": median, "problem": problem, "notes": notes}


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    ms, least = found["median"], found["ms"]
    ratios = [of["torch-pruning"] / of["proven"] for of in (ms, least)]
    cells = [f"{ms[column]:.1f}" if ms[column] == ms[column] else "none" for column in COLUMNS]
    cells += [f"{ratio:.2f}" if ratio == ratio else "none" for ratio in ratios]
    cells.append(f"{ms['proven'] / ms['forward']:.1f}")
    return f"| {found['model']} | " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(ZOO)}; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--small", action="store_true", help="small models: does it all run?")
    parser.add_argument("--json")
    given = parser.parse_args(argv)
    unknown = sorted(set(given.models) - set(ZOO))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    torch.set_num_threads(given.threads)
    header = ("model", *COLUMNS, "ratio", "of the least", "forwards")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    found = []
    for name in given.models or ZOO:
        found.append(measure(name, given))
        print(row(found[-1]), flush=True)
    print("\nratio: torch-pruning / proven, of the medians, then of the least times; forwards: proven / forward")
    for each in found:
        if each["problem"]:
            print(f"{each['model']}: Torch-Pruning: {each['problem']}")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"machine": table.machine(torch.device("cpu")), "models": found}, file, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
