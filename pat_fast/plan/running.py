"""Running a model's forward without leaving a trace of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


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
    attributes = [(m, _snapshot(m)) for m in model.modules()]
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one fused op for a whole layer would hide its structure
        model.eval()
        for p, _ in flags:
            if p.is_floating_point():
                p.requires_grad_(True)  # a frozen layer has channels like any other
        eager = torch.compiler.set_stance("force_eager")  # a compiled model runs as it was written
        with torch.random.fork_rng(devices), torch.enable_grad(), eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, attributes_before in attributes:
            _restore(module, attributes_before)
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            for b, version, before in buffers:
                if b._version != version:
                    b.copy_(before)


def _snapshot(module: nn.Module) -> dict[str, Any]:
    """The attributes of ``module`` (its hooks, parameters and children among them), with copies of lists and dicts."""
    held = (dict, OrderedDict, list, set)
    return {k: (v, v.copy()) if type(v) in held else (v, None) for k, v in vars(module).items()}


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    for name in vars(module).keys() - before.keys():
        del vars(module)[name]
    for name, (value, content) in before.items():
        vars(module)[name] = value
        if content is not None and not _same(value, content):
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)


def _same(one: Any, two: Any) -> bool:
    if not one and not two:
        return True
    if isinstance(one, dict):
        return _same([*one.keys(), *one.values()], [*two.keys(), *two.values()])
    return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))
