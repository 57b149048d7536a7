"""`python -m benchmarks.run`: one table of pat_fast against Torch-Pruning."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.cases import CASES, MODELS, Subject
from benchmarks.common import Bandwidth, Row, measure, table, with_share
from benchmarks.zoo import ZOO


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if any case failed its equality test."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(ZOO), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--ops", nargs="+", choices=sorted(CASES), default=list(CASES), metavar="OP")
    parser.add_argument(
        "--rounds", type=int, default=15, help="interleaved runs (default 15; steps take a third)"
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds: a glance, not a result")
    parser.add_argument(
        "--small", action="store_true", help="the zoo's small models: checks that it all works"
    )
    parser.add_argument("--json", type=Path, help="also write rows, bandwidth and machine here")
    args = parser.parse_args(argv)

    rounds = 3 if args.quick else args.rounds
    bandwidth = Bandwidth()
    machine = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_pruning": version("torch-pruning"),
        "pat_fast": version("pat_fast"),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    rows: list[Row] = []
    left_out: list[str] = []
    for name in args.models:
        try:
            subject = Subject(name, small=args.small)
        except Exception as error:  # e.g. a model that Torch-Pruning cannot trace
            rows.append(Row("all", name, "", "", problem=f"{type(error).__name__}: {error}"))
            continue
        for op in args.ops:
            rows.append(measure(CASES[op](subject), bandwidth, rounds))
            print(f"{op} {name}: {rows[-1].problem or 'done'}", file=sys.stderr, flush=True)
        left_out += [f"{name}: {root}" for root in subject.unmatched]
    rows = [with_share(row, bandwidth) for row in rows]
    print(table(rows))
    print(f"\nbandwidth: {bandwidth}")
    if left_out:
        print("\ngroups of Torch-Pruning that our plan does not have alike, left out on both sides:")
        print("\n".join(f"  {line}" for line in left_out))
    if args.json:
        result = {"machine": machine, "bandwidth": bandwidth.rates, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row.problem for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
