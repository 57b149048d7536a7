"""Groups of the plan in a ranking: channels to units and heads, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from ...plan.types import BoolArray, ChannelArray, Group, IndexArray
from .ranking import Field, Scores, caps
from .shaping import Attention

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a group of the plan before its channels are scored.

    Attributes:
        number: among the plan's groups.
        group: of the plan.
        root: its root layer.
        unit: the unit of each channel, counted from 0 ``[n]``, an attention's extra channels, the last, have none; None
            where every channel is a unit.
        units: how many there are.
        least: see :class:`Field`.
        attention: set if it is one that the user has named.
        side: name of the layer that a history names, whether it is pruned by its outputs, channels along that side.
    """

    number: int
    group: Group
    root: str
    unit: IndexArray | None
    units: int
    least: int
    attention: Attention | None
    side: tuple[str, bool, ChannelArray]

    @property
    def own(self) -> slice:
        """Its channels."""
        return slice(self.group.start, self.group.stop)

    @property
    def is_whole(self) -> bool:
        """Whether a unit is a head, of which no dimension goes by itself."""
        return self.attention is not None and self.attention.whole

    @property
    def every(self) -> IndexArray:
        """``unit``, with the channels' numbers in the place of None."""
        return np.arange(self.group.channels) if self.unit is None else self.unit

    @property
    def width(self) -> int:
        """Channels that have a unit."""
        return self.group.channels if self.unit is None else len(self.unit)


@dataclass(frozen=True)
class Standings:
    """The groups that may be pruned, side by side.

    Attributes:
        every: of them.
        field: the same in a ranking.
        first: units that each had before the first step ``[C]``.
        modules: for each scope the layer whose own ratio it has, if any.
    """

    every: list[Standing]
    field: Field
    first: IndexArray
    modules: dict[str, nn.Module | None]

    def caps(self, most: float) -> IndexArray:
        """Units that must stay when no more than ``most`` of the first may go, and heads, which others choose ``[C]``.
        """
        return np.maximum(caps(self.first, self.field.units, most), self._whole) if most < 1 else self._whole

    @cached_property
    def _whole(self) -> IndexArray:
        """How many units the groups have whose units are heads; none of others ``[C]``."""
        return np.where([s.is_whole for s in self.every], self.field.units, 0)

    @cached_property
    def single(self) -> bool:
        """Whether every channel is a unit."""
        return all(s.unit is None for s in self.every)

    @cached_property
    def channels(self) -> IndexArray:
        """All channels that have a unit ``[n]``."""
        return np.concatenate([_NONE, *(np.arange(s.group.start, s.group.start + s.width) for s in self.every)])

    @cached_property
    def units(self) -> IndexArray:
        """The unit of each of these, among all units ``[n]``."""
        firsts = self.field.starts.tolist()
        return np.concatenate([_NONE, *(s.every + first for s, first in zip(self.every, firsts, strict=False))])

    @cached_property
    def in_order(self) -> list[Standing]:
        """As Torch-Pruning goes: scope by scope."""
        order = {"DEFAULT_SCOPE": 0}
        places = [order.setdefault(scope, len(order)) for scope in self.field.scopes]
        return [s for _, s in sorted(zip(places, self.every, strict=True), key=lambda of: of[0])]

    def prepare(self) -> None:
        """Work out ahead what a step needs."""
        _ = self.caps(1.0), self.single, self.channels, self.units, self.field.parts


@dataclass(slots=True)
class Decision:
    """What goes in a step.

    Attributes:
        of: the groups that were ranked.
        scores: importance of all channels of the plan ``[N]``.
        gone: units that go: bool ``[U]``.
        heads: heads that go, by the numbers of groups: bool ``[heads]``, if heads are pruned.
        prune_dims: whether the channels of an attention go.
    """

    of: Standings
    scores: Scores
    gone: BoolArray
    heads: dict[int, BoolArray]
    prune_dims: bool

    def lost(self) -> BoolArray:
        """The channels of the plan that go: bool ``[N]``; none of a group of which nothing would be left."""
        found = np.zeros(len(self.scores), dtype=np.bool_)
        found[self.of.channels] = self.gone[self.of.units]
        for s in self.of.every if self.heads or not self.prune_dims else ():
            if s.attention is not None:
                found[s.own] = self._of_attention(s, found[s.own])
        return found

    def _of_attention(self, s: Standing, lost: BoolArray) -> BoolArray:
        mask, extra = lost[: s.width] & self.prune_dims, lost[s.width :]
        heads = self.heads.get(s.number)
        if heads is not None and s.is_whole:
            mask = heads[s.every]
        elif heads is not None:
            mask = mask | np.repeat(heads, len(mask) // len(heads))
            extra = np.tile(heads, len(extra) // len(heads))
        return np.concatenate([mask, extra]) & ~mask.all()


def head_scores(standing: Standing, scores: Scores) -> Any:
    """Mean score of each head of an attention, from those of its channels: ``[heads]``."""
    if standing.is_whole:
        return unit_means(scores, standing.every)
    return torch.from_numpy(scores[: standing.width]).view(-1, standing.units).mean(1).numpy()


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
