"""Changes that happen as a whole or not at all."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..errors import PatError, SurgeryError

Undo = Callable[[], None]

# The functions in C: those of Python take ten times as long, to find that a handler is no member of an enum.
_get: Any = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_set: Any = getattr(signal.signal, "__wrapped__", signal.signal)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let an interrupt from the keyboard (SIGINT) wait until the block is done, and the garbage collector.

    Python delivers it between any two instructions, those that undo a change included. Only the main thread gets
    it; a handler that is not Python's own is left alone. What a collection finalizes could see a model in pieces, too.
    """
    with uncollected():
        main = threading.current_thread() is threading.main_thread()
        before = _get(signal.SIGINT) if main else None
        waiting: list[tuple[int, Any]] = []
        if before is not None:
            _set(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
        try:
            yield
        finally:
            if before is not None:
                _set(signal.SIGINT, before)
                if waiting and callable(before):
                    before(*waiting[0])


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage until the block is done."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def remember(objects: Iterable[Any]) -> Undo:
    """What gives ``objects`` the attributes back that they have now; of dicts and lists among them, the entries."""
    kept = [
        (thing, {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in vars(thing).items()})
        for thing in objects
    ]

    def restore() -> None:
        for thing, attributes in kept:
            vars(thing).clear()
            vars(thing).update(attributes)

    return restore


def take_back(undo: list[Undo], error: BaseException) -> None:
    """Undo what a prune did before ``error``, the last first; the caller raises that on.

    Raises:
        SurgeryError: what ``error`` was, if it is neither of this package nor an interrupt; or that undoing failed,
            too: what could be undone was.
    """
    try:
        with uninterrupted(), ExitStack() as steps:  # which takes all of them, even if one fails
            for step in undo:
                steps.callback(step)
    except Exception as other:
        raise SurgeryError(
            f"the prune failed ({type(error).__name__}: {error}) and could not be undone ({type(other).__name__}: "
            f"{other}): the model is in pieces, load the last checkpoint"
        ) from other
    if not isinstance(error, PatError) and isinstance(error, Exception):
        raise SurgeryError(
            f"the prune failed ({type(error).__name__}: {error}) and was undone; the model and its optimizers are "
            "as they were"
        ) from error
