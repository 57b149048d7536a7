"""Options that steady a training in which channels keep leaving; all of them are off by default."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from .errors import ConfigError, check, check_count, did_you_mean
from .modes import Mode, SoftMask
from .plan.types import Plan
from .schedules import OneShot, Schedule

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Batches = Iterable[Any] | Callable[[], Iterable[Any]]


@dataclass(frozen=True)
class Stability:
    """Options for :class:`pat_fast.Pruner`.

    Args:
        freeze_settled: freeze the ranking of a group that has settled: at each of its last ``settled_prunes`` prunes
            the Jaccard similarity ``|A & B| / |A | B|`` of the sets A and B of its channels that the target would keep,
            by the scores then and the time before, was at least this, in ``(0, 1]``. From then on the group's channels
            keep the scores that they have, so noise no longer decides who goes. After You et al., "Drawing Early-Bird
            Tickets", ICLR 2020, https://arxiv.org/abs/1909.11957, who stop when masks no longer change.
        settled_prunes: at least 1.
        max_lost: the most that one prune may remove, as a share in ``(0, 1]`` of the importance of all channels that
            are left (scores below 0 count as 0). What is over it waits for the next prune, after ``end_epoch`` too.
            To first order the loss grows by the saliencies that are removed: LeCun et al., "Optimal Brain Damage",
            NeurIPS 1989, equation 2.
        recalibrate: after each prune that changed the model, let the batch norms gather their statistics anew, from
            this many of the pruner's ``batches``: their cumulative average, as by
            :func:`torch.optim.swa_utils.update_bn`. Izmailov et al., "Averaging Weights Leads to Wider Optima", UAI
            2018, section 3.2, https://arxiv.org/abs/1803.05407; for pruned networks Li et al., "EagleEye", ECCV 2020,
            https://arxiv.org/abs/2007.02491.
        rewind_to: learning-rate rewinding: set the optimizers' hyperparameters and the pruner's ``scheduler`` back to
            where they were after this step (0: before the first), weights as they are. Renda et al., "Comparing
            Rewinding and Fine-tuning in Neural Network Pruning", ICLR 2020, https://arxiv.org/abs/2003.02389.
        rewind_at: ``"target"``: once, when the target is reached; ``"prune"``: at every prune that removes something.
    Raises:
        ConfigError: a value is out of range.
    """

    freeze_settled: float | None = None
    settled_prunes: int = 3
    max_lost: float | None = None
    recalibrate: int | None = None
    rewind_to: int | None = None
    rewind_at: str = "target"

    def __post_init__(self) -> None:
        share = "a number in (0, 1], or None"
        for name in ("freeze_settled", "max_lost"):
            check(f"stability: {name}", getattr(self, name), lambda v: v is None or 0 < v <= 1, share)
        for name, least in (("recalibrate", 1), ("rewind_to", 0)):
            check_count(f"stability: {name}", getattr(self, name), least, or_none=True)
        check_count("stability: settled_prunes", self.settled_prunes, 1)
        check("stability: rewind_at", self.rewind_at, lambda v: v in ("target", "prune"), "'target' or 'prune'")

    @classmethod
    def of(cls, given: Stability | Mapping[str, Any] | None) -> Stability:
        """From an object of its options; all off if there is none.

        Raises:
            ConfigError: an unknown option, or a value out of range.
        """
        if isinstance(given, Stability):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise ConfigError(f"stability: expected a Stability, an object with its options or None, got {given!r}")
        known = [f.name for f in fields(cls)]
        for option in given or {}:
            if option not in known:
                hint = did_you_mean(str(option), known) or f"; there are {', '.join(known)}"
                raise ConfigError(f"stability: unknown option {option!r}{hint}")
        return cls(**(given or {}))

    def check_beside(self, mode: Mode, schedule: Schedule) -> None:
        """Refuse what makes no sense together.

        Raises:
            ConfigError: with the reason.
        """
        one_shot = isinstance(schedule.function, OneShot)
        if one_shot and self.freeze_settled is not None:
            raise ConfigError("stability: freeze_settled expects several prunes, and 'one_shot' prunes once")
        if isinstance(mode, SoftMask) and self.max_lost is not None:
            raise ConfigError(
                "stability: max_lost expects channels that go for good, and in mode 'soft' they may return; choose "
                "another mode, or leave it out"
            )
        if self.rewind_to is not None and self.rewind_to >= max(schedule.end, 1):
            raise ConfigError(
                f"stability: rewind_to expects a step before end_epoch ({schedule.end}), at which the target is due, "
                f"got {self.rewind_to}"
            )


def check_batches(stability: Stability, batches: Batches | None) -> None:
    """Raise :class:`ConfigError` unless there are batches if, and only if, they are needed."""
    if stability.recalibrate is not None and batches is None:
        raise ConfigError("stability: recalibrate needs the pruner's batches=: a loader, or a function that makes one")
    if stability.recalibrate is None and batches is not None:
        raise ConfigError("batches: expected None without stability={'recalibrate': n}, which is what they are for")
    if batches is not None and not callable(batches) and not isinstance(batches, Iterable):
        raise ConfigError(f"batches: expected a loader or a function that makes one, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise ConfigError("batches: expected what can be read again at every prune, got an iterator; pass the loader")


def recalibrate_batch_norms(model: nn.Module, batches: Batches, count: int | None = None) -> None:
    """Replace the running statistics of all batch norms by their cumulative average over ``count`` batches.

    Modes, gradients and the random state are left as they are. See :func:`torch.optim.swa_utils.update_bn`.

    Args:
        batches: what gives batches ``[B, ...]``, or tuples or lists that begin with one; or a function that returns it.
    """
    found = batches() if callable(batches) and not isinstance(batches, Iterable) else batches
    assert isinstance(found, Iterable)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            update_bn(itertools.islice(found, count), model, device)
    finally:
        for module, training in modes:
            module.training = training


class Settling:
    """Which groups' rankings have settled; all vectors are ``[N]`` and follow the plan."""

    def __init__(self, stability: Stability) -> None:
        self._least = stability.freeze_settled
        self._prunes = stability.settled_prunes
        self._keep: BoolArray | None = None  # what the target would have kept the last time
        self._runs = np.zeros(0, dtype=np.int64)  # prunes at which the channel's group stayed similar, in a row
        self._scores = np.zeros(0)  # of groups that have settled; NaN elsewhere

    def settle(self, plan: Plan, scores: FloatArray, chosen: Callable[[FloatArray], BoolArray]) -> FloatArray:
        """The scores to rank by: those of old where a group has settled.

        Args:
            scores: ``[N]``, as the criterion gave them.
            chosen: what the whole target would keep by given scores.
        """
        if self._least is None:
            return scores
        if self._keep is None:
            self._runs, self._scores = np.zeros(len(scores), np.int64), np.full(len(scores), np.nan)
        scores = np.where(np.isnan(self._scores), scores, self._scores)
        keep = chosen(scores)
        if self._keep is not None:
            both, any_ = (
                np.bincount(plan.group_of[where], minlength=len(plan.groups))
                for where in (keep & self._keep, keep | self._keep)
            )
            similar = both >= self._least * any_
            self._runs = np.where(similar[plan.group_of], self._runs + 1, 0)
            self._scores = np.where(self._runs >= self._prunes, scores, np.nan)
        self._keep = keep
        return scores

    def settled(self, plan: Plan) -> list[str]:
        """Roots of the groups that have settled."""
        if self._keep is None:
            return []
        return [g.root for g in plan.groups if not np.isnan(self._scores[g.start])]

    def shrink(self, movable: BoolArray) -> None:
        """Follow a prune; ``movable [N]`` as of :meth:`Plan.movable`."""
        if self._keep is not None:
            self._keep, self._runs, self._scores = (
                self._keep[movable], self._runs[movable], self._scores[movable]
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any] | None:
        if self._keep is None:
            return None
        parts = {"keep": self._keep, "runs": self._runs, "scores": self._scores}
        return {name: torch.from_numpy(part.copy()) for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        self._keep = None
        if state is not None:
            self._keep, self._runs, self._scores = (
                state[name].cpu().numpy().copy() for name in ("keep", "runs", "scores")
            )


def capped(
    max_lost: float, scores: FloatArray, alive: BoolArray, keep_at: Callable[[float], BoolArray], fraction: float
) -> tuple[BoolArray, bool]:
    """What to keep when ``fraction`` of the target is due and one prune may lose ``max_lost`` of all importance.

    Args:
        scores: ``[N]``. Those that are not finite, and of what is gone, do not count.
        alive: bool ``[N]``, what is not gone.
        keep_at: what is kept at a fraction.
    Returns:
        bool ``[N]``, and whether something waits for the next prune.
    """
    worth = np.where(np.isfinite(scores) & alive, np.maximum(scores, 0.0), 0.0)
    limit = max_lost * worth.sum()

    def fits(keep: BoolArray) -> bool:
        return bool(worth[alive & ~keep].sum() <= limit)

    keep = keep_at(fraction)
    if fits(keep):
        return keep, False
    best, low, high = alive, 0.0, fraction
    for _ in range(16):
        middle = (low + high) / 2
        keep = keep_at(middle)
        if fits(keep):
            best, low = keep, middle
        else:
            high = middle
    return best, True


class Rewinder:
    """Hyperparameters of optimizers and schedulers at a step, and the way back to them."""

    def __init__(self, stability: Stability, schedulers: Sequence[Any]) -> None:
        self.to = stability.rewind_to
        self.at = stability.rewind_at
        self._schedulers = schedulers
        self._saved: dict[str, Any] | None = None

    def record(self, step: int, optimizers: Callable[[], Sequence[Optimizer]]) -> None:
        """Called at every step, and before the first."""
        if step == self.to and self._saved is None:
            groups = [[_hyperparameters(group) for group in o.param_groups] for o in optimizers()]
            states = [copy.deepcopy(s.state_dict()) for s in self._schedulers]
            self._saved = {"optimizers": groups, "schedulers": states}

    def rewind(self, optimizers: Sequence[Optimizer]) -> bool:
        """Go back; False if there is nothing to go back to."""
        if self._saved is None:
            return False
        for optimizer, groups in zip(optimizers, self._saved["optimizers"], strict=False):
            for group, saved in zip(optimizer.param_groups, groups, strict=False):
                for key, value in saved.items():
                    if isinstance(group.get(key), Tensor):
                        group[key].copy_(torch.as_tensor(value))  # captured graphs read this very tensor
                    else:
                        group[key] = copy.deepcopy(value)
        for scheduler, state in zip(self._schedulers, self._saved["schedulers"], strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
        return True

    def state_dict(self) -> dict[str, Any] | None:
        return copy.deepcopy(self._saved)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self._saved = None if state is None else copy.deepcopy(dict(state))


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for key, value in group.items():
        if key not in ("params", "param_names"):
            found[key] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return found


class Steady:
    """What a pruner does of :class:`Stability`: one object with all that lasts between its steps.

    Raises:
        ConfigError: options that make no sense together, or without what they need.
    """

    def __init__(
        self,
        stability: Stability,
        mode: Mode,
        schedule: Schedule,
        batches: Batches | None = None,
        scheduler: Any = None,
    ) -> None:
        stability.check_beside(mode, schedule)
        check_batches(stability, batches)
        schedulers = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler] * (scheduler is not None)
        if schedulers and stability.rewind_to is None:
            raise ConfigError("scheduler: expected None without stability={'rewind_to': step}, which is what it is for")
        for one in schedulers:
            if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
                raise ConfigError(f"scheduler: expected a learning-rate scheduler, got {type(one).__name__}")
        self.options = stability
        self.settling = Settling(stability)
        self.rewinder = Rewinder(stability, schedulers)
        self.waits = False  # whether max_lost held something back at the last prune
        self._batches = batches
        self._notes: list[str] = []

    def choose(
        self,
        plan: Plan,
        scores: FloatArray,
        keep_at: Callable[[FloatArray, float], BoolArray],
        fraction: float,
        alive: BoolArray,
    ) -> BoolArray:
        """The channels to keep, bool ``[N]``, of the ``alive [N]``, when ``fraction`` of the target is due."""
        scores = self.settling.settle(plan, scores, lambda s: keep_at(s, 1.0))
        if self.options.max_lost is None:
            return keep_at(scores, fraction)
        keep, self.waits = capped(self.options.max_lost, scores, alive, lambda f: keep_at(scores, f), fraction)
        return keep

    def after(self, model: nn.Module, changed: bool, reached: bool, optimizers: Callable[[], list[Optimizer]]) -> None:
        """After a step that ``changed`` the model, or at which the target was ``reached``."""
        if changed and self.options.recalibrate is not None:
            assert self._batches is not None
            recalibrate_batch_norms(model, self._batches, self.options.recalibrate)
        if self.rewinder.to is not None and (reached or (changed and self.rewinder.at == "prune")):
            done = self.rewinder.rewind(optimizers())
            to = self.rewinder.to
            self._notes.append(f"the learning rate is back at step {to}" if done else f"step {to} was not seen")

    def notes(self, plan: Plan) -> list[str]:
        """What the next report is to say."""
        notes = list(self._notes)
        settled = self.settling.settled(plan)
        if settled:
            notes.append(f"{len(settled)} of {len(plan.groups)} groups have settled: {', '.join(settled[:4])}")
        if self.waits:
            notes.append(f"max_lost ({self.options.max_lost}) holds channels back: they wait for the next prune")
        return notes

    def clear_notes(self) -> None:
        """Forget what a report has said."""
        self._notes = []

    def state_dict(self) -> dict[str, Any]:
        """What lasts between steps."""
        return {
            "settling": self.settling.state_dict(),
            "rewind": self.rewinder.state_dict(),
            "waits": self.waits,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.settling.load_state_dict(state["settling"])
        self.rewinder.load_state_dict(state["rewind"])
        self.waits = state["waits"]
