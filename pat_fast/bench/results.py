"""A result: rows, the machine and its bandwidth, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .bandwidth import Bandwidth
from .clock import NOISY, Sample

FORMAT = 1


class Mismatch(Exception):
    """Two results on the same inputs differ: there is nothing to compare."""


@dataclass(frozen=True)
class Row:
    """One operation on one model; times in ms (medians), rates in GB/s (1e9 bytes).

    Attributes:
        op: a kernel ("channel_reduce") or an operation of pruning ("importance").
        backend: the kernels that ran, or "+" between several.
        layout: "contiguous" or "channels_last".
        traffic: the kind of bandwidth that ``share`` is a share of.
        problem: why there are no numbers at all.
        spread: distance of the quartiles, as a share of the median.
        plain_ms: PyTorch's own time for as many bytes in one buffer, in turns with the call (:meth:`Bandwidth.plain`).
        graph_ms: the same call replayed from a CUDA graph; ``graph_share`` likewise.
        tp_ms: Torch-Pruning's time for the same; None if there is nothing to compare with.
        ratio: ``tp_ms / ms``, only after the results were found equal.
        no_ratio: why there is no ratio although the operation is one of Torch-Pruning's.
        differs: the results differ; ``no_ratio`` or ``problem`` says by how much.
        groups: compared groups, of all groups of Torch-Pruning.
        extra: other numbers, by name.
    """

    model: str
    op: str
    dtype: str
    backend: str
    layout: str = "contiguous"
    traffic: str = ""
    problem: str = ""
    ms: float | None = None
    spread: float | None = None
    gbps: float | None = None
    peak_gbps: float | None = None
    share: float | None = None
    plain_ms: float | None = None
    graph_ms: float | None = None
    graph_share: float | None = None
    tp_ms: float | None = None
    tp_spread: float | None = None
    ratio: float | None = None
    no_ratio: str = ""
    differs: bool = False
    groups: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model, and its memory layout if it is not the usual one."""
        return self.model if self.layout == "contiguous" else f"{self.model} {self.layout}"

    @property
    def is_noisy(self) -> bool:
        return max(self.spread or 0.0, self.tp_spread or 0.0) > NOISY

    @property
    def most(self) -> float | None:
        """The ratio of an implementation that takes no longer than PyTorch's plain pass over as many bytes."""
        return self.tp_ms / self.plain_ms if self.tp_ms and self.plain_ms else None

    def timed(self, sample: Sample, moved: int, plain: Sample | None = None, graph: Sample | None = None) -> Row:
        """The row with the times of a call that moves ``moved`` bytes."""
        return replace(
            self,
            ms=sample.ms,
            spread=sample.spread,
            gbps=moved / sample.ms / 1e6,
            plain_ms=plain.ms if plain else None,
            graph_ms=graph.ms if graph else None,
        )

    def against(self, theirs: Sample) -> Row:
        """The row with Torch-Pruning's times for an equal result."""
        assert self.ms is not None
        return replace(self, tp_ms=theirs.ms, tp_spread=theirs.spread, ratio=theirs.ms / self.ms)

    def held_against(self, bandwidth: Bandwidth) -> Row:
        """The row with its share of the bandwidth as known now."""
        if self.ms is None or self.gbps is None:
            return self
        kind = bandwidth.kind(self.traffic)
        peak = bandwidth.rates[kind]
        graph = self.gbps * self.ms / self.graph_ms / peak if self.graph_ms else None
        return replace(self, traffic=kind, peak_gbps=peak, share=self.gbps / peak, graph_share=graph)


@dataclass(frozen=True)
class Result:
    """All that one run found.

    Attributes:
        settings: what was asked for.
        disturbed: why its numbers should not be believed; empty if nothing speaks against them.
        notes: what was left out, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    bandwidth: dict[str, float]
    rows: tuple[Row, ...]
    disturbed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether no result differed from what it was compared with, and nothing failed."""
        return not any(row.differs or row.problem for row in self.rows)

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")


