"""What a caller has around a call of ours, and what other threads do meanwhile, must not matter in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Method = TypeVar("Method", bound=Callable[..., Any])
DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def plainly() -> Iterator[None]:
    """Neither in inference mode, whose tensors could not be trained, nor in autocast, whose weights are copies."""
    with ExitStack() as around:
        if torch.is_inference_mode_enabled():
            around.enter_context(torch.inference_mode(False))
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                around.enter_context(torch.autocast(device, enabled=False))
        yield


def in_turn(method: Method) -> Method:
    """Let one thread at a time into the methods of an object that are marked with this; one may call another."""

    @wraps(method)
    def turn(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock, plainly():
            return method(self, *args, **kwargs)

    return cast("Method", turn)
