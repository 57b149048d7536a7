"""Groups of the plan in a ranking: channels to units and heads, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...plan.types import BoolArray, IndexArray
from .ranking import Candidate
from .shaping import Attention


@dataclass
class Planned:
    """A group of the plan in a ranking.

    Attributes:
        root: its root layer.
        born: lifelong names of its channels ``[n]``.
        unit: the unit of each, counted from 0 ``[n]``; an attention's extra channels, the last, have none.
        scores: importance of each ``[n]``.
        candidate: its units in the ranking.
        attention: set if it is one that the user has named.
        heads_gone: bool ``[heads]``, if heads are pruned.
    """

    root: str
    born: IndexArray
    unit: IndexArray
    scores: Tensor
    candidate: Candidate
    attention: Attention | None = None
    heads_gone: BoolArray | None = None

    def gone(self, prune_dims: bool) -> BoolArray:
        """Its channels that go: bool ``[n]``; none if nothing would be left."""
        if self.attention is None and self.candidate.units == len(self.born):  # a unit is a channel
            gone = self.candidate.gone
            return np.zeros_like(gone) if gone.all() else gone
        mask = self.candidate.gone[self.unit] & (self.attention is None or prune_dims)
        extra = np.zeros(len(self.born) - len(mask), dtype=np.bool_)
        if self.heads_gone is not None:
            mask = mask | np.repeat(self.heads_gone, len(mask) // len(self.heads_gone))
            extra = np.tile(self.heads_gone, len(extra) // len(self.heads_gone))
        return np.concatenate([mask, extra]) & ~mask.all()

    def head_scores(self) -> Any:
        """Mean score of each head: ``[heads]``."""
        return self.scores[: len(self.unit)].view(-1, self.candidate.units).mean(1).numpy()


def unit_means(scores: Tensor, unit: IndexArray) -> Any:
    """Mean score of each unit, summed as Torch-Pruning does where units repeat block by block: ``[U]``.

    Channels without a score (NaN) do not count: an importance of groups cannot score a channel that has several
    indices in every layer (a rotary pair); the rest of its unit speaks for it.
    """
    units = int(unit.max()) + 1
    if units == len(unit):
        return scores.numpy()[np.argsort(unit, kind="stable")]
    known = ~scores.isnan().numpy()
    if known.all() and len(unit) % units == 0 and (unit.reshape(-1, units) == np.arange(units)).all():
        return scores.view(-1, units).mean(0).numpy()
    total = np.bincount(unit[known], weights=scores.double().numpy()[known], minlength=units)
    count = np.bincount(unit[known], minlength=units)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
