"""Backends of the ops, and the one place that chooses among them.

A backend is a module with ``OPS`` (op name -> function of the schema's arguments). It is registered
here with the device types it serves and a probe that says why it cannot run, or ``None`` if it can.
Backends know tensors and tables only: nothing of plans, modules or pruners.

For the CPU the choice is made at import. For CUDA it is made when an op first meets a CUDA tensor, so that
importing pat_fast neither starts CUDA nor compiles; the winner is held against the reference first.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from pat_fast.errors import BackendError, did_you_mean

ENV = "PAT_FAST_BACKEND"
ANY = "any"
"""Device type of a backend that runs wherever PyTorch runs."""


@dataclass(frozen=True)
class Backend:
    """A candidate.

    Args:
        module: has ``OPS``.
        devices: the device types it serves.
        probe: says why it cannot run on a device type, or None.
        named_devices: device types that it serves only if ``PAT_FAST_BACKEND`` names it.
        checked: whether to compare it with the reference before its first use on ``devices``.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    probe: Callable[[str], str | None]
    named_devices: tuple[str, ...] = ()
    checked: bool = False

    def serves(self, device: str, named: bool) -> bool:
        """Whether the backend is a candidate for ``device``."""
        return ANY in self.devices or device in self.devices or (named and device in self.named_devices)

    def ops(self) -> dict[str, Callable[..., Any]]:
        """The ops that it has."""
        return importlib.import_module(self.module).OPS

    def shortcuts(self) -> dict[str, Callable[..., Any]]:
        """What it can do in one call for which others need several ops, by name."""
        found: dict[str, Callable[..., Any]] = getattr(importlib.import_module(self.module), "SHORTCUTS", {})
        return found


@dataclass(frozen=True)
class Choice:
    """The winner for one op on one device type, and why it won."""

    op: str
    device: str
    backend: str
    why: str
    run: Callable[..., Any]


def _probe_cpu(device: str) -> str | None:
    return importlib.import_module("pat_fast.backends.cpu").unavailable()


def _probe_cuda(device: str) -> str | None:
    return importlib.import_module("pat_fast.backends.cuda").unavailable()


def _probe_triton(device: str) -> str | None:
    return importlib.import_module("pat_fast.backends.triton").unavailable(device)


# Best first. On CUDA devices a compiled extension ("cuda") goes before Triton: it needs neither a compiler at run time
# nor a launcher in Python, has the shortcuts, and was the faster on an H100 wherever they differ by much.
BACKENDS = (
    Backend("cuda", "pat_fast.backends.cuda", ("cuda",), _probe_cuda, checked=True),
    Backend("cpu", "pat_fast.backends.cpu", ("cpu",), _probe_cpu),
    Backend(
        "triton", "pat_fast.backends.triton", ("cuda",), _probe_triton, named_devices=("cpu",), checked=True
    ),
    Backend("reference", "pat_fast.backends.reference", (ANY,), lambda device: None),
)
DEVICES = ("cpu", "cuda", ANY)
"""Device types that are chosen for; ``ANY`` stands for all that are not named."""
LATE = ("cuda",)
"""Device types whose choice waits for the first tensor there."""


def override() -> Backend | None:
    """Return the backend that ``PAT_FAST_BACKEND`` names, or None.

    Raises:
        BackendError: it is unknown, or it can run on none of the device types it serves.
    """
    wanted = os.environ.get(ENV, "").strip().lower()
    if not wanted:
        return None
    names = [backend.name for backend in BACKENDS]
    if wanted not in names:
        raise BackendError(
            f"expected {ENV} to be one of {', '.join(names)}; got {wanted!r}{did_you_mean(wanted, names)}"
        )
    named = BACKENDS[names.index(wanted)]
    reasons = [named.probe(device) for device in (*named.devices, *named.named_devices)]
    if None not in reasons:
        raise BackendError(
            f"expected {ENV}={wanted} to run here; got: {'; '.join(r for r in reasons if r)}; unset {ENV}, or "
            "install what is missing"
        )
    return named


@cache
def select(device: str) -> tuple[Choice, ...]:
    """Return one winner per op for a device type (one of ``DEVICES``).

    For a device type in ``LATE`` there should be such a device: a winner may be tried out on it.

    Raises:
        BackendError: ``PAT_FAST_BACKEND`` names a backend that is unknown, cannot run here or fails its check.
    """
    named = override()
    choices: dict[str, Choice] = {}
    passed_over: list[str] = []
    for backend in BACKENDS:
        if not backend.serves(device, backend is named):
            continue
        # Devices that the named backend does not serve still need the reference.
        if named is not None and backend not in (named, BACKENDS[-1]):
            passed_over.append(f"not {backend.name}: {ENV}={named.name}")
            continue
        reason = backend.probe(device) or _check(backend, device, backend is named)
        if reason is not None:
            passed_over.append(f"not {backend.name}: {reason}")
            continue
        why = f"{ENV}={backend.name}" if backend is named else "; ".join(passed_over) or "first that serves this device"
        for op, run in backend.ops().items():
            choices.setdefault(op, Choice(op, device, backend.name, why, run))
    return tuple(choices.values())


def _check(backend: Backend, device: str, named: bool) -> str | None:
    """Say how a backend differs from the reference: an error if it was asked for by name, else a warning."""
    if not backend.checked or device in backend.named_devices:
        return None
    selfcheck = importlib.import_module("pat_fast.backends.selfcheck")
    found: str | None = selfcheck.difference({**backend.ops(), **backend.shortcuts()}, torch.device(device))
    if found is not None and named:
        raise BackendError(f"expected {ENV}={backend.name} to agree with the reference on {device}; got: {found}")
    if found is not None:
        warnings.warn(
            f"pat_fast does not use its {backend.name} kernels on {device}: {found}; the next best are used, see "
            "`pat-fast env`",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def runner(op: str, device: str) -> Callable[..., Any]:
    """Return the implementation of ``op`` on ``device``; for device types in ``LATE`` it is chosen when called."""
    if device not in LATE:
        return _winner(op, device)

    def run(*arguments: Any) -> Any:
        return _winner(op, device)(*arguments)

    return run


@cache
def _winner(op: str, device: str) -> Callable[..., Any]:
    return next(choice.run for choice in select(device) if choice.op == op)


@cache
def shortcut(name: str, device: str) -> Callable[..., Any] | None:
    """Return the shortcut ``name`` of the backend that won all ops on ``device``, or None."""
    winners = {choice.backend for choice in select(device)}
    found = [b.shortcuts().get(name) for b in BACKENDS if {b.name} == winners]
    return found[0] if found else None


def describe() -> list[dict[str, str]]:
    """Return ``{"device", "op", "backend", "why"}`` for every op and device type.

    Makes the choices that are still open: on a machine with a GPU this starts CUDA.
    """
    choices = [choice for device in DEVICES for choice in select(device)]
    return [{"device": c.device, "op": c.op, "backend": c.backend, "why": c.why} for c in choices]
