"""Which channels go: rank units, keep what must be kept, meet the budget exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .errors import ConfigError, PlanError, did_you_mean
from .plan.types import ChannelArray, Group, Plan

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Units = NDArray[np.int64]
SPARING = 32  # groups that are looked at once more when a target is met, those of the best units that would go first
NEAR, TRIES = 0.01, 8  # a target is met from within this share of it, if that many tries find how


@dataclass(frozen=True)
class Limits:
    """What selection must respect. Mappings go by a group's root.

    Args:
        ranking: which groups share a budget where ``scopes`` does not say: ``"global"``: all together; ``"local"``:
            each has its own.
        round_to: the channels that a group keeps are a multiple of this (at least one multiple; a group that is
            smaller than that is left alone). Where ``steps`` does not say.
        min_channels: units that every group keeps.
        scopes: groups of the same name share a budget.
        steps: ``round_to`` of single groups.
        least: channels that a group keeps at least.
    """

    ranking: str = "global"
    round_to: int = 1
    min_channels: int = 1
    scopes: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)

    def scope(self, root: str) -> str | None:
        """What the group of this root shares its budget with; None: with all that have no scope."""
        return self.scopes.get(root, root if self.ranking == "local" else None)

    def step(self, group: Group) -> int:
        """What the channels that ``group`` keeps are a multiple of; its kernels may ask for one, too."""
        return math.lcm(self.steps.get(group.root, self.round_to), group.multiple)


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


def check_any(plan: Plan, eligible: NDArray[np.bool_], skipped: Iterable[tuple[str, str]]) -> None:
    """Raise :class:`PlanError`, with the reasons, unless a channel is ``eligible [N]``."""
    if not eligible.any():
        reasons = [f"{f.layer}: {f.reason}" for f in plan.frozen] + [f"{name}: {reason}" for name, reason in skipped]
        why = "; ".join(reasons[:8]) or "it has no layers"
        raise PlanError(f"nothing of this model can be pruned; {why}")


def _owners_of_outputs(plan: Plan) -> list[list[str]]:
    """For each group, the modules that make its channels or pass them on with parameters of their own (norms)."""
    found: list[list[str]] = [[] for _ in plan.groups]
    for tensor, axis in plan.axes():
        if axis.role != "in":
            for i in plan.holds(axis.channels)[2]:
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
    alive = ~np.isneginf(scores)[plan.unit]  # of a masked model, too, what is gone does not count
    for group, count in zip(plan.groups, plan.least_units_beside(alive).tolist(), strict=True):
        own: NDArray[np.int64] = np.unique(plan.unit[group.start : group.stop])
        _keep_best(kept, own, scores, max(min_channels, count))
    for units, least in _narrow_axes(plan):
        _keep_best(kept, units, scores, least)
    return kept


def _narrow_axes(plan: Plan) -> list[tuple[NDArray[np.int64], int]]:
    """Units of each axis that its group's best channels might leave empty, and how many it needs."""
    needed: dict[int, tuple[ChannelArray, int]] = {}  # most axes share their vectors
    for tensor, axis in plan.axes():
        least = 2 if plan.least(tensor, axis) > 1 else 1
        known = needed.get(id(axis.channels))
        if known is None or known[1] < least:
            needed[id(axis.channels)] = (axis.channels, least)
    found: dict[bytes, tuple[NDArray[np.int64], int]] = {}
    for channels, least in needed.values():
        if least == 1 and channels.min(initial=0) < 0:
            continue
        key = channels.tobytes()
        if key not in found or found[key][1] < least:
            found[key] = (np.unique(plan.unit[channels[channels >= 0]]), least)
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
    excess: Callable[[BoolArray], float] | None = None,
) -> BoolArray:
    """The channels to keep: bool ``[N]``.

    Args:
        scores: ``[N]``; the least important go first, ties in channel order. ``-inf``: already gone; ``inf``:
            stays.
        eligible: bool ``[N]``; channels that may be removed.
        removable: how many of the plan's channels are to go, for a scope (see :meth:`Limits.scope`). A unit
            that would exceed it stays; with multiples to be kept it is as near as they allow.
        limits: see :class:`Limits`.
        enough: stop removing as soon as this holds of the channels kept (a target in MACs, say). Where the last unit
            is a large one, units that went before it are spared as far as it still holds.
        excess: by how much more than ``enough`` asks in the end is gone, as a share of what is to be left. Above
            ``NEAR``, the last unit (a head, say) and those after it in its group stay, and smaller ones go instead.
    """
    ranks = unit_scores(plan, scores)
    size = np.bincount(plan.unit, minlength=plan.n_units)
    home = np.zeros(plan.n_units, dtype=np.int64)
    home[plan.unit] = plan.group_of
    free = np.bincount(plan.unit[eligible], minlength=plan.n_units) == size
    free &= ~protected_units(plan, ranks, limits.min_channels) | np.isneginf(ranks)
    free &= ~np.isposinf(ranks)
    order = np.argsort(ranks, kind="stable")
    order = _capped(plan, order[free[order]], ranks, size, home, limits)

    def removing(order: Units) -> tuple[BoolArray, Units]:
        rounding = _Rounding(plan, order, ranks, size, home, limits)
        turns = _in_turns(plan, order, ranks, size, home, limits, removable, rounding)

        def keep_without(units: Units) -> BoolArray:
            removed = np.zeros(plan.n_units, dtype=np.bool_)
            removed[rounding.apply(units)] = True
            return ~removed[plan.unit]

        if enough is None or not enough(keep_without(turns)):
            return keep_without(turns), turns[:0]
        return _fewest(turns, home[turns], np.isneginf(ranks[turns]), len(plan.groups), keep_without, enough)

    best, gone = removing(order)
    if excess is None or not len(gone) or (least := excess(best)) <= NEAR:
        return best
    for _ in range(TRIES):
        last = gone[-1]
        staying = (home[order] == home[last]) & ~np.isin(order, gone[:-1])
        order = order[~staying | np.isneginf(ranks[order])]
        keep, gone = removing(order)
        if not len(gone):
            break
        if (more := excess(keep)) < least:
            best, least = keep, more
        if least <= NEAR:
            break
    return best