@contextmanager
def writing(option: str) -> Iterator[None]:
    """Raise ConfigError where the file that ``option`` names cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}: expected a file that can be written, got {error}") from None


def check_writable(path: Path, option: str) -> None:
    """Make the file's folder; before an hour of measuring, not after.

    Raises:
        ConfigError: no file can be written there.
    """
    with writing(option):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()


HEADER = ("model", "operation", "dtype", "backend", "ms", "spread", "GB/s", "share of bandwidth", "TP ms", "ratio")
LEFT = (0, 1, 2, 3, 7)


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.name, row.op, row.dtype, row.backend)
    if row.ms is None:
        return (*start, f"no numbers: {row.problem}", *[""] * 5)
    ratio = "none" if row.no_ratio else ""
    if row.ratio is not None:
        ratio = f"{row.ratio:.1f}x" + _mark(row.tp_spread)
    return (
        *start,
        _ms(row.ms),
        f"{row.spread:.0%}" + _mark(row.spread),
        f"{row.gbps:.1f}",
        f"{row.share:.0%} of {row.traffic} {row.peak_gbps:.1f}",
        f"{row.tp_ms:.1f}" if row.tp_ms is not None else "",
        ratio,
    )


def _ms(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _most(row: Row) -> str:
    return f"{row.most:.1f}x" if row.most else ""


def _mark(spread: float | None) -> str:
    return "!" if spread is not None and spread > NOISY else ""


def _plain_cells(row: Row) -> tuple[str, str]:
    if row.ms is None or row.plain_ms is None:
        return ("", "")
    return (_ms(row.plain_ms), f"{row.plain_ms / row.ms:.0%}")


def _graph_cells(row: Row) -> tuple[str, str]:
    if row.graph_ms is None or row.graph_share is None:
        return ("", "")
    return (f"{row.graph_ms:.3f}", f"{row.graph_share:.0%}")


def table(rows: Iterable[Row]) -> str:
    """Rows as aligned text, then why some have no ratio, and other numbers."""
    rows = list(rows)
    lines = [HEADER, *(_cells(row) for row in rows)]
    left = LEFT
    more: list[list[tuple[str, ...]]] = []
    if any(row.graph_ms for row in rows):
        more.append([("graph ms", "share"), *(_graph_cells(row) for row in rows)])
    if any(row.plain_ms for row in rows):
        more.append([("plain ms", "share"), *(_plain_cells(row) for row in rows)])
    if any(row.most for row in rows):
        lines = [(*line, cell) for line, cell in zip(lines, ["most", *(_most(row) for row in rows)], strict=True)]
    for columns in reversed(more):
        lines = [(*line[:8], *cells, *line[8:]) for line, cells in zip(lines, columns, strict=True)]
    # A problem is a sentence: it may run over the columns that it leaves empty.
    widths = [max(len(c[i]) for c in lines if c[5] or i < 4) for i in range(len(lines[0]))]
    out = []
    for cells in lines:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        out.append("  ".join(padded if cells[5] else [*padded[:4], cells[4]]).rstrip())
    for row in rows:
        if row.no_ratio:
            out.append(f"no ratio for {row.op} of {row.name} ({row.dtype}): {row.no_ratio}")
        if row.extra:
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in row.extra.items())
            out.append(f"{row.op} of {row.name} ({row.dtype}, {row.backend}): {numbers}")
    if any(row.is_noisy for row in rows):
        out.append(f"!  noise: quartiles more than {NOISY:.0%} of the median apart (at a ratio: Torch-Pruning's)")
    return "\n".join(out)


def render(result: Result) -> str:
    """The whole result as text."""
    machine = result.machine
    where = [machine["cpu"], f"cores {machine['cores']}, threads {machine['threads']}"]
    where += [f"GPU {machine['gpu']['name']}"] if machine["gpu"] else [str(machine["isa"] or "no C++ kernels")]
    where += [f"{name} {version}" for name, version in machine["versions"].items() if version]
    rates = ", ".join(f"{kind} {rate:.1f} GB/s" for kind, rate in result.bandwidth.items())
    lines = [", ".join(where), f"bandwidth: {rates}"]
    if machine.get("others") is not None:
        lines.append(f"beside it: {machine['others']:.2f} cores used by others, {machine['stolen']:.2f} lost to others")
    lines += ["", table(result.rows)]
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"disturbed, do not quote: {reason}" for reason in result.disturbed]
    return "\n".join(lines)
