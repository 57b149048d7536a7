"""What the pruner checks of its arguments before it looks at the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from .criteria import Criterion, GroupNorm, Magnitude
from .errors import ConfigError, check, did_you_mean, named_options
from .regularizers import (
    BNScaleRegularizer,
    GroupNormRegularizer,
    GrowingRegularizer,
    ProximalGroupLasso,
    Regularizer,
)

REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "group_norm": GroupNormRegularizer,
    "bn_scale": BNScaleRegularizer,
    "growing": GrowingRegularizer,
    "proximal": ProximalGroupLasso,
}


def check_count(name: str, value: Any, least: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number, at least ``least``."""
    check(name, value, lambda v: isinstance(v, Integral) and int(v) >= least, f"a whole number, at least {least}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint}")


def check_target(sparsity: Any, mac_target: Any) -> None:
    """Raise :class:`ConfigError` unless ``sparsity`` is in ``[0, 1)``, and ``mac_target`` in ``(0, 1]`` or None."""
    check("target_sparsity", sparsity, lambda v: 0.0 <= v < 1.0, "a number in [0, 1)")
    if mac_target is not None:
        check("mac_target", mac_target, lambda v: 0.0 < v <= 1.0, "a number in (0, 1], or None")


def check_unit(unit: Any, auto: bool) -> None:
    """Raise :class:`ConfigError` unless ``unit`` is ``"epoch"``, or ``"step"`` where hooks count the steps."""
    check_choice("unit", unit, ("epoch", "step"))
    if unit == "step" and not auto:
        raise ConfigError("unit: expected 'epoch' with auto=False, got 'step': there is no hook that counts steps")


def check_callback(name: str, value: Any) -> Any:
    """``value``; raises :class:`ConfigError` unless it is a function or None."""
    check(name, value, lambda v: v is None or callable(v), "a function, or None")
    return value


def make_regularizer(given: Any, strength: float, criterion: Criterion | None = None) -> Regularizer | None:
    """The regulariser that a name or ``{"name": ..., options}`` says, or a regulariser itself, or None.

    Those that score channels share ``criterion`` if that is a magnitude.

    Args:
        strength: for options without one.
    Raises:
        ConfigError: it is no regulariser, or an option is unknown or out of range.
    """
    if isinstance(given, (str, Mapping)):
        name, options = named_options("regularizer", given, REGULARIZERS, hidden=("criterion",))
        options.setdefault("strength", strength)
        shares = "criterion" in inspect.signature(REGULARIZERS[name]).parameters
        if shares and isinstance(criterion, (GroupNorm, Magnitude)):
            options["criterion"] = criterion
        return REGULARIZERS[name](**options)
    if given is not None and (isinstance(given, type) or not callable(getattr(given, "apply", None))):
        known = [repr(name) for name in REGULARIZERS]
        raise ConfigError(f"regularizer: expected {', '.join(known)}, None or an object with apply(), got {given!r}")
    found: Regularizer | None = given
    return found
