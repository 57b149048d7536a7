"""Saving and loading pruned models: one safetensors file, the structure in its header, no pickle, no tracing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import CheckpointError
from .surgery.modules import SIZES, sizes
from .surgery.prune import set_tensor

FORMAT = 1


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``model``'s tensors, and the sizes that its layers keep as attributes, to one safetensors file.

    Parameters and buffers are written, buffers that a state dict leaves out too; a tensor that has several
    names is written once. The file is complete or not there at all: it is written beside ``path`` and moved.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    named = _tensors(model)
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named.items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    tensors = {name: named[name].detach().cpu().contiguous().clone() for name in first.values()}
    structure = {
        "format": FORMAT,
        "model": type(model).__qualname__,
        "modules": {name: found for name, module in model.named_modules() if (found := sizes(module))},
        "aliases": aliases,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file(tensors, temporary, metadata={"pat_fast": json.dumps(structure)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Give ``model``, a fresh instance of the original definition, the saved sizes and values.

    Nothing is traced. Parameters keep their identity, device and ``requires_grad``; values and dtype are
    those of the file, to the bit.

    Returns:
        ``model``.
    Raises:
        CheckpointError: the file is missing, damaged, of another format or of another model; the model is
            then as it was.
    """
    path = Path(path)
    structure, tensors = _read(path)
    named = _tensors(model)
    modules = dict(model.named_modules())
    _check_names(path, named, tensors, structure["aliases"])
    changes = [change for name, found in structure["modules"].items() for change in _sizes(path, modules, name, found)]
    wanted = {(id(module), attribute): value for module, attribute, value in changes}
    for name, tensor in tensors.items():
        _check_tensor(path, name, tensor, named[name])
        owner, _, local = name.rpartition(".")
        _check_layer(path, owner, modules[owner], local, tensor, wanted)
    # A copy even on the same device: what was read lies unaligned in memory, and kernels round differently there.
    ready = [(named[name], tensor.to(named[name].device, copy=True)) for name, tensor in tensors.items()]
    for own, tensor in ready:
        set_tensor(own, tensor, None)
    for module, attribute, value in changes:
        setattr(module, attribute, value)
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("pat_fast")
            if header is None:
                raise CheckpointError(f"{path} is a safetensors file, but not one that pat_fast.save wrote")
            structure = json.loads(header)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(structure, dict) or structure.get("format") != FORMAT:
        got = structure.get("format") if isinstance(structure, dict) else type(structure).__name__
        raise CheckpointError(f"{path}: expected format {FORMAT}, got {got!r}; was it written by a newer pat_fast?")
    for key in ("modules", "aliases"):
        if not isinstance(structure.get(key), dict):
            raise CheckpointError(f"{path}: the structure lacks {key!r}; the file is damaged")
    return structure, tensors


def _check_names(path: Path, named: dict[str, Tensor], tensors: dict[str, Tensor], aliases: dict[str, Any]) -> None:
    missing = sorted(set(named) - set(tensors) - set(aliases))
    extra = sorted((set(tensors) | set(aliases)) - set(named))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the model does not"
        raise CheckpointError(
            f"{path} {what} ({len(missing)} missing, {len(extra)} unknown); it belongs to another definition of the "
            "model"
        )
    for name, first in aliases.items():
        if not isinstance(first, str) or first not in tensors or named[name] is not named[first]:
            raise CheckpointError(f"{path}: {name!r} and {first!r} are one tensor in the file, but not in the model")
    own: dict[int, str] = {}
    for name in tensors:
        other = own.setdefault(id(named[name]), name)
        if other != name:
            raise CheckpointError(f"{path}: {other!r} and {name!r} are one tensor in the model, but not in the file")


def _check_tensor(path: Path, name: str, saved: Tensor, own: Tensor) -> None:
    fits = saved.ndim == own.ndim and all(0 < a <= b or a == b for a, b in zip(saved.shape, own.shape, strict=True))
    if not fits or saved.is_floating_point() != own.is_floating_point():
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(saved.shape)} and {saved.dtype}, which cannot be a pruned "
            f"{tuple(own.shape)} of {own.dtype}; it belongs to another definition of the model"
        )


def _sizes(path: Path, modules: dict[str, nn.Module], name: str, found: Any) -> list[tuple[nn.Module, str, Any]]:
    """The attributes to set on module ``name``, checked against what such a module has."""
    module = modules.get(name)
    own = sizes(module) if module is not None else {}
    if module is None or not isinstance(found, dict) or set(found) != set(own):
        raise CheckpointError(f"{path}: the sizes of {name!r} do not fit the model's module of that name")
    changes = []
    for attribute, value in found.items():
        several = isinstance(own[attribute], (tuple, list))
        numbers, most = (value, own[attribute]) if several else ([value], [own[attribute]])
        good = isinstance(numbers, list) and len(numbers) == len(most) and all(type(n) is int for n in numbers)
        if not good or any(not 0 < n <= m for n, m in zip(numbers, most, strict=True)):
            raise CheckpointError(f"{path}: {name}.{attribute} = {value!r} cannot be a pruned {own[attribute]!r}")
        changes.append((module, attribute, tuple(value) if several else value))
    return changes


def _check_layer(
    path: Path, name: str, module: nn.Module, local: str, tensor: Tensor, wanted: dict[tuple[int, str], Any]
) -> None:
    """A layer's sizes must be those of its tensors: a mismatch would fail only in some later forward."""
    for kind, rule in SIZES.items():
        if isinstance(module, kind):
            now = {a: wanted.get((id(module), a), getattr(module, a)) for a in sizes(module)}
            expected = rule.shape(module, now, local)
            told = rule.from_tensor(module, local, tuple(tensor.shape), now.get("groups", 1))
            if (expected is not None and tuple(tensor.shape) != expected) or any(now[a] != n for a, n in told.items()):
                raise CheckpointError(
                    f"{path}: {name}.{local} has shape {tuple(tensor.shape)}, its layer's sizes ({now}) say {expected}"
                )
            return

