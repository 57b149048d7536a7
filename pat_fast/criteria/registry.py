"""Criteria by name, as a configuration has them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, PlanError, named_options
from ..plan.bind import Binding
from .activation import Activation
from .activation_taylor import ActivationTaylor
from .base import Criterion
from .cost_aware import MACAware
from .gradient import Hessian, Movement, Taylor
from .group_norm import GroupNorm
from .magnitude import FPGM, LAMP, BNScale, Magnitude
from .simple import Function, Random

CRITERIA: dict[str, Callable[..., Criterion]] = {
    "group_norm": GroupNorm,
    "magnitude": Magnitude,
    "bn_scale": BNScale,
    "lamp": LAMP,
    "fpgm": FPGM,
    "taylor": Taylor,
    "hessian": Hessian,
    "activation": Activation,
    "activation_taylor": ActivationTaylor,
    "movement": Movement,
    "random": Random,
    "mac_aware": MACAware,
}


def make_criterion(given: Any, p: float | None = None) -> Criterion:
    """A criterion from a name, ``{"name": ..., options}``, a function of a binding, or a criterion itself.

    Args:
        given: see above; the options are the arguments of the class. ``"mac_aware"`` has another criterion as
            its ``criterion``, by default ``"group_norm"``.
        p: exponent for the criteria that have one; refused with others.
    Raises:
        ConfigError: an unknown name or option, or a combination that makes no sense.
    """
    if isinstance(given, (str, Mapping)):
        return _named(*named_options("importance", given, CRITERIA), p)
    if p is not None:
        raise ConfigError(f"p: expected None beside an importance that is made already, got {p!r}; give it there")
    if not isinstance(given, type) and callable(getattr(given, "score", None)):
        criterion: Criterion = given
        return criterion
    if callable(given) and not isinstance(given, type):
        return Function(given)
    known = ", ".join(repr(name) for name in CRITERIA)
    raise ConfigError(
        f"importance: expected one of {known}, a function, or an object with score(binding), got {given!r}"
    )


def _named(name: str, options: dict[str, Any], p: float | None) -> Criterion:
    if name == "mac_aware":
        return MACAware(make_criterion(options.pop("criterion", "group_norm"), p), **options)
    if p is not None:
        if "p" not in inspect.signature(CRITERIA[name]).parameters:
            raise ConfigError(f"p: expected None with the importance {name!r}, which has no exponent, got {p!r}")
        if "p" in options and options["p"] != p:
            raise ConfigError(f"p: expected one exponent, got {p!r} and {options['p']!r} in importance")
        options["p"] = p
    return CRITERIA[name](**options)


def checked_scores(criterion: Criterion, binding: Binding) -> NDArray[np.float64]:
    """The criterion's scores ``[N]`` on the CPU.

    Raises:
        PlanError: there is not one for each channel, or some are NaN.
    """
    scores: NDArray[np.float64] = criterion.score(binding).double().cpu().numpy()
    n = binding.plan.n_channels
    if scores.shape != (n,) or np.isnan(scores).any():
        measured = [g.root for g in binding.plan.groups if g.statistic and binding.alive is not None]
        why = (
            f" Or does the model divide channels by their own length ({', '.join(measured[:4])}), as a weight norm by "
            'hand does? A masked one is 0 / 0 then; mode="prune" removes it'
        )
        raise PlanError(
            f"the criterion must give one score per channel ({n}) without NaN, got shape {scores.shape} with "
            f"{int(np.isnan(scores).sum())} NaN; did the training diverge?{why if measured else ''}"
        )
    return scores
