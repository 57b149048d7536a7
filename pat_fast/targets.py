"""Targets: how small or fast the model is to become, in channels, parameters, MACs or milliseconds.

Solved on the plan alone: what a target bounds is counted, or predicted from measured layers, without a forward.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import ConfigError, PlanError, check, check_count, did_you_mean
from .latency import LatencyModel
from .limits import Rules
from .plan.bind import Binding
from .plan.types import Group, Plan
from .report import Counts
from .selection import Limits, select

BoolArray = NDArray[np.bool_]
KINDS = ("channels", "params", "macs", "latency", "latency_ms")
NAMES = {
    "channels": "channels",
    "params": "parameters",
    "macs": "MACs",
    "latency": "ms",
    "latency_ms": "ms",
}
LATENCIES = ("latency", "latency_ms")


@dataclass(frozen=True)
class Target:
    """What is due in the end.

    Args:
        kind: ``"channels"``, ``"params"``, ``"macs"`` (multiply-accumulates per example), ``"latency"`` or
            ``"latency_ms"`` (of one forward in eval mode, as :class:`pat_fast.latency.LatencyModel` predicts it).
        value: for channels the fraction to remove, in ``[0, 1)``; else what is to be left: up to 1 a fraction of the
            dense model, above 1 a number. Of ``"latency"`` always a fraction, of ``"latency_ms"`` always milliseconds.
            It is an upper bound: the fewest removals that reach it are made, and what fits after the last one stays.
            A unit (a head, say) that would overshoot it by more than 1 % stays where smaller ones can go instead.
        batch: examples per forward, for a latency.
    Raises:
        ConfigError: an unknown kind, or a value out of range.
    """

    kind: str
    value: float
    batch: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            hint = did_you_mean(str(self.kind), KINDS)
            raise ConfigError(f"target: expected one of {', '.join(KINDS)}, got {self.kind!r}{hint}")
        what = {
            "channels": "the fraction to remove, in [0, 1)",
            "latency": "a fraction of the dense model's latency in (0, 1]",
            "latency_ms": "milliseconds above 0",
        }.get(self.kind, f"a fraction of the dense model in (0, 1], or a number of {NAMES[self.kind]} above 1")
        most = 1 if self.kind == "latency" else math.inf
        if self.kind == "channels":
            check("target: channels", self.value, lambda v: 0 <= v < 1, what)
        else:
            check(f"target: {self.kind}", self.value, lambda v: 0 < v <= most and v < math.inf, what)
        check_count("target: batch", self.batch, 1)

    @classmethod
    def of(cls, given: Mapping[str, float] | None, sparsity: float, default: float) -> Target:
        """From ``{"macs": 0.5}`` or ``{"latency_ms": 4.0, "batch": 8}``, or from a fraction of channels.

        Raises:
            ConfigError: not one target, or both are given (``sparsity`` other than its ``default``).
        """
        if given is None:
            return cls("channels", sparsity)
        options = dict(given) if isinstance(given, Mapping) else {}
        batch: Any = options.pop("batch", 1)
        if len(options) != 1:
            raise ConfigError(f"target: expected one of {', '.join(KINDS)}, as {{'macs': 0.5}}, got {given!r}")
        if sparsity != default:
            raise ConfigError(f"target: expected none beside target_sparsity ({sparsity}), got {dict(given)!r}")
        kind, value = next(iter(options.items()))
        if "batch" in given and kind not in LATENCIES:
            raise ConfigError(f"target: expected a batch beside a latency alone, got {dict(given)!r}")
        return cls(kind, value, int(cls(kind, value, batch).batch))

    def left(self, dense: float) -> float:
        """What is to be left of ``dense``."""
        if self.kind == "channels":
            return dense * (1 - self.value)
        return dense * self.value if self.value <= 1 and self.kind != "latency_ms" else float(self.value)


class Goal:
    """A target for one model: what was dense, what is left, which channels go next.

    Args:
        target: what is due in the end.
        mac_target: with a target in channels, stop at this fraction of the dense MACs.
        rules: what the user says about single layers.
    Raises:
        ConfigError: ``mac_target`` or ``layer_ratios`` beside a target that is not in channels.
    """

    def __init__(self, target: Target, mac_target: float | None, rules: Rules) -> None:
        if mac_target is not None and target.kind != "channels":
            raise ConfigError(
                f"mac_target: expected None beside a target in {NAMES[target.kind]}, got {mac_target!r}; it stops a "
                "target in channels early"
            )
        if rules.layer_ratios and target.kind != "channels":
            raise ConfigError(
                f"layer_ratios: expected none beside a target in {NAMES[target.kind]}, which is reached by what "
                f"matters least; got {rules.layer_ratios!r}; max_ratio bounds what a layer may lose"
            )
        self.target = target
        self.mac_target = mac_target
        self.rules = rules
        self.limits = Limits()
        self.ratios: dict[str, float] = {}  # of scopes that have one of their own
        self.roots: dict[str, int] = {}
        self.dense: Counts = (0, 0, 0, None)
        self.latency: LatencyModel | None = None
        self._shared = False
        self._model: Callable[[], nn.Module | None] = lambda: None
        self.notes: tuple[str, ...] = ()
        self._checked = False

    def start(self, binding: Binding, eligible: BoolArray, example_inputs: Any = None) -> None:
        """Take ``binding`` for the dense model's; the channels ``eligible [N]`` may be removed.

        For a target in milliseconds, layers are measured (or found in the cache), and the model on inputs like
        ``example_inputs``.

        Raises:
            ConfigError: layers that share channels are given different rules.
        """
        plan, self._model = binding.plan, weakref.ref(binding.model)
        self.roots = {g.root: g.channels for g in plan.groups if eligible[g.start]}
        self.limits = self.rules.limits(binding)
        self.ratios = self.rules.ratios(plan)
        note = self.rules.note(binding)
        self.notes = () if note is None else (note,)
        if self.target.kind in LATENCIES:
            # Measured like the model will be used: at widths that the limits allow.
            def halved(share: float) -> BoolArray:
                scores = np.random.default_rng(0).random(plan.n_channels)
                every = Limits("local", self.limits.round_to, self.limits.min_channels, steps=self.limits.steps)
                sizes = {g.root: g.channels for g in plan.groups}
                return select(plan, scores, eligible, lambda root: int(sizes[str(root)] * share), every)

            self.latency = LatencyModel.measure(binding, example_inputs, self.target.batch, halved)
        ms = None if self.latency is None else self.latency.dense
        self.dense = (int(eligible.sum()), plan.params(), plan.macs(), ms)

    def state_dict(self) -> dict[str, Any]:
        """The dense model's counts, and what the rules and the measured layers came to for it."""
        return {
            "roots": dict(self.roots),
            "dense": list(self.dense),
            "limits": {name: dict(getattr(self.limits, name)) for name in ("scopes", "steps", "least")},
            "ratios": dict(self.ratios),
            "notes": list(self.notes),
            "latency": None if self.latency is None else self.latency.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.roots = dict(state["roots"])
        channels, params, macs, ms = state["dense"]
        self.dense = (channels, params, macs, ms)
        self.limits = replace(self.limits, **state["limits"])
        self.ratios = dict(state["ratios"])
        self.notes = tuple(state["notes"])
        model = self._model()
        if state["latency"] is not None and model is not None:
            self.latency = LatencyModel.from_state(state["latency"], model)

    def share(self, of_first: Callable[[str, Any], Any]) -> None:
        """Go by what the first of several ranks measured: ``of_first(what, value)`` gives its value."""
        model = self._model()
        if self.latency is not None and model is not None and not self._shared:
            self._shared = True
            shared = of_first("the latency", self.latency.state_dict())
            self.latency = LatencyModel.from_state(shared, model)
            self.dense = (*self.dense[:3], self.latency.dense)

    def check(self, plan: Plan, eligible: BoolArray | Tensor) -> None:
        """Once, before training: refuse what cannot be reached, or asks for nothing.

        Args:
            eligible: bool ``[N]``, on any device, which is waited for that once alone.

        Raises:
            ConfigError: with everything gone that may go, the model is still too large; or it has fewer parameters or
                MACs already.
        """
        if self._checked:
            return
        self._checked = True
        eligible = torch.as_tensor(eligible).cpu().numpy()
        if self.target.kind == "channels":
            self._check_channels(plan, eligible)
            return
        keep = select(plan, np.zeros(plan.n_channels), eligible, lambda scope: plan.n_channels, self.limits)
        least, dense = self.cost(plan, keep), self._dense()
        if self.latency is None and self.target.left(dense) > dense:
            raise ConfigError(
                f"target: expected fewer than the {self._show(dense, False)} of the dense model, or a fraction of "
                f"them, got {self.target.value}, for which nothing would be pruned"
            )
        if least > self.target.left(dense):
            share = math.ceil(1e4 * least / dense) / 1e4
            asked = self._show(self.target.left(dense), False)
            raise ConfigError(
                f"target: expected at least {self._show(least)} ({share} of {self._show(dense, False)}), which stay "
                f"with these layers and limits, got {self.target.value} ({asked}); raise the target, or "
                "lower min_channels or round_to, raise max_ratio, or prune more layers"
            )

    def _check_channels(self, plan: Plan, eligible: BoolArray) -> None:
        alive = np.ones(plan.n_channels, dtype=np.bool_)
        keep = select(plan, np.zeros(plan.n_channels), eligible, lambda scope: plan.n_channels, self.limits)
        units = np.bincount(plan.unit, minlength=1)[plan.unit]
        scopes: dict[str | None, list[Group]] = {}
        for group in plan.groups:
            if group.root in self.roots:
                scopes.setdefault(self.limits.scope(group.root), []).append(group)
        for scope, groups in scopes.items():
            wanted = self._removable(plan, alive, 1.0, scope)
            most = sum(g.channels - int(keep[g.start : g.stop].sum()) for g in groups)
            grain = max(max(self.limits.step(g), int(units[g.start])) for g in groups)
            dense = sum(self.roots[r] for r in self.roots if self.limits.scope(r) == scope)
            if wanted - most > max(0.01 * dense, grain, len(groups)):
                gone = math.floor(1e4 * (dense - self._alive(plan, alive, self._of(scope)) + most) / dense) / 1e4
                where = "" if scope is None else f" of {', '.join(g.root for g in groups[:3])}"
                raise ConfigError(
                    f"target: expected at most {gone} of the channels{where}, which these layers and limits allow, got "
                    f"{self.ratios.get(str(scope), self.target.value)}; lower it, or lower min_channels or round_to, "
                    "raise max_ratio, or prune more layers"
                )

    def cost(self, plan: Plan, keep: BoolArray) -> float:
        """What the target bounds, of the model with the channels ``keep [N]``: parameters, MACs or milliseconds."""
        if self.latency is not None:
            return self.latency.predict(plan, keep)
        return plan.params(keep) if self.target.kind == "params" else plan.macs(keep)

    def counts(self, plan: Plan, keep: BoolArray) -> Counts:
        """Channels that may be pruned, parameters, MACs and, for a target in it, the latency of what is left."""
        ms = None if self.latency is None else self.latency.predict(plan, keep)
        return self._alive(plan, keep), plan.params(keep), plan.macs(keep), ms

    def reached(self, plan: Plan, keep: BoolArray) -> bool:
        """Whether ``mac_target`` is met."""
        return self.mac_target is not None and plan.macs(keep) <= self.mac_target * self.dense[2]

    def ratio(self, fraction: float) -> float:
        """What is to be gone, as a fraction of the dense channels (parameters, ...), of which ``fraction`` is due."""
        if self.target.kind == "channels":
            gone = sum(n * self.ratios.get(root, self.target.value) for root, n in self.roots.items())
            return fraction * gone / max(sum(self.roots.values()), 1) if self.ratios else self.target.value * fraction
        dense = self._dense()
        return fraction * max(1 - self.target.left(dense) / dense, 0.0) if dense else 0.0

    def select(
        self, plan: Plan, scores: NDArray[np.float64], alive: BoolArray, eligible: BoolArray, fraction: float
    ) -> BoolArray:
        """The channels to keep when ``fraction`` of the target is due: bool ``[N]``.

        Raises:
            PlanError: a target in parameters, MACs or milliseconds cannot be reached, since the criterion leaves groups
                unscored.
        """
        if self.target.kind != "channels":
            return self._by_cost(plan, scores, eligible, fraction)
        enough = None if self.mac_target is None else (lambda keep: self.reached(plan, keep))
        removable = partial(self._removable, plan, alive, fraction)
        return select(plan, scores, eligible, removable, self.limits, enough)

    def _removable(self, plan: Plan, alive: BoolArray, fraction: float, scope: str | None) -> int:
        """Channels of the plan that are to be gone of a scope; masked ones among them."""
        own = self._of(scope)
        ratio = self.ratios.get(str(scope), self.target.value) * fraction
        wanted = int(sum(self.roots[root] for root in own) * (1.0 - ratio) + 1e-9)
        left = self._alive(plan, alive, own)
        masked = self._alive(plan, np.ones_like(alive), own) - left
        return max(left - wanted, 0) + masked

    def _by_cost(self, plan: Plan, scores: NDArray[np.float64], eligible: BoolArray, fraction: float) -> BoolArray:
        dense = self._dense()
        limit = dense * (1 - self.ratio(fraction)) * (1 + 1e-9) + 1e-9

        def enough(keep: BoolArray) -> bool:
            return self.cost(plan, keep) <= limit

        left = max(self.target.left(dense), 1e-9)

        def excess(keep: BoolArray) -> float:
            return 1 - self.cost(plan, keep) / left

        keep = select(plan, scores, eligible, lambda scope: plan.n_channels, self.limits, enough, excess)
        if not enough(keep):
            raise PlanError(
                f"target: {self._show(limit)} are due, and at least {self._show(self.cost(plan, keep), False)} of "
                f"{self._show(dense, False)} stay with what the criterion scores highest, or not at all; raise the "
                "target, or choose another criterion"
            )
        return keep

    def _show(self, value: float, name: bool = True) -> str:
        if self.latency is not None:
            return f"{value:.4g} ms"
        return f"{value:,.0f} {NAMES[self.target.kind]}" if name else f"{value:,.0f}"

    def _dense(self) -> float:
        place = 3 if self.latency is not None else KINDS.index(self.target.kind)
        return self.dense[place] or 0.0

    def _of(self, scope: str | None) -> list[str]:
        """Roots of the groups that may be pruned and share this budget."""
        return [root for root in self.roots if self.limits.scope(root) == scope]

    def _alive(self, plan: Plan, keep: BoolArray, roots: Iterable[str] | None = None) -> int:
        """Living channels of these groups, or of all that may be pruned; a group's last unit counts too."""
        found = plan.lone() | {g.root: int(keep[g.start : g.stop].sum()) for g in plan.groups}
        return sum(found.get(root, 1) for root in (self.roots if roots is None else roots))
