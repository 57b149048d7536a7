"""Ops that move data: the labels make the same move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ..labels import IntArray, Solution, along, place, varying
from ..trace import Tracer
from .registry import nth, rule

# What comes out is still a parameter, or a part of it: a layer's weight if it is multiplied.
KEEPS_ORIGIN = ("permute", "transpose", "t", "squeeze", "unsqueeze", "select")


@rule("permute", "transpose", "t", "movedim", "unsqueeze", "squeeze", "expand", "flip", "roll", "select", "slice")
def move(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Ops that move or repeat whole indices: the same move is made on the labels."""
    mark = tr.mark(args[0])
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    factors = []
    for factor in mark.factors:
        moved = _MOVES[name](tr, factor, args[0], out, *args[1:], **kwargs)
        if moved is not None:
            factors.append(moved)
    if name == "expand":
        factors += _repeated(tr, args[0], out)
    tr.set(out, factors, mark.leaf if name in KEEPS_ORIGIN else None)


def _repeated(tr: Tracer, x: Tensor, out: Tensor) -> list[IntArray]:
    """Labels of dimensions in which all of ``x`` is repeated, as a key for every head of queries: they follow those.

    The first is a batch, which nothing shrinks.
    """
    sizes = (1,) * (out.ndim - x.ndim) + tuple(x.shape)
    fresh = [d for d in range(1, out.ndim) if sizes[d] == 1 < out.shape[d]]
    return [place(tr.slots.followers(out.shape[d]), d, out.ndim) for d in fresh]


def _permute(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dims: Sequence[int]) -> IntArray:
    return f.transpose([nth(d, x) for d in dims])


def _transpose(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, a: int = -1, b: int = -2) -> IntArray:
    return f.swapaxes(a, b) if f.ndim > 1 else f


def _like(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, *_: Any, **__: Any) -> IntArray:
    """Dimensions of size 1 come and go: what varies stays in order."""
    sizes = [n for n in f.shape if n > 1]
    places = [d for d, n in enumerate(out.shape) if n > 1]
    source = [d for d, n in enumerate(x.shape) if n > 1]
    shape = [1] * out.ndim
    for d in varying(f):
        shape[places[source.index(d)]] = sizes.pop(0)
    return f.reshape(shape)


def _expand(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, *_: Any, **__: Any) -> IntArray:
    return f.reshape((1,) * (out.ndim - f.ndim) + f.shape)


def _flip(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dims: Sequence[int]) -> IntArray:
    return np.flip(f, tuple(nth(d, x) for d in dims))


def _roll(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, shifts: Any, dims: Any = ()) -> IntArray | None:
    shifts, dims = np.atleast_1d(shifts), np.atleast_1d(dims)
    if any(nth(int(d), x) in varying(f) for d in dims) or dims.size == 0:
        tr.freeze((f,), "is rolled along the channels")
        return None
    return f


def _select(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dim: int, index: int) -> IntArray | None:
    dim = nth(dim, x)
    if varying(f) == (dim,) and tr.mark(x).leaf is None:
        tr.poison(out, f, f"index {index} is picked out by number")
        return None
    if dim in varying(f):
        tr.pin(f, dim, f"index {index} is picked out by number")
        f = f.take([index], axis=dim)
    return f.reshape([n for d, n in enumerate(f.shape) if d != dim])


