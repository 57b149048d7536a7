"""Which units of which group go: Torch-Pruning's thresholds within scopes, exact where scores are tied.

A unit is what is removed as one: a channel, the j-th channels of all blocks of a grouped layer, a dimension of
all heads. Torch-Pruning removes what scores no better than a threshold, more than was asked for if scores are
tied; here it is as many as asked for, and ties are spread evenly over the groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...plan.types import BoolArray, IndexArray

Scores = NDArray[np.floating]
Row = tuple[str, str, int, int, int, int]  # of a field
NEAR = 1e-6  # relative distance of scores that count as tied, where ties matter


class Part(NamedTuple):
    """The groups of a scope: which these are, where their units are among all; of each its units, and the first of
    these among the scope's."""

    scope: str
    members: IndexArray | slice
    places: IndexArray | slice
    sizes: IndexArray
    starts: IndexArray


@dataclass(frozen=True)
class Field:
    """Groups that are ranked, side by side: what is known of them before their units are scored.

    Attributes:
        names: their root layers, for messages.
        scopes: what each is ranked with.
        units: how many each has ``[C]``.
        widths: channels of their root layers ``[C]``.
        least: units that must stay of each if any goes ``[C]``.
        multiples: what the channels of each must stay a multiple of, because a kernel needs it ``[C]``.
    """

    names: list[str]
    scopes: list[str]
    units: IndexArray
    widths: IndexArray
    least: IndexArray
    multiples: IndexArray

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Field:
        """Groups of (name, scope, units, width, least, multiple)."""
        numbers = np.array([row[2:] for row in rows], dtype=np.int64).reshape(len(rows), 4).T
        return cls([row[0] for row in rows], [row[1] for row in rows], *numbers)

    def __add__(self, other: Field) -> Field:
        arrays = ((self.units, other.units), (self.widths, other.widths), (self.least, other.least))
        more = (self.multiples, other.multiples)
        return Field(self.names + other.names, self.scopes + other.scopes, *map(np.concatenate, (*arrays, more)))

    @cached_property
    def starts(self) -> IndexArray:
        """Where the units of each begin among the units of all, and the end ``[C + 1]``."""
        return np.append(0, np.cumsum(self.units))

    @cached_property
    def parts(self) -> list[Part]:
        """The scopes, in the order of their first groups."""
        scopes = list(dict.fromkeys(self.scopes))
        if len(scopes) == 1:
            return [Part(scopes[0], slice(None), slice(None), self.units, self.starts[:-1])]
        found = []
        for scope in scopes:
            members = np.flatnonzero([own == scope for own in self.scopes])
            sizes = self.units[members]
            starts = np.cumsum(sizes) - sizes
            places = np.arange(sizes.sum()) + np.repeat(self.starts[members] - starts, sizes)
            found.append(Part(scope, members, places, sizes, starts))
        return found


def ranked(scores: Scores) -> IndexArray:
    """Units from the least important to the most, those without a score last; ties in order."""
    return np.argsort(scores, kind="stable")


def caps(first: IndexArray, units: IndexArray, most: float) -> IndexArray:
    """How many ``units`` must stay when no more than ``most`` of the ``first`` may go ``[C]``."""
    return np.minimum(units, np.ceil(first * (1 - most) - 1e-9).astype(np.int64))


def choose(
    field: Field,
    scores: Scores,
    stay: IndexArray,
    ratios: Mapping[str, float],
    initial: dict[str, int],
    round_to: int | None,
) -> tuple[BoolArray, IndexArray]:
    """Which units go, scope by scope, and how many of each group: bool ``[U]``, ``[C]``.

    Args:
        scores: of all units ``[U]``.
        stay: units that must stay, see :func:`caps` ``[C]``.
        ratios: of each scope's units that are to be gone after this step, of those that it began with.
        initial: units that each scope began with; new scopes are entered.
    """
    gone, going = np.zeros(len(scores), dtype=np.bool_), np.zeros(len(field.names), dtype=np.int64)
    for part in field.parts:
        own = scores[part.places]
        left = int(initial.setdefault(part.scope, len(own)) * (1 - ratios[part.scope]))
        gone[part.places], going[part.members] = _taken(own, part, stay[part.members], len(own) - left)
    tight = (field.units - going < np.maximum(field.least, stay)) | (field.units == going) | (field.multiples > 1)
    for i in np.flatnonzero((tight | bool(round_to)) & (going > 0)).tolist():
        settled = _settled(field, i, int(going[i]), int(stay[i]), round_to)
        if settled != going[i]:
            start, stop = field.starts[i : i + 2].tolist()
            gone[start:stop], going[i] = False, settled
            gone[start + ranked(scores[start:stop])[:settled]] = True
    return gone, going


def _taken(scores: Scores, part: Part, stay: IndexArray, count: int) -> tuple[BoolArray, IndexArray]:
    """The ``count`` least important units of a scope, and how many these are of each of its groups."""
    free = scores
    if stay.any():
        free = scores.copy()
        for cap, own in zip(stay.tolist(), _split(free, part), strict=True):
            own[ranked(own)[len(own) - cap :]] = np.inf
    count = min(count, int(np.count_nonzero(free < np.inf)))
    if count <= 0:
        return np.zeros(len(free), dtype=np.bool_), np.zeros(len(part.sizes), dtype=np.int64)
    threshold = np.partition(free, count - 1)[count - 1]
    gone: BoolArray = free <= threshold  # what is no number never is
    going = _count(gone, part)
    if going.sum() == count and (going < part.sizes).all():
        return gone, going
    # More is tied at the threshold than is asked for, or a group would be gone altogether for a rounding error.
    near = np.abs(free - threshold) <= NEAR * abs(threshold)
    gone &= ~near
    tied = np.flatnonzero(near)
    gone[tied[np.argsort(_share(scores, part)[tied], kind="stable")[: count - int(gone.sum())]]] = True
    return gone, _count(gone, part)


def _count(gone: BoolArray, part: Part) -> IndexArray:
    """How many of each group's units are ``gone``."""
    return np.add.reduceat(gone, part.starts, dtype=np.int64)  # each has some


def _split(scores: Scores, part: Part) -> list[Scores]:
    return np.split(scores, part.starts[1:])


def _share(scores: Scores, part: Part) -> NDArray[np.float64]:
    """For each unit, which part of its group goes before it: the order in which ties are broken."""
    shares = []
    for own in _split(scores, part):
        share = np.empty(len(own))
        share[ranked(own)] = np.arange(1, len(own) + 1) / len(own)
        shares.append(share)
    return np.concatenate(shares)


def _settled(field: Field, i: int, going: int, cap: int, round_to: int | None) -> int:
    """How many units of a group go in the place of ``going``, so that what is left is a multiple; none if all would."""
    units, width, multiple = int(field.units[i]), int(field.widths[i]), int(field.multiples[i])
    if going == units:
        _warn(field, i, "all of its channels are among the least important; it is left as it is in this step")
        return 0
    least = max(int(field.least[i]), cap)
    left = max(units - going, least)
    if multiple > 1:
        left = nearest(units, left, least, width, math.lcm(round_to or 1, multiple))
    elif round_to:
        left = rounded(units, left, least, width, round_to)
        if left == units:
            _warn(field, i, f"it has {width} channels, and cannot be pruned to a multiple of {round_to}")
    return units - left


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


def _warn(field: Field, i: int, what: str) -> None:
    warnings.warn(f"{field.names[i]}: {what}", stacklevel=2)
