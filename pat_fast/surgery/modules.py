"""The sizes that layers keep as attributes, as their tensors' new shapes demand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..plan.types import Width

Change = tuple[nn.Module, str, Any]  # module, attribute, new value


def attributes_from_shape(module: nn.Module, local: str, shape: tuple[int, ...], groups: int) -> list[Change]:
    """What ``module`` must say of itself when its tensor ``local`` has this shape.

    Covers the layers whose attributes take part in their forward; the same values as Torch-Pruning's own
    layer pruners set, wherever those are right.
    """
    if local != "weight":
        return []
    values: dict[str, int] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        c_out, c_in = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
        if module.transposed:
            c_out *= groups
        else:
            c_in *= groups
        values = {"out_channels": c_out, "in_channels": c_in, "groups": groups}
    elif isinstance(module, nn.Linear):
        values = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, nn.Embedding):
        values = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    elif isinstance(module, nn.PReLU):
        values = {"num_parameters": shape[0]}
    return [(module, name, value) for name, value in values.items() if getattr(module, name) != value]


def attributes_from_width(module: nn.Module, width: Width, left: int) -> list[Change]:
    """What a normalisation layer must say of itself when ``left`` channels remain."""
    if width.dim is not None:
        shape = list(module.normalized_shape)  # type: ignore[arg-type]
        shape[width.dim] = left
        return [(module, "normalized_shape", tuple(shape))]
    return [(module, "num_channels" if isinstance(module, nn.GroupNorm) else "num_features", left)]


def apply_changes(changes: list[Change], undo: list[Change]) -> None:
    """Set the attributes; what they were is appended to ``undo`` first."""
    for module, name, value in changes:
        undo.append((module, name, getattr(module, name)))
        setattr(module, name, value)


def summary(changes: list[Change], names: Mapping[nn.Module, str]) -> dict[str, Any]:
    """``{"layer1.0.conv1.out_channels": 12, ...}`` for logs and errors."""
    return {f"{names[module]}.{attribute}": value for module, attribute, value in changes}
