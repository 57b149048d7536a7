"""Saving and loading pruned models: one safetensors file, the structure in its header, no pickle, no tracing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CheckpointError, ConfigError, PatError, check_model
from .structure import Structure, describe, holder, is_pruned, like, remember
from .surgery.modules import Change, as_published, rule_of, sizes
from .surgery.prune import set_tensor

HEADER = "pat_fast"  # the key of the structure in the file's metadata


def save(
    model: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model``'s tensors, and what pruning made of its structure, to one safetensors file.

    Parameters and buffers are written, buffers that a state dict leaves out too; a tensor that has several
    names is written once. The header holds, as JSON, every size that a layer keeps as an attribute, the channels of
    the dense model that are left, versions and date, ``config`` and ``metrics``. The file is complete or not there at
    all: it is written beside ``path`` and moved.

    Args:
        config, metrics: kept for whoever reads the file, such as the arguments of the model's factory; JSON.
    Raises:
        CheckpointError: the file cannot be written, or a tensor or a value cannot be kept without pickle.
    """
    check_model(model)
    for argument, given in (("config", config), ("metrics", metrics)):
        if not isinstance(given, Mapping | None):
            raise CheckpointError(f"{argument}: expected a dict of what JSON can hold, got {type(given).__name__}")
    path = Path(path)
    named = tensors_of(model)
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named.items():
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
    _check_can_be_kept(model, named)
    text = describe(model, aliases, config or {}, metrics or {}).to_json()
    tensors = {name: named[name].detach().cpu().contiguous().clone() for name in first.values()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata={HEADER: text}))


def load(path: str | Path, model: nn.Module, *, device: torch.device | str | None = None) -> nn.Module:
    """Give ``model``, a fresh instance of the original definition, the saved sizes and values.

    Nothing is traced. Parameters keep their identity and ``requires_grad``; values and dtype are those of the file, to
    the bit. A model on the meta device gets new parameters, so the dense one need never be in memory.

    Args:
        device: where the model is to be; by default where it is, the CPU for one on the meta device.
    Returns:
        ``model``.
    Raises:
        CheckpointError: the file is missing, damaged, of another format or of another model; the model is
            then as it was.
        ConfigError: ``device`` is not here.
    """
    check_model(model)
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without it
            raise ConfigError(f"device: expected one that this machine has, got {device!r} ({error})") from error
    path = Path(path)
    named = tensors_of(model)
    changes: list[Change] = []

    def check(structure: Structure, shapes: dict[str, tuple[int, ...]]) -> None:
        """Before a value is read: what does not fit must not cost memory."""
        changes.extend(changes_to(str(path), model, structure, shapes))

    structure, tensors = _read(path, check)
    for name, tensor in tensors.items():
        _check_dtype(path, name, tensor, named[name])
    # A copy even on the same device: what was read lies unaligned in memory, and kernels round differently there.
    ready = {name: tensor.to(_target(named[name], device), copy=True) for name, tensor in tensors.items()}
    names = {id(tensor): [n for n in named if named[n] is tensor] for tensor in named.values()}
    for name, tensor in ready.items():
        own = named[name]
        if own.device.type == "meta":
            _replace(model, names[id(own)], tensor, own)
        else:
            set_tensor(own, tensor, None)
    for module, attribute, value in changes:
        setattr(module, attribute, value)
    remember(model, structure)
    return model


def changes_to(
    where: str, model: nn.Module, structure: Structure, shapes: Mapping[str, tuple[int, ...]]
) -> list[Change]:
    """The attributes to set so that ``model`` says of itself what ``structure`` does, with tensors of ``shapes``.

    Raises:
        CheckpointError: they are of another model, or contradict each other; ``where`` is the source to name.
    """
    named = tensors_of(model)
    _check_names(where, named, shapes, structure.aliases)
    changes: list[Change] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in {n for n, m in model.named_modules() if sizes(m)} | set(structure.modules):
        changes.extend(_sizes(where, modules, name, structure.modules.get(name)))
    _check_agree(where, changes)
    wanted = {(id(module), attribute): value for module, attribute, value in changes}
    for name, shape in shapes.items():
        _check_shape(where, name, shape, named[name])
    for name, own in named.items():
        shape = shapes[structure.aliases.get(name, name)]
        owner, _, local = as_published(name).rpartition(".")
        # A parametrization may make a weight of another shape than it keeps.
        if as_published(name) == name or _shape(modules[owner], local) == tuple(own.shape):
            _check_layer(where, owner, modules[owner], local, shape, wanted)
    return changes


def read_structure(path: str | Path) -> Structure:
    """What the file at ``path`` says of its model; no tensor is read.

    Raises:
        CheckpointError: the file is missing, damaged, of another format, or not one that :func:`save` wrote.
    """
    return _open(Path(path), lambda file, structure: structure)


def write_whole(path: Path, write: Callable[[Path], object], kind: type[PatError] = CheckpointError) -> None:
    """Let ``write`` make a file beside ``path``, then move it there: ``path`` is never half written.

    Raises:
        PatError: of ``kind``: that failed; what was at ``path`` still is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part{path.suffix}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError, ValueError) as error:
        raise kind(f"cannot write {path}: {error}") from error


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``model``, under every name."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return named


def _check_can_be_kept(model: nn.Module, named: dict[str, Tensor]) -> None:
    """Only plain tensors can be written without pickle."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{name or 'the model'} ({type(module).__name__}) keeps extra state, which only pickle can hold; keep "
                "it in buffers"
            )
    for name, tensor in named.items():
        kind = "not initialised yet" if is_lazy(tensor) else ""
        if not kind and tensor.device.type == "meta":
            kind = "on the meta device"
        if not kind and (tensor.layout != torch.strided or tensor.is_quantized):
            kind = "sparse or quantized"
        if not kind and any(hasattr(tensor, name) for name in ("__tensor_flatten__", "full_tensor")):
            kind = f"of type {type(tensor).__name__}"
        if kind:
            raise CheckpointError(f"{name}: expected a plain tensor that has values, got one that is {kind}")


