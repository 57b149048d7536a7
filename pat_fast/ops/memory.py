"""Whether tensors share memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pat_fast.errors import OpError


def check_apart(name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """Raise :class:`OpError` if there is a :func:`clash`; ``name`` is that of those written."""
    found = clash(written, read)
    if found is not None:
        names = [f"{name}[{i}]" if i < len(written) else "a tensor that is read" for i in found]
        raise OpError(
            f"expected {name} that share no memory with other tensors of the call; got {names[0]} inside {names[1]}"
        )


def clash(written: Sequence[Tensor], read: Sequence[Tensor]) -> tuple[int, int] | None:
    """Return two tensors, numbered through both lists, of which one is written and shares memory with the other.

    Tensors that only lie in one another's gaps, such as the halves of a weight split by columns, do not.
    """
    spans = []
    for number, x in enumerate((*written, *read)):
        reach = x.numel()
        if reach and not x.is_meta:
            start = x.data_ptr()
            if not x.is_contiguous():
                reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
            spans.append((start, start + reach * x.element_size(), number))
    spans.sort()
    tensors = [*written, *read]
    for cluster in _clusters(spans):
        if len(cluster) > 1 and min(number for _, _, number in cluster) < len(written):
            found = _first_clash(cluster, tensors, len(written))
            if found is not None:
                return found
    return None


Span = tuple[int, int, int]  # first byte, byte after the last, number of the tensor


def _clusters(spans: list[Span]) -> Iterator[list[Span]]:
    """Split sorted spans where one begins after all before it have ended."""
    cluster: list[Span] = []
    end = 0
    for span in spans:
        if cluster and span[0] >= end:
            yield cluster
            cluster = []
        cluster.append(span)
        end = max(end, span[1]) if len(cluster) > 1 else span[1]
    if cluster:
        yield cluster


def _first_clash(cluster: list[Span], tensors: list[Tensor], n_written: int) -> tuple[int, int] | None:
    start = cluster[0][0]
    unit = math.gcd(*(tensors[number].element_size() for _, _, number in cluster), *(s - start for s, _, _ in cluster))
    length = (max(end for _, end, _ in cluster) - start) // unit
    marks = torch.full((length,), -1, dtype=torch.int32, device="cpu")
    # Those written first, so that each meets the marks of all others that are written.
    for first, _, number in sorted(cluster, key=lambda span: span[2]):
        x = tensors[number]
        size = x.element_size() // unit
        strides = [s * size for s in x.stride()]
        view = marks.as_strided([*x.shape, size], [*strides, 1], (first - start) // unit)
        taken = int(view.amax())
        if taken >= 0:
            return taken, number
        if number < n_written:
            view.fill_(number)
    return None
