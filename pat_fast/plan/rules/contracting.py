"""Contractions: the summed dimension of both sides is the same channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..labels import Factors, IntArray, along, flat, place, varying
from ..trace import Leaf, Mark, Tracer, Work
from .registry import held, outputs, rule


def _widen(mark: Mark, shape: Sequence[int], axes: Sequence[int | None]) -> tuple[Mark, list[int]]:
    """View an operand with its dimensions re-ordered to ``axes``; None inserts a dimension of size 1."""
    order = [a for a in axes if a is not None]
    moved = order != sorted(order)
    factors = []
    for factor in mark.factors:
        sizes = [1 if a is None else factor.shape[a] for a in axes]
        factors.append((factor.transpose(order) if moved else factor).reshape(sizes))
    return Mark(tuple(factors), mark.leaf), [1 if a is None else shape[a] for a in axes]


def _product(tr: Tracer, a: Tensor, a_axes: Sequence[int | None], b: Tensor, b_axes: Sequence[int | None]) -> Factors:
    wide_a, shape_a = _widen(tr.mark(a), a.shape, a_axes)
    wide_b, shape_b = _widen(tr.mark(b), b.shape, b_axes)
    return tr.contract(wide_a, shape_a, wide_b, shape_b, np.broadcast_shapes(tuple(shape_a), tuple(shape_b)))


def _adopted(tr: Tracer, bias: Tensor, factors: Factors, dim: int) -> bool:
    """Whether ``bias`` is a fresh vector that goes with what labels ``dim`` alone of the tensor that it is added to."""
    own = [f for f in factors if f.shape[dim] > 1]
    return len(own) == 1 and varying(own[0]) == (dim,) and tr.adopt(bias, own[0])


def _plain(tr: Tracer, a: Mark, b: Mark, a_shape: Sequence[int], b_shape: Sequence[int]) -> Factors | None:
    """What :func:`_product` comes to for [M, K] times [K, N] with a vector of labels for each dimension, if at all.

    None where it does not: what is summed over has no labels on one side, or channels lie across both dimensions.
    """
    found: list[dict[int, IntArray]] = []
    for mark in (a, b):
        by_dim = {varying(f): f for f in mark.factors if tr.slots.proper(f)}
        if len(by_dim) < len(mark.factors) or not by_dim.keys() <= {(0,), (1,)}:
            return None
        found.append({dims[0]: flat(f) for dims, f in by_dim.items()})
    rows, columns = found
    if (1 in rows) != (0 in columns) or (1 not in rows and a_shape[1] > 1):
        return None
    if 1 in rows:
        tr.slots.unify(rows[1], columns[0])
    labels = {0: rows.get(0), 1: columns.get(1)}
    sizes = ((a_shape[0], labels[0]), (a_shape[1], rows.get(1)), (b_shape[1], labels[1]))
    axes = (*rows.values(), *(f for d, f in columns.items() if d == 1))
    tr.work.append(Work(float(math.prod(n for n, own in sizes if own is None)), axes))
    for mark, own, summed in ((a, rows, 1), (b, columns, 0)):
        if mark.leaf is not None:
            for dim, slots in own.items():
                tr.use(mark.leaf, slots, dim == summed)
    return tuple(place(slots, dim, 2) for dim, slots in labels.items() if slots is not None)


@rule("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
def matmul(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """(batch of) [M, K] times [K, N], with an optional term that is added."""
    name = func._schema.name
    added = args[0] if "add" in name else None
    a, b = args[1:3] if added is not None else args[:2]
    plain = _plain(tr, tr.mark(a), tr.mark(b), a.shape, b.shape) if a.ndim == b.ndim == 2 else None
    if plain is not None:
        factors = plain
    elif b.ndim == 1:
        factors = _product(tr, a, range(a.ndim), b, [None] * (a.ndim - 1) + [0])
    elif b.ndim == 2:
        factors = _product(tr, a, [0, None, 1], b, [None, 1, 0])
    else:
        factors = _product(tr, a, [0, 1, None, 2], b, [0, None, 2, 1])
    if added is not None and added.ndim and not _adopted(tr, added, factors, out.ndim - 1):
        factors = tr.merge([(out.shape, factors), (added.shape, tr.mark(added).factors)], out.shape)
    tr.set(out, factors)


@rule("_grouped_mm")
def grouped_matmul(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Rows [S, K], sorted by expert, times a weight [E, K, N] of which each row meets one: [S, N]."""
    rows, weight = args[:2]
    if rows.ndim != 2 or weight.ndim != 3:
        tr.barrier([rows, weight], "a grouped product of an unusual shape")
        return
    mark, factors = tr.mark(weight), []
    for factor in mark.factors:
        if 0 in varying(factor):
            tr.pin(factor, 0, "experts are chosen by number")
            factor = factor.take([0], axis=0)
        factors.append(factor.reshape(factor.shape[1:]))
    # The kernel reads rows at addresses that are multiples of 16 bytes: of 8 elements in half precision.
    tr.multiples += [(f, 8) for f in (*tr.mark(rows).factors, *factors)]
    wide_rows, rows_shape = _widen(tr.mark(rows), rows.shape, [0, None, 1])
    wide, shape = _widen(Mark(tuple(factors), mark.leaf), weight.shape[1:], [None, 1, 0])
    tr.set(out, tr.contract(wide_rows, rows_shape, wide, shape, np.broadcast_shapes(tuple(rows_shape), tuple(shape))))


