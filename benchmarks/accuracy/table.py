"""The finished cells as a table (Markdown and JSON), a verdict and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pat_fast.bench.machine import describe
from pat_fast.style import INK, MUTED, plain

from .tasks import TASKS

Record = dict[str, Any]


def rows(records: Iterable[Record]) -> list[Record]:
    """One row for each task, method and ratio: means over seeds, and how far the accuracy spreads."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["ratio"], record["method"]), []).append(record)
    found = []
    for (task, ratio, method), cells in groups.items():
        good = [cell for cell in cells if "error" not in cell]
        row: Record = {"task": task, "ratio": ratio, "method": method, "seeds": len(good), "epochs": cells[0]["epochs"]}
        row["errors"] = sorted({cell["error"] for cell in cells if "error" in cell})
        if good:
            accuracy = [cell["accuracy"] for cell in good]
            row |= {
                "accuracy": statistics.fmean(accuracy),
                "spread": statistics.stdev(accuracy) if len(good) > 1 else 0.0,
                "macs": statistics.fmean(cell["macs"] / cell["dense_macs"] for cell in good),
                "params": statistics.fmean(cell["params"] / cell["dense_params"] for cell in good),
                "seconds": statistics.fmean(cell["seconds"] for cell in good),
                "cpu_seconds": statistics.fmean(cell["cpu_seconds"] for cell in good),
                "peak_mb": statistics.fmean(cell["peak_mb"] for cell in good),
            }
        found.append(row)
    order = list(TASKS)
    return sorted(found, key=lambda row: (order.index(row["task"]), row["ratio"]))


def verdicts(table: Sequence[Record]) -> list[Record]:
    """pat_fast's default beside the best of Torch-Pruning, for each task and ratio that has both.

    Within the spread: the means differ by no more than the root of the summed variances of the two.
    """
    found = []
    for task, ratio in dict.fromkeys((row["task"], row["ratio"]) for row in table):
        here = {row["method"]: row for row in table if (row["task"], row["ratio"]) == (task, ratio) and row["seeds"]}
        theirs = [row for name, row in here.items() if name.startswith("tp ")]
        if "pat" not in here or not theirs:
            continue
        ours, best = here["pat"], max(theirs, key=lambda row: row["accuracy"])
        spread = (ours["spread"] ** 2 + best["spread"] ** 2) ** 0.5
        difference = ours["accuracy"] - best["accuracy"]
        verdict: Record = {"task": task, "ratio": ratio, "best_tp": best["method"], "difference": difference}
        verdict |= {"spread": spread, "holds": difference >= -spread}
        same = here.get("tp iterative")
        verdict |= {"seconds": ours["cpu_seconds"], "tp_seconds": same["cpu_seconds"] if same else None}
        found.append(verdict)
    return found


def times_faster(found: Sequence[Record]) -> str:
    """How many times the CPU time of pat_fast Torch-Pruning takes for the same recipe, over these verdicts."""
    both = [one for one in found if one["tp_seconds"] is not None]
    if not both:
        return "-"
    return f"{sum(one['tp_seconds'] for one in both) / sum(one['seconds'] for one in both):.2f}x"


def markdown(table: Sequence[Record], quick: bool) -> str:
    """The table for people."""
    lines = []
    if quick:
        lines += ["Quick: a subset of the cells, with fewer seeds and epochs than the full run.", ""]
    head = "| task | MACs | method | accuracy | MACs left | parameters left | s | CPU s | peak MB | seeds |"
    lines += [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for row in table:
        start = f"| {TASKS[row['task']].title} | {fewer(row['ratio'])} | {row['method']} |"
        if not row["seeds"]:
            lines.append(f"{start} failed: {row['errors'][0]} | | | | | | 0 |")
            continue
        lines.append(
            f"{start} {row['accuracy']:.2%} ± {100 * row['spread']:.2f} | {row['macs']:.1%} | {row['params']:.1%} | "
            f"{row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_mb']:.0f} | {row['seeds']} |"
        )
    found = verdicts(table)
    if found:
        lines += ["", "| task | MACs | pat - best of Torch-Pruning | which | spread | | tp iterative / pat, CPU time |"]
        lines.append("|---|---|---|---|---|---|---|")
    for one in found:
        faster = times_faster([one])
        lines.append(
            f"| {TASKS[one['task']].title} | {fewer(one['ratio'])} | {100 * one['difference']:+.2f} points | "
            f"{one['best_tp']} | {100 * one['spread']:.2f} | {'holds' if one['holds'] else '**worse**'} | {faster} |"
        )
    if len(found) > 1:
        lines.append(f"| all | | | | | | {times_faster(found)} |")
    return "\n".join(lines) + "\n"


def fewer(ratio: float) -> str:
    """`4x fewer`, or `dense`."""
    return "dense" if ratio == 1 else f"{ratio:g}x fewer"


def plot(table: Sequence[Record], path: Path) -> None:
    """Accuracy over MACs, a panel for each task, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in table))
    methods = list(dict.fromkeys(row["method"] for row in table if row["method"] != "dense"))
    figure = Figure(figsize=(4.4 * len(tasks) + 1.6, 3.8), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axis, task in zip(axes, tasks, strict=True):
        plain(axis)
        for number, method in enumerate(methods):
            here = [r for r in table if (r["task"], r["method"]) == (task, method) and r["seeds"]]
            aside = 1 + 0.02 * (number - len(methods) / 2)  # so that error bars stand beside each other
            x = [aside / row["macs"] for row in here]
            y, spread = ([100 * row[key] for row in here] for key in ("accuracy", "spread"))
            style = "--" if method.startswith("tp ") else "-"
            axis.errorbar(x, y, spread, label=method, linestyle=style, marker="o", markersize=3, capsize=2)
        for row in table:
            if row["task"] == task and row["method"] == "dense" and row["seeds"]:
                axis.axhline(100 * row["accuracy"], color=MUTED, linewidth=1, label="dense")
        axis.set_title(TASKS[task].title, loc="left", color=INK, fontsize=10)
        axis.set_xlabel("times fewer MACs", color=MUTED)
        axis.set_xscale("log")
        axis.set_xticks([2, 4, 8], ["2", "4", "8"])
        axis.minorticks_off()
    axes[0].set_ylabel("test accuracy, %", color=MUTED)
    axes[-1].legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def write(records: Sequence[Record], out: Path, quick: bool) -> str:
    """Write `table.json`, `table.md` and `plot.png` to `out`; returns the Markdown."""
    table = rows(records)
    text = markdown(table, quick)
    device = torch.device(records[0].get("device", "cpu") if records else "cpu")
    found = {"quick": quick, "machine": describe(device), "rows": table, "verdicts": verdicts(table)}
    (out / "table.json").write_text(json.dumps(found, indent=1))
    (out / "table.md").write_text(text)
    if any(row["seeds"] and row["method"] != "dense" for row in table):
        plot(table, out / "plot.png")
    return text
