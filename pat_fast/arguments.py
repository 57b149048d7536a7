"""What the pruner checks of its arguments before it looks at the model."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import nn

from .criteria import Criterion, GroupNorm, Magnitude
from .errors import ConfigError, check, did_you_mean
from .regularizers import GroupNormRegularizer


def check_model(model: object) -> None:
    """Raise :class:`ConfigError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number, at least ``least``."""
    check(name, value, lambda v: isinstance(v, Integral) and int(v) >= least, f"a whole number, at least {least}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint}")


def make_regularizer(
    given: str | GroupNormRegularizer | None, strength: float, criterion: Criterion
) -> GroupNormRegularizer | None:
    """The regulariser that ``given`` names; it shares the criterion if that is a magnitude.

    Raises:
        ConfigError: it is no regulariser.
    """
    if isinstance(given, str):
        check_choice("regularizer", given, ("group_norm",))
        magnitude = criterion if isinstance(criterion, (GroupNorm, Magnitude)) else None
        return GroupNormRegularizer(strength, criterion=magnitude)
    if given is not None and not hasattr(given, "apply"):
        raise ConfigError(f"regularizer: expected 'group_norm', None or a GroupNormRegularizer, got {given!r}")
    return given
