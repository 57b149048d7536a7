"""Pruned models of Transformers as ordinary ones, where their config can say how wide they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CheckpointError


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned model of Transformers so that ``from_pretrained`` reads it, without pat_fast.

    A config has one number for the width of all layers, so this can only be where pruning left them alike (with
    ``ranking="local"`` and whole heads, say). It is tried before anything is written: a model made from the config,
    without memory, must have the same shapes, and numbers that the file does not hold (the scale of an embedding).

    Raises:
        CheckpointError: it is no model of Transformers, or its config cannot say its shapes; :func:`pat_fast.save`
            can keep it all the same.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(type(model), "config_class") or config is None:
        raise CheckpointError(
            f"save_pretrained: expected a model of Transformers, got {type(model).__name__}; use pat_fast.save"
        )
    make: Any = type(model)
    try:
        with torch.random.fork_rng(devices=[]), _no_memory():
            twin = make(config)
    except Exception as error:
        raise CheckpointError(
            f"save_pretrained: no {type(model).__name__} can be made from the pruned model's config "
            f"({type(error).__name__}: {error}); use pat_fast.save"
        ) from error
    expected = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    for name, p in model.named_parameters():
        if name in expected and expected[name] != tuple(p.shape):
            raise CheckpointError(
                f"save_pretrained: {name} has shape {tuple(p.shape)}, the config can only say {expected[name]}: its "
                "widths are the same in all layers; prune the layers alike (ranking='local'), or use pat_fast.save"
            )
    now = dict(_computed(model))
    for name, value in _computed(twin):
        if name in now and not _is_near(now[name], value):
            raise CheckpointError(
                f"save_pretrained: {_differs(name, now[name], value)}: the model that is read would compute something "
                "else; keep the width that it is made from, or use pat_fast.save"
            )
    written: Any = model
    written.save_pretrained(str(folder))


@contextmanager
def _no_memory() -> Iterator[None]:
    """Parameters that are trained have none; others and buffers do, as their values count."""
    register: Any = nn.Module.register_parameter

    def hollow(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.requires_grad:
            parameter = nn.Parameter(parameter.detach().to("meta"))
        register(module, name, parameter)

    nn.Module.register_parameter = hollow  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _computed(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a model makes of its config and no file holds.

    Numbers with a fraction, buffers that are not persistent, parameters that are not trained and not to be saved.
    """
    for path, module in model.named_modules():
        own = {} if type(module).__module__.startswith("torch.nn") else vars(module)  # what is dropped out is no matter
        kept = {name: value for name, value in own.items() if isinstance(value, float)}
        kept |= {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        for name, value in kept.items():
            if value is not None:
                yield f"{path}.{name}".lstrip("."), value
    for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ():
        yield from ((n, p) for n, p in model.named_parameters() if re.search(pattern, n) and not p.is_meta)


def _is_near(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether both are the same but for rounding, to half precision, too."""
    one, two = (torch.as_tensor(x, dtype=torch.float64).detach().cpu() for x in (a, b))
    return one.shape == two.shape and torch.allclose(one, two, rtol=0.01, atol=1e-6, equal_nan=True)


def _differs(name: str, now: float | Tensor, made: float | Tensor) -> str:
    if isinstance(now, Tensor) and now.numel() > 1:
        return f"{name} {tuple(now.shape)} holds other values than the config gives it"
    return f"{name} is {float(now):.5g}, the config makes it {float(made):.5g}"
