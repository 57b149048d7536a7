"""The exceptions that pat_fast raises. Everything a caller may want to catch is a :class:`PatError`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any


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


def check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    """Raise :class:`ConfigError` unless ``holds(value)``; a value that cannot even be compared does not."""
    try:
        good = holds(value)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or ``""``."""
    near = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