def _fewest(
    order: Units,
    group: Units,
    lost: BoolArray,
    n_groups: int,
    keep_without: Callable[[Units], BoolArray],
    enough: Callable[[BoolArray], bool],
) -> tuple[BoolArray, Units]:
    """The channels to keep when the fewest units go that are enough, and the first of ``order`` that were needed."""
    count = _first(lambda n: enough(keep_without(order[:n])), int(lost.sum()), len(order))
    # The last one may have been more than was needed (a head, say): others stay then, as far as they fit.
    place = _place_in_group(group)
    gone = np.bincount(group[:count], minlength=n_groups)
    least = np.bincount(group[lost], minlength=n_groups)
    for number in list(dict.fromkeys(group[:count][::-1].tolist()))[:SPARING]:
        every = gone[number]

        def fits(n: int, number: int = number) -> bool:
            gone[number] = n
            return enough(keep_without(order[place < gone[group]]))

        few = every > least[number] and fits(every - 1)
        gone[number] = _first(fits, int(least[number]), int(every) - 1) if few else every
    needed = order[:count] if count > lost.sum() else order[:0]
    return keep_without(order[place < gone[group]]), needed


def _place_in_group(group: Units) -> Units:
    """How many entries of the same group come before each of ``group [n]``."""
    by_group = np.argsort(group, kind="stable")
    place = np.empty(len(group), dtype=np.int64)
    place[by_group] = np.arange(len(group)) - np.searchsorted(group[by_group], group[by_group])
    return place


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least of ``low .. high`` for which ``holds``, which stays true from there on and is at ``high``."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _capped(plan: Plan, order: Units, ranks: FloatArray, size: Units, home: Units, limits: Limits) -> Units:
    """``order`` without the best units of groups that have a least size."""
    if not limits.least:
        return order
    most = np.array([g.channels - min(limits.least.get(g.root, 0), g.channels) for g in plan.groups])
    by_group = np.argsort(home[order], kind="stable")
    owner, run = home[order][by_group], np.cumsum(size[order][by_group])
    first = np.searchsorted(owner, owner, side="left")
    before = np.concatenate([[0], run])[first]
    fits = np.empty(len(order), dtype=np.bool_)
    fits[by_group] = run - before <= most[owner]
    return order[fits | np.isneginf(ranks[order])]


