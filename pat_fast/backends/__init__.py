"""Backends of the ops, and the one place that chooses among them.

A backend is a module with ``OPS`` (op name -> function of the schema's arguments). It is registered
here with the device types it serves and a probe that says why it cannot run, or ``None`` if it can.
Backends know tensors and tables only: nothing of plans, modules or pruners.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pat_fast.errors import BackendError, did_you_mean

ENV = "PAT_FAST_BACKEND"
ANY = "any"
"""Device type of a backend that runs wherever PyTorch runs."""


@dataclass(frozen=True)
class Backend:
    """A candidate: ``module`` has ``OPS``; ``probe()`` returns why it cannot run, or None."""

    name: str
    module: str
    devices: tuple[str, ...]
    probe: Callable[[], str | None]


@dataclass(frozen=True)
class Choice:
    """The winner for one op on one device type, and why it won."""

    op: str
    device: str
    backend: str
    why: str
    run: Callable[..., Any]


def _probe_cpu() -> str | None:
    return importlib.import_module("pat_fast.backends.cpu").unavailable()


# Best first.
BACKENDS = (
    Backend("cpu", "pat_fast.backends.cpu", ("cpu",), _probe_cpu),
    Backend("reference", "pat_fast.backends.reference", (ANY,), lambda: None),
)
DEVICES = ("cpu", ANY)
"""Device types that are chosen for; ``ANY`` stands for all that are not named."""


def _candidates(override: str) -> tuple[Backend, ...]:
    if not override:
        return BACKENDS
    names = [backend.name for backend in BACKENDS]
    if override not in names:
        raise BackendError(
            f"expected {ENV} to be one of {', '.join(names)}; got {override!r}{did_you_mean(override, names)}"
        )
    named = BACKENDS[names.index(override)]
    reason = named.probe()
    if reason is not None:
        raise BackendError(
            f"expected {ENV}={override} to run here; got: {reason}; unset {ENV}, or install pat_fast again"
        )
    # Devices that the named backend does not serve still need the reference.
    return (named,) if ANY in named.devices else (named, BACKENDS[-1])


@cache
def select() -> tuple[Choice, ...]:
    """Return one winner per (op, device type), best backend first.

    Raises:
        BackendError: ``PAT_FAST_BACKEND`` names a backend that is unknown or cannot run here.
    """
    override = os.environ.get(ENV, "").strip().lower()
    choices: dict[tuple[str, str], Choice] = {}
    passed_over: dict[str, list[str]] = {device: [] for device in DEVICES}
    for backend in _candidates(override):
        served = [d for d in DEVICES if d in backend.devices or ANY in backend.devices]
        reason = backend.probe()
        if reason is not None:
            for device in served:
                passed_over[device].append(f"not {backend.name}: {reason}")
            continue
        ops = importlib.import_module(backend.module).OPS
        for device in served:
            why = "; ".join(passed_over[device]) or "first that serves this device"
            if backend.name == override:
                why = f"{ENV}={override}"
            for op, run in ops.items():
                choices.setdefault((op, device), Choice(op, device, backend.name, why, run))
    return tuple(choices.values())


def describe() -> list[dict[str, str]]:
    """Return ``{"device", "op", "backend", "why"}`` for every choice that :func:`select` made."""
    return [{"device": c.device, "op": c.op, "backend": c.backend, "why": c.why} for c in select()]
