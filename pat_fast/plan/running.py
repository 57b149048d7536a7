"""Running a model's forward without leaving a trace of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
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
    modules = [m for _, m in named_modules(model)]
    attributes = [_Snapshot(m) for m in modules]
    own = {id(b): b for m in modules for b in m._buffers.values() if b is not None}
    buffers = [(b, b._version, b.detach().clone()) for b in own.values()]
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}.values()
    flags = [(p, p.requires_grad) for p in parameters]
    devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one fused op for a whole layer would hide its structure
        if any(m.training for m in modules):
            model.eval()
        for p, flag in flags:
            if not flag and p.is_floating_point():
                p.requires_grad_(True)  # a frozen layer has channels like any other
        eager = torch.compiler.set_stance("force_eager")  # a compiled model runs as it was written
        with torch.random.fork_rng(devices), torch.enable_grad(), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for snapshot in attributes:
            snapshot.restore()
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        with torch.no_grad():
            for b, version, before in buffers:
                if b._version != version:
                    b.copy_(before)


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
