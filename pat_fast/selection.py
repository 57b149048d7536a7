"""Which channels go: rank units, keep what must be kept, meet the budget exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .errors import ConfigError, did_you_mean
from .plan.types import Group, Plan

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


class Scope:
    """Which groups the user wants pruned."""

    def __init__(
        self, model: nn.Module, wanted: Sequence[str] | None, ignored: Sequence[str | nn.Module] | None
    ) -> None:
        names = [name for name, _ in model.named_modules() if name]
        of_module = {module: name for name, module in model.named_modules()}
        self._wanted = None
        if wanted is not None:
            self._wanted = [_known("layers_to_prune", w, names) for w in _listed("layers_to_prune", wanted)]
        if self._wanted == []:
            raise ConfigError(
                "layers_to_prune: expected at least one name, got an empty list; leave it out for all layers"
            )
        self._ignored = []
        for layer in _listed("ignored_layers", ignored or []):
            if isinstance(layer, nn.Module):
                if layer not in of_module:
                    raise ConfigError(f"ignored_layers: {type(layer).__name__} is not a part of the model")
                self._ignored.append(of_module[layer])
            else:
                self._ignored.append(_known("ignored_layers", layer, names))

    def apply(self, plan: Plan) -> tuple[NDArray[np.bool_], tuple[tuple[str, str], ...]]:
        """Which channels may be pruned (bool ``[N]``), and the groups left out with the reason."""
        eligible = np.zeros(plan.n_channels, dtype=np.bool_)
        skipped = []
        outputs = _owners_of_outputs(plan)
        for i, group in enumerate(plan.groups):
            reason = self._reason(group, outputs[i])
            if reason is None:
                eligible[group.start : group.stop] = True
            else:
                skipped.append((group.root, reason))
        return eligible, tuple(skipped)

    def _reason(self, group: Group, outputs: list[str]) -> str | None:
        held = [name for name in outputs if _covered(name, self._ignored)]
        if held:
            return f"{held[0]} is in ignored_layers"
        if self._wanted is None:
            return None
        inside = [name for name in group.layers if _covered(name, self._wanted)]
        outside = [name for name in group.layers if name not in inside]
        if not outside:
            return None
        if not inside:
            return "not in layers_to_prune"
        return f"{inside[0]} shares its channels with {outside[0]}, which is not in layers_to_prune"


def _owners_of_outputs(plan: Plan) -> list[list[str]]:
    """For each group, the modules that make its channels or pass them on with parameters of their own (norms)."""
    found: list[list[str]] = [[] for _ in plan.groups]
    for tensor, axis in plan.axes():
        if axis.role != "in":
            for i in np.unique(plan.group_of[axis.channels[axis.channels >= 0]]).tolist():
                found[i].append(tensor.name.rpartition(".")[0])
    return found


def _covered(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def _listed(argument: str, value: Any) -> list[Any]:
    if isinstance(value, (str, nn.Module)) or not isinstance(value, Iterable):
        shown = repr(value) if isinstance(value, str) else type(value).__name__
        raise ConfigError(f"{argument}: expected a list of layers, got {shown}; put it in brackets")
    return list(value)


def _known(argument: str, name: str, names: list[str]) -> str:
    if not isinstance(name, str) or name not in names:
        raise ConfigError(
            f"{argument}: {name!r} matches no layer of the model{did_you_mean(str(name), names)} "
            f"(layers are named as in model.named_modules())"
        )
    return name


def unit_scores(plan: Plan, scores: FloatArray) -> FloatArray:
    """Mean score of the channels of each unit, of those below ``inf`` if it has any: ``[U]`` from ``[N]``."""
    scored = ~np.isposinf(scores)
    total = np.bincount(plan.unit[scored], weights=scores[scored], minlength=plan.n_units)
    count = np.bincount(plan.unit[scored], minlength=plan.n_units)
    return np.where(count > 0, total / np.maximum(count, 1), np.inf)


def protected_units(plan: Plan, scores: FloatArray, min_channels: int) -> BoolArray:
    """Units that must stay whatever their score: the best of every group, and of every axis: ``[U]``."""
    kept = np.zeros(plan.n_units, dtype=np.bool_)
    for group in plan.groups:
        own: NDArray[np.int64] = np.unique(plan.unit[group.start : group.stop])
        _keep_best(kept, own, scores, max(min_channels, plan.least_units(group)))
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
        scores: ``[N]``; the least important go first, ties in channel order. ``-inf``: already gone; ``inf``:
            stays.
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
    free &= ~np.isposinf(ranks)
    order = np.argsort(ranks, kind="stable")
    order = order[free[order]]
    if limits.ranking == "global":
        order = order[: _affordable(size[order], removable(None))]
    else:
        order = _interleave(plan, order, ranks, size, home, removable)
    gone_before = int(np.isneginf(ranks[order]).sum())

    def keep_after(count: int) -> BoolArray:
        removed = np.zeros(plan.n_units, dtype=np.bool_)
        removed[order[:count]] = True
        if limits.round_to > 1 or any(g.multiple > 1 for g in plan.groups):
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
    ranks: FloatArray,
    size: NDArray[np.int64],
    home: NDArray[np.int64],
    removable: Callable[[str | None], int],
) -> NDArray[np.int64]:
    """Each group's own removals: what is gone already, then about the same share of every group by turns."""
    parts, shares = [], []
    for i, group in enumerate(plan.groups):
        own = order[home[order] == i]
        own = own[: _affordable(size[own], removable(group.root))]
        parts.append(own)
        shares.append(np.where(np.isneginf(ranks[own]), 0.0, np.arange(1, len(own) + 1) / max(len(own), 1)))
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
    """Make what each group keeps a multiple of ``round_to``, and of what its kernels need.

    Its next best units are removed, or spared.
    """
    removed = removed.copy()
    for i, group in enumerate(plan.groups):
        units = np.flatnonzero(home == i)
        if not removed[units].any():
            continue
        step = math.lcm(limits.round_to, group.multiple)
        kept = int(size[units][~removed[units]].sum())
        gone = np.isneginf(ranks[units])
        most = group.channels - int(size[units][gone].sum())
        nearest = max(step, round(kept / step) * step)
        order = units[np.argsort(ranks[units], kind="stable")]
        order = order[free[order]]
        removed[units] = gone
        for wanted in range(nearest, most, step):  # units may be too large, or protected, for the nearest
            cut = _affordable(size[order], group.channels - wanted)
            if int(size[order[:cut]].sum()) == group.channels - wanted:
                removed[order[:cut]] = True
                break
    return removed
