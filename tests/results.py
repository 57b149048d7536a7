"""The outcome of a run of tests as JSON, for whoever was not there: ``pytest --json=FILE``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pat_fast.bench.machine import describe
from pat_fast.errors import in_a_line

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def write(path: Path, stats: Mapping[str, Sequence[Any]], exit_code: int) -> None:
    """Write ``exit_code``, ``counts`` by outcome, ``tests`` and ``machine``.

    Args:
        stats: the reports that pytest's terminal reporter gathered, by outcome.
    """
    found = {outcome: list(stats.get(outcome, ())) for outcome in OUTCOMES}
    tests = [_test(report, outcome) for outcome, reports in found.items() for report in reports]
    result = {
        "exit_code": int(exit_code),
        "counts": {outcome: len(reports) for outcome, reports in found.items()},
        "tests": sorted(tests, key=lambda test: test["test"]),
        "machine": _machine(),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _test(report: Any, outcome: str) -> dict[str, Any]:
    """``seconds`` are those of the phase that the report is of; ``why`` is a line, None where all went well."""
    why = report.longrepr
    if isinstance(why, (tuple, list)):  # of a skip: file, line, reason
        why = why[-1]
    line = str(getattr(why, "reprcrash", None) or why or "").strip().splitlines()[-1:]
    seconds = round(getattr(report, "duration", 0.0), 4)  # a module that was not collected has none
    return {"test": report.nodeid, "outcome": outcome, "seconds": seconds, "why": line[0] if line else None}


def _machine() -> dict[str, Any]:
    try:
        return describe(torch.device("cuda" if torch.cuda.device_count() else "cpu"))
    except Exception as error:  # of a GPU that failed, and the results say how
        return {"problem": in_a_line(error)}
