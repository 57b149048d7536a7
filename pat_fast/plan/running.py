"""Running a model's forward without leaving a trace of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn

from .walk import named_modules


class Call(NamedTuple):
    """Example inputs that are positional and keyword arguments both."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run ``model``: a dict is keyword arguments, a tuple or list positional ones, anything else one argument."""
    if isinstance(example_inputs, Call):
        return model(*example_inputs.args, **example_inputs.kwargs)
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run forwards in eval mode with gradients enabled, and leave nothing behind.

    Restored: the train/eval flag and the attributes of every module (also what its lists and dicts hold), buffers,
    ``requires_grad``, and the random state.
    """
    with Still(model).running():
        yield


class Still:
    """What a model is now, for several times :func:`undisturbed` in a row: it is noted once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted = False

    def _note(self) -> None:
        self._noted = True
        model = self._model
        modules = [m for _, m in named_modules(model)]
        self._training = any(m.training for m in modules)
        self._attributes = [_Snapshot(m) for m in modules]
        own = {id(b): b for m in modules for b in m._buffers.values() if b is not None}
        with torch.no_grad():
            self._buffers = [(b, b._version, b.clone()) for b in own.values()]
        parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
        self._flags = [(p, p.requires_grad) for p in parameters]
        self._frozen = [p for p, flag in self._flags if not flag and p.is_floating_point()]
        self._devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})

    @contextmanager
    def running(self) -> Iterator[None]:
        """See :func:`undisturbed`."""
        if not self._noted:
            self._note()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # one fused op for a whole layer would hide its structure
            if self._training:
                self._model.eval()
            for p in self._frozen:
                p.requires_grad_(True)  # a frozen layer has channels like any other
            eager = torch.compiler.set_stance("force_eager")  # a compiled model runs as it was written
            with torch.random.fork_rng(self._devices), torch.enable_grad(), eager:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            self._restore()

    def _restore(self) -> None:
        for snapshot in self._attributes:
            snapshot.restore()
        for p, flag in self._flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        with torch.no_grad():
            for b, version, before in self._buffers:
                if b._version != version:
                    b.copy_(before)


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


CALLS = Method(nn.Module, "__call__")
HOOKS = Method(torch.Tensor, "register_hook")


class _Snapshot:
    """The attributes of a module (its hooks, parameters and children among them), with copies of lists and dicts."""

    def __init__(self, module: nn.Module) -> None:
        self._now = vars(module)
        self._before = self._now.copy()
        held = [v for v in self._before.values() if type(v) in _HELD]
        self._full = [(v, v.copy()) for v in held if v]
        self._empty = [v for v in held if not v]

    def restore(self) -> None:
        """Put everything back."""
        now, before = self._now, self._before
        if not _same(now, before):
            now.clear()
            now.update(before)
        if any(self._empty):
            for value in self._empty:
                value.clear()
        for value, content in self._full:
            if not _same(value, content):
                if isinstance(value, list):
                    value[:] = content
                else:
                    value.clear()
                    value.update(content)


_HELD = frozenset({dict, OrderedDict, list, set})


def _same(one: Any, two: Any) -> bool:
    if len(one) != len(two) or not all(map(is_, one, two)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), two.values()))
