"""Tables over the rows of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.reach.probe import ALONE, FAILED, LEAST, OUTPUT, OUTSIDE, PRUNED, UNBUILT, Row

HEADER: tuple[str, ...] = (
    "family",
    "kind",
    "parameters",
    "gone",
    "weights gone",
    "free / all channels",
    "groups",
    "plan s",
)
HEADER += ("masked=pruned", "afresh", "status", "frozen")


def table(rows: Iterable[Row]) -> str:
    """One line for each family; a family that was not planned says why."""
    return _aligned([HEADER, *(_cells(row) for row in rows)], right=range(2, 9))


def _cells(row: Row) -> tuple[str, ...]:
    status = f"{row.status}: {row.detail}" if row.detail else row.status
    if not row.groups and not row.frozen:
        return (row.family, row.kind, *[""] * 8, status, "")
    gone = f"{1 - row.params_left / row.params:.0%}" if row.params_left else ""
    weights = f"{row.gone:.0%}" if row.weights_left else ""
    share = f"{row.free} / {row.channels} {row.free / max(row.channels, 1):4.0%}"
    counts = Counter(reason for reason, _, _ in row.frozen if not reason.startswith(OUTPUT))
    frozen = "; ".join(f"{n} x {reason}" for reason, n in counts.most_common())
    cells = (row.family, row.kind, f"{row.params:,}", gone, weights, share, str(row.groups), f"{row.seconds:.2f}")
    return (*cells, row.equal, row.afresh, status, frozen)


def reasons_table(rows: Sequence[Row]) -> str:
    """Why channels are frozen, over all families: families, layers and channels of each reason."""
    channels: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    where: dict[str, list[str]] = {}
    for row in rows:
        for reason, _, count in row.frozen:
            channels[reason] += count
            layers[reason] += 1
            if row.family not in where.setdefault(reason, []):
                where[reason].append(row.family)
    lines = [("families", "layers", "channels", "reason", "for example")]
    for reason in sorted(where, key=lambda r: (-len(where[r]), -channels[r])):
        found = where[reason]
        lines.append((str(len(found)), str(layers[reason]), str(channels[reason]), reason, ", ".join(found[:4])))
    return _aligned(lines, right=range(3))


def closing(rows: Sequence[Row], ratio: float) -> str:
    """How many families were pruned, of those that run dense here; the others by name."""
    of = {s: [r for r in rows if r.status == s] for s in (PRUNED, ALONE, FAILED, UNBUILT, OUTSIDE)}
    given = len(of[PRUNED]) + len(of[ALONE]) + len(of[FAILED])
    lines = [f"left alone: {', '.join(f'{r.family} ({r.gone:.0%})' for r in of[ALONE]) or 'none'}"]
    lines.append(f"failed: {', '.join(r.family for r in of[FAILED]) or 'none'}")
    lines += [f"not counted: {r.family}: {r.status}: {r.detail}" for r in of[UNBUILT] + of[OUTSIDE]]
    compared = sum(bool(r.equal) and r.equal[0].isdigit() for r in rows)
    lines.append(f"masked equals pruned in float64 for {compared} families")
    again = [r for r in rows if r.afresh]
    other = [f"{r.family} ({r.afresh})" for r in again if r.afresh != "="]
    lines.append(f"the plan built afresh is the one foreseen for {len(again) - len(other)} of {len(again)} families")
    lines += [f"  not for {text}" for text in other]
    lines.append(
        f"{len(of[PRUNED])} of {given} families pruned ({len(of[PRUNED]) / max(given, 1):.1%}): at ratio {ratio} the "
        f"pruned model runs, trains and generates, and at least {LEAST:.0%} of the weights of its layers went"
    )
    return "\n".join(lines)


def _aligned(lines: Sequence[Sequence[str]], right: Iterable[int]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    flush = set(right)
    return "\n".join(
        "  ".join(
            c.rjust(w) if i in flush else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
