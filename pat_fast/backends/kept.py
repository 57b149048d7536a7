"""What GPU backends keep of tile tables from call to call, and when they may not make it.

A CUDA graph replays launches: it neither waits for the host nor brings a table to the device. So what is made of a
table must be there before a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pat_fast.errors import BackendError

T = TypeVar("T")


def is_capturing(device: torch.device) -> bool:
    """Whether work on ``device`` is being captured into a CUDA graph, not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_captured(device: torch.device, what: str) -> None:
    """Raise :class:`BackendError` during a capture; ``what`` should have happened before, such as "an op to run"."""
    if is_capturing(device):
        raise BackendError(
            f"expected {what} once before it is captured into a CUDA graph; got its first call; run the step once "
            "before the capture"
        )


class Kept(Generic[T]):
    """What was made of tile tables, each for as long as all the tables it was made of live.

    Tables are not written to, so they stand for their contents.
    """

    def __init__(self) -> None:
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __len__(self) -> int:
        """Return for how many (first) tables there is something."""
        return len(self._made)

    def of(self, tables: Sequence[Tensor], device: torch.device, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` made of ``tables`` for a device and a key.

        Raises:
            BackendError: it must be made, and a CUDA graph is being captured.
        """
        level = self._made
        for table in tables[:-1]:
            level = level.setdefault(table, WeakIdKeyDictionary())
        made: dict[Hashable, T] = level.setdefault(tables[-1], {})
        if (device, key) not in made:
            check_not_captured(device, "an op to have run with this tile table")
            made[device, key] = make()
        return made[device, key]
