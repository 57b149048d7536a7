"""Schedules: what fraction of the target is due at which epoch. Pure functions of the epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

from .errors import ConfigError, did_you_mean

Curve = Callable[[float], float]


def linear(t: float) -> float:
    """``t``."""
    return t


def cubic(t: float) -> float:
    """``1 - (1 - t)^3``: fast at first, when channels are plenty. Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878."""
    return 1.0 - (1.0 - t) ** 3


def constant(t: float) -> float:
    """The whole target at once, at the start."""
    return 1.0


CURVES: dict[str, Curve] = {"linear": linear, "cubic": cubic, "constant": constant}


@dataclass(frozen=True)
class Schedule:
    """When to prune, and how much of the target is then due.

    Epochs are counted as calls of ``Pruner.step()``, from 1. The fraction rises from 0 at ``start`` to 1 at
    ``end``; it is acted on every ``interval`` epochs after ``start``, and at ``end``.

    Args:
        curve: ``"linear"``, ``"cubic"``, ``"constant"``, or a function of the progress ``t`` in 0 .. 1 that
            returns a fraction in 0 .. 1.
        start: last epoch before pruning begins (for ``"constant"``, the epoch at which it happens).
        end: epoch at which the whole target is due.
        interval: epochs between prunes.
    Raises:
        ConfigError: an unknown curve, or epochs out of order.
    """

    curve: str | Curve = "linear"
    start: int = 0
    end: int = 10
    interval: int = 1

    def __post_init__(self) -> None:
        if not callable(self.curve) and self.curve not in list(CURVES):
            raise ConfigError(
                f"schedule: expected one of {', '.join(CURVES)} or a function, got {self.curve!r}"
                + did_you_mean(str(self.curve), CURVES)
            )
        epochs = {"start_epoch": self.start, "end_epoch": self.end, "interval": self.interval}
        for name, value in epochs.items():
            if not isinstance(value, Integral):
                raise ConfigError(f"{name}: expected a whole number, got {value!r}")
        if self.start < 0:
            raise ConfigError(f"start_epoch: expected at least 0, got {self.start}")
        if self.end < self.start:
            raise ConfigError(f"end_epoch: expected at least start_epoch ({self.start}), got {self.end}")
        if self.interval < 1:
            raise ConfigError(f"interval: expected at least 1 epoch, got {self.interval}")

    def fraction(self, epoch: int) -> float:
        """Fraction of the target that is due after ``epoch``: 0 .. 1."""
        if epoch >= self.end:
            return 1.0
        if epoch < self.start or (epoch == self.start and self.curve != "constant"):
            return 0.0
        curve = CURVES[self.curve] if isinstance(self.curve, str) else self.curve
        value = float(curve((epoch - self.start) / (self.end - self.start)))
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"schedule: the curve must return a fraction in 0 .. 1, got {value} at epoch {epoch}")
        return value

    def due(self, epoch: int) -> bool:
        """Whether to prune after ``epoch``."""
        return self.fraction(epoch) > 0.0 and ((epoch - self.start) % self.interval == 0 or epoch >= self.end)

    def stage(self, epoch: int, done: bool) -> str:
        """``"regularize"`` before the first prune, ``"finetune"`` when the target is reached, else ``"prune"``."""
        if done:
            return "finetune"
        return "regularize" if epoch < self.start else "prune"
