"""The exceptions that pat_fast raises, all of them a :class:`PatError`, and the checks that raise them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import nn


class PatError(Exception):
    """Base class of every error that pat_fast raises on purpose.

    A message says what was expected, what came and what to do about it.
    """


class ConfigError(PatError, ValueError):
    """A configuration or an argument is out of range, unknown or contradictory."""


class PlanError(PatError, RuntimeError):
    """A model cannot be traced, has nothing to prune, or no longer matches its plan."""


class SurgeryError(PatError, RuntimeError):
    """A prune was refused or undone; the model and its optimizers are as they were."""


class BackendError(PatError, RuntimeError):
    """A kernel backend was asked for by name and cannot run here."""


class OpError(PatError, ValueError):
    """An op was called with tensors that do not fit its tile table."""


class CheckpointError(PatError, RuntimeError):
    """A saved model is truncated, tampered with, or belongs to another definition."""


class ExportError(PatError, RuntimeError):
    """A model cannot be exported or quantized, or what came out computes something else."""


def in_a_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, with the next where that one only announces it."""
    lines = str(error).strip().splitlines()
    said = " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {said}"


def check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    """Raise :class:`ConfigError` unless ``holds(value)``.

    A value that cannot even be compared does not; nor does True or False, which would pass for 1 and 0.
    """
    try:
        good = not isinstance(value, bool) and holds(value)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def check_count(name: str, value: Any, least: int, or_none: bool = False) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number, at least ``least`` (or None, with ``or_none``)."""

    def holds(value: Any) -> bool:
        return (or_none and value is None) or (isinstance(value, Integral) and int(value) >= least)

    check(name, value, holds, f"a whole number, at least {least}" + (", or None" if or_none else ""))


def check_flag(name: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {value!r}")


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or ``""``."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?"


def named_options(
    argument: str,
    given: str | Mapping[str, Any],
    known: Mapping[str, Callable[..., Any]],
    others: str = "",
    hidden: Collection[str] = (),
) -> tuple[str, dict[str, Any]]:
    """The name and the options of a choice: ``"name"``, or ``{"name": ..., options}``.

    Args:
        known: what can be chosen; the options are its parameters, but for those that are ``hidden``.
        others: what else the argument takes, to end the list in the message.
    Raises:
        ConfigError: an unknown name or option.
    """
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    name = options.pop("name", None)
    if name not in list(known):
        hint = did_you_mean(str(name), known)
        raise ConfigError(f"{argument}: expected one of {', '.join(known)}{others}, got {name!r}{hint}")
    takes = [option for option in inspect.signature(known[name]).parameters if option not in hidden]
    for option in options:
        if option not in takes:
            hint = did_you_mean(option, takes) or f"; it has {', '.join(takes) or 'none'}"
            raise ConfigError(f"{argument}: {name!r} has no option {option!r}{hint}")
    return name, options


SCRIPTED = "is scripted or traced by torch.jit, so its layers cannot be cut; prune the model as written, then script it"


def check_model(model: object) -> None:
    """Raise :class:`ConfigError` unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"the model {SCRIPTED}")