def _target(own: Tensor, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if own.device.type == "meta" else own.device


def _replace(model: nn.Module, names: list[str], tensor: Tensor, own: Tensor) -> None:
    """Put ``tensor`` where the meta tensor ``own`` is, under all of its names."""
    value = nn.Parameter(tensor, requires_grad=own.requires_grad) if isinstance(own, nn.Parameter) else tensor
    for name in names:
        owner, _, local = name.rpartition(".")
        setattr(model.get_submodule(owner), local, value)


# Reading


def _open(path: Path, use: Callable[[Any, Structure], Any]) -> Any:
    """Call ``use`` with the open file and its structure."""
    try:
        if path.exists() and not path.is_file():  # to open a pipe is to wait for whoever writes to it
            raise OSError("it is no file")
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise CheckpointError(f"{path} is a safetensors file, but not one that pat_fast.save wrote")
            return use(file, Structure.from_json(header, str(path)))
    # What the reader raises of a type or shape that PyTorch has not.
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read(
    path: Path, check: Callable[[Structure, dict[str, tuple[int, ...]]], None]
) -> tuple[Structure, dict[str, Tensor]]:
    def read(file: Any, structure: Structure) -> tuple[Structure, dict[str, Tensor]]:
        names = list(file.keys())
        check(structure, {name: tuple(file.get_slice(name).get_shape()) for name in names})
        return structure, {name: file.get_tensor(name) for name in names}

    return _open(path, read)


def _check_names(path: str, named: dict[str, Tensor], stored: Mapping[str, Any], aliases: dict[str, Any]) -> None:
    missing = sorted(set(named) - set(stored) - set(aliases))
    extra = sorted((set(stored) | set(aliases)) - set(named))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which the model does not"
        raise CheckpointError(
            f"{path} {what} ({len(missing)} missing, {len(extra)} unknown); it belongs to another definition of the "
            "model"
        )
    for name, first in aliases.items():
        if not isinstance(first, str) or first not in stored or named[name] is not named[first]:
            raise CheckpointError(f"{path}: {name!r} and {first!r} are one tensor in the file, but not in the model")
    own: dict[int, str] = {}
    for name in stored:
        other = own.setdefault(id(named[name]), name)
        if other != name:
            raise CheckpointError(f"{path}: {other!r} and {name!r} are one tensor in the model, but not in the file")


def _check_shape(path: str, name: str, shape: tuple[int, ...], own: Tensor) -> None:
    if len(shape) != own.ndim or any(not (0 < a <= b or a == b) for a, b in zip(shape, own.shape, strict=True)):
        raise CheckpointError(
            f"{path}: {name} has shape {shape}, which cannot be a pruned {tuple(own.shape)}; it belongs to another "
            "definition of the model"
        )


def _check_dtype(path: Path, name: str, saved: Tensor, own: Tensor) -> None:
    if saved.is_floating_point() != own.is_floating_point() or saved.is_complex() != own.is_complex():
        raise CheckpointError(
            f"{path}: {name} is of {saved.dtype}, which cannot be a pruned tensor of {own.dtype}; it belongs to "
            "another definition of the model"
        )


def _sizes(path: str, modules: dict[str, nn.Module], name: str, found: Any) -> list[Change]:
    """The attributes to set on module ``name``, checked against what such a module has."""
    module = modules.get(name)
    if module is None or not isinstance(found, dict) or not set(found) >= set(sizes(module)):
        raise CheckpointError(f"{path}: the sizes of {name!r} do not fit the model's module of that name")
    changes = []
    for attribute, value in found.items():
        place = holder(module, attribute)
        if place is None:
            raise CheckpointError(f"{path}: the sizes of {name!r} do not fit the model's: it has no {attribute!r}")
        own = vars(place[0])[place[1]]
        if not is_pruned(value, own):
            raise CheckpointError(
                f"{path}: {name}.{attribute} = {value!r} cannot be a pruned {own!r}; load it into the dense definition"
            )
        changes.append((*place, like(value, own)))
    return changes


def _check_agree(path: str, changes: list[Change]) -> None:
    """Modules that share an object must say the same of it."""
    said: dict[tuple[int, str], Any] = {}
    for place, attribute, value in changes:
        if said.setdefault((id(place), attribute), value) != value:
            raise CheckpointError(f"{path}: {attribute} has two values in the file, {value!r} is one; it is damaged")


def _shape(module: nn.Module, local: str) -> tuple[int, ...] | None:
    rule = rule_of(module)
    return None if rule is None else rule.shape(module, sizes(module), local)


def _check_layer(
    path: str,
    name: str,
    module: nn.Module,
    local: str,
    shape: tuple[int, ...],
    wanted: dict[tuple[int, str], Any],
) -> None:
    """A layer's sizes must be those of its tensors: a mismatch would fail only in some later forward."""
    rule = rule_of(module)
    if rule is None:
        return
    now = {a: wanted.get((id(module), a), getattr(module, a)) for a in rule.attributes}
    expected = rule.shape(module, now, local)
    told = rule.from_tensor(module, local, shape, now.get("groups", 1))
    if (expected is not None and shape != expected) or any(now[a] != n for a, n in told.items()):
        raise CheckpointError(
            f"{path}: {name}.{local} has shape {shape}, its layer's sizes ({now}) say {expected or told}"
        )
