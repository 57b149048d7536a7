"""Pruned models of Transformers as ordinary ones, where their config can say how wide they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a pruned model of Transformers so that ``from_pretrained`` reads it, without pat_fast.

    A config has one number for the width of all layers, so this can only be where pruning left them alike (with
    ``ranking="local"`` and whole heads, say). It is tried before anything is written: a model made from the config,
    without memory, must have the same shapes.

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
        with torch.device("meta"):
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
    written: Any = model
    written.save_pretrained(str(folder))
