"""How far the latency that a target goes by is from whole models that are measured.

    python -m benchmarks.latency [--models resnet20 resnet50] [--device cpu] [--cpu-time] [--json out.json]

For each model, copies that lost random channels (other ones, and other shares of every group, than those that the model
of latency was made with) are timed and compared with what was predicted for them. `--cpu-time` counts the seconds that
the process ran, for machines where others run beside it; with one thread and nobody else it is the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.zoo import ZOO
from pat_fast.latency import LatencyModel, model, table
from pat_fast.limits import Rules
from pat_fast.models import resnet20
from pat_fast.plan import bind, build_plan
from pat_fast.selection import select
from pat_fast.targets import Goal, Target

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (8, 1, 32, 32)),
    "resnet50": (ZOO["resnet50"].build, (1, 3, 224, 224)),
    "mobilenet_v2": (ZOO["mobilenet_v2"].build, (1, 3, 224, 224)),
}


def compare(name: str, device: torch.device, round_to: Any, trials: int) -> dict[str, Any]:
    """Predicted and measured milliseconds of ``trials`` smaller copies of a model."""
    torch.manual_seed(0)
    build, shape = MODELS[name]
    net, inputs = build().to(device).eval(), torch.randn(shape, device=device)
    binding = bind(build_plan(net, inputs), net)
    plan = binding.plan
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    goal = Goal(Target("latency", 0.5, shape[0]), None, Rules("local", round_to))
    start = time.perf_counter()
    goal.start(binding, everything, inputs)
    built = time.perf_counter() - start
    latency = goal.latency
    assert isinstance(latency, LatencyModel)
    rows = []
    for trial in range(trials):
        rng = np.random.default_rng(100 + trial)
        shares = {g.root: rng.uniform(0.1, 0.8) for g in plan.groups}
        sizes = {g.root: g.channels for g in plan.groups}
        keep = select(
            plan,
            rng.random(plan.n_channels),
            everything,
            lambda root, shares=shares, sizes=sizes: int(sizes[str(root)] * shares[str(root)]),  # type: ignore[misc]
            goal.limits,
        )
        measured = model._measure([model._smaller(binding, keep)], inputs, device)[0]
        predicted, by_macs = latency.predict(plan, keep), latency.dense * plan.macs(keep) / plan.macs()
        rows.append({"predicted": predicted, "measured": measured, "by_macs": by_macs, "macs": plan.macs(keep)})
    off = np.array([abs(r["predicted"] / r["measured"] - 1) for r in rows])
    off_macs = np.array([abs(r["by_macs"] / r["measured"] - 1) for r in rows])
    print(f"{name} {shape}, round_to={round_to}: dense {latency.dense:.2f} ms, tables in {built:.1f} s")
    for r in rows:
        share = r["macs"] / plan.macs()
        print(f"  predicted {r['predicted']:8.2f} ms  measured {r['measured']:8.2f} ms  {share:.0%} of MACs")
    print(f"  off by {off.mean():.1%} in the mean, {off.max():.1%} at most; by MACs {off_macs.mean():.0%}")
    return {"model": name, "round_to": round_to, "dense_ms": latency.dense, "seconds": built, "rows": rows}


def main() -> None:
    """Compare, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet50"], choices=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.cpu_time:
        table.clock = time.process_time
    found = []
    for name in given.models:
        for round_to in (None, "auto"):
            found.append(compare(name, torch.device(given.device), round_to, given.trials))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"machine": table.machine(torch.device(given.device)), "models": found}, file, indent=1)


if __name__ == "__main__":
    main()