def _affordable(sizes: Units, budget: int) -> int:
    """How many of the first units fit into ``budget`` channels."""
    return int(np.searchsorted(np.cumsum(sizes), budget, side="right"))


def _in_turns(
    plan: Plan,
    order: Units,
    ranks: FloatArray,
    size: Units,
    home: Units,
    limits: Limits,
    removable: Callable[[str | None], int],
    rounding: _Rounding,
) -> Units:
    """Each scope's own removals: what is gone already, then about the same share of every scope by turns."""
    members: dict[str | None, list[int]] = {}
    for i, group in enumerate(plan.groups):
        members.setdefault(limits.scope(group.root), []).append(i)
    number = np.empty(len(plan.groups), dtype=np.int64)
    for n, groups in enumerate(members.values()):
        number[groups] = n
    scope = number[home[order]]
    parts, shares = [order[:0]], [np.zeros(0)]
    for n, name in enumerate(members):
        own = order[scope == n]
        own = own[: rounding.nearest(own, size, removable(name))]
        parts.append(own)
        shares.append(np.where(np.isneginf(ranks[own]), 0.0, np.arange(1, len(own) + 1) / max(len(own), 1)))
    if len(members) == 1:
        return parts[-1]
    return np.concatenate(parts)[np.argsort(np.concatenate(shares), kind="stable")]


class _Rounding:
    """Makes what each group keeps a multiple: its next best units are removed, or spared.

    ``order``: units that may go, the least important first.
    """

    def __init__(
        self, plan: Plan, order: Units, ranks: FloatArray, size: Units, home: Units, limits: Limits
    ) -> None:
        self._size, self._home = size, home
        self._steps = np.array([limits.step(g) for g in plan.groups], dtype=np.int64)
        self.active = bool((self._steps > 1).any())
        if not self.active:
            return
        self._channels = np.array([g.channels for g in plan.groups], dtype=np.int64)
        self._lost = np.isneginf(ranks)
        owner = home[order]
        own = [order[owner == i] for i in range(len(plan.groups))]
        gone = [int(self._lost[units].sum()) for units in own]
        self._own = own
        self._after = [np.concatenate([[0], np.cumsum(size[units])]) for units in own]  # channels gone after n units
        self._gone = [int(after[n]) for after, n in zip(self._after, gone, strict=True)]

    def counts(self, units: Units) -> list[int]:
        """For each group how many of its own first units go instead of those in ``units``."""
        asked = np.bincount(self._home[units], self._size[units], len(self._channels)).astype(np.int64)
        return [self._count(i, n) if n else 0 for i, n in enumerate(asked.tolist())]

    def _count(self, i: int, asked: int) -> int:
        """How many units of group ``i`` go when ``asked`` channels are to."""
        step, channels, after, gone = int(self._steps[i]), int(self._channels[i]), self._after[i], self._gone[i]
        wanted = max(step, round((channels - asked) / step) * step)
        while asked > gone and wanted < channels - gone:  # units may be too large, or protected, for the nearest
            n = int(np.searchsorted(after, channels - wanted))
            if n < len(after) and after[n] == channels - wanted:
                return n
            wanted += step
        return int(np.searchsorted(after, gone))

    def apply(self, units: Units) -> Units:
        """The units that go instead of ``units``."""
        if not self.active:
            return units
        found = [own[:n] for own, n in zip(self._own, self.counts(units), strict=True)]
        return np.concatenate([units[:0], *found])

    def nearest(self, units: Units, size: Units, budget: int) -> int:
        """How many of a scope's ``units`` to remove so that what goes is as near to ``budget`` channels as can be.

        Never more than ``budget``, but where multiples are to be kept, and more is nearer.
        """
        if not self.active:
            return _affordable(size[units], budget)

        def gone(count: int) -> int:
            return int(size[self.apply(units[:count])].sum())

        least = int(self._lost[units].sum())  # what is gone already goes in any case
        more = _first(lambda n: n > len(units) or gone(n) > budget, least, len(units) + 1)
        if more > len(units) or (more > least and budget - gone(more - 1) <= gone(more) - budget):
            return more - 1
        return more
