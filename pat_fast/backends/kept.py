"""What GPU backends keep of tile tables from call to call, and when they may not make it.

A CUDA graph replays launches: it neither waits for the host nor brings a table to the device. So what is made of a
table must be there before a capture.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
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


def stream_of(device: torch.device) -> int:
    """The handle of the current stream of a GPU; every call asks for it, and an object for it would cost ten times."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


@dataclass(frozen=True)
class Upload:
    """A tensor on the device, filled from the host without waiting; on a GPU the stream and the event of the copy."""

    tensor: Tensor
    stream: int = 0
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, host: Tensor, device: torch.device) -> Upload:
        """Bring ``host`` to the device, on its current stream."""
        if device.type != "cuda":
            return cls(host.to(device))
        tensor = (host.pin_memory() if host.numel() else host).to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device)
        return cls(tensor, stream.cuda_stream, stream.record_event())

    def here(self) -> Tensor:
        """The tensor, ready for the current stream.

        A capture may not wait for work outside it and need not: what came before a capture is complete.
        """
        device = self.tensor.device
        if self.event is not None and stream_of(device) != self.stream and not is_capturing(device):
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)
        return self.tensor
