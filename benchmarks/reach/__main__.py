"""`python -m benchmarks.reach`: which families of the installed ``transformers`` pat_fast prunes, and how far."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.reach.models import KINDS, families
from benchmarks.reach.report import closing, reasons_table, table
from benchmarks.reach.runner import run


def main(argv: Sequence[str] | None = None) -> int:
    """Probe the families, print the tables; 1 if any family failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reach", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, as in transformers' auto mappings")
    parser.add_argument("--kind", choices=sorted(KINDS))
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the units of every group (default 0.3)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each family (default 60)")
    parser.add_argument("--jobs", type=int, default=2, help="families at a time (default 2)")
    parser.add_argument("--json", type=Path, help="also write all rows here, with errors' tracebacks")
    args = parser.parse_args(argv)

    chosen = families()
    if args.kind:
        chosen = [f for f in chosen if f.kind in KINDS[args.kind]]
    if args.only:
        unknown = sorted(set(args.only) - {f.name for f in chosen})
        if unknown:
            parser.error(f"no such families: {', '.join(unknown)}; known are {', '.join(f.name for f in chosen)}")
        chosen = [f for f in chosen if f.name in args.only]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows = []
    for row in run(chosen, args.ratio, args.timeout, args.jobs):
        rows.append(row)
        print(f"{len(rows)}/{len(chosen)} {row.family}: {row.status} {row.detail}", file=sys.stderr, flush=True)
    order = {f.name: i for i, f in enumerate(chosen)}
    rows.sort(key=lambda row: order[row.family])
    packages = {name: version(name) for name in ("transformers", "torch")}
    print(", ".join(f"{name} {number}" for name, number in packages.items()))
    print(f"\n{table(rows)}\n\n{reasons_table(rows)}\n\n{closing(rows, args.ratio)}")
    if args.json:
        result = {"packages": packages, "ratio": args.ratio, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
