"""What a step of the pruner did."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import check

if TYPE_CHECKING:
    from .plan.types import Group

Change = tuple[int, int]  # before and after
Changes = tuple[tuple[str, int, int], ...]  # group, channels before, channels after
Counts = tuple[int, int, int, float | None]  # channels, parameters, MACs, predicted ms where a target asks for them


def changes(groups: Iterable[Group], before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Changes:
    """The groups of which other channels are left after than before (bool ``[N]``), and how many."""
    return tuple(
        (g.root, int(before[g.start : g.stop].sum()), int(after[g.start : g.stop].sum()))
        for g in groups
        if (before[g.start : g.stop] != after[g.start : g.stop]).any()
    )


def joined(first: Changes, then: Changes) -> Changes:
    """What two prunes changed, one after the other."""
    found = {root: (before, after) for root, before, after in first}
    for root, before, after in then:
        found[root] = (found.get(root, (before, after))[0], after)
    return tuple((root, *pair) for root, pair in found.items())


@dataclass(frozen=True)
class StepReport:
    """One call of ``Pruner.step()`` or ``Pruner.finalize()``.

    ``channels``, ``params`` and ``macs`` are pairs (before, after) of this step; in mask mode they count what
    the model will have once it is finalised. MACs are per example. ``latency_ms`` is that of one forward as the target
    predicts it, None without a target in milliseconds. ``frozen`` lists what stays and why.
    """

    step: int
    epoch: int
    stage: str
    ratio: float  # of the dense channels that the schedule asks to be gone by now
    channels: Change
    params: Change
    macs: Change
    dense_channels: int
    dense_params: int
    dense_macs: int
    changed: Changes = ()
    frozen: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    latency_ms: tuple[float, float] | None = None
    dense_latency_ms: float | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the dense channels that are gone: 0 .. 1."""
        return 1.0 - self.channels[1] / self.dense_channels if self.dense_channels else 0.0

    def __str__(self) -> str:
        def part(name: str, pair: Change, dense: int) -> str:
            before, after = pair
            share = f"{after / dense:.1%} of dense" if dense else "-"
            moved = f"{before:,} -> {after:,}" if before != after else f"{after:,}"
            return f"{name} {moved} ({share})"

        lines = [
            f"epoch {self.epoch} [{self.stage}] "
            + ", ".join(
                (
                    part("channels", self.channels, self.dense_channels),
                    part("parameters", self.params, self.dense_params),
                    part("MACs", self.macs, self.dense_macs),
                )
            )
        ]
        if self.latency_ms is not None and self.dense_latency_ms:
            now = self.latency_ms[1]
            lines[0] += f", predicted latency {now:.3g} ms ({now / self.dense_latency_ms:.1%} of dense)"
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def make_report(
    epoch: int,
    stage: str,
    ratio: float,
    counts: tuple[Counts, Counts, Counts],
    changed: Changes,
    frozen: tuple[tuple[str, str], ...],
    notes: tuple[str, ...],
) -> StepReport:
    """A report of a step; ``counts`` are those before it, after it, and of the dense model."""
    before, after, dense = counts
    return StepReport(
        step=epoch,
        epoch=epoch,
        stage=stage,
        ratio=ratio,
        channels=(before[0], after[0]),
        params=(before[1], after[1]),
        macs=(before[2], after[2]),
        dense_channels=dense[0],
        dense_params=dense[1],
        dense_macs=dense[2],
        latency_ms=None if before[3] is None or after[3] is None else (before[3], after[3]),
        dense_latency_ms=dense[3],
        changed=changed,
        frozen=frozen,
        notes=notes,
    )


class Callbacks:
    """What the user wants to be told of while a pruner works.

    Raises:
        ConfigError: one of them cannot be called.
    """

    def __init__(
        self, on_stage: Callable[[str, StepReport], object] | None, on_prune: Callable[[StepReport], object] | None
    ) -> None:
        for name, value in (("on_stage", on_stage), ("on_prune", on_prune)):
            check(name, value, lambda v: v is None or callable(v), "a function, or None")
        self._on_stage = on_stage
        self._on_prune = on_prune

    def __bool__(self) -> bool:
        return self._on_stage is not None or self._on_prune is not None

    def tell(self, before: str, now: str, changed: Changes, report: Callable[[], StepReport]) -> None:
        """Call back if something was pruned, or if the stage ``before`` has given way to ``now``."""
        if changed and self._on_prune is not None:
            self._on_prune(report())
        if before != now and self._on_stage is not None:
            self._on_stage(now, report())
