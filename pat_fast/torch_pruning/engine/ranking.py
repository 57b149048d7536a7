"""Which units of which group go: Torch-Pruning's thresholds within scopes, exact where scores are tied.

A unit is what is removed as one: a channel, the j-th channels of all blocks of a grouped layer, a dimension of
all heads. Torch-Pruning removes what scores no better than a threshold, more than was asked for if scores are
tied; here it is as many as asked for, and ties are spread evenly over the groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...plan.types import BoolArray

Scores = NDArray[np.floating]
NEAR = 1e-6  # relative distance of scores that count as tied, where ties matter


@dataclass(slots=True)
class Candidate:
    """A group that takes part in a ranking.

    Attributes:
        name: its root layer, for messages.
        scope: what it is ranked with.
        ratio: of its scope's units that are to be gone after this step, of those that it began with.
        scores: ``[U]``, one for each unit.
        width: channels of its root layer.
        cap: units that must stay because of ``max_pruning_ratio``.
        least: units that must stay if any goes.
        multiple: what its channels must stay a multiple of, because a kernel needs it.
        gone: bool ``[U]``, what was chosen.
        going: how many these are.
    """

    name: str
    scope: str
    ratio: float
    scores: Scores
    width: int
    cap: int = 0
    least: int = 1
    multiple: int = 1
    gone: BoolArray = field(init=False)
    going: int = field(default=0, init=False)

    @property
    def units(self) -> int:
        return len(self.scores)

    def ranked(self) -> NDArray[np.int64]:
        """Units from the least important to the most, those without a score last; ties in order."""
        return np.argsort(self.scores, kind="stable")


def choose(candidates: Sequence[Candidate], initial: dict[str, int], round_to: int | None) -> None:
    """Fill ``gone`` of all candidates, scope by scope.

    ``initial``: units that each scope began with; new scopes are entered.
    """
    scopes: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        scopes.setdefault(candidate.scope, []).append(candidate)
    for name, members in scopes.items():
        sizes = [c.units for c in members]
        bounds = np.cumsum([0, *sizes])
        total = sum(sizes)
        left = int(initial.setdefault(name, total) * (1 - members[0].ratio))
        gone, going = _taken(members, bounds, total - left)
        for candidate, units, count, start in zip(members, sizes, going.tolist(), bounds.tolist(), strict=False):
            candidate.gone, candidate.going = gone[start : start + units], count
            tight = units - count < max(candidate.least, candidate.cap, 1) or candidate.multiple > 1
            if count and (tight or round_to):
                _settle(candidate, round_to)


def _count(gone: BoolArray, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many of each candidate's units are ``gone``."""
    return np.add.reduceat(gone, bounds[:-1], dtype=np.int64)  # each has some


def _taken(
    members: Sequence[Candidate], bounds: NDArray[np.int64], count: int
) -> tuple[BoolArray, NDArray[np.int64]]:
    """The ``count`` least important units of all ``members`` together, whose units ``bounds`` tell apart.

    And how many these are of each member.
    """
    scores = np.concatenate([c.scores for c in members])
    scores[np.isnan(scores)] = np.inf
    for c, start in zip(members, bounds.tolist(), strict=False):
        if c.cap:
            scores[start + c.ranked()[c.units - c.cap :]] = np.inf
    count = min(count, int(np.count_nonzero(scores < np.inf)))
    if count <= 0:
        return np.zeros(len(scores), dtype=np.bool_), np.zeros(len(members), dtype=np.int64)
    threshold = np.partition(scores, count - 1)[count - 1]
    gone: BoolArray = scores <= threshold
    going = _count(gone, bounds)
    if going.sum() == count and (going < np.diff(bounds)).all():
        return gone, going
    # More is tied at the threshold than is asked for, or a group would be gone altogether for a rounding error.
    near = np.abs(scores - threshold) <= NEAR * abs(threshold)
    gone = (scores <= threshold) & ~near
    tied = np.flatnonzero(near)
    gone[tied[np.argsort(_share(members)[tied], kind="stable")[: count - int(gone.sum())]]] = True
    return gone, _count(gone, bounds)


def _share(members: Sequence[Candidate]) -> NDArray[np.float64]:
    """For each unit, which part of its group goes before it: the order in which ties are broken."""
    shares = []
    for c in members:
        share = np.empty(c.units)
        share[c.ranked()] = np.arange(1, c.units + 1) / c.units
        shares.append(share)
    return np.concatenate(shares)


def _settle(candidate: Candidate, round_to: int | None) -> None:
    """Round what is left, and leave the group alone if nothing would be."""
    if candidate.going == candidate.units:
        _warn(candidate, "all of its channels are among the least important; it is left as it is in this step")
        _set(candidate, 0)
        return
    least = max(candidate.least, candidate.cap)
    left = max(candidate.units - candidate.going, least)
    if candidate.multiple > 1:
        left = nearest(candidate.units, left, least, candidate.width, math.lcm(round_to or 1, candidate.multiple))
    elif round_to:
        left = rounded(candidate.units, left, least, candidate.width, round_to)
        if left == candidate.units:
            _warn(candidate, f"it has {candidate.width} channels, and cannot be pruned to a multiple of {round_to}")
    if left != candidate.units - candidate.going:
        _set(candidate, candidate.units - left)


def _set(candidate: Candidate, going: int) -> None:
    """Let the ``going`` least important units go."""
    candidate.gone = np.zeros(candidate.units, dtype=np.bool_)
    candidate.gone[candidate.ranked()[:going]] = True
    candidate.going = going


def rounded(units: int, left: int, least: int, width: int, round_to: int) -> int:
    """How many units to leave so that their channels are a multiple of ``round_to``; ``units`` if there is no way.

    ``left`` is rounded down, as in Torch-Pruning, but to no less than one multiple and ``least``.
    """
    per_unit = max(width // units, 1)
    step = round_to // math.gcd(round_to, per_unit)
    down = left - left % step
    if down < max(least, 1):
        down = -(-max(least, 1) // step) * step
    return min(down, units)


def nearest(units: int, left: int, least: int, width: int, multiple: int) -> int:
    """How many units to leave so that their channels are a ``multiple`` that is nearest to ``left``, as natively.

    No less than one multiple and ``least``; ``units`` if there is no way.
    """
    per_unit = max(width // units, 1)
    step = multiple // math.gcd(multiple, per_unit)
    most = max(least, 1)
    return min(max(round(left / step) * step, -(-most // step) * step), units)


def head_counts(scores: Sequence[Scores], left: int) -> list[int]:
    """How many heads of each layer go when ``left`` of all stay, ranked together."""
    together = np.concatenate(scores)
    going = np.zeros(len(together), dtype=np.bool_)
    going[np.argsort(together, kind="stable")[: max(len(together) - left, 0)]] = True
    return [int(g.sum()) for g in np.split(going, np.cumsum([len(s) for s in scores])[:-1])]


def choose_heads(scores: Sequence[Scores], counts: Sequence[int]) -> list[BoolArray]:
    """The ``counts[i]`` least important heads of each layer; none of a layer that would lose all of them."""
    gone = []
    for own, count in zip(scores, counts, strict=True):
        mask = np.zeros(len(own), dtype=np.bool_)
        if 0 < count < len(own):
            mask[np.argsort(own, kind="stable")[:count]] = True
        gone.append(mask)
    return gone


def _warn(candidate: Candidate, what: str) -> None:
    warnings.warn(f"{candidate.name}: {what}", stacklevel=2)
