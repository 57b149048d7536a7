"""Reductions, pooling, sorting."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..labels import varying
from ..trace import Tracer
from .pointwise import elementwise
from .registry import arguments, extents, held, note, nth, outputs, rule

SPATIAL = re.compile(
    r"aten::_?(upsample_\w+?|max_pool|avg_pool|adaptive_avg_pool|adaptive_max_pool"
    r"|reflection_pad|replication_pad|fractional_max_pool)([123])d"
)


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "argmax",
    "argmin", "any", "all", "var_mean", "std_mean", "max", "min", "aminmax", "count_nonzero", "nansum",
)  # fmt: skip
def reduction(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Reduced dimensions are gone; a reduction over channels is noted as a statistic."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):
        elementwise(tr, func, args, kwargs, out)
        return
    spec = arguments(func, args, kwargs)
    dims = spec.get("dim")
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = [nth(d, x) for d in dims]
    factors = tr.mark(x).factors
    note(tr, [f for f in factors if set(dims) & set(varying(f))], func._schema.name.removeprefix("aten::"))
    reduced = tr.reduce(factors, dims, bool(spec.get("keepdim")))
    for result in outputs(out):
        tr.set(result, reduced if result.ndim else ())


def spatial(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Pooling, up-sampling, border padding: the last dimensions change, channels stay."""
    match = SPATIAL.match(func._schema.name)
    assert match is not None
    x = args[0]
    inner = range(x.ndim - int(match[2]), x.ndim)
    factors = held(tr, tr.mark(x).factors, inner, "is resampled along the channels")
    for result in outputs(out):
        tr.set(result, factors)


@rule("sort", "topk", "argsort", "kthvalue", "median")
def ordering(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Sorting along channels mixes them; along anything else it does not touch them."""
    x = args[0]
    spec = arguments(func, args, kwargs)
    dim = nth(-1 if spec.get("dim") is None else spec["dim"], x)
    factors = tr.mark(x).factors
    tr.freeze([f for f in factors if dim in varying(f)], "is sorted along the channels")
    for result in outputs(out):
        if result.ndim == x.ndim:
            tr.set(result, [f for f in factors if dim not in varying(f)])


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def running(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What comes before along one dimension is taken in."""
    x = args[0]
    factors = held(tr, tr.mark(x).factors, [nth(args[1], x)], "is summed up along the channels")
    for result in outputs(out):
        tr.set(result, factors)


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
def loss(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Two tensors are held against each other place by place, and that is averaged."""
    shape = args[0].shape
    factors = tr.merge([(extents(t), tr.mark(t).factors) for t in args[:2]], shape)
    note(tr, factors, func._schema.name.removeprefix("aten::"))
    tr.set(out, factors if out.ndim else ())


@rule("nll_loss_forward", "nll_loss2d_forward")
def classes(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Scores of classes, one of which a number names."""
    tr.freeze(tr.mark(args[0]).factors, "is the score of a class in a loss")
