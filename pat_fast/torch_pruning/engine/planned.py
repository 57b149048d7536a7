"""Groups of the plan in a ranking: channels to units and heads, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...plan.types import BoolArray, ChannelArray, Group, IndexArray
from .ranking import Candidate, Scores
from .shaping import Attention


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a group of the plan before its channels are scored.

    Attributes:
        number: among the plan's groups.
        group: of the plan.
        root: its root layer.
        unit: see :class:`Planned`; None where every channel is one.
        every: ``unit`` with the channels' numbers in the place of None.
        units: how many there are.
        least: see :class:`Candidate`.
        attention: set if it is one that the user has named.
        side: name of the layer that a history names, whether it is pruned by its outputs, channels along that side.
    """

    number: int
    group: Group
    root: str
    unit: IndexArray | None
    every: IndexArray
    units: int
    least: int
    attention: Attention | None
    side: tuple[str, bool, ChannelArray]


@dataclass(slots=True)
class Planned:
    """A group of the plan in a ranking.

    Attributes:
        standing: what was known of it.
        born: lifelong names of its channels ``[n]``.
        unit: the unit of each, counted from 0 ``[n]``; an attention's extra channels, the last, have none.
        scores: importance of each ``[n]``.
        candidate: its units in the ranking.
        heads_gone: bool ``[heads]``, if heads are pruned.
    """

    standing: Standing
    born: IndexArray
    unit: IndexArray
    scores: Scores
    candidate: Candidate
    heads_gone: BoolArray | None = None

    @property
    def plain(self) -> bool:
        """Whether a unit is a channel."""
        return self.standing.attention is None and self.standing.unit is None

    @property
    def is_whole(self) -> bool:
        """Whether a unit is a head, of which no dimension goes by itself."""
        return self.standing.attention is not None and self.standing.attention.whole

    def gone(self, prune_dims: bool) -> BoolArray:
        """Its channels that go: bool ``[n]``; none if nothing would be left."""
        if self.plain:
            return self.candidate.gone
        mask = self.candidate.gone[self.unit] & (self.standing.attention is None or prune_dims)
        extra = np.zeros(len(self.born) - len(mask), dtype=np.bool_)
        if self.heads_gone is not None and self.is_whole:
            mask = self.heads_gone[self.unit]
        elif self.heads_gone is not None:
            mask = mask | np.repeat(self.heads_gone, len(mask) // len(self.heads_gone))
            extra = np.tile(self.heads_gone, len(extra) // len(self.heads_gone))
        return np.concatenate([mask, extra]) & ~mask.all()

    def any_goes(self, prune_dims: bool) -> bool:
        """Whether a channel goes."""
        return self.candidate.going > 0 if self.plain else bool(self.gone(prune_dims).any())

    def head_scores(self) -> Any:
        """Mean score of each head: ``[heads]``."""
        if self.is_whole:
            return self.candidate.scores
        scores = torch.from_numpy(self.scores[: len(self.unit)])
        return scores.view(-1, self.candidate.units).mean(1).numpy()


def unit_means(scores: Scores, unit: IndexArray) -> Any:
    """Mean score of each unit, summed as Torch-Pruning does where units repeat block by block: ``[U]``.

    Channels without a score (NaN) do not count: an importance of groups cannot score a channel that has several
    indices in every layer (a rotary pair); the rest of its unit speaks for it.
    """
    units = int(unit.max()) + 1
    if units == len(unit):
        return scores[np.argsort(unit, kind="stable")]
    known = ~np.isnan(scores)
    if known.all() and len(unit) % units == 0 and (unit.reshape(-1, units) == np.arange(units)).all():
        return torch.from_numpy(scores).view(-1, units).mean(0).numpy()
    total = np.bincount(unit[known], weights=scores[known], minlength=units)
    count = np.bincount(unit[known], minlength=units)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
