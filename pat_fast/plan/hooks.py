"""Hooks on the modules of a user's model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class Hook:
    """A function on a module; a copy of the module, or one that was pickled, has one that does nothing in its place.

    So a copy is not watched, holds nothing of what watches the model, and a model can be saved whole while it is, for
    a process that has no pat_fast.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (nullcontext(), "__exit__")  # takes whatever it is given, and is Python's own
