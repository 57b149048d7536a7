"""What the pruner checks of its arguments before it looks at the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .criteria import Criterion, GroupNorm, Magnitude
from .errors import ConfigError, check, check_flag, did_you_mean, named_options
from .regularizers import (
    BNScaleRegularizer,
    GroupNormRegularizer,
    GrowingRegularizer,
    ProximalGroupLasso,
    Regularizer,
)

DEFAULT_STRENGTH = 1e-4
REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "group_norm": GroupNormRegularizer,
    "bn_scale": BNScaleRegularizer,
    "growing": GrowingRegularizer,
    "proximal": ProximalGroupLasso,
}


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


def check_unit(unit: Any, auto: Any, verify: Any) -> None:
    """Raise :class:`ConfigError` unless ``unit`` is ``"epoch"``, or ``"step"`` where hooks count; the others flags."""
    check_flag("auto", auto)
    check_flag("verify", verify)
    check_choice("unit", unit, ("epoch", "step"))
    if unit == "step" and not auto:
        raise ConfigError("unit: expected 'epoch' with auto=False, got 'step': there is no hook that counts steps")


def make_regularizer(given: Any, strength: float, criterion: Criterion | None = None) -> Regularizer | None:
    """The regulariser that a name or ``{"name": ..., options}`` says, or a regulariser itself, or None.

    Those that score channels share ``criterion`` if that is a magnitude.

    Args:
        strength: for options without one.
    Raises:
        ConfigError: it is no regulariser, or an option is unknown or out of range; a strength beside a regulariser that
            has its own, or beside none.
    """
    if isinstance(given, (str, Mapping)):
        name, options = named_options("regularizer", given, REGULARIZERS, hidden=("criterion",))
        own = options.setdefault("strength", strength)
        if own is not strength and strength not in (own, DEFAULT_STRENGTH):
            raise ConfigError(f"reg_strength: expected one strength, got {strength!r} and {own!r}")
        shares = "criterion" in inspect.signature(REGULARIZERS[name]).parameters
        if shares and isinstance(criterion, (GroupNorm, Magnitude)):
            options["criterion"] = criterion
        return REGULARIZERS[name](**options)
    if given is not None and (isinstance(given, type) or not callable(getattr(given, "apply", None))):
        known = [repr(name) for name in REGULARIZERS]
        raise ConfigError(f"regularizer: expected {', '.join(known)}, None or an object with apply(), got {given!r}")
    if strength != DEFAULT_STRENGTH:
        why = "without a regulariser" if given is None else f"beside a {type(given).__name__}, which has one of its own"
        raise ConfigError(f"reg_strength: expected no strength {why}, got {strength!r}")
    found: Regularizer | None = given
    return found
