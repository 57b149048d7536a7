"""The plot of a run: accuracy and MACs over the epochs, dense against pruned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .runlog import Record, human
from .style import INK, MUTED, plain

COLOURS = {"dense": "#8a94a0", "pruned": "#0b6fb8"}
STAGES = {
    "regularize": ("#eaf5f3", "regularise"),
    "prune": ("#fff3dc", "prune"),
    "finetune": ("#edf1fb", "fine-tune"),
}
SPLITS = {"val": "validation", "test": "test"}


def plot_run(records: Sequence[Record], path: Path, *, title: str, subtitle: str = "") -> None:
    """Draw ``records`` to the PNG file ``path``; without pyplot, which keeps global state."""
    figure = Figure(figsize=(8.4, 6.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    twins = {name: [r for r in records if r.twin == name] for name in ("dense", "pruned")}
    twins = {name: found for name, found in twins.items() if found}
    for axis in (upper, lower):
        plain(axis)
        _shade_stages(axis, twins.get("pruned", []))
    _draw_accuracy(upper, twins)
    _draw_macs(lower, twins)
    _name_stages(upper, twins.get("pruned", []))
    lower.set_xlabel("epoch", color=MUTED)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    first = max(len(found) for found in twins.values())
    lower.set_xlim(0.5, first + 0.5)
    figure.align_ylabels()
    upper.set_title(subtitle, loc="left", pad=24, color=MUTED, fontsize=10.5)
    _beside(upper, title, (0.0, 1.0), offset=42, ha="left", color=INK, fontsize=13, fontweight="bold")
    figure.savefig(path)


def _draw_accuracy(axis: Any, twins: dict[str, list[Record]]) -> None:
    for name, found in twins.items():
        label = f"{name}, {found[-1].accuracy:.1%} at the end"
        axis.plot(
            [r.epoch for r in found],
            [r.accuracy for r in found],
            color=COLOURS[name],
            label=label,
            **_line(name),
        )
    split = next(iter(twins.values()))[0].split
    axis.set_ylabel(f"{SPLITS[split]} accuracy", color=MUTED)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axis.set_ylim(top=1.005)
    axis.legend(loc="lower right", frameon=False, labelcolor="linecolor", fontsize=10)


def _draw_macs(axis: Any, twins: dict[str, list[Record]]) -> None:
    dense_macs = max(record.macs for found in twins.values() for record in found)
    for name, found in twins.items():
        last = found[-1]
        share = f" ({last.macs / dense_macs:.0%} of dense)" if name == "pruned" and dense_macs else ""
        label = f"{name}, {human(last.macs)}{share}"
        # A prune happens between two epochs: a step, not a slope.
        axis.step(
            [r.epoch for r in found],
            [r.macs for r in found],
            where="mid",
            color=COLOURS[name],
            label=label,
            **_line(name, marker=False),
        )
    axis.set_ylabel("MACs per image", color=MUTED)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_ylim(0, 1.12 * dense_macs)
    axis.legend(loc="lower left", frameon=False, labelcolor="linecolor", fontsize=10)


def _tick(value: float) -> str:
    """A tick's label, as short as it can be: ``10M`` rather than ``10.0M``."""
    text = human(value)
    number, unit = text.rstrip("kMGT"), text.lstrip("-0123456789.")
    return f"{float(number):g}{unit}"


def _line(name: str, marker: bool = True) -> dict[str, Any]:
    front = name == "pruned"
    look: dict[str, Any] = {"linewidth": 2.2 if front else 1.8, "zorder": 4 if front else 3}
    if marker:
        look |= {"marker": "o", "markersize": 3.6, "markeredgewidth": 0}
    return look


def _spans(records: Sequence[Record]) -> list[tuple[str, float, float]]:
    """(stage, first, last) of each run of epochs in one stage, from edge to edge."""
    spans = []
    for stage, group in groupby(records, key=lambda record: record.stage):
        members = list(group)
        spans.append((stage, members[0].epoch - 0.5, members[-1].epoch + 0.5))
    return spans


def _shade_stages(axis: Any, records: Sequence[Record]) -> None:
    for stage, start, end in _spans(records):
        if stage in STAGES:
            axis.axvspan(start, end, color=STAGES[stage][0], linewidth=0, zorder=0)


def _name_stages(axis: Any, records: Sequence[Record]) -> None:
    for stage, start, end in _spans(records):
        if stage in STAGES:
            middle = ((start + end) / 2, 1.0)
            _beside(axis, STAGES[stage][1], middle, offset=4, ha="center", color=MUTED, fontsize=9.5, x="data")


def _beside(
    axis: Any, text: str, at: tuple[float, float], *, offset: float, x: str = "axes fraction", **style: Any
) -> None:
    """Write ``text`` ``offset`` points above ``at``, whose height is a fraction of the axis."""
    axis.annotate(text, at, xycoords=(x, "axes fraction"), xytext=(0, offset), textcoords="offset points", **style)
