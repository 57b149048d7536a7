"""The figure of a result: for each model the share of the bandwidth that each operation of each backend reached."""

from __future__ import annotations

import importlib.util
from io import BytesIO
from pathlib import Path
from typing import Any

from ..errors import ConfigError, in_a_line
from ..style import INK, MUTED, plain
from .results import Result, Row, check_writable

COLOURS = {"reference": "#a9b2bb", "cpu": "#0b6fb8", "triton": "#d97a1d", "cuda": "#2a8a57"}
OTHERS = ("#7d5ba6", "#b8446c", "#4d6a00")
KINDS = (".png", ".svg", ".pdf")
COLUMNS = 2
HEAD = 1.25  # inches for what stands above the panels
BAR = 0.8  # of the distance between operations, for the bars of all backends together


def check_plot(path: Path) -> None:
    """Look whether the figure can be drawn and written; before an hour of measuring, not after.

    Raises:
        ConfigError: Matplotlib is missing or does not draw, or the file cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: expected Matplotlib to be installed, got none; pip install 'pat-fast[demo]'")
    if path.suffix not in KINDS:
        raise ConfigError(f"--plot: expected a file name that ends in {', '.join(KINDS)}, got {str(path)!r}")
    try:
        from matplotlib.figure import Figure

        Figure().savefig(BytesIO(), format=path.suffix[1:])
    except Exception as error:  # MPLBACKEND names none that there is, an installation is broken
        raise ConfigError(f"--plot: expected Matplotlib to draw, got {in_a_line(error)}") from None
    check_writable(path, "--plot")


def draw(result: Result, path: Path) -> None:
    """Draw a result to ``path``; without pyplot, which keeps global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in result.rows:
        if row.share is not None:
            panels.setdefault(f"{row.name}, {row.dtype}", []).append(row)
    columns = min(COLUMNS, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    bars = max((len(rows) for rows in panels.values()), default=1)
    height = HEAD + lines * (0.95 + 0.27 * max(3, bars))
    figure = Figure(figsize=(6.6 * columns, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0, 1, 1 - HEAD / height))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    backends = list(dict.fromkeys(row.backend for rows in panels.values() for row in rows))
    spare = iter(OTHERS * len(backends))
    colours = {name: COLOURS[name] if name in COLOURS else next(spare) for name in backends}
    for axis, (title, rows) in zip(axes, panels.items(), strict=False):
        _panel(axis, rows, colours)
        axis.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    for axis in axes[len(panels) :]:
        axis.axis("off")
    _head(figure, height, result, colours)
    figure.savefig(path)


def _panel(axis: Any, rows: list[Row], colours: dict[str, str]) -> None:
    """One model: a bar for each backend at every operation, with what was reached written beside it."""
    from matplotlib.ticker import PercentFormatter

    plain(axis, lines="x")
    ops = list(dict.fromkeys(row.op for row in rows))
    for place, op in enumerate(ops):
        of_op = [row for row in rows if row.op == op]
        height = BAR / len(of_op)
        for i, row in enumerate(of_op):
            assert row.share is not None
            y = place - BAR / 2 + (i + 0.5) * height
            hatch = "///" if row.is_noisy else None
            look = {"color": colours[row.backend], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axis.barh(y, row.share, 0.92 * min(height, 0.4), **look)
            label = axis.text(row.share + 0.012, y, _label(row), va="center", color=MUTED, fontsize=8)
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.4})
    axis.axvline(1.0, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(ops)), ops, color=INK, fontsize=9)
    axis.set_ylim(len(ops) - 0.5, -0.5)
    axis.set_xlim(0, 1.45)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _label(row: Row) -> str:
    assert row.gbps is not None
    parts = [f"{row.share:.0%}", f"{row.gbps:.2g} GB/s" if row.gbps < 1 else f"{row.gbps:.3g} GB/s"]
    return ", ".join([*parts, f"{row.ratio:.3g}x Torch-Pruning"] if row.ratio is not None else parts)


def _head(figure: Any, height: float, result: Result, colours: dict[str, str]) -> None:
    """The machine, its bandwidth, what speaks against the numbers, and the colours, a line each."""
    from matplotlib.patches import Patch

    def line(inches: float, text: str, **look: Any) -> None:
        figure.text(0.1 / figure.get_figwidth(), 1 - inches / height, text, va="center", **look)

    machine = result.machine
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, threads: {machine['threads']}"
    rates = ", ".join(f"{kind} {rate:.3g} GB/s" for kind, rate in result.bandwidth.items())
    line(0.2, f"Share of the memory bandwidth: {name}", color=INK, fontsize=13)
    line(0.46, f"of what the memory delivered in the same run: {rates}", color=MUTED, fontsize=9)
    if result.disturbed:
        line(0.7, f"disturbed, do not quote: {'; '.join(result.disturbed)}", color="#b3261e", fontsize=9)
    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if any(row.is_noisy for row in result.rows):
        handles.append(Patch(facecolor="#d5dbe1", hatch="///", edgecolor="white", label="noisy"))
    at = (0.0, 1 - 1.12 / height)
    figure.legend(handles=handles, loc="lower left", bbox_to_anchor=at, ncols=len(handles), frameon=False, fontsize=9)
