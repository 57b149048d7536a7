"""Targets: how small the model is to become, in channels, parameters or MACs, solved on the plan alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, PlanError, check, did_you_mean
from .plan.types import Plan
from .report import Counts
from .selection import Limits, select

BoolArray = NDArray[np.bool_]
KINDS = ("channels", "params", "macs")
NAMES = {"channels": "channels", "params": "parameters", "macs": "MACs"}


@dataclass(frozen=True)
class Target:
    """What is due in the end.

    Args:
        kind: ``"channels"``, ``"params"`` or ``"macs"`` (multiply-accumulates per example).
        value: for channels the fraction to remove, in ``[0, 1)``; else what is to be left: up to 1 a fraction of the
            dense model, above 1 a number. It is an upper bound: the fewest removals that reach it are made.
    Raises:
        ConfigError: an unknown kind, or a value out of range.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = did_you_mean(str(self.kind), KINDS)
            raise ConfigError(f"target: expected one of {', '.join(KINDS)}, got {self.kind!r}{hint}")
        if self.kind == "channels":
            check("target: channels", self.value, lambda v: 0 <= v < 1, "the fraction to remove, in [0, 1)")
        else:
            what = f"a fraction of the dense model in (0, 1], or a number of {NAMES[self.kind]} above 1"
            check(f"target: {self.kind}", self.value, lambda v: 0 < v < math.inf and not isinstance(v, bool), what)

    @classmethod
    def of(cls, given: Mapping[str, float] | None, sparsity: float, default: float) -> Target:
        """From ``{"macs": 0.5}``, or from a fraction of channels where there is none.

        Raises:
            ConfigError: not one target, or both are given (``sparsity`` other than its ``default``).
        """
        if given is None:
            return cls("channels", sparsity)
        if not isinstance(given, Mapping) or len(given) != 1:
            raise ConfigError(f"target: expected one of {', '.join(KINDS)}, as {{'macs': 0.5}}, got {given!r}")
        if sparsity != default:
            raise ConfigError(f"target: expected none beside target_sparsity ({sparsity}), got {dict(given)!r}")
        return cls(*next(iter(given.items())))

    def left(self, dense: int) -> float:
        """What is to be left of ``dense``."""
        if self.kind == "channels":
            return dense * (1 - self.value)
        return dense * self.value if self.value <= 1 else float(self.value)

    def cost(self, plan: Plan, keep: BoolArray) -> int:
        """What the target bounds, of the model with the channels ``keep [N]``."""
        return plan.params(keep) if self.kind == "params" else plan.macs(keep)


