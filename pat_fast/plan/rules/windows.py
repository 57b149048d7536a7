"""Windows, grids and transforms: places in images and sequences are gathered or mixed, channels stay what they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..labels import IntArray, along, place
from ..trace import Tracer
from .registry import held, nth, rule

GATHERED = "is gathered in windows along the channels"


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """r * r channels become one with a finer grid (or the reverse): they are one channel."""
    x = args[0]
    fine, coarse = (x, out) if x.shape[-3] > out.shape[-3] else (out, x)
    r2 = fine.shape[-3] // coarse.shape[-3]
    for factor in tr.mark(x).factors:
        slots = along(factor, x.ndim - 3)
        if slots is None or coarse.shape[-3] == 1:
            tr.freeze((factor,), "pixels are shuffled")
        elif fine is x:
            tr.slots.unify(slots.reshape(-1, r2)[:, :1], slots.reshape(-1, r2))
            tr.set(out, [place(slots[::r2].copy(), out.ndim - 3, out.ndim)])
        else:
            tr.set(out, [place(np.repeat(slots, r2), out.ndim - 3, out.ndim)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Channel j of group i becomes channel i of block j: the groups must stay of one size."""
    x, groups = args[:2]
    factors: list[IntArray] = []
    for factor in tr.mark(x).factors:
        slots = along(factor, 1)
        if slots is None:
            factors += held(tr, [factor], [1], "is shuffled along the channels")
            continue
        tr.slots.couple_blocks(slots, groups)
        factors.append(place(slots.reshape(groups, -1).T.reshape(-1), 1, out.ndim))
    tr.set(out, factors)


@rule("unfold")
def unfold(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Windows along one dimension; their places are a new last dimension."""
    x = args[0]
    factors = held(tr, tr.mark(x).factors, [nth(args[1], x)], GATHERED)
    tr.set(out, [f.reshape(*f.shape, 1) for f in factors])


@rule("im2col")
def im2col(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """[..., C, H, W] to [..., C * window, places]: each channel repeats."""
    x = args[0]
    window = out.shape[-2] // x.shape[-3]
    factors = held(tr, tr.mark(x).factors, [x.ndim - 2, x.ndim - 1], GATHERED)
    repeated = [np.repeat(f, window, axis=-3) if f.shape[-3] > 1 else f for f in factors]
    tr.set(out, [f.reshape(f.shape[:-1]) for f in repeated])


@rule("col2im")
def col2im(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """[..., C * window, places] to [..., C, H, W]: the places of a window are one channel."""
    x, channels = args[0], out.shape[-3]
    factors = []
    for factor in held(tr, tr.mark(x).factors, [x.ndim - 1], GATHERED):
        slots = along(factor, x.ndim - 2)
        if slots is None:
            factors += [f[..., None] for f in held(tr, [factor], [x.ndim - 2], GATHERED)]
            continue
        window = slots.reshape(channels, -1)
        tr.slots.unify(window[:, :1], window)
        factors.append(place(window[:, 0].copy(), out.ndim - 3, out.ndim))
    tr.set(out, factors)


@rule("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "grid_sampler")
def grid_sampler(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Each channel [H, W] is read at the places of a grid [..., 2], whose labels end here."""
    x, grid = args[:2]
    tr.freeze(tr.mark(grid).factors, "is a place of a grid")
    tr.set(out, held(tr, tr.mark(x).factors, range(2, x.ndim), "is sampled along the channels"))


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The reverse of a pooling, by its indices, which have its channels."""
    x, indices = args[:2]
    dims = range(x.ndim - int(func._schema.name[-2]), x.ndim)
    both = [held(tr, tr.mark(t).factors, dims, "is resampled along the channels") for t in (x, indices)]
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    tr.set(out, tr.merge([(shape, factors) for factors in both], shape))


@rule("tril", "triu")
def triangle(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What is left depends on the places along the last two dimensions."""
    x = args[0]
    mark = tr.mark(x)
    held(tr, mark.factors, [x.ndim - 2, x.ndim - 1], "is cut to a triangle")
    tr.set(out, mark.factors, mark.leaf)


@rule("view_as_complex")
def as_complex(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The last dimension, real and imaginary part, is gone: the two go together."""
    x = args[0]
    factors = held(tr, tr.mark(x).factors, [x.ndim - 1], "is a real or an imaginary part")
    tr.set(out, [f.reshape(f.shape[:-1]) for f in factors])


@rule("view_as_real")
def as_real(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A last dimension of real and imaginary part is new."""
    tr.set(out, [f.reshape(*f.shape, 1) for f in tr.mark(args[0]).factors])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What is transformed is mixed; the other dimensions stay."""
    x = args[0]
    dims = [nth(d, x) for d in args[1]]
    tr.set(out, held(tr, tr.mark(x).factors, dims, "is transformed along the channels"))