def _slice(
    tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> IntArray | None:
    dim = nth(dim, x)
    if dim not in varying(f) or out.shape[dim] == x.shape[dim]:
        return f
    if varying(f) == (dim,):
        return _slice_of_channels(tr, f, dim, start or 0, min(end, x.shape[dim]), step)
    tr.pin(f, dim, "")
    return f[(slice(None),) * dim + (slice(start, end, step),)]


def _slice_of_channels(tr: Tracer, f: IntArray, dim: int, start: int, end: int, step: int) -> IntArray | None:
    """A part of the channels, between places that an attribute of a module gives."""
    n = f.shape[dim]
    start, end = start % n, n if end == n else end % n
    part = f[(slice(None),) * dim + (slice(start, end, step),)]
    for place_ in {start, end} - {0, n}:
        number = tr.numbers.find([place_])[0] if step == 1 else None
        if number is None:
            tr.freeze((f,), "a slice of the channels is taken by number")
            return None
        tr.numbers.use(number, (f[(slice(None),) * dim + (slice(0, place_),)],), dim)
    return part


_MOVES: dict[str, Callable[..., IntArray | None]] = {
    "permute": _permute,
    "transpose": _transpose,
    "t": _transpose,
    "movedim": _permute,
    "unsqueeze": _like,
    "squeeze": _like,
    "expand": _expand,
    "flip": _flip,
    "roll": _roll,
    "select": _select,
    "slice": _slice,
}


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten")
def view(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Merging dimensions repeats labels; splitting one spreads them, into heads and their dimensions, say."""
    mark = tr.mark(args[0])
    factors = []
    for factor in mark.factors:
        shaped = reshape(factor, args[0].shape, out.shape)
        if len(varying(shaped)) > len(varying(factor)):
            tr.split(shaped)
        factors.append(shaped)
    if len(factors) > 1:
        factors = _one_for_each_dim(tr, mark.factors, factors)
    tr.set(out, factors, mark.leaf)


def _one_for_each_dim(tr: Tracer, before: Sequence[IntArray], after: Sequence[IntArray]) -> list[IntArray]:
    """Of labels that a view has brought together in one dimension, those of most channels that can go.

    A place there is one of a grid, and what is made of it has one channel for each: the others must stay.
    """

    def met_by(i: int, others: Iterable[int]) -> list[int]:
        return [j for j in others if _meet(after[i], after[j]) and not _meet(before[i], before[j])]

    if not any(met_by(i, range(i)) for i in range(len(after))):
        return list(after)
    kept: list[int] = []
    solution = tr.slots.solve()
    stays = solution.frozen.mask[solution.unit]
    many = [_channels_of(tr, solution, factor) for factor in before]
    for i in sorted(range(len(after)), key=lambda i: (-many[i], -before[i].size)):
        met = met_by(i, kept)
        if met:
            if not stays[tr.slots.index(before[i])].all() and all(stays[tr.slots.index(before[j])].all() for j in met):
                kept = [j for j in kept if j not in met]
            else:
                tr.freeze((before[i],), "is flattened together with other channels")
                continue
        kept.append(i)
    return [after[i] for i in sorted(kept)]


def _channels_of(tr: Tracer, solution: Solution, factor: IntArray) -> int:
    """How many channels the units of ``factor`` have."""
    channels = np.flatnonzero(solution.channel[: solution.count] == np.arange(solution.count))
    return int(np.isin(solution.unit[channels], solution.unit[tr.slots.index(factor)]).sum())


def _meet(one: IntArray, other: IntArray) -> bool:
    """Whether both vary along some dimension."""
    return not set(varying(one)).isdisjoint(varying(other))


def reshape(factor: IntArray, source: Sequence[int], target: Sequence[int]) -> IntArray:
    """``factor`` of a tensor of shape ``source`` after ``view(target)``."""
    middle, final = _through(factor.shape, tuple(source), tuple(target))
    shaped = (factor if middle == factor.shape else np.broadcast_to(factor, middle)).reshape(final)
    for dim in varying(shaped):  # e.g. (batch * channel) split again: constant along the batch
        first = shaped.take([0], axis=dim)
        if (first == shaped.take([-1], axis=dim)).all() and (first == shaped).all():
            shaped = first
    return shaped


@lru_cache(maxsize=1024)
def _through(
    factor: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that a factor has on the way: what it varies along repeated in full, then viewed."""
    middle: list[int] = []
    final: list[int] = []
    for dims_in, dims_out in _matching(source, target):
        varies = any(factor[d] > 1 for d in dims_in)
        middle += [source[d] if varies else 1 for d in dims_in]
        final += [target[d] if varies else 1 for d in dims_out]
    return tuple(middle), tuple(final)


def _matching(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dimensions of both shapes with equal products, in order."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(source) or j < len(target):
        run: tuple[list[int], list[int]] = ([], [])
        a = b = 1
        if i < len(source):
            run[0].append(i)
            a, i = source[i], i + 1
        if j < len(target):
            run[1].append(j)
            b, j = target[j], j + 1
        while a != b:
            if (a < b and i < len(source)) or j >= len(target):
                run[0].append(i)
                a, i = a * source[i], i + 1
            else:
                run[1].append(j)
                b, j = b * target[j], j + 1
        runs.append(run)
    return runs


@rule("as_strided")
def restride(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Dimensions with labels stay what they are; the others may be seen in windows that overlap."""
    x = args[0]
    if out is x and _is_dense(out):
        return  # pooling to 1 x 1 in channels_last rewrites the strides of its size-1 dimensions; that moves nothing
    factors = [_in_windows(f, x, out) for f in tr.mark(x).factors]
    if any(f is None for f in factors) or out.storage_offset() != x.storage_offset():
        tr.barrier([x], "is viewed with strides written in the code")
        return
    tr.set(out, [f for f in factors if f is not None])


def _is_dense(x: Tensor) -> bool:
    extents = [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if n > 1]
    dense = all(extents[i][1] == math.prod(n for n, _ in extents[i + 1 :]) for i in range(len(extents)))
    return dense and len(extents) <= 2


def _in_windows(factor: IntArray, x: Tensor, out: Tensor) -> IntArray | None:
    """``factor`` of ``x`` for ``out``, which has what it varies along in the same order; None if it has not."""
    sizes = list(zip(out.shape, out.stride(), strict=True))
    places: list[int] = []
    for dim in varying(factor):
        n, stride = x.shape[dim], x.stride(dim)
        found = [d for d, size in enumerate(sizes) if size == (n, stride)]
        others = [size for size in sizes if size != (n, stride)]
        within = sum((m - 1) * s for m, s in others if s < stride)
        if len(found) != 1 or within >= stride or any(s % (n * stride) for m, s in others if s >= stride and m > 1):
            return None
        places += found
    if places != sorted(places):
        return None
    shape = [1] * out.ndim
    for place_, dim in zip(places, varying(factor), strict=True):
        shape[place_] = factor.shape[dim]
    return factor.reshape(shape)


@rule("repeat", "tile")
def repeat(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The labels of a repeated dimension repeat."""
    reps = args[1]
    factors = []
    for factor in tr.mark(args[0]).factors:
        factor = factor.reshape((1,) * (len(reps) - factor.ndim) + factor.shape)
        factors.append(np.tile(factor, [r if factor.shape[d] > 1 else 1 for d, r in enumerate(reps)]))
    tr.set(out, factors + _repeated(tr, args[0], out))


@rule("cat", "concatenate")
def cat(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Along the concatenated dimension labels are strung together; along the others they are the same."""
    dim = nth(args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
    tensors = [t for t in args[0] if t.ndim == out.ndim and t.shape[dim]]
    across, strung = [], []
    for t in tensors:
        own = tr.mark(t).factors
        across.append(([1 if d == dim else n for d, n in enumerate(t.shape)], [f for f in own if f.shape[dim] == 1]))
        strung.append([f for f in own if f.shape[dim] > 1])
    shape = [1 if d == dim else n for d, n in enumerate(out.shape)]
    result = list(tr.merge([(s, tuple(f)) for s, f in across], shape))
    if any(strung):
        parts = [
            factors[0]
            if factors
            else place(tr.slots.fixed(t.shape[dim], f"no channels ({tr.where()})"), dim, out.ndim)
            for t, factors in zip(tensors, strung, strict=True)
        ]
        result.append(_string(tr, parts, dim))
    tr.set(out, result)


def _string(tr: Tracer, parts: list[IntArray], dim: int) -> IntArray:
    """Labels strung together along ``dim``; where they vary along other dimensions too, those shrink alike."""
    shape = np.broadcast_shapes(*((*p.shape[:dim], 1, *p.shape[dim + 1:]) for p in parts))
    full = [np.broadcast_to(p, (*shape[:dim], p.shape[dim], *shape[dim + 1:])) for p in parts]
    if any(n > 1 for n in shape):
        for part in full:
            tr.pin(part, dim, "")
            tr.slots.couple(full[0].take([0], axis=dim), part.take([0], axis=dim))
    return np.concatenate(full, axis=dim)


@rule("stack")
def stack(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Stacked tensors have the same labels."""
    dim = nth(args[1] if len(args) > 1 else 0, out)
    merged = tr.merge([(t.shape, tr.mark(t).factors) for t in args[0]], args[0][0].shape)
    tr.set(out, [np.expand_dims(f, dim) for f in merged])


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def split(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Equal parts of a labelled dimension shrink alike; unequal parts have their sizes in the code."""
    x = args[0]
    unbind = func._schema.name == "aten::unbind"
    position = 1 if unbind else 2
    dim = nth(args[position] if len(args) > position else kwargs.get("dim", 0), x)
    starts = np.cumsum([0] + [1 if unbind else t.shape[dim] for t in out])
    for factor in tr.mark(x).factors:
        parts = [factor] * len(out)
        if factor.shape[dim] > 1 and len(out) > 1:
            parts = np.split(factor, starts[1:-1].tolist(), axis=dim)
            if len(varying(factor)) > 1:
                tr.pin(factor, dim, "")
            elif not _split_channels(tr, factor, parts, dim, args[1] if len(args) > 1 else None, unbind):
                continue
        for result, part in zip(out, parts, strict=True):
            shape = [n for d, n in enumerate(part.shape) if not (unbind and d == dim)]
            tr.set(result, (*tr.mark(result).factors, part.reshape(shape)))


def _split_channels(
    tr: Tracer, factor: IntArray, parts: list[IntArray], dim: int, written: Any, unbind: bool
) -> bool:
    """Whether the parts may shrink: all alike, or each by itself where an attribute says how large it is."""
    sizes = [p.shape[dim] for p in parts]
    equal = len(set(sizes)) == 1 and not unbind
    numbers = tr.numbers.find([sizes[0]] if equal and isinstance(written, int) else sizes)
    if not any(numbers) and not equal:
        tr.freeze((factor,), f"is split into parts of {sorted(set(sizes))} channels")
        return False
    if equal:
        tr.slots.couple_blocks(factor.reshape(-1), len(parts))
    for number, part in zip(numbers, parts, strict=False):
        if number is not None:
            tr.numbers.use(number, (part,), dim)
        elif not equal:
            tr.freeze((part,), f"is a part of {part.size} channels by number")
    return True


@rule("constant_pad_nd")
def pad(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Padding a labelled dimension adds positions that no channel makes."""
    x, amounts = args[0], args[1]
    factors = []
    for factor in tr.mark(x).factors:
        for i in range(len(amounts) // 2):
            dim = x.ndim - 1 - i
            if factor.shape[dim] == 1 or not any(amounts[2 * i : 2 * i + 2]):
                continue
            left, right = amounts[2 * i : 2 * i + 2]
            slots = along(factor, dim)
            if slots is None:  # inside of what goes as a whole, heads say: what is added goes with its neighbour
                tr.pin(factor, dim, "")
                factor = factor[(slice(None),) * dim + (slice(max(-left, 0), factor.shape[dim] - max(-right, 0)),)]
                factor = np.pad(factor, [(max(left, 0), max(right, 0)) if d == dim else (0, 0) for d in range(x.ndim)],
                                mode="edge")
                continue
            if min(left, right) < 0:
                tr.freeze((factor,), "is cropped along the channels")
                break
            before, after = (tr.slots.fixed(n, f"padding ({tr.where()})") for n in (left, right))
            factor = place(np.concatenate([before, slots, after]), dim, x.ndim)
        else:
            factors.append(factor)
    tr.set(out, factors)


@rule("glu")
def glu(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The halves of the dimension gate each other: same places, same channels."""
    dim = nth(args[1] if len(args) > 1 else -1, args[0])
    factors = []
    for factor in tr.mark(args[0]).factors:
        if factor.shape[dim] > 1:
            left, right = np.split(factor, 2, axis=dim)
            tr.slots.unify(left, right)
            factor = left
        factors.append(factor)
    tr.set(out, factors)
