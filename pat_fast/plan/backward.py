"""Whether the backward of a forward is all PyTorch's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


class Method:
    """A method of one of PyTorch's classes, which threads may have made in another way for a while.

    Forwards of other threads go on as they are, and it is put back when the last thread is done.
    """

    def __init__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name
        self._ways: dict[int, Callable[..., Any]] = {}  # by thread
        self._lock = threading.Lock()
        self._run: Callable[..., Any] = getattr(owner, name)

    @contextmanager
    def made_by(self, way: Callable[..., Any]) -> Iterator[None]:
        """Calls of this thread are ``way(run, *args)``, where ``run(*args)`` is what they were."""
        thread = threading.get_ident()
        with self._lock:
            if not self._ways:
                self._change()
            before = self._ways.get(thread)
            self._ways[thread] = way
        try:
            yield
        finally:
            with self._lock:
                if before is None:
                    del self._ways[thread]
                else:
                    self._ways[thread] = before
                if not self._ways:
                    setattr(self._owner, self._name, self._run)

    def _change(self) -> None:
        ways, run, thread = self._ways, getattr(self._owner, self._name), threading.get_ident

        def made(*args: Any, **kwargs: Any) -> Any:
            way = ways.get(thread())
            return run(*args, **kwargs) if way is None else way(run, *args, **kwargs)

        self._run = run
        setattr(self._owner, self._name, made)


_HOOKS = Method(torch.Tensor, "register_hook")


@contextmanager
def hooks_seen() -> Iterator[list[bool]]:
    """Notes whether a forward hangs hooks of its own into the backward."""
    seen: list[bool] = []

    def noticed(run: Any, tensor: Tensor, hook: Any) -> Any:
        seen.append(True)
        return run(tensor, hook)

    with _HOOKS.made_by(noticed):
        yield seen


def is_pytorchs(nodes: Iterable[Any]) -> bool:
    """Whether all steps of a backward are PyTorch's own, which take their shapes from the forward's tensors."""
    return all(map(_is_known, set(map(type, nodes))))


@cache
def _is_known(kind: Any) -> bool:
    """Whether nodes of ``kind`` are PyTorch's own: neither a Python function's nor an extension's."""
    return not issubclass(kind, BackwardCFunction) and kind.__name__ != "CppFunction"
