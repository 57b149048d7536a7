"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..labels import Factors, along, flat, varying
from ..trace import Tracer
from .registry import held, note, nth, outputs, rule


def _per_channel(x: Tensor, tensors: Sequence[Tensor | None], tr: Tracer) -> list[tuple[list[int], Factors]]:
    shape = [1, x.shape[1]] + [1] * (x.ndim - 2)
    return [(shape, tuple(f.reshape(shape) for f in tr.mark(t).factors)) for t in tensors if t is not None]


@rule(
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm",
)  # fmt: skip
def batch_norm(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Weight, bias and running statistics follow dimension 1."""
    x = args[0]
    mark = tr.mark(x)
    own = [t for t in args[1:5] if isinstance(t, Tensor)]
    if len(mark.factors) == 1 and varying(mark.factors[0]) == (1,):
        vector = flat(mark.factors[0])
        own = [t for t in own if not tr.adopt(t, vector)]
    factors = tr.merge([(x.shape, mark.factors), *_per_channel(x, own, tr)], x.shape) if own else mark.factors
    note(tr, [f for f in factors if varying(f) != (1,)], "batch norm")  # of a weight, say, that is standardised
    if isinstance(tr.module, nn.modules.batchnorm._NormBase):
        for factor in factors:
            if varying(factor) == (1,):  # an instance norm has its channels once for each example
                tr.width(factor.reshape(-1)[: tr.module.num_features], "num_features")
    tr.set(outputs(out)[0], factors, mark.leaf)


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A weight v [rows, ...] scaled row by row to the norms g [rows, 1, ...]: zeros count for nothing in a norm."""
    v, g = args[:2]
    factors = tr.merge([(v.shape, tr.mark(v).factors), (g.shape, tr.mark(g).factors)], v.shape)
    rows = nth(args[2] if len(args) > 2 else 0, v)
    note(tr, [f for f in factors if varying(f) == (rows,)], "weight norm (0 / 0 of a row at zero)")
    tr.set(outputs(out)[0], factors, tr.mark(v).leaf)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Weight and bias follow the last dimensions, over which the statistics are taken."""
    x, size = args[0], len(args[1])
    given, found = [t for t in args[2:4] if isinstance(t, Tensor)], tr.mark(x).factors
    if len(found) == 1 and varying(found[0]) == (x.ndim - 1,):
        given = [t for t in given if not tr.adopt(t, found[0])]
    own = [(t.shape, tr.mark(t).factors) for t in given]
    factors = tr.merge([(x.shape, found), *own], x.shape) if own else found
    inner = [f for f in factors if max(varying(f)) >= x.ndim - size]
    note(tr, inner, "layer norm")
    for factor in inner:
        dim = varying(factor)[-1]
        (number,) = tr.numbers.find([x.shape[dim]])
        if varying(factor)[0] < x.ndim - size:  # inside of what goes as a whole: heads that are normalised one by one
            if number is not None:
                tr.numbers.use(number, (factor,), dim)
            held(tr, (factor,), [d for d in varying(factor) if d >= x.ndim - size], "")
        elif len(varying(factor)) > 1:
            tr.freeze((factor,), "its width is written in the code")
        elif isinstance(tr.module, (nn.LayerNorm, nn.RMSNorm)):
            tr.width(factor, "normalized_shape", dim - x.ndim)
        elif number is not None:
            tr.numbers.use(number, (factor,), dim)
        elif args[1] != list(x.shape[dim:]):  # else taken from a tensor's shape, or found out by the dry run
            tr.freeze((factor,), "its width is written in the code")
    tr.set(outputs(out)[0], factors)


@rule("native_group_norm", "group_norm")
def group_norm(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Weight and bias follow dimension 1; every group keeps as many channels as the others."""
    x, groups = args[0], args[6] if func._schema.name == "aten::native_group_norm" else args[1]
    own = _per_channel(x, [t for t in args[1:3] if isinstance(t, Tensor)], tr)
    factors = tr.merge([(x.shape, tr.mark(x).factors), *own], x.shape)
    for factor in factors:
        slots = along(factor, 1)
        if slots is None:
            tr.freeze((factor,), "is normalised in groups along two dimensions")
        else:
            tr.slots.couple_blocks(slots, groups)
            if isinstance(tr.module, nn.GroupNorm):
                tr.width(slots, "num_channels")
    note(tr, factors, "group norm")
    tr.set(outputs(out)[0], factors)
