"""What each ATen op does to channel labels. One small function per family; see :mod:`pat_fast.plan.labels`.

A rule gets the tracer, the op, its arguments and its result, and labels the result. Element-wise ops need no
rule: PyTorch tags them. An op without a rule is a barrier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .labels import Factors, IntArray, along, place, varying
from .trace import Leaf, Mark, Tracer

Rule = Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any], Any], None]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the ATen ops ``names`` (without ``aten::``), all their overloads included."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten::{name}"] = function
        return function

    return register


_SPATIAL = re.compile(
    r"aten::_?(upsample_\w+?|max_pool|avg_pool|adaptive_avg_pool|adaptive_max_pool"
    r"|reflection_pad|replication_pad|fractional_max_pool)([123])d"
)


def find(func: Any) -> Rule | None:
    """The rule for ``func``, or None."""
    name = func._schema.name
    found = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        return elementwise
    if found is None and _SPATIAL.match(name):
        return spatial
    return found


def _outputs(out: Any) -> list[Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, Tensor)]


def _dim(dim: int, tensor: Tensor) -> int:
    return dim % max(tensor.ndim, 1)


@rule(
    "native_dropout", "_prelu_kernel", "copy", "where", "masked_fill", "lerp", "addcmul", "addcdiv",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "fill",
    "uniform", "normal", "zero", "rrelu_with_noise", "_log_softmax", "_softmax", "cumsum", "cumprod",
    "logcumsumexp", "_safe_softmax", "nan_to_num", "polar", "isin",
)  # fmt: skip
def elementwise(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Every output element depends on the input elements at its place, up to broadcasting."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    for result in _outputs(out):
        factors = tr.merge([(t.shape, tr.mark(t).factors) for t in inputs if t.ndim], result.shape)
        if "softmax" in func._schema.name:
            _note(tr, [f for f in factors if _dim(args[1], result) in varying(f)], "softmax")
        tr.set(result, factors)


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "to", "dropout")
def same(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A copy or an alias: labels and origin are kept."""
    mark = tr.mark(args[0])
    for result in _outputs(out):
        tr.set(result, mark.factors, mark.leaf)


