"""Glue to the C++ kernels: takes addresses out of tensors and hands them over.

Arguments are those of the op schemas; they were checked by the public wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pat_fast.backends import native
from pat_fast.backends.known import Known, UnknownError, check_memory

_C, _WHY = native.load("pat_fast._C", "C++")


def unavailable() -> str | None:
    """Return why the C++ kernels cannot run, or None if they can."""
    return _WHY


def details() -> dict[str, Any]:
    """Return ``isa`` (in use), ``isas`` (that run here, best last) and ``openmp``."""
    return {"isa": _C.isa(), "isas": _C.isas(), "openmp": _C.has_openmp()}


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def channel_reduce(
    xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, f: str, p: float
) -> Tensor:
    """Return the row and column sums of ``f``: ``[slots]``."""
    dtype = xs[0].dtype if xs else torch.float32
    out = torch.empty(slots, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    _C.reduce(
        _addresses(xs),
        _addresses(ys),
        tiles.data_ptr(),
        len(tiles),
        native.DTYPES[dtype],
        native.function(f, p),
        p,
        out.data_ptr(),
        slots,
        torch.get_num_threads(),
    )
    return out


def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    """Add ``(coef[row] + coef[col]) * x`` to ``y``."""
    if ys:
        _C.axpy(
            _addresses(ys),
            _addresses(xs),
            tiles.data_ptr(),
            len(tiles),
            native.DTYPES[ys[0].dtype],
            coef.data_ptr(),
            torch.get_num_threads(),
        )


def channel_scale_(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    """Multiply ``x`` by ``scale[row] * scale[col]``; a product of 0 writes 0 even over inf and nan."""
    if xs:
        _C.scale(
            _addresses(xs),
            tiles.data_ptr(),
            len(tiles),
            native.DTYPES[xs[0].dtype],
            scale.data_ptr(),
            torch.get_num_threads(),
        )


def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor
) -> None:
    """Copy the rows and columns that ``index`` keeps."""
    if xs:
        compact_beside([(outs, xs)], tiles, out_tiles, index, xs[0].element_size())


def compact_beside(
    parts: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]],
    tiles: Tensor,
    out_tiles: Tensor,
    index: Tensor,
    element_bytes: int,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """:func:`channel_compact` with ``outs`` and ``xs`` that come in ``parts``, some of each at a time.

    While other threads copy the first ones, the next are asked for (and made then, it may be); when all are there,
    ``meanwhile`` is called. What any of this raises comes out of this call, whose ``outs`` are not written any more.
    """
    held: list[object] = []  # for as long as they are written

    def addresses() -> Iterator[tuple[list[int], list[int]]]:
        for part in parts:
            held.append(part)
            found = _addresses(part[0]), _addresses(part[1])
            check_memory("tensors that are moved", part[1], found[1])
            del part  # the traceback of an error in what makes the next would keep it
            yield found

    try:
        _C.compact(
            addresses(),
            tiles.data_ptr(),
            out_tiles.data_ptr(),
            len(tiles),
            element_bytes,
            index.data_ptr(),
            torch.get_num_threads(),
            meanwhile,
        )
    finally:
        held.clear()  # the traceback of an error would keep them


def grouping(tiles: Tensor, runs: Tensor, slots: int, sizes: Tensor, channels: int, device: torch.device) -> Any:
    """What the two calls below know of a table, channels and groups; the tensors must outlive it."""
    return _C.Grouping(
        tiles.data_ptr(), len(tiles), runs.data_ptr(), len(runs), slots, sizes.data_ptr(), len(sizes), channels
    )


def channel_totals(
    xs: Sequence[Tensor],
    known: Known,
    groups: Any,
    p: float,
    divided: bool,
    meanwhile: Callable[[], None] | None = None,
) -> Tensor:
    """Return the sums of ``|x|^p`` over channels ``[channels]``, if ``divided`` by their means over the groups.

    While other threads read the first xs, the next are compared with those ``known``; when all are, ``meanwhile`` is
    called. What any of this raises comes out of this call.

    Raises:
        UnknownError: see :meth:`Known.compare`.
    """
    made: list[Tensor] = []

    def out(moved: bool) -> int:
        # Sums of absolute values do not depend on signs; what was negated where it lay is summed, too.
        known.compare_rest(xs, signs=moved)
        if meanwhile is not None:
            meanwhile()
        dtype = torch.float64 if known.dtype is torch.float64 else torch.float32
        made.append(native.empty(groups.channels, dtype))
        return made[0].data_ptr()

    if not _C.totals(out, xs, known.likes, p, groups, divided, torch.get_num_threads()):
        raise UnknownError
    return made[0]


def group_push(
    ys: Callable[[], tuple[Sequence[Tensor], Sequence[int]]],
    xs: Sequence[Tensor],
    known: Known,
    groups: Any,
    p: float,
    alpha: float,
    strength: float,
    where: Tensor | None,
) -> None:
    """Add ``(gamma[row] + gamma[col]) * x`` to ``y``, for the ys and their places among the xs.

    While other threads read the first xs, the next are compared with those ``known``, then the ys are asked for. What
    any of this raises comes out of this call, which adds nothing then.

    Raises:
        UnknownError: see :meth:`Known.compare`.
    """
    held: list[object] = []  # for as long as they are written

    def targets() -> list[int]:
        known.compare_rest(xs)
        tensors, places = ys()
        held.append(tuple(tensors))
        to = _addresses(tensors)
        if len(to) == len(xs):
            return to
        by_place = dict(zip(places, to, strict=True))
        return [by_place.get(i, 0) for i in range(len(xs))]

    chosen, threads = 0 if where is None else where.data_ptr(), torch.get_num_threads()
    try:
        if not _C.push(targets, xs, known.likes, p, groups, alpha, strength, chosen, threads):
            raise UnknownError
    finally:
        held.clear()  # the traceback of an error would keep them


OPS = {
    "channel_reduce": channel_reduce,
    "channel_axpy_": channel_axpy_,
    "channel_scale_": channel_scale_,
    "channel_compact": channel_compact,
}
_SHORTCUTS = {
    "compact_beside": compact_beside,
    "grouping": grouping,
    "channel_totals": channel_totals,
    "group_push": group_push,
}
SHORTCUTS = _SHORTCUTS if _WHY is None else {}
"""Several ops in one call, see :mod:`pat_fast.ops.grouped`; and a copy with something to do meanwhile."""
