"""Hands the chosen backends to ``torch.library``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pat_fast.backends import ANY, DEVICES, override, runner
from pat_fast.errors import BackendError
from pat_fast.ops import at_run
from pat_fast.ops.schema import LIB, OPS

_WRITES = ("channel_axpy_", "channel_scale_", "channel_compact")


@cache
def register() -> None:
    """Register one implementation per (op, device type), once.

    Raises:
        BackendError: ``PAT_FAST_BACKEND`` names a backend that cannot run here.
    """
    try:
        override()
    except BackendError as error:
        if not _by_command():
            raise
        print(f"error: {error}", file=sys.stderr)  # before the command could catch it: the package is being imported
        sys.exit(2)
    for device in DEVICES:
        key = "CompositeExplicitAutograd" if device == ANY else device.upper()
        for op in OPS:
            LIB.impl(op, _looking(op, implementation(op, device)), key)


def _by_command() -> bool:
    """Whether this process is a ``pat-fast``, however it was started."""
    if sys.argv and sys.argv[0] == "-m":  # python is looking for the module that it was told, before its arguments
        module = sys.orig_argv[-len(sys.argv)]
        return re.fullmatch(r"(-\w*m)?pat_fast(\.cli|\.__main__)?", module) is not None
    return Path(sys.argv[0] if sys.argv else "").stem == "pat-fast"


def _looking(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op for the dispatcher, which graphs call that were traced before there were tensors to look at."""
    look = at_run.CHECKS[op]

    def look_and_run(*arguments: Any, checked: bool = False) -> Any:
        if not checked:
            look(*arguments)
        return run(*arguments)

    return look_and_run


@cache
def implementation(op: str, device: str) -> Callable[..., Any]:
    """What the dispatcher leads to for ``op`` on a device type; to call it at once saves what lies between."""
    run = runner(op, device)
    return _bumping(run) if op in _WRITES else run


def _bumping(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an op that writes its first argument so that autograd sees the tensors change."""

    def bump_and_run(written: Sequence[Tensor], *rest: Any) -> None:
        bump(written)
        run(written, *rest)

    return bump_and_run


def bump(written: Sequence[Tensor]) -> None:
    """Let autograd see that tensors change. Best before they do: to come back to them all takes longer (0.1 ms)."""
    try:
        torch.autograd.graph.increment_version(written)
    except RuntimeError:  # inference tensors have no version counter
        torch.autograd.graph.increment_version([t for t in written if not t.is_inference()])
