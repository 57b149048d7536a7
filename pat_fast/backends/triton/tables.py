"""What the kernels read besides tensors: work records and addresses, kept on the device between calls.

Records are cut once for each tile table (and element size) and live as long as the table. Addresses go to the
device when they differ from those of recent calls, through pinned memory, without waiting for the device.

CUDA graphs: a capture uses what eager calls before it have left, so call an op once before it is captured, and
keep the tile table for as long as the graph. Addresses that are new in the capture are copied by the graph itself,
from pinned memory that was put aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pat_fast.backends import kept
from pat_fast.backends.kept import Kept, Upload
from pat_fast.errors import BackendError

from .work import Cut, Ints, Shape, cut, cut_copy

RECENT = 4
"""Lists of addresses to keep: weights, gradients and moments take turns with one table."""
SPARE = 4
"""Captured calls for which pinned memory is put aside."""


class Addresses:
    """Device copies of lists of addresses, for the calls with one table."""

    def __init__(self, device: torch.device, length: int) -> None:
        self.device = device
        self._recent: dict[tuple[int, ...], Upload] = {}
        self._captured: list[tuple[Upload, Tensor | None]] = []
        self._spare: list[Tensor] = []
        if device.type == "cuda":
            self._spare = list(torch.empty(SPARE, length, dtype=torch.int64, pin_memory=True).unbind())

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The addresses of ``tensors``: ``[len(tensors)]`` int64 on the device."""
        key = tuple(map(Tensor.data_ptr, tensors))
        if kept.is_capturing(self.device):
            return self._while_capturing(key, self._recent.get(key))
        known = self._recent.pop(key, None) or Upload.of(torch.tensor(key, dtype=torch.int64), self.device)
        self._recent[key] = known  # the latest is last
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return known.here()

    def _while_capturing(self, key: tuple[int, ...], known: Upload | None) -> Tensor:
        staged = None
        if known is None:
            if not self._spare:
                raise BackendError(
                    f"expected at most {SPARE} captured calls with new tensors for one table; got more; call the op "
                    "with these tensors once before the capture"
                )
            staged = self._spare.pop()
            staged.copy_(torch.tensor(key, dtype=torch.int64))
            known = Upload(staged.to(self.device, non_blocking=True))
        self._captured.append((known, staged))  # the graph reads both at every replay
        return known.tensor


@dataclass(frozen=True)
class Records:
    """The records of one table on one device."""

    shape: Shape
    items: Upload
    sums: Upload | None
    counts: tuple[int, int, int]
    """Items, sums and partials."""
    addresses: Addresses


_records: Kept[Records] = Kept()


def _upload(found: Cut, shape: Shape, device: torch.device, length: int) -> Records:
    sums = Upload.of(torch.from_numpy(found.sums), device) if len(found.sums) else None
    counts = (len(found.items), len(found.sums), found.partials)
    return Records(shape, Upload.of(torch.from_numpy(found.items), device), sums, counts, Addresses(device, length))


def records(tiles: Tensor, slots: int, like: Tensor, length: int) -> Records:
    """The records for a table over tensors like ``like``; calls bring ``length`` addresses."""
    shape = Shape.of(like.element_size())

    def make() -> Records:
        return _upload(cut(_rows(tiles), slots, shape), shape, like.device, length)

    return _records.of([tiles], like.device, (shape, slots, length), make)


def copy_records(tiles: Tensor, out_tiles: Tensor, like: Tensor, length: int) -> Records:
    """The records for a gather from ``tiles`` to ``out_tiles``."""
    shape = Shape.of(like.element_size())

    def make() -> Records:
        found = Cut(cut_copy(_rows(tiles), _rows(out_tiles), shape), np.zeros((0, 1), np.int64), 0)
        return _upload(found, shape, like.device, length)

    return _records.of([tiles, out_tiles], like.device, (shape, length), make)


def _rows(tiles: Tensor) -> Ints:
    return tiles.detach().numpy()
