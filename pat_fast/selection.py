"""Which channels go: rank units, keep what must be kept, meet the budget exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .plan.types import Plan

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """What selection must respect.

    Args:
        ranking: ``"global"``: one budget for all groups together; ``"local"``: one for each group.
        round_to: the channels that a group keeps are a multiple of this (the nearest one, at least one
            multiple; a group that is smaller than that is left alone).
        min_channels: units that every group keeps.
    """

    ranking: str = "global"
    round_to: int = 1
    min_channels: int = 1


def unit_scores(plan: Plan, scores: FloatArray) -> FloatArray:
    """Mean score of the channels of each unit: ``[U]`` from ``[N]``."""
    total = np.bincount(plan.unit, weights=scores, minlength=plan.n_units)
    return total / np.bincount(plan.unit, minlength=plan.n_units)


def protected_units(plan: Plan, scores: FloatArray, min_channels: int) -> BoolArray:
    """Units that must stay whatever their score: the best of every group, and of every axis: ``[U]``."""
    kept = np.zeros(plan.n_units, dtype=np.bool_)
    for group in plan.groups:
        _keep_best(kept, np.unique(plan.unit[group.start : group.stop]), scores, min_channels)
    for units, least in _narrow_axes(plan):
        _keep_best(kept, units, scores, least)
    return kept


def _narrow_axes(plan: Plan) -> list[tuple[NDArray[np.int64], int]]:
    """Units of each axis that its group's best channels might leave empty, and how many it needs."""
    found: dict[bytes, tuple[NDArray[np.int64], int]] = {}
    for tensor, axis in plan.axes():
        least = 2 if plan.least(tensor, axis) > 1 else 1
        if least == 1 and (axis.channels < 0).any():
            continue
        key = axis.channels.tobytes()
        if key not in found or found[key][1] < least:
            found[key] = (np.unique(plan.unit[axis.channels[axis.channels >= 0]]), least)
    return list(found.values())


def _keep_best(kept: BoolArray, units: NDArray[np.int64], scores: FloatArray, count: int) -> None:
    best = units[np.argsort(-scores[units], kind="stable")[:count]]
    kept[best] = True


def select(
    plan: Plan,
    scores: FloatArray,
    eligible: BoolArray,
    removable: Callable[[str | None], int],
    limits: Limits,
    enough: Callable[[BoolArray], bool] | None = None,
) -> BoolArray:
    """The channels to keep: bool ``[N]``.

    Args:
        scores: ``[N]``; the least important go first, ties in channel order. ``-inf``: already gone.
        eligible: bool ``[N]``; channels that may be removed.
        removable: how many of the plan's channels are to go, for a group's root, or in all (None). A unit
            that would exceed it stays.
        limits: see :class:`Limits`.
        enough: stop removing as soon as this holds of the channels kept (a target in MACs, say).
    """
    ranks = unit_scores(plan, scores)
    size = np.bincount(plan.unit, minlength=plan.n_units)
    home = np.zeros(plan.n_units, dtype=np.int64)
    home[plan.unit] = plan.group_of
    free = np.bincount(plan.unit[eligible], minlength=plan.n_units) == size
    free &= ~protected_units(plan, ranks, limits.min_channels) | np.isneginf(ranks)
    order = np.argsort(ranks, kind="stable")
    order = order[free[order]]
    if limits.ranking == "global":
        order = order[: _affordable(size[order], removable(None))]
    else:
        order = _interleave(plan, order, size, home, removable)
    gone_before = int(np.isneginf(ranks[order]).sum())

    def keep_after(count: int) -> BoolArray:
        removed = np.zeros(plan.n_units, dtype=np.bool_)
        removed[order[:count]] = True
        if limits.round_to > 1:
            removed = _round(plan, removed, ranks, free, size, home, limits)
        return ~removed[plan.unit]

    count = len(order)
    if enough is not None and enough(keep_after(count)):
        low = gone_before
        while low < count:  # the fewest removals that are enough
            middle = (low + count) // 2
            if enough(keep_after(middle)):
                count = middle
            else:
                low = middle + 1
    return keep_after(count)


def _affordable(sizes: NDArray[np.int64], budget: int) -> int:
    """How many of the first units fit into ``budget`` channels."""
    return int(np.searchsorted(np.cumsum(sizes), budget, side="right"))


def _interleave(
    plan: Plan,
    order: NDArray[np.int64],
    size: NDArray[np.int64],
    home: NDArray[np.int64],
    removable: Callable[[str | None], int],
) -> NDArray[np.int64]:
    """Each group's own removals, merged so that every prefix takes about the same share of every group."""
    parts, shares = [], []
    for i, group in enumerate(plan.groups):
        own = order[home[order] == i]
        own = own[: _affordable(size[own], removable(group.root))]
        parts.append(own)
        shares.append(np.arange(1, len(own) + 1) / max(len(own), 1))
    if not parts:
        return order[:0]
    return np.concatenate(parts)[np.argsort(np.concatenate(shares), kind="stable")]


def _round(
    plan: Plan,
    removed: BoolArray,
    ranks: FloatArray,
    free: BoolArray,
    size: NDArray[np.int64],
    home: NDArray[np.int64],
    limits: Limits,
) -> BoolArray:
    """Make what each group keeps a multiple of ``round_to``, by removing or sparing its next best units."""
    removed = removed.copy()
    for i, group in enumerate(plan.groups):
        units = np.flatnonzero(home == i)
        if not removed[units].any():
            continue
        kept = int(size[units][~removed[units]].sum())
        gone = np.isneginf(ranks[units])
        most = group.channels - int(size[units][gone].sum())
        wanted = max(limits.round_to, round(kept / limits.round_to) * limits.round_to)
        if wanted >= most:
            removed[units] = gone
            continue
        order = units[np.argsort(ranks[units], kind="stable")]
        order = order[free[order]]
        removed[units] = False
        cut = _affordable(size[order], group.channels - wanted)
        if int(size[order[:cut]].sum()) == group.channels - wanted:
            removed[order[:cut]] = True
        else:  # units of this group are too large, or too many protected, to meet a multiple
            removed[units] = gone
    return removed