class Goal:
    """A target for one model: what was dense, what is left, which channels go next.

    Args:
        target: what is due in the end.
        mac_target: with a target in channels, stop at this fraction of the dense MACs.
        limits: see :class:`Limits`.
    Raises:
        ConfigError: ``mac_target`` beside a target that is not in channels.
    """

    def __init__(self, target: Target, mac_target: float | None, limits: Limits) -> None:
        if mac_target is not None and target.kind != "channels":
            raise ConfigError(
                f"mac_target: expected None beside a target in {NAMES[target.kind]}, got {mac_target!r}; it stops a "
                "target in channels early"
            )
        self.target = target
        self.mac_target = mac_target
        self.limits = limits
        self.roots: dict[str, int] = {}
        self.dense: Counts = (0, 0, 0)
        self._checked = target.kind == "channels"

    def start(self, plan: Plan, eligible: BoolArray) -> None:
        """Take ``plan`` for the dense model's; the channels ``eligible [N]`` may be removed."""
        self.roots = {g.root: g.channels for g in plan.groups if eligible[g.start]}
        self.dense = (int(eligible.sum()), plan.params(), plan.macs())

    def state_dict(self) -> dict[str, Any]:
        """The dense model's counts."""
        return {"roots": dict(self.roots), "dense": list(self.dense)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.roots = dict(state["roots"])
        channels, params, macs = state["dense"]
        self.dense = (channels, params, macs)

    def check(self, plan: Plan, eligible: BoolArray) -> None:
        """Once, before training: refuse what cannot be reached.

        Raises:
            ConfigError: with everything gone that may go, the model is still too large.
        """
        if self._checked:
            return
        self._checked = True
        keep = select(plan, np.zeros(plan.n_channels), eligible, lambda root: plan.n_channels, self.limits)
        least, dense = self.target.cost(plan, keep), self._dense()
        if least > self.target.left(dense):
            share = math.ceil(1e4 * least / dense) / 1e4
            raise ConfigError(
                f"target: expected at least {least:,} {self._name()} ({share} of {dense:,}), which stay with these "
                f"layers and limits, got {self.target.value} ({self.target.left(dense):,.0f}); raise the target, or "
                "lower min_channels or round_to, or prune more layers"
            )

    def counts(self, plan: Plan, keep: BoolArray) -> Counts:
        """Channels that may be pruned, parameters and MACs of what is left."""
        return self._alive(plan, keep), plan.params(keep), plan.macs(keep)

    def reached(self, plan: Plan, keep: BoolArray) -> bool:
        """Whether ``mac_target`` is met."""
        return self.mac_target is not None and plan.macs(keep) <= self.mac_target * self.dense[2]

    def ratio(self, fraction: float) -> float:
        """What is to be gone, as a fraction of the dense channels (parameters, MACs), of which ``fraction`` is due."""
        if self.target.kind == "channels":
            return self.target.value * fraction
        dense = self._dense()
        return fraction * max(1 - self.target.left(dense) / dense, 0.0) if dense else 0.0

    def select(
        self, plan: Plan, scores: NDArray[np.float64], alive: BoolArray, eligible: BoolArray, fraction: float
    ) -> BoolArray:
        """The channels to keep when ``fraction`` of the target is due: bool ``[N]``.

        Raises:
            PlanError: a target in parameters or MACs cannot be reached, since the criterion leaves groups unscored.
        """
        if self.target.kind != "channels":
            return self._by_cost(plan, scores, eligible, fraction)
        ratio = self.ratio(fraction)

        def removable(root: str | None) -> int:
            """Channels of the plan that are to be gone; masked ones among them."""
            dense = sum(n for r, n in self.roots.items() if root is None or r == root)
            wanted = int(dense * (1.0 - ratio) + 1e-9)
            masked = self._alive(plan, np.ones_like(alive), root) - self._alive(plan, alive, root)
            return max(self._alive(plan, alive, root) - wanted, 0) + masked

        enough = None if self.mac_target is None else (lambda keep: self.reached(plan, keep))
        return select(plan, scores, eligible, removable, self.limits, enough)

    def _by_cost(self, plan: Plan, scores: NDArray[np.float64], eligible: BoolArray, fraction: float) -> BoolArray:
        dense = self._dense()
        limit = dense * (1 - self.ratio(fraction)) + 1e-6

        def enough(keep: BoolArray) -> bool:
            return self.target.cost(plan, keep) <= limit

        keep = select(plan, scores, eligible, lambda root: plan.n_channels, self.limits, enough)
        if not enough(keep):
            raise PlanError(
                f"target: {limit:,.0f} {self._name()} are due, and at least {self.target.cost(plan, keep):,} of "
                f"{dense:,} stay with what the criterion scores highest, or not at all; raise the target, or choose "
                "another criterion"
            )
        return keep

    def _name(self) -> str:
        return NAMES[self.target.kind]

    def _dense(self) -> int:
        return self.dense[KINDS.index(self.target.kind)]

    def _alive(self, plan: Plan, keep: BoolArray, root: str | None = None) -> int:
        """Living channels of one group or of all that may be pruned; a group's last channel counts too."""
        found = {g.root: int(keep[g.start : g.stop].sum()) for g in plan.groups}
        return sum(found.get(r, 1) for r in self.roots if root is None or r == root)
