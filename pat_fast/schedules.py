"""Schedules: what fraction of the target is due when. Pure functions of the epoch (or of the optimizer step)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .errors import ConfigError, check, check_count, named_options

Curve = Callable[[float], float]


@dataclass(frozen=True)
class Polynomial:
    """``1 - (1 - t)^power``: fast at first, when channels are plenty, for a power above 1.

    With power 3 the cubic schedule of automated gradual pruning; Zhu & Gupta, "To prune, or not to prune", 2017,
    https://arxiv.org/abs/1710.01878.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        check("power", self.power, lambda v: 0 < v < math.inf, "a number above 0")

    def __call__(self, t: float) -> float:
        return float(1.0 - (1.0 - t) ** self.power)


@dataclass(frozen=True)
class Constant:
    """The whole target from the start on; what grows back (soft masks) is taken again at every prune."""

    def __call__(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class OneShot(Constant):
    """The whole target in one prune, at ``start``; nothing afterwards."""


@dataclass(frozen=True)
class Cosine:
    """``(1 - cos(pi t)) / 2``: slow at both ends."""

    def __call__(self, t: float) -> float:
        return (1.0 - math.cos(math.pi * t)) / 2.0


@dataclass(frozen=True)
class Exponential:
    """``(1 - e^(-rate t)) / (1 - e^(-rate))``: equal shares of what is left; slow at first for a rate below 0."""

    rate: float = 3.0

    def __post_init__(self) -> None:
        check("rate", self.rate, lambda v: 0 < abs(v) <= 100, "a number other than 0, in [-100, 100]")

    def __call__(self, t: float) -> float:
        return min(math.expm1(-self.rate * t) / math.expm1(-self.rate), 1.0)


@dataclass(frozen=True)
class OneCycle:
    """``(1 + e^(offset - slope)) / (1 + e^(offset - slope t))``, less what it is at 0 so that it starts there.

    Hubens et al., "One-Cycle Pruning", 2021, https://arxiv.org/abs/2107.02086, with slope 14 and offset 5.
    """

    slope: float = 14.0
    offset: float = 5.0

    def __post_init__(self) -> None:
        check("slope", self.slope, lambda v: 0 < v <= 100, "a number in (0, 100]")
        check("offset", self.offset, lambda v: 0 <= v <= 100, "a number in [0, 100]")

    def __call__(self, t: float) -> float:
        low, high, now = (1 / (1 + math.exp(self.offset - self.slope * x)) for x in (0.0, 1.0, t))
        return (now - low) / (high - low)


@dataclass(frozen=True)
class Milestones:
    """A staircase: from progress ``at[i]`` on, the fraction ``fractions[i]``; equal steps by default.

    ``Milestones(at=(0.2, 0.5, 1.0))`` takes a third of the target at each.
    """

    at: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    fractions: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("at", "fractions"):
            if isinstance(getattr(self, name), Iterable):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check("at", self.at, lambda v: len(v) > 0 and _rising((0.0, *v)) and v[-1] <= 1, "rising numbers in (0, 1]")
        steps = f"{len(self.at)} rising numbers in (0, 1], the last of them 1"
        check("fractions", self.fractions, lambda v: v is None or self._fits(v), steps)

    def _fits(self, fractions: tuple[float, ...]) -> bool:
        return len(fractions) == len(self.at) and _rising((0.0, *fractions)) and fractions[-1] == 1

    def __call__(self, t: float) -> float:
        reached = sum(at <= t + 1e-9 for at in self.at)
        if not reached:
            return 0.0
        return reached / len(self.at) if self.fractions is None else self.fractions[reached - 1]


def _rising(values: tuple[float, ...]) -> bool:
    return all(a < b for a, b in pairwise(values))


def linear() -> Polynomial:
    """``t``."""
    return Polynomial(1.0)


def cubic() -> Polynomial:
    """``1 - (1 - t)^3``; see :class:`Polynomial`."""
    return Polynomial(3.0)


DEFAULT_STEPS = 10
PROBES = 1024
SLACK = 1e-9  # what a curve may fall by rounding
CURVES: dict[str, Callable[..., Curve]] = {
    "linear": linear,
    "cubic": cubic,
    "constant": Constant,
    "polynomial": Polynomial,
    "cosine": Cosine,
    "exponential": Exponential,
    "one_cycle": OneCycle,
    "milestones": Milestones,
    "one_shot": OneShot,
}


def make_curve(given: Any) -> Curve:
    """A curve from a name, ``{"name": ..., options}``, or a function of the progress ``t`` in 0 .. 1.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    if callable(given) and not isinstance(given, type):
        curve: Curve = given
        return curve
    name, options = named_options("schedule", given, CURVES, " or a function")
    return CURVES[name](**options)


@dataclass(frozen=True)
class Schedule:
    """When to prune, and how much of the target is then due.

    Epochs are counted as calls of ``Pruner.step()``, from 1 (or, if the pruner counts optimizer steps, those). The
    fraction rises from 0 at ``start`` to 1 at ``end``; it is acted on every ``interval`` epochs after ``start``, and
    at ``end``.

    Args:
        curve: a name (see :data:`CURVES`), ``{"name": ..., options}``, or a function of the progress ``t`` in 0 .. 1
            that returns a fraction in 0 .. 1 and never falls: what was removed does not come back.
        start: last epoch before pruning begins (for ``"constant"`` and ``"one_shot"``, the epoch at which it happens).
        end: epoch at which the whole target is due; ``"one_shot"`` has it at its start.
        interval: epochs between prunes.
    Raises:
        ConfigError: an unknown curve, a function that leaves its bounds or falls, or epochs out of order.
    """

    curve: str | Mapping[str, Any] | Curve = "cubic"
    start: int = 0
    end: int = 10
    interval: int = 1

    def __post_init__(self) -> None:
        curve = make_curve(self.curve)
        object.__setattr__(self, "_curve", curve)
        check_count("start_epoch", self.start, 0)
        check_count("end_epoch", self.end, 0)
        check_count("interval", self.interval, 1)
        if isinstance(curve, OneShot):
            object.__setattr__(self, "end", max(self.start, 1))
        if self.end < self.start:
            raise ConfigError(f"end_epoch: expected at least start_epoch ({self.start}), got {self.end}")
        if callable(self.curve):  # its mistakes are to be seen now, not when the training is half done
            before = 0.0
            for epoch in range(self.start + 1, self.end, max((self.end - self.start) // PROBES, 1)):
                before = self.risen(epoch, before)

    @classmethod
    def of(cls, curve: Any, start: int, end: int | None, interval: int) -> Schedule:
        """A schedule that ends ``DEFAULT_STEPS`` after its start if no end is given.

        Raises:
            ConfigError: as the constructor; or an end for ``"one_shot"``, which would not count.
        """
        check_count("start_epoch", start, 0)
        made = cls(curve, start, start + DEFAULT_STEPS if end is None else end, interval)
        if isinstance(made.function, OneShot) and end not in (None, start, made.end):
            raise ConfigError(
                f"end_epoch: expected None with 'one_shot', which prunes at start_epoch ({start}), got {end}"
            )
        return made

    @property
    def function(self) -> Curve:
        """The curve as a function of the progress."""
        curve: Curve = self._curve  # type: ignore[attr-defined]
        return curve

    def fraction(self, epoch: int) -> float:
        """Fraction of the target that is due after ``epoch``: 0 .. 1."""
        if epoch >= self.end:
            return 1.0
        at_once = isinstance(self.function, Constant) and not isinstance(self.function, OneShot)
        if epoch < self.start or (epoch == self.start and not at_once) or isinstance(self.function, OneShot):
            return 0.0
        value = self.function((epoch - self.start) / (self.end - self.start))
        try:
            fraction = float(value)
        except (TypeError, ValueError):
            fraction = math.nan
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"schedule: the curve must return a fraction in 0 .. 1, got {value!r} at epoch {epoch}")
        return fraction

    def risen(self, epoch: int, before: float) -> float:
        """:meth:`fraction`, after so much was due ``before``.

        Raises:
            ConfigError: it is less.
        """
        fraction = self.fraction(epoch)
        if fraction < before - SLACK:
            raise ConfigError(
                f"schedule: the curve must not fall, got {fraction:.4g} at epoch {epoch} after {before:.4g}; what was "
                "removed does not come back"
            )
        return fraction

    def due(self, epoch: int) -> bool:
        """Whether to prune after ``epoch``."""
        if isinstance(self.function, OneShot):
            return epoch == self.end
        return self.fraction(epoch) > 0.0 and ((epoch - self.start) % self.interval == 0 or epoch >= self.end)

    def stage(self, epoch: int, done: bool) -> str:
        """``"regularize"`` before the first prune, ``"finetune"`` when the target is reached, else ``"prune"``."""
        if done:
            return "finetune"
        return "regularize" if epoch < self.start else "prune"

    def plot(self, target: float = 1.0, unit: str = "epoch", width: int = 40, rows: int = 40) -> str:
        """A table with bars for people: the epochs that prune, and the share of the channels due then.

        Args:
            target: what the fraction is a fraction of.
            rows: at most so many; evenly chosen of more.
        """
        first = [self.start] if self.start > 0 and not self.due(self.start) else []
        due = first + [e for e in range(1, self.end + 1) if self.due(e)]
        if len(due) > rows:
            due = [due[round(i * (len(due) - 1) / (rows - 1))] for i in range(rows)]
        digits = max(len(unit), len(str(self.end)))
        lines = [f"{unit:>{digits}}  share"]
        for epoch in due:
            ratio = target * self.fraction(epoch)
            bar = "#" * round(width * ratio / target) if target else ""
            lines.append(f"{epoch:>{digits}}  {ratio:5.1%}  {bar}".rstrip())
        return "\n".join(lines)
