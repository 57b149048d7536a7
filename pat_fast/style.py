"""What the figures share: colours, and axes without ornaments."""

from __future__ import annotations

from typing import Any

INK, MUTED, GRID = "#1f2933", "#66727f", "#d5dbe1"


def plain(axis: Any, lines: str = "y") -> None:
    """A frame without sides, and pale lines at the ticks of one axis."""
    axis.grid(axis=lines, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#b8c0c8")
    axis.tick_params(colors=MUTED, length=0)
