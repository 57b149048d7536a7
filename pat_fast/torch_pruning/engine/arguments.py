"""What a user may pass: refused by name before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError, check

LAYER_PRUNER = ("prune_out_channels", "prune_in_channels", "get_out_channels", "get_in_channels")


def check_ratio(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a number in 0 .. 1."""
    check(name, value, lambda v: isinstance(v, Real) and 0.0 <= float(v) <= 1.0, "a number from 0 to 1")


def check_count(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number, at least 1."""
    check(name, value, lambda v: isinstance(v, Integral) and int(v) >= 1, "a whole number, at least 1")


def check_model(model: Any) -> None:
    """Raise :class:`ConfigError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def check_importance(importance: Any) -> None:
    """Raise :class:`ConfigError` unless ``importance`` scores groups or plans."""
    if not callable(importance) and not callable(getattr(importance, "score", None)):
        raise ConfigError(
            f"importance: expected one of tp.importance's classes, a function of a group, or an object with "
            f"score(binding), got {type(importance).__name__}"
        )


def _name(model: nn.Module, module: Any) -> str:
    return next((n for n, m in model.named_modules() if m is module and n), type(module).__name__)


def in_model(model: nn.Module, argument: str, module: Any, parts: set[int] | None = None) -> nn.Module:
    """``module``, which must be a part of ``model``; raises :class:`ConfigError` otherwise.

    ``parts``: the ``id`` of all of the model's, if that is known.
    """
    if not isinstance(module, nn.Module) or id(module) not in (_parts(model) if parts is None else parts):
        what = f"a {type(module).__name__} that is not a part of it" if isinstance(module, nn.Module) else repr(module)
        raise ConfigError(f"{argument}: expected modules of the model (as in model.named_modules()), got {what}")
    return module


def _parts(model: nn.Module) -> set[int]:
    return {id(m) for m in model.modules()}


def split_ignored(model: nn.Module, ignored: Iterable[Any] | None) -> tuple[list[nn.Module], list[type], list[Tensor]]:
    """Modules (with all that they contain), types and parameters of ``ignored_layers``.

    Raises:
        ConfigError: something else is in it, or a module or parameter of another model.
    """
    modules: list[nn.Module] = []
    types: list[type] = []
    params: list[Tensor] = []
    if isinstance(ignored, (nn.Module, str)) or not isinstance(ignored, (Iterable, type(None))):
        raise ConfigError(
            f"ignored_layers: expected a list of layers, got {type(ignored).__name__}; put it in brackets"
        )
    for layer in ignored or ():
        if isinstance(layer, nn.Parameter):
            if not any(layer is p for p in model.parameters()):
                raise ConfigError("ignored_layers: it holds a parameter that is not one of the model's")
            params.append(layer)
        elif isinstance(layer, type) and issubclass(layer, nn.Module):
            types.append(layer)
        else:
            modules.extend(in_model(model, "ignored_layers", layer).modules())
    if types:
        modules.extend(m for m in model.modules() if isinstance(m, tuple(types)))
    return modules, types, params


def checked_counts(model: nn.Module, argument: str, given: Mapping[Any, Any] | None) -> dict[nn.Module, int]:
    """A copy of a dict of modules to whole numbers, checked."""
    found = {}
    check(argument, given, lambda v: v is None or isinstance(v, Mapping), "a dict whose keys are modules of the model")
    parts = _parts(model) if given else None
    for module, count in (given or {}).items():
        in_model(model, argument, module, parts)
        check_count(f"{argument}[{_name(model, module)}]", count)
        found[module] = int(count)
    return found


def checked_ratios(model: nn.Module, argument: str, given: Mapping[Any, Any] | None) -> dict[Any, float]:
    """A copy of a dict of modules, or tuples of modules, to ratios, checked."""
    found = {}
    check(argument, given, lambda v: v is None or isinstance(v, Mapping), "a dict whose keys are modules of the model")
    parts = _parts(model) if given else None
    for key, ratio in (given or {}).items():
        for module in key if isinstance(key, tuple) else (key,):
            in_model(model, argument, module, parts)
            check_ratio(f"{argument}[{_name(model, module)}]", ratio)
        found[key] = ratio
    return found


def check_customized(model: nn.Module, key: Any, pruner: Any) -> None:
    """Raise :class:`ConfigError` unless ``key`` is a class or a layer of ``model``, and ``pruner`` a layer pruner."""
    name = key.__name__ if isinstance(key, type) else _name(model, key)
    if not (isinstance(key, type) and issubclass(key, (nn.Module, nn.Parameter))):
        in_model(model, "customized_pruners", key)
    if isinstance(pruner, type):
        raise ConfigError(f"customized_pruners[{name}]: got the class {pruner.__name__}; pass an instance of it")
    missing = [method for method in LAYER_PRUNER if not callable(getattr(pruner, method, None))]
    if missing:
        raise ConfigError(
            f"customized_pruners[{name}]: {type(pruner).__name__} lacks {', '.join(missing)}; derive it from "
            "tp.BasePruningFunc and define them"
        )


def check_unwrapped(model: nn.Module, unwrapped: Any) -> list[tuple[nn.Parameter, int]]:
    """``unwrapped_parameters`` as a list of (parameter, dimension), checked; a list or a dict may be given."""
    try:
        pairs = list(unwrapped.items()) if isinstance(unwrapped, Mapping) else [tuple(p) for p in unwrapped or ()]
    except TypeError:
        raise ConfigError(f"unwrapped_parameters: expected (parameter, dimension) pairs, got {unwrapped!r}") from None
    own = {id(p) for p in model.parameters()} if pairs else set()
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], Tensor) or id(pair[0]) not in own:
            raise ConfigError("unwrapped_parameters: expected (parameter of the model, dimension) pairs")
        if not isinstance(pair[1], Integral) or not -pair[0].ndim <= int(pair[1]) < pair[0].ndim:
            raise ConfigError(
                f"unwrapped_parameters: a parameter of shape {tuple(pair[0].shape)} has no dimension {pair[1]!r}"
            )
    return pairs


def checked_schedule(scheduler: Callable[..., Any], ratio: float, steps: int) -> list[float]:
    """``scheduler(ratio, steps)``: the ratio at each step, 0 .. ``steps``."""
    found = [float(r) for r in scheduler(ratio, steps)]
    if len(found) < steps + 1 or not all(math.isfinite(r) and 0.0 <= r <= 1.0 for r in found):
        raise ConfigError(
            f"iterative_pruning_ratio_scheduler: expected {steps + 1} ratios from 0 to 1 (for steps 0 to {steps}), "
            f"got {found}"
        )
    return found


def checked_indices(layer: str, idxs: Any, size: int | None) -> list[int]:
    """Distinct indices as a list of ints; raises :class:`ConfigError` if one is not in ``0 .. size - 1``."""
    if isinstance(idxs, Tensor):
        idxs = idxs.tolist()
    given: Sequence[Any] = [idxs] if isinstance(idxs, Integral) else list(idxs)
    wrong = [i for i in given if not isinstance(i, Integral) or not 0 <= int(i) < (math.inf if size is None else size)]
    if wrong or not given:
        raise ConfigError(
            f"{layer}: expected indices from 0 to {(size or 0) - 1}, got {wrong[:8] if given else 'none'}"
        )
    return list(dict.fromkeys(int(i) for i in given))


def deprecated(name: str, value: Any, instead: str, current: Any) -> Any:
    """``value``, with a warning, of an argument that Torch-Pruning has renamed; ``current`` if it was not given."""
    if value is None:
        return current
    warnings.warn(f"{name} is deprecated; use {instead}", stacklevel=4)
    return value