@rule("_cdist_forward", "_euclidean_dist")
def distances(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """x [..., P, M] and y [..., R, M]: the differences [P, R] are summed up over M."""
    x, y = args[:2]
    lead: list[int | None] = list(range(x.ndim - 2))
    tr.set(out, _product(tr, x, [*lead, x.ndim - 2, None, x.ndim - 1], y, [*lead, None, y.ndim - 2, y.ndim - 1]))


@rule("linear")
def linear(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """x [..., K] times weight [N, K] transposed, plus bias [N]."""
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
    lead: list[int | None] = list(range(x.ndim - 1))
    factors = _product(tr, x, [*lead, None, x.ndim - 1], weight, [None] * len(lead) + [0, 1])
    if bias is not None and not _adopted(tr, bias, factors, out.ndim - 1):
        factors = tr.merge([(out.shape, factors), (bias.shape, tr.mark(bias).factors)], out.shape)
    tr.set(out, factors)


@rule("_trilinear")
def trilinear(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Three operands with new dimensions, multiplied and summed: x [N, I], w [O, I, J] and y [N, J] to [N, O], say."""
    summed = args[6]
    marks, shapes = [], []
    for x, new in zip(args[:3], args[3:6], strict=True):
        old = iter(range(x.ndim))
        mark, shape = _widen(tr.mark(x), x.shape, [None if d in new else next(old) for d in range(x.ndim + len(new))])
        marks.append(mark)
        shapes.append(shape)
    full = np.broadcast_shapes(*map(tuple, shapes))
    factors = tr.merge([(shape, mark.factors) for mark, shape in zip(marks, shapes, strict=True)], full)
    tr.count_work(factors, full)
    for mark in marks:
        if mark.leaf is not None:
            for factor in mark.factors:
                tr.use(mark.leaf, factor, consumed=not set(summed).isdisjoint(varying(factor)))
    tr.set(out, tr.reduce(factors, summed))


@rule(
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, E]: two products; the heads are a batch."""
    q, k, v = args[:3]
    result = outputs(out)[0]
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[1] % k.shape[1]:
        tr.barrier([q, k, v], "attention of an unusual shape")
        return
    wide_q, q_shape = _widen(tr.mark(q), q.shape, [0, 1, 2, None, 3])
    wide_k, k_shape = _repeat_heads(*_widen(tr.mark(k), k.shape, [0, 1, None, 2, 3]), q.shape[1])
    scores = tr.contract(wide_q, q_shape, wide_k, k_shape, np.broadcast_shapes(tuple(q_shape), tuple(k_shape)))
    wide_v, v_shape = _repeat_heads(*_widen(tr.mark(v), v.shape, [0, 1, None, 3, 2]), q.shape[1])
    s_shape = [q.shape[0], q.shape[1], q.shape[2], 1, k.shape[2]]
    wide_s = Mark(tuple(np.expand_dims(f, 3) for f in scores))
    tr.set(result, tr.contract(wide_s, s_shape, wide_v, v_shape, [*s_shape[:3], v.shape[3], s_shape[4]]))


def _repeat_heads(mark: Mark, shape: list[int], heads: int) -> tuple[Mark, list[int]]:
    """Grouped queries: each key-value head serves ``heads / shape[1]`` query heads next to one another; one, all."""
    if shape[1] == 1:
        return mark, shape
    times = heads // shape[1]
    factors = tuple(np.repeat(f, times, axis=1) if f.shape[1] > 1 else f for f in mark.factors)
    return Mark(factors, mark.leaf), [shape[0], heads, *shape[2:]]


@rule("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "convolution_overrideable")
def convolution(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Any convolution, grouped, depthwise or transposed."""
    x, weight, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    c_in, c_out = x.shape[1], out.shape[1]
    label, beside = _conv_input(tr, x, out, weight, args[3], args[4])
    row, col = (0, 1) if not transposed else (1, 0)
    leaf = tr.leaves.get(id(weight))
    if leaf is not None and not leaf.axes and groups == 1 and label is not None and c_out > 1:
        # It has not been met before: the channels that it expects are those that enter.
        leaf.axes[row], leaf.axes[col] = tr.slots.new(c_out), label
    outs, ins = _conv_slots(tr, weight, groups, row, col)
    per_in, per_out = c_in // groups, c_out // groups
    scale = float(x.shape[0] * math.prod((x if transposed else out).shape[2:]) * math.prod(weight.shape[2:]))
    if groups > 1 and 1 in (per_in, per_out):
        if outs is None and per_in == 1:  # transposed: the weight has the input's channels alone
            outs = ins
        _remove_groups(tr, label, outs, ins, groups)
        if leaf is not None:
            leaf.whole_groups = True
        counted = [(outs, c_out)] if per_in == 1 else [(ins if ins is not None else label, c_in)]
    else:
        _join(tr, label, ins)
        for slots in (outs, ins) if groups > 1 else ():
            if slots is not None:
                tr.slots.couple_blocks(slots, groups)
        scale /= groups
        counted = [(outs, c_out), (ins if ins is not None else label, c_in)]
    if groups > 1:
        _count_sizes(tr, weight, groups, ins if ins is not None else label, outs, 1 in (per_in, per_out))
    scale *= math.prod(n for slots, n in counted if slots is None)
    axes = [slots for slots, _ in counted if slots is not None]
    for factor in beside:
        axes.append(flat(factor))
        scale /= factor.size
    tr.work.append(Work(scale, tuple(axes)))
    factors: Factors = () if outs is None else (place(outs, 1, out.ndim),)
    if bias is not None and not _adopted(tr, bias, factors, 1):
        shape = [1, c_out] + [1] * (out.ndim - 2)
        named = tuple(f.reshape(shape) for f in tr.mark(bias).factors)
        factors = tr.merge([(shape, named), (shape, factors)], shape)
    tr.set(out, (*factors, *beside))


def _conv_input(
    tr: Tracer, x: Tensor, out: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[IntArray | None, list[IntArray]]:
    """The labels of the channels that enter, and those of dimensions that a convolution leaves alone.

    These are the batch and places that meet only themselves; what it mixes otherwise keeps its size.
    """
    label, beside = None, []
    for factor in tr.mark(x).factors:
        if varying(factor) == (1,):
            label = flat(factor)
            continue
        still = _still(x, out, weight, stride, padding)
        mixed = [d for d in varying(factor) if d > 1 and d not in still]
        alone = [d for d in varying(factor) if d != 1 and factor.shape[1] > 1 and d not in mixed]
        for left in held(tr, (factor,), [*mixed, *alone], "is convolved along the channels"):
            slots = along(left, 1)
            if slots is None:
                beside.append(left)
            else:
                label = slots
    return label, beside


def _still(x: Tensor, out: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Dimensions along which a convolution computes every place from that place alone."""
    return [
        d for d in range(2, x.ndim)
        if weight.shape[d] == 1 and stride[d - 2] == 1 and padding[d - 2] == 0 and x.shape[d] == out.shape[d]
    ]  # fmt: skip


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


def _count_sizes(
    tr: Tracer, weight: Tensor, groups: int, ins: IntArray | None, outs: IntArray | None, whole: bool
) -> None:
    """A grouped convolution whose weight is computed (a weight norm): no shape of a tensor tells its sizes."""
    module, leaf = tr.module, tr.leaves.get(id(weight))
    if not isinstance(module, nn.modules.conv._ConvNd) or (leaf is not None and leaf.groups == groups):
        return
    for slots, attribute in ((ins, "in_channels"), (outs, "out_channels")):
        if slots is not None and len(slots) == getattr(module, attribute):
            tr.width(slots, attribute)
    of_groups = ins if ins is not None else outs
    if whole and of_groups is not None and module.groups == groups:
        tr.width(of_groups.reshape(groups, -1)[:, 0], "groups")


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
        if label is not own:
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