@rule("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
def fresh(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Only the dtype and device of the input are used; the size is written in the code."""


def _note(tr: Tracer, factors: Sequence[IntArray], what: str) -> None:
    for factor in factors:
        tr.slots.note(factor, f"{what} over the channels ({tr.where()})")


# Moving data: the labels make the same move.


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
    tr.set(out, factors, mark.leaf if name in ("permute", "transpose", "t", "squeeze", "unsqueeze") else None)


def _permute(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dims: Sequence[int]) -> IntArray:
    return f.transpose([_dim(d, x) for d in dims])


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
    return np.flip(f, [_dim(d, x) for d in dims])


def _roll(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, shifts: Any, dims: Any = ()) -> IntArray | None:
    shifts, dims = np.atleast_1d(shifts), np.atleast_1d(dims)
    if any(_dim(int(d), x) in varying(f) for d in dims) or dims.size == 0:
        tr.freeze((f,), "is rolled along the channels")
        return None
    return f


def _select(tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dim: int, index: int) -> IntArray | None:
    dim = _dim(dim, x)
    if dim in varying(f):
        tr.pin(f, dim, f"index {index} is picked out by number")
        f = f.take([index], axis=dim)
    return f.reshape([n for d, n in enumerate(f.shape) if d != dim])


def _slice(
    tr: Tracer, f: IntArray, x: Tensor, out: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> IntArray | None:
    dim = _dim(dim, x)
    if dim not in varying(f) or out.shape[dim] == x.shape[dim]:
        return f
    tr.freeze((f,), "a slice of the channels is taken by number")
    return None


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
    """Merging dimensions repeats labels; splitting a labelled dimension hard-codes its size."""
    mark = tr.mark(args[0])
    factors = []
    for factor in mark.factors:
        shaped = reshape(factor, args[0].shape, out.shape)
        if shaped is None:
            tr.freeze((factor,), f"{tuple(args[0].shape)} is reshaped to {tuple(out.shape)}")
        else:
            factors.append(shaped)
    tr.set(out, factors, mark.leaf if out.shape == args[0].shape else None)


def reshape(factor: IntArray, source: Sequence[int], target: Sequence[int]) -> IntArray | None:
    """``factor`` of a tensor of shape ``source`` after ``view(target)``; None if it would vary along two
    dimensions where it varied along one."""
    middle: list[int] = []
    final: list[int] = []
    for dims_in, dims_out in _matching(source, target):
        varies = any(factor.shape[d] > 1 for d in dims_in)
        middle += [source[d] if varies else 1 for d in dims_in]
        final += [target[d] if varies else 1 for d in dims_out]
    shaped = np.broadcast_to(factor, middle).reshape(final)
    for dim in varying(shaped):  # e.g. (batch * channel) split again: constant along the batch
        first = shaped.take([0], axis=dim)
        if np.array_equal(shaped, np.broadcast_to(first, shaped.shape)):
            shaped = first
    return shaped if len(varying(shaped)) <= len(varying(factor)) else None


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
    """Pooling to 1 x 1 in channels_last rewrites the strides of its size-1 dimensions; that moves nothing."""
    extents = [(n, s) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1]
    dense = all(extents[i][1] == math.prod(n for n, _ in extents[i + 1 :]) for i in range(len(extents)))
    if out is args[0] and dense and len(extents) <= 2:
        return
    tr.barrier([args[0]], "is viewed with strides written in the code")


@rule("repeat", "tile")
def repeat(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The labels of a repeated dimension repeat."""
    reps = args[1]
    factors = []
    for factor in tr.mark(args[0]).factors:
        factor = factor.reshape((1,) * (len(reps) - factor.ndim) + factor.shape)
        factors.append(np.tile(factor, [r if factor.shape[d] > 1 else 1 for d, r in enumerate(reps)]))
    tr.set(out, factors)


@rule("cat", "concatenate")
def cat(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Along the concatenated dimension labels are strung together; along the others they are the same."""
    tensors = [t for t in args[0] if t.ndim == out.ndim]
    dim = _dim(args[1] if len(args) > 1 else kwargs.get("dim", 0), out)
    across, strung = [], []
    for t in tensors:
        factors = tr.mark(t).factors
        across.append(([1 if d == dim else n for d, n in enumerate(t.shape)], [f for f in factors if f.shape[dim] == 1]))
        strung.append([f for f in factors if f.shape[dim] > 1])
    shape = [1 if d == dim else n for d, n in enumerate(out.shape)]
    result = list(tr.merge([(s, tuple(f)) for s, f in across], shape))
    if any(strung):
        parts = []
        for t, factors in zip(tensors, strung, strict=True):
            if any(len(varying(f)) > 1 for f in factors):
                tr.freeze(factors, "is concatenated along one of two channel dimensions")
                factors = []
            slots = factors[0].reshape(-1) if factors else tr.slots.fixed(t.shape[dim], f"no channels ({tr.where()})")
            parts.append(slots)
        result.append(place(np.concatenate(parts), dim, out.ndim))
    tr.set(out, result)


@rule("stack")
def stack(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Stacked tensors have the same labels."""
    dim = _dim(args[1] if len(args) > 1 else 0, out)
    merged = tr.merge([(t.shape, tr.mark(t).factors) for t in args[0]], args[0][0].shape)
    tr.set(out, [np.expand_dims(f, dim) for f in merged])


@rule("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk")
def split(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Equal parts of a labelled dimension shrink alike; unequal parts have their sizes in the code."""
    x = args[0]
    unbind = func._schema.name == "aten::unbind"
    position = 1 if unbind else 2
    dim = _dim(args[position] if len(args) > position else kwargs.get("dim", 0), x)
    starts = np.cumsum([0] + [1 if unbind else t.shape[dim] for t in out])
    for factor in tr.mark(x).factors:
        parts = [factor] * len(out)
        if factor.shape[dim] > 1 and len(out) > 1:
            sizes = set(np.diff(starts).tolist())
            if len(varying(factor)) > 1 or len(sizes) > 1 or unbind:
                tr.freeze((factor,), f"is split into parts of {sorted(sizes)} channels")
                continue
            tr.slots.couple_blocks(factor.reshape(-1), len(out))
            parts = np.split(factor, len(out), axis=dim)
        for result, part in zip(out, parts, strict=True):
            shape = [n for d, n in enumerate(part.shape) if not (unbind and d == dim)]
            tr.set(result, (*tr.mark(result).factors, part.reshape(shape)))


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
            slots = along(factor, dim)
            if slots is None or min(amounts) < 0:
                tr.freeze((factor,), "is padded or cropped along the channels")
                break
            before, after = (tr.slots.fixed(n, f"padding ({tr.where()})") for n in amounts[2 * i : 2 * i + 2])
            factor = place(np.concatenate([before, slots, after]), dim, x.ndim)
        else:
            factors.append(factor)
    tr.set(out, factors)


@rule("index_select", "index", "gather", "embedding", "take_along_dim")
def index(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Look-ups: the dimension looked up by number must stay, the others keep their labels."""
    x, name = args[0], func._schema.name.removeprefix("aten::")
    if name == "embedding":
        looked_up, width = {0}, args[1].ndim
    elif name == "index":
        looked_up = {d for d, i in enumerate(args[1]) if i is not None}
        width = max(i.ndim for i in args[1] if i is not None)
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if masks or looked_up != set(range(min(looked_up), max(looked_up) + 1)):
            return tr.barrier([x], "is indexed by a mask or along separate dimensions")
    else:
        looked_up, width = {_dim(args[1], x)}, 1
        if name != "index_select" and any(varying(f) != tuple(looked_up) for f in tr.mark(args[2]).factors):
            return tr.barrier([x, args[2]], "is gathered by computed indices")
    dim = min(looked_up)
    mark, factors = tr.mark(x), []
    for factor in mark.factors:
        if looked_up & set(varying(factor)):
            tr.freeze((factor,), "is looked up by number")
            continue
        shape = [n for d, n in enumerate(factor.shape) if d not in looked_up]
        shape[dim:dim] = [1] * width
        factors.append(factor.reshape(shape))
        if mark.leaf is not None:
            tr.use(mark.leaf, factor, consumed=False)
    tr.set(out, factors)


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


@rule("glu")
def glu(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The halves of the dimension gate each other: same places, same channels."""
    dim = _dim(args[1] if len(args) > 1 else -1, args[0])
    factors = []
    for factor in tr.mark(args[0]).factors:
        if factor.shape[dim] > 1:
            left, right = np.split(factor, 2, axis=dim)
            tr.slots.unify(left, right)
            factor = left
        factors.append(factor)
    tr.set(out, factors)


# Reductions, pooling, sorting


@rule(
    "mean", "sum", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "argmax",
    "argmin", "any", "all", "var_mean", "std_mean", "max", "min", "aminmax", "count_nonzero", "nansum",
)  # fmt: skip
def reduction(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Reduced dimensions are gone; a reduction over channels is noted as a statistic."""
    x = args[0]
    if len(args) > 1 and isinstance(args[1], Tensor):
        return elementwise(tr, func, args, kwargs, out)
    spec = {a.name: (args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)}
    dims = spec.get("dim")
    dims = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = [_dim(d, x) for d in dims]
    factors = tr.mark(x).factors
    _note(tr, [f for f in factors if set(dims) & set(varying(f))], func._schema.name.removeprefix("aten::"))
    reduced = tr.reduce(factors, dims, bool(spec.get("keepdim")))
    for result in _outputs(out):
        tr.set(result, reduced if result.ndim else ())


def spatial(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Pooling, up-sampling, border padding: the last dimensions change, channels stay."""
    match = _SPATIAL.match(func._schema.name)
    assert match is not None
    x = args[0]
    inner = set(range(x.ndim - int(match[2]), x.ndim))
    factors = []
    for factor in tr.mark(x).factors:
        if inner & set(varying(factor)):
            tr.freeze((factor,), "is resampled along the channels")
        else:
            factors.append(factor)
    for result in _outputs(out):
        tr.set(result, factors)


@rule("sort", "topk", "argsort", "kthvalue", "median")
def ordering(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Sorting along channels mixes them; along anything else it does not touch them."""
    x = args[0]
    spec = {a.name: (args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)}
    dim = _dim(spec.get("dim") if spec.get("dim") is not None else -1, x)
    factors = tr.mark(x).factors
    tr.freeze([f for f in factors if dim in varying(f)], "is sorted along the channels")
    for result in _outputs(out):
        if result.ndim == x.ndim:
            tr.set(result, [f for f in factors if dim not in varying(f)])


# Contractions: the summed dimension of both sides is the same channels.


def _widen(mark: Mark, shape: Sequence[int], axes: Sequence[int | None]) -> tuple[Mark, list[int]]:
    """View an operand with its dimensions re-ordered to ``axes``; None inserts a dimension of size 1."""
    order = [a for a in axes if a is not None]
    factors = []
    for factor in mark.factors:
        full = factor.transpose(order)
        for place_, a in enumerate(axes):
            if a is None:
                full = np.expand_dims(full, place_)
        factors.append(full)
    return Mark(tuple(factors), mark.leaf), [1 if a is None else shape[a] for a in axes]


def _product(tr: Tracer, a: Tensor, a_axes: Sequence[int | None], b: Tensor, b_axes: Sequence[int | None]) -> Factors:
    wide_a, shape_a = _widen(tr.mark(a), a.shape, a_axes)
    wide_b, shape_b = _widen(tr.mark(b), b.shape, b_axes)
    return tr.contract(wide_a, shape_a, wide_b, shape_b, np.broadcast_shapes(tuple(shape_a), tuple(shape_b)))


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "dot")
def matmul(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """(batch of) [M, K] times [K, N], with an optional term that is added."""
    name = func._schema.name
    added = args[0] if "add" in name else None
    a, b = args[1:3] if added is not None else args[:2]
    if b.ndim == 1:
        factors = _product(tr, a, range(a.ndim), b, [None] * (a.ndim - 1) + [0])
    elif b.ndim == 2:
        factors = _product(tr, a, [0, None, 1], b, [None, 1, 0])
    else:
        factors = _product(tr, a, [0, 1, None, 2], b, [0, None, 2, 1])
    if added is not None and added.ndim:
        factors = tr.merge([(out.shape, factors), (added.shape, tr.mark(added).factors)], out.shape)
    tr.set(out, factors)


@rule("linear")
def linear(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """x [..., K] times weight [N, K] transposed, plus bias [N]."""
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    lead: list[int | None] = list(range(x.ndim - 1))
    factors = _product(tr, x, [*lead, None, x.ndim - 1], weight, [None] * len(lead) + [0, 1])
    if bias is not None:
        factors = tr.merge([(out.shape, factors), (bias.shape, tr.mark(bias).factors)], out.shape)
    tr.set(out, factors)


@rule(
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, E]: two products; the heads are a batch."""
    q, k, v = args[:3]
    result = _outputs(out)[0]
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[1] != q.shape[1]:
        return tr.barrier([q, k, v], "grouped or unusual attention")
    scores = _product(tr, q, [0, 1, 2, None, 3], k, [0, 1, None, 2, 3])
    wide_v, v_shape = _widen(tr.mark(v), v.shape, [0, 1, None, 3, 2])
    s_shape = [q.shape[0], q.shape[1], q.shape[2], 1, k.shape[2]]
    wide_s = Mark(tuple(np.expand_dims(f, 3) for f in scores))
    tr.set(result, tr.contract(wide_s, s_shape, wide_v, v_shape, [*s_shape[:3], v.shape[3], s_shape[4]]))


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Any convolution, grouped, depthwise or transposed."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    c_in, c_out = x.shape[1], out.shape[1]
    label = _conv_input(tr, x)
    row, col = (0, 1) if not transposed else (1, 0)
    outs, ins = _conv_slots(tr, weight, groups, row, col)
    per_in, per_out = c_in // groups, c_out // groups
    positions = math.prod((x if transposed else out).shape[2:])
    scale = x.shape[0] * positions * math.prod(weight.shape[2:])
    if groups > 1 and 1 in (per_in, per_out):
        _remove_groups(tr, label, outs, ins, groups)
        if id(weight) in tr.leaves:
            tr.leaves[id(weight)].whole_groups = True
        counted = [(outs, c_out)] if per_in == 1 else [(ins if ins is not None else label, c_in)]
    else:
        _join(tr, label, ins)
        for slots in (outs, ins):
            if slots is not None:
                tr.slots.couple_blocks(slots, groups)
        scale /= groups
        counted = [(outs, c_out), (ins if ins is not None else label, c_in)]
    axes = [place(slots, d, len(counted)) for d, (slots, _) in enumerate(counted) if slots is not None]
    tr.count_work(tuple(axes), [n for _, n in counted], scale)
    factors: Factors = () if outs is None else (place(outs, 1, out.ndim),)
    if bias is not None:
        shape = [1, c_out] + [1] * (out.ndim - 2)
        named = tuple(f.reshape(shape) for f in tr.mark(bias).factors)
        factors = tr.merge([(shape, named), (shape, factors)], shape)
    tr.set(out, factors)


def _conv_input(tr: Tracer, x: Tensor) -> IntArray | None:
    label = None
    for factor in tr.mark(x).factors:
        slots = along(factor, 1)
        if slots is None:
            tr.freeze((factor,), "is convolved along the channels")
        else:
            label = slots
    return label


def _conv_slots(
    tr: Tracer, weight: Tensor, groups: int, row: int, col: int
) -> tuple[IntArray | None, IntArray | None]:
    """Slots of the output and the input channels that ``weight`` owns; None where an axis has size 1."""
    leaf = tr.leaves.get(id(weight))
    if leaf is not None:
        if 1 not in leaf.axes:
            leaf.groups = groups
        slots = [_leaf_axis(tr, leaf, dim, groups if dim == 1 else 1) for dim in (row, col)]
        for dim, own, uses in zip((row, col), slots, (leaf.producers, leaf.consumers), strict=True):
            if own is not None and dim not in uses:
                uses.append(dim)
        return slots[0], slots[1]
    mark = tr.mark(weight)  # computed, e.g. a standardised weight
    tr.freeze([f for f in mark.factors if varying(f) not in ((0,), (1,))], "belongs to a kernel")
    found: list[IntArray | None] = []
    for dim in (row, col):
        own = next((f.reshape(-1) for f in mark.factors if varying(f) == (dim,)), None)
        if own is None and weight.shape[dim] > 1:
            own = tr.slots.fixed(weight.shape[dim], f"computed weight ({tr.where()})")
        if own is not None and mark.leaf is not None:
            tr.use(mark.leaf, own, consumed=dim == col)
        found.append(own if own is None or dim == 0 else np.tile(own, groups))
    return found[0], found[1]


def _leaf_axis(tr: Tracer, leaf: Leaf, dim: int, groups: int) -> IntArray | None:
    n = leaf.tensor.shape[dim]
    if n == 1:
        return None
    if dim not in leaf.axes:
        leaf.axes[dim] = tr.slots.new(n * groups)
    own = leaf.axes[dim]
    return own if len(own) == n * groups else np.tile(own[:n], groups)


def _join(tr: Tracer, label: IntArray | None, own: IntArray | None) -> None:
    """The channels that enter are those that the weight expects; a side without labels fixes the other."""
    if label is not None and own is not None:
        tr.slots.unify(label, own)
    elif own is not None:
        tr.freeze((own,), "its input is not made by a layer that can shrink")
    elif label is not None:
        tr.freeze((label,), "meets a weight of fixed size")


def _remove_groups(
    tr: Tracer, label: IntArray | None, outs: IntArray | None, ins: IntArray | None, groups: int
) -> None:
    """One input or one output per group (depthwise, with or without a multiplier): a whole group goes."""
    sides = [s.reshape(groups, -1) for s in (label, outs, ins) if s is not None]
    for side in sides:
        tr.slots.unify(sides[0][:, :1], side)
    if label is None:
        tr.freeze(sides, "its input is not made by a layer that can shrink")


# Normalisation


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
    own = _per_channel(x, [t for t in args[1:5] if isinstance(t, Tensor)], tr)
    factors = tr.merge([(x.shape, tr.mark(x).factors), *own], x.shape)
    if isinstance(tr.module, nn.modules.batchnorm._NormBase):
        for factor in factors:
            if varying(factor) == (1,):  # an instance norm has its channels once for each example
                tr.width(factor.reshape(-1)[: tr.module.num_features])
    tr.set(_outputs(out)[0], factors)


@rule("native_layer_norm", "layer_norm", "_fused_rms_norm", "rms_norm")
def layer_norm(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Weight and bias follow the last dimensions, over which the statistics are taken."""
    x, size = args[0], len(args[1])
    own = [(t.shape, tr.mark(t).factors) for t in args[2:4] if isinstance(t, Tensor)]
    factors = tr.merge([(x.shape, tr.mark(x).factors), *own], x.shape)
    inner = [f for f in factors if max(varying(f)) >= x.ndim - size]
    _note(tr, inner, "layer norm")
    for factor in inner:
        if isinstance(tr.module, (nn.LayerNorm, nn.RMSNorm)) and len(varying(factor)) == 1:
            tr.width(factor, varying(factor)[0] - x.ndim)
        else:
            tr.freeze((factor,), "its width is written in the code")
    tr.set(_outputs(out)[0], factors)


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
                tr.width(slots)
    _note(tr, factors, "group norm")
    tr.set(_outputs(out)[0], factors)
