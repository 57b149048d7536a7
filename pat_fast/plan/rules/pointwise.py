"""Element-wise ops and copies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..labels import varying
from ..trace import Mark, Tracer, tensors
from .registry import extents, note, nth, outputs, rule


@rule(
    "native_dropout", "_prelu_kernel", "copy", "where", "masked_fill", "lerp", "addcmul", "addcdiv",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "fill",
    "uniform", "normal", "zero", "rrelu_with_noise", "_log_softmax", "_softmax", "_safe_softmax", "nan_to_num",
    "complex", "_conj", "floor_divide", "polar", "isin", "hardswish", "leaky_relu",
    "log_sigmoid_forward",
)  # fmt: skip
def elementwise(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Every output element depends on the input elements at its place, up to broadcasting."""
    inputs = tensors((args, tuple(kwargs.values())) if kwargs else args)
    if len(inputs) == 1 and isinstance(out, Tensor) and inputs[0].shape == out.shape:
        mark = tr.mark(inputs[0])
        if len(mark.factors) < 2 and "softmax" not in func._schema.name:
            tr.set(out, mark.factors, mark.leaf if out.ndim > 1 else None)
            return
    for result in outputs(out):
        factors = tr.merge([(extents(t), tr.mark(t).factors) for t in inputs if t.ndim], result.shape)
        if "softmax" in func._schema.name:
            note(tr, [f for f in factors if nth(args[1], result) in varying(f)], "softmax")
        weight = _weight_among(tr, inputs, result)
        if weight.leaf is not None and set(map(varying, weight.factors)) == set(map(varying, factors)):
            factors = weight.factors  # the same channels, by the weight's own slots: whoever uses them uses the weight
        tr.set(result, factors, weight.leaf)


def _weight_among(tr: Tracer, inputs: list[Tensor], result: Tensor) -> Mark:
    """What is known of the parameter of which ``result`` is a scaled, shifted or masked version, if it is one.

    That is the only operand of its shape, but for buffers (a mask).
    """
    full = [tr.mark(t) for t in inputs if t.shape == result.shape]
    if len(full) > 1:
        full = [mark for mark in full if mark.leaf is None or mark.leaf.is_parameter]
    return full[0] if len(full) == 1 and result.ndim > 1 else Mark(())


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "to", "dropout")
def same(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A copy or an alias: labels and origin are kept."""
    mark = tr.mark(args[0])
    for result in outputs(out):
        tr.set(result, mark.factors, mark.leaf)


@rule("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
def fresh(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Only the dtype and device of the input are used; the size is written in the code."""
