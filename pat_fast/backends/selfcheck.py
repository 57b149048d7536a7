"""A quick comparison of a backend with the reference, made before a GPU backend is used for the first time.

A driver, a compiler and a GPU that were never seen together can fail to compile, or compile to something else. The
tensors are small and odd, a few milliseconds' worth once kernels are compiled; no random numbers are drawn.

It runs in a thread of its own: modes, a default device, autocast, transforms and most profilers are the caller's, and
nothing that they do to it would say anything about the backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pat_fast.backends import reference
from pat_fast.backends.kept import check_not_captured
from pat_fast.backends.known import Known, is_reliable
from pat_fast.errors import in_a_line

Ops = Mapping[str, Any]  # name of an op or shortcut -> function

# R, C, K and strides: a plain weight that fits no vector, channels_last, rows nearer than columns, one that is all
# vectors and several blocks wide, and a vector.
TILES = (
    ((7, 5, 9), (45, 9, 1)),
    ((8, 4, 9), (36, 1, 4)),
    ((6, 9, 4), (4, 24, 1)),
    ((40, 528, 1), (528, 1, 1)),
    ((37, 1, 1), (1, 1, 1)),
)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Dtypes to try, and what the rounding of a written element may differ by.

Half precision and double are not tried: to compile the Triton kernels for a dtype takes seconds, of every process.
"""
SUMS = 1e-4
"""What sums in float32 may differ by: the order of their terms is free."""
SUMMING = ("channel_reduce", "channel_totals")


class _Unwatched(Known):
    """Tensors of the check's own: a profiler of all threads may see what is done to them."""

    __slots__ = ()

    def compare_rest(self, tensors: Sequence[Tensor], signs: bool = True) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class _Case:
    """Tensors in the layouts of ``TILES``, with their table and a value for every slot."""

    xs: list[Tensor]
    ys: list[Tensor]
    tiles: Tensor
    slots: int
    values: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, device: torch.device) -> _Case:
        rows, slot = [], 0
        for at, (sizes, strides) in enumerate(TILES):
            columns = slot + sizes[0] if sizes[1] > 1 else -1
            rows.append((at, 0, *sizes, *strides, slot, columns))
            slot += sizes[0] + (sizes[1] if sizes[1] > 1 else 0)
        slots = slot + 3  # slots that no tile names
        values = _wave(slots, 0.9, device).float()
        values[::4] = 0
        return cls(_tensors(dtype, device, 0.7), _tensors(dtype, device, 1.3), torch.tensor(rows), slots, values)


def _wave(n: int, step: float, device: torch.device) -> Tensor:
    return torch.arange(n, device=device, dtype=torch.float64).mul_(step).sin_()


def _tensors(dtype: torch.dtype, device: torch.device, step: float) -> list[Tensor]:
    made = []
    for sizes, strides in TILES:
        n = sizes[0] * sizes[1] * sizes[2]
        made.append(torch.empty_strided(sizes, strides, dtype=dtype, device=device))
        made[-1].copy_(_wave(n, step, device).reshape(sizes))
    return made


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t).copy_(t) for t in tensors]  # dense, so strides are kept


def _reduce(ops: Ops, case: _Case) -> list[Tensor]:
    found = [ops["channel_reduce"](case.xs, [], case.tiles, case.slots, "pow", 2.0)]
    return [*found, ops["channel_reduce"](case.xs, case.ys, case.tiles, case.slots, "absmul", 0.0)]


def _axpy(ops: Ops, case: _Case) -> list[Tensor]:
    ys = _clones(case.ys)
    ops["channel_axpy_"](ys, case.xs, case.tiles, case.values)
    return ys


def _scale(ops: Ops, case: _Case) -> list[Tensor]:
    xs = _clones(case.xs)
    xs[0][0] = torch.inf  # its row is scaled by 0
    ops["channel_scale_"](xs, case.tiles, case.values)
    return xs


