"""Glue to the Triton kernels: addresses and work records in, one or two launches per call out.

Arguments are those of the op schemas; they were checked by the public wrappers. Triton itself is imported at the
first call. With ``TRITON_INTERPRET=1`` the kernels run on CPU tensors, slowly: that is how they are tested where
there is no GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .tables import copy_records, records
from .work import SUM_SLOTS

OLDEST = (3, 6)
SUM_DEPTH = 16
"""Partials that a program of the second pass adds at once, per slot."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
"""Of every launch. Fusion is said outright, because Triton 3.10 changes its default."""
_BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def unavailable(device: str = "cuda") -> str | None:
    """Return why the Triton kernels cannot run on ``device`` ("cuda" or "cpu"), or None if they can."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    if device == "cpu":
        return None if is_interpreted() else "Triton runs on the CPU with TRITON_INTERPRET=1 only"
    if is_interpreted():
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU"
    # Asks the driver's management library where it can: a process may still fork afterwards.
    return None if torch.cuda.device_count() else "PyTorch sees no CUDA device"


def details() -> dict[str, Any]:
    """Return ``version`` and ``interpreted``."""
    return {"version": importlib.metadata.version("triton"), "interpreted": is_interpreted()}


@cache
def _kernels() -> Any:
    return importlib.import_module("pat_fast.backends.triton.kernels")


@cache
def _type(name: str) -> Any:
    return getattr(_kernels().tl, name)


def _type_of(x: Tensor) -> tuple[Any, Any]:
    """Triton's names of a tensor's dtype and of its accumulator's."""
    double = x.dtype == torch.float64
    return _type(str(x.dtype).removeprefix("torch.")), _type("float64" if double else "float32")


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device: make it that of ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def channel_reduce(
    xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, f: str, p: float
) -> Tensor:
    """Return the row and column sums of ``f``: ``[slots]``."""
    if not xs:
        return torch.zeros(slots)
    work = records(tiles, slots, xs[0], len(xs))
    accumulator = torch.float64 if xs[0].dtype == torch.float64 else torch.float32
    out = xs[0].new_empty(slots, dtype=accumulator)
    n_items, n_sums, n_partials = work.counts
    if work.sums is None:
        return out
    of, sums_of = _type_of(xs[0])
    partials = out.new_empty(n_partials)
    with _on(out):
        if n_items:
            x = work.addresses.of(xs)
            y = work.addresses.of(ys) if ys else x
            _kernels().reduce_items[(n_items,)](
                x, y, work.items.here(), partials, f, p if f == "pow" else 0.0, of, sums_of, *_block(work), **OPTIONS
            )  # fmt: skip
        _kernels().add_partials[(n_sums,)](
            work.sums.here(), partials, out, sums_of, SUM_DEPTH, SUM_SLOTS, **OPTIONS
        )
    return out


def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    """Add ``(coef[row] + coef[col]) * x`` to ``y``."""
    if not ys:
        return
    work = records(tiles, len(coef), ys[0], len(ys))
    if work.counts[0]:
        with _on(ys[0]):
            y, x = work.addresses.of(ys), work.addresses.of(xs)
            _kernels().axpy_items[(work.counts[0],)](
                y, x, work.items.here(), coef, *_type_of(ys[0]), *_block(work), **OPTIONS
            )


def channel_scale_(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    """Multiply ``x`` by ``scale[row] * scale[col]``; a product of 0 writes 0 even over inf and nan."""
    if not xs:
        return
    work = records(tiles, len(scale), xs[0], len(xs))
    if work.counts[0]:
        with _on(xs[0]):
            _kernels().scale_items[(work.counts[0],)](
                work.addresses.of(xs), work.items.here(), scale, *_type_of(xs[0]), *_block(work), **OPTIONS
            )


def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor
) -> None:
    """Copy the rows and columns that ``index`` keeps."""
    if not xs:
        return
    work = copy_records(tiles, out_tiles, xs[0], len(xs))
    if work.counts[0]:
        bits = _type(_BITS[xs[0].element_size()])
        with _on(xs[0]):
            out, x = work.addresses.of(outs), work.addresses.of(xs)
            _kernels().copy_items[(work.counts[0],)](
                out, x, work.items.here(), index.to(x.device), bits, *_block(work), **OPTIONS
            )


def _block(work: Any) -> tuple[int, int, int]:
    return work.shape.rows, work.shape.width, work.shape.vector


OPS = {
    "channel_reduce": channel_reduce,
    "channel_axpy_": channel_axpy_,
    "channel_scale_": channel_scale_,
    "channel_compact": channel_compact,
}
