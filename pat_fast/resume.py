"""Interrupting a training and going on: one file for everything that has a state, and a dense model made to fit it."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from .distributed.ddp import rebuild, wrappers
from .distributed.sharded import is_sharded
from .errors import CheckpointError
from .structure import Structure, describe, remember
from .surgery.modules import Change
from .surgery.prune import dense_strides, set_tensor

MAGIC = b"pat_fast training 1\n"
TAIL = len(MAGIC) + 8 + hashlib.sha256().digest_size  # after the content: what it is, its length, its checksum
CHUNK = 1 << 24


# The shape of a model


def structure_of(model: nn.Module) -> dict[str, Any]:
    """What pruning made of ``model``, as plain data: the sizes that its layers keep and the shapes of its tensors."""
    shapes: dict[str, list[int]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in _named(model).items():
        if first.setdefault(id(tensor), name) == name:
            shapes[name] = list(tensor.shape)
        else:
            aliases[name] = first[id(tensor)]
    found = describe(model, aliases, {}, {})
    found.provenance.pop("created")
    return {"structure": found.to_json(), "shapes": shapes}


def fit(model: nn.Module, saved: Mapping[str, Any], where: str = "the state") -> bool:
    """Give ``model``, of the dense definition, the shape that :func:`structure_of` was called on.

    Parameters and buffers stay the objects that they are and keep their memory format; their values are whatever
    memory held, for ``load_state_dict`` to fill. Nothing is traced.

    Returns:
        Whether anything had to change.
    Raises:
        CheckpointError: it is of another model, or of one that was pruned less; nothing is changed.
    """
    found = _changes(model, saved, where)
    if found is None:
        return False
    if is_sharded(model):
        raise CheckpointError(
            f"{where} is of a smaller model, and fully_shard has split this one already; load it before fully_shard, "
            "then the sharded values"
        )
    structure, shapes, changes = found
    named = _named(model)
    for name, shape in shapes.items():
        own = named[name]
        if tuple(own.shape) != shape:
            strides = dense_strides(shape, own.stride())
            set_tensor(own, torch.empty_strided(shape, strides, dtype=own.dtype, device=own.device), None)
    for module, attribute, value in changes:
        setattr(module, attribute, value)
    remember(model, structure)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for ddp in wrappers(model):
            rebuild(ddp)
    return True


def _changes(
    model: nn.Module, saved: Mapping[str, Any], where: str
) -> tuple[Structure, dict[str, tuple[int, ...]], list[Change]] | None:
    """The structure, shapes and attributes to set, checked; None if the tensors have these shapes already."""
    from .checkpoint import changes_to

    shapes = {name: tuple(shape) for name, shape in saved["shapes"].items()}
    named = _named(model)
    if all(name in named and tuple(named[name].shape) == shape for name, shape in shapes.items()):
        return None
    structure = Structure.from_json(saved["structure"], where)
    return structure, shapes, changes_to(where, model, structure, shapes)


def _named(model: nn.Module) -> dict[str, Tensor]:
    from .checkpoint import tensors_of

    return tensors_of(model)


# A whole training


def save_training(path: str | Path, *, extra: Mapping[str, Any] | None = None, **parts: Any) -> None:
    """Write the states of ``parts`` (model, optimizer, pruner, scheduler, scaler, ema, ...) to one file.

    The states of the random number generators (torch's, numpy's, Python's) are in it, too. The file is complete or
    not there: it is written beside ``path``, flushed to the disk and moved. It ends with a checksum.

    Args:
        extra: plain values of your own, such as the epoch; :func:`load_training` returns them.
        parts: anything with ``state_dict`` and ``load_state_dict``; a pruner among them, as ``pruner=``.
    Raises:
        CheckpointError: the file cannot be written, or a state holds what only pickle can store.
    """
    from .checkpoint import write_whole

    path = Path(path)
    for name, part in parts.items():
        if not callable(getattr(part, "state_dict", None)) or not callable(getattr(part, "load_state_dict", None)):
            raise CheckpointError(f"{name}: expected something with a state_dict, got {type(part).__name__}")
    if not isinstance(extra, Mapping | None):
        raise CheckpointError(f"extra: expected a dict of plain values, got {type(extra).__name__}")
    content = {
        "parts": {name: part.state_dict() for name, part in parts.items()},
        "structures": {name: structure_of(part) for name, part in parts.items() if isinstance(part, nn.Module)},
        "optimizers": {n: type(part).__name__ for n, part in parts.items() if isinstance(part, torch.optim.Optimizer)},
        "random": _random_state(),
        "extra": dict(extra or {}),
    }

    def write(temporary: Path) -> None:
        with temporary.open("w+b") as file:
            torch.save(content, file)
            length = file.tell()
            _check_plain(file)
            file.seek(length)
            file.write(MAGIC + length.to_bytes(8, "big") + _checksum(file, length))
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)
    _sync_folder(path.parent)


def load_training(path: str | Path, **parts: Any) -> dict[str, Any]:
    """Put ``parts`` where :func:`save_training` found them; the model may still be dense, and need not be traced.

    Modules (the model, averages of its weights) are first given the shape that they had, then every part loads its
    state. Then the random number generators are set. No code from the file is run.

    Returns:
        What was saved as ``extra``.
    Raises:
        CheckpointError: the file is missing, truncated or altered, or holds other parts, or is of another model;
            nothing is changed.
    """
    path = Path(path)
    content = read_training(path)
    states = content["parts"]
    if states.keys() != parts.keys():
        there, given = ", ".join(sorted(states)), ", ".join(sorted(parts))
        raise CheckpointError(f"{path}: expected the parts {there}, which are in the file, got {given}")
    optimizers = {n: p for n, p in parts.items() if isinstance(p, torch.optim.Optimizer)}
    for name, optimizer in optimizers.items():
        _check_groups(f"{path}: {name}", optimizer, states[name])
        _check_kind(f"{path}: {name}", optimizer, states[name], content.get("optimizers", {}).get(name))
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            _check_keys(f"{path}: {name}", part, states[name])
            _changes(part, content["structures"][name], f"{path}: {name}")
    for name, saved in content["structures"].items():
        fit(parts[name], saved, f"{path}: {name}")
    for name in sorted(parts, key=lambda n: isinstance(parts[n], nn.Module), reverse=True):
        try:
            parts[name].load_state_dict(states[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: {name} does not take its state: {error}") from error
    _set_random_state(content["random"])
    return dict(content["extra"])


def _check_keys(where: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    own = module.state_dict().keys()
    different = sorted(own ^ state.keys())
    if different:
        which = "the file" if different[0] in own else "the model"
        raise CheckpointError(
            f"{where} does not fit: {different[0]!r} is not in {which} ({len(different)} such names); it belongs to "
            "another definition of the model"
        )


def _check_groups(where: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    saved = [len(group["params"]) for group in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(f"{where}: expected parameter groups of {saved}, as in the file, got {own}")


def _check_kind(where: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], saved: str | None) -> None:
    """PyTorch gives an optimizer the settings of another kind, which then fails in its step."""
    own = type(optimizer).__name__
    missing = sorted(optimizer.defaults.keys() - state["param_groups"][0].keys())
    if saved not in (None, own) and missing:
        raise CheckpointError(f"{where}: expected {saved}, as in the file, got {own}, which needs {missing[0]!r}, too")


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(numbers), gauss],
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


# The file


class _Content(io.RawIOBase):
    """The first ``length`` bytes of a file."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        file.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._file.tell(), os.SEEK_END: self._length}[whence]
        return self._file.seek(base + offset)

    def readinto(self, buffer: Any) -> int:
        left = max(self._length - self._file.tell(), 0)
        found = self._file.read(min(len(buffer), left))
        buffer[: len(found)] = found
        return len(found)


def _checksum(file: BinaryIO, length: int) -> bytes:
    found = hashlib.sha256()
    file.seek(0)
    while length > 0:
        chunk = file.read(min(CHUNK, length))
        found.update(chunk)
        length -= len(chunk) or length
    file.seek(0, os.SEEK_END)
    return found.digest()


def _check_plain(file: BinaryIO) -> None:
    """Raise :class:`CheckpointError` if a state holds objects that would need code to be read."""
    file.seek(0)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if unsafe:
        raise CheckpointError(
            f"a state holds objects of {', '.join(sorted(unsafe))}, which can only be read by running code; expected "
            "tensors, numbers, strings, lists and dicts"
        )


def read_training(path: Path) -> dict[str, Any]:
    """What :func:`save_training` wrote: ``"parts"``, ``"structures"``, ``"random"`` and ``"extra"``.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or needs code to be read.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL, 0))
            tail = file.read()
            length = int.from_bytes(tail[len(MAGIC) : len(MAGIC) + 8], "big")
            if tail[: len(MAGIC)] != MAGIC or length != size - TAIL:
                raise CheckpointError(f"{path} is truncated, or not a file that pat_fast.save_training wrote")
            if _checksum(file, length) != tail[len(MAGIC) + 8 :]:
                raise CheckpointError(f"{path} was altered since it was written: its checksum is another")
            content = torch.load(io.BufferedReader(_Content(file, length)), map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except Exception as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or not {"parts", "structures", "random", "extra"} <= content.keys():
        raise CheckpointError(f"{path}: expected a training, got {type(content).__name__}")
    return content


def _sync_folder(folder: Path) -> None:
    """The move is on the disk when the folder is."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)