def _compact(ops: Ops, case: _Case) -> list[Tensor]:
    rows: list[tuple[int, ...]] = []
    index: list[int] = []
    outs: list[Tensor] = []
    for at, (x, (sizes, _)) in enumerate(zip(case.xs, TILES, strict=True)):
        kept_rows, kept_cols = list(range(0, sizes[0], 2)), list(range(sizes[1] // 3, sizes[1]))
        gathers_cols = at % 2 == 0
        starts = len(index), len(index) + len(kept_rows) if gathers_cols else -1
        index += kept_rows + (kept_cols if gathers_cols else [])
        outs.append(x.new_zeros(len(kept_rows), len(kept_cols) if gathers_cols else sizes[1], sizes[2]))
        rows.append((at, 0, *outs[-1].shape, *outs[-1].stride(), *starts))
    kept = torch.tensor(index, dtype=torch.int32).to(case.values.device)
    ops["channel_compact"](outs, case.xs, case.tiles, torch.tensor(rows), kept)
    return outs


@dataclass(frozen=True)
class _Channels:
    """Slots four apart make up a channel, half of the channels a group; the last slots are of none, ``count``."""

    count: int
    sizes: Tensor  # which a native grouping may point at, as at the runs
    runs: Tensor
    of_slot: Tensor

    @classmethod
    def of(cls, case: _Case) -> _Channels:
        apart = case.slots // 4
        count = apart // 2 * 2
        of_slot = (torch.arange(case.slots) % apart).clamp_max(count)
        runs = torch.stack([torch.arange(case.slots), of_slot, torch.ones_like(of_slot)], 1)[of_slot < count]
        return cls(count, torch.full((2,), count // 2), runs, of_slot)

    def native(self, ops: Ops, case: _Case) -> Any:
        return ops["grouping"](case.tiles, self.runs, case.slots, self.sizes, self.count, case.values.device)

    def totals(self, ops: Ops, case: _Case) -> Tensor:
        """``[groups, channels]``."""
        sums = ops["channel_reduce"](case.xs, [], case.tiles, case.slots, "pow", 2.0)
        return sums.new_zeros(self.count + 1).index_add_(0, self.of_slot.to(sums.device), sums)[:-1].reshape(2, -1)


def _totals(ops: Ops, case: _Case) -> list[Tensor]:
    channels = _Channels.of(case)
    if "channel_totals" in ops and is_reliable():  # else nothing calls it
        grouping, known = channels.native(ops, case), _Unwatched(case.xs)
        return [ops["channel_totals"](case.xs, known, grouping, 2.0, divided) for divided in (False, True)]
    found = channels.totals(ops, case)
    return [found.flatten(), (found / found.mean(1, keepdim=True)).flatten()]


def _push(ops: Ops, case: _Case) -> list[Tensor]:
    channels, ys, strength, alpha = _Channels.of(case), _clones(case.ys), 0.5, 16.0
    if "group_push" in ops and is_reliable():  # else nothing calls it
        arguments = case.xs, _Unwatched(case.xs), channels.native(ops, case), 2.0, alpha, strength, None
        ops["group_push"](lambda: (ys, range(len(ys))), *arguments)
        return ys
    norms = channels.totals(ops, case).sqrt()
    low, high = norms.amin(1, keepdim=True), norms.amax(1, keepdim=True)
    gamma = torch.nn.functional.pad(strength * alpha ** ((high - norms) / (high - low)).flatten(), (0, 1))
    ops["channel_axpy_"](ys, case.xs, case.tiles, gamma[channels.of_slot.to(gamma.device)])
    return ys


STEPS: tuple[tuple[str, Callable[[Ops, _Case], list[Tensor]]], ...] = (
    ("channel_reduce", _reduce),
    ("channel_axpy_", _axpy),
    ("channel_scale_", _scale),
    ("channel_compact", _compact),
    ("channel_totals", _totals),
    ("group_push", _push),
)


def difference(ops: Ops, device: torch.device) -> str | None:
    """Return in which op ``ops`` differs from the reference on ``device``, or None.

    Raises:
        BackendError: a CUDA graph is being captured: results cannot be looked at.
    """
    check_not_captured(device, "an op to have run")
    if device.type == "cuda" and device.index is None:  # the caller's; another thread's is the first one
        device = torch.device("cuda", torch.cuda.current_device())
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_difference, ops, device).result()


@torch.no_grad()
def _difference(ops: Ops, device: torch.device) -> str | None:
    with _on(device):
        for dtype, rounding in ROUNDING.items():
            case = _Case.of(dtype, device)
            for name, step in STEPS:
                if name in ops:
                    problem = _compare(name, step, ops, case, SUMS if name in SUMMING else rounding)
                    if problem is not None:
                        return f"{name} of {str(dtype).removeprefix('torch.')} {problem}"
    return None


def _compare(
    name: str, step: Callable[[Ops, _Case], list[Tensor]], ops: Ops, case: _Case, tolerance: float
) -> str | None:
    want = step(reference.OPS, case)
    try:
        found = step(ops, case)
        exact = name == "channel_compact"
        worst = [_distance(a, b, exact, tolerance) for a, b in zip(found, want, strict=True)]
    except Exception as error:  # a compiler's, a driver's: whatever it is, the reference runs without it
        return f"failed ({in_a_line(error)})"
    bad = [f"{TILES[i][0] if len(want) == len(TILES) else 'sums'}: {w}" for i, w in enumerate(worst) if w]
    return f"differs from the reference ({'; '.join(bad)})" if bad else None


def _distance(found: Tensor, want: Tensor, exact: bool, tolerance: float) -> str | None:
    if found.dtype != want.dtype or found.shape != want.shape:
        return f"{list(found.shape)} {found.dtype}, not {list(want.shape)} {want.dtype}"
    if exact:
        return None if torch.equal(found, want) else "not the same bits"
    found, want = found.double(), want.double()
    if torch.allclose(found, want, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return f"off by up to {float((found - want).abs().max()):.3g}"


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """On ``device``, free to wait for it, which the caller may have forbidden its own code."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
