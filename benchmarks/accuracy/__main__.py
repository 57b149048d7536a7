"""`python -m benchmarks.accuracy [--quick] [--out DIR]`: train the cells that are not finished, make the table."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

from pat_fast.bench.run import device_of
from pat_fast.errors import ConfigError

from .cell import Cell, tell
from .recipes import METHODS
from .table import write
from .tasks import TASKS

# One thread a cell: small networks gain nothing from two, and two cells at once share the cores evenly.
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
FEW = ("dense", "tp one-shot", "tp iterative", "pat")
SOME = ("tp one-shot local", "pat mask", "pat soft", "pat hybrid", "pat taylor", "pat linear", "pat no-reg")
# Epochs, and the methods of the full run. The ViT learns slowly.
FULL: dict[str, tuple[int, Sequence[str]]] = {
    "resnet20-digits8": (15, (*FEW, *SOME)),
    "vit-digits8": (25, FEW),
    "mobilenet-digits16": (15, (*FEW, "tp one-shot local")),
    "resnet20-photos": (8, FEW),
}
QUICK = {"resnet20-digits8": 10, "vit-digits8": 20, "mobilenet-digits16": 10}


def full() -> list[Cell]:
    """Three seeds of everything. Ablations are made on the first task alone."""
    return [
        cell
        for task, (epochs, methods) in FULL.items()
        for cell in grid([task], methods, (2, 4, 8), range(3), epochs)
    ]


def quick() -> list[Cell]:
    """A subset for five minutes: the main methods, two ratios, fewer epochs."""
    return [cell for task, epochs in QUICK.items() for cell in grid([task], FEW, (2, 8), range(3), epochs)]


def grid(
    tasks: Iterable[str], methods: Sequence[str], ratios: Iterable[float], seeds: Iterable[int], epochs: int
) -> list[Cell]:
    """All combinations; the dense network once, at ratio 1."""
    ratios, seeds = list(ratios), list(seeds)
    return [
        Cell(task, method, ratio, seed, epochs)
        for task in tasks
        for seed in seeds
        for method in methods
        for ratio in ([1] if method == "dense" else ratios)
    ]


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a results file by the key of their cell; a line that was cut off is passed over."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[Cell(**{name: record[name] for name in Cell.__dataclass_fields__ if name in record}).key] = record
    return found


def run_all(cells: Sequence[Cell], path: Path, jobs: int) -> None:
    """Run what is not finished, `jobs` at a time, each in a process of its own; append a line for each."""
    known = finished(path)
    waiting = [cell for cell in cells if cell.key not in known or "error" in known[cell.key]]
    waiting.sort(key=lambda cell: cell.seed)  # a run that is cut short has finished seeds
    if path.exists() and not path.read_text().endswith("\n"):
        path.write_text(path.read_text() + "\n")  # a line that was cut off
    lock, begun, count = Lock(), time.perf_counter(), [0]

    def one(cell: Cell) -> None:
        record = run_one(cell)
        with lock, path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            count[0] += 1
            said = record.get("error") or f"{record['accuracy']:.2%}, {record['seconds']:.0f} s"
            minutes = (time.perf_counter() - begun) / 60
            print(f"[{count[0]}/{len(waiting)}, {minutes:.1f} min] {cell.key}: {said}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, waiting))


def run_one(cell: Cell, timeout: float = 1800) -> dict[str, Any]:
    """The record of a cell; with `error`, the last line that it said, if it failed.

    Each has a process of its own, forked from one that has imported what it needs.
    """
    os.environ.update(ALONE)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.accuracy.cell", "torch_pruning"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(cell, send))
    process.start()
    send.close()
    try:
        if not receive.poll(timeout):
            return asdict(cell) | {"error": f"took more than {timeout:.0f} s"}
        record: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        return asdict(cell) | {"error": f"exit status {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a subset of the cells, for five minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder for results (runs/accuracy)")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (2)")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="(0 1 2)")
    parser.add_argument("--ratios", nargs="+", type=float, help="times fewer MACs (2 4 8)")
    parser.add_argument("--epochs", type=int, help="for every task")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu); on a GPU with --jobs 1")
    args = parser.parse_args(argv)
    try:
        device_of(args.device)
    except ConfigError as error:
        parser.error(str(error))
    cells = quick() if args.quick else full()
    if args.methods or args.seeds or args.ratios or args.epochs or args.tasks:
        cells = []
        for task in args.tasks or list(TASKS):
            epochs = args.epochs or (QUICK.get(task, 10) if args.quick else FULL[task][0])
            ratios = [int(r) if r == int(r) else r for r in args.ratios or (2, 4, 8)]
            cells += grid([task], args.methods or FEW, ratios, args.seeds or range(3), epochs)
    cells = [replace(cell, device=args.device) for cell in cells]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "cells.jsonl"
    run_all(cells, path, args.jobs)
    known = finished(path)
    records = [known[cell.key] for cell in cells if cell.key in known]
    print(write(records, args.out, quick=args.quick))
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
