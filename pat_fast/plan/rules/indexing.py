"""Look-ups: places along some dimensions are named by numbers or masks; along the others nothing moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..labels import Factors, varying
from ..trace import Tracer
from .registry import arguments, extents, held, nth, rule

WRITTEN = "its places are written by number"


@rule("gather", "take_along_dim")
def gather(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Places along one dimension are looked up by number; along the others nothing moves."""
    x, indices = args[0], args[2] if func._schema.name == "aten::gather" else args[1]
    dim = nth(args[1] if func._schema.name == "aten::gather" else args[2], x)
    shape = [1 if d == dim else n for d, n in enumerate(out.shape)]
    operands = []
    for tensor in (x, indices):
        left = []
        for factor in tr.mark(tensor).factors:
            if dim in varying(factor):
                tr.pin(factor, dim, "is looked up by number")
                factor = factor.take([0], axis=dim)
            left.append(factor)
        sizes = [1 if d == dim else n for d, n in enumerate(extents(tensor))]
        if all(n in (1, shape[d]) for d, n in enumerate(sizes)):
            operands.append((sizes, tuple(left)))
        else:
            tr.freeze(left, "is looked up by number")
    tr.set(out, tr.merge(operands, shape))


@rule("index_add", "scatter_add", "index_copy", "scatter", "index_fill", "scatter_reduce", "index_reduce")
def add_rows(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Rows (places along one dimension) go where an index says; along the other dimensions nothing moves."""
    x, source = args[0], args[3]
    dim = nth(args[1], x)
    operands = []
    for tensor in (x, source):
        if not isinstance(tensor, Tensor) or not tensor.ndim:
            continue
        left = []
        for factor in tr.mark(tensor).factors:
            if dim in varying(factor):
                tr.pin(factor, dim, WRITTEN)
                factor = factor.take([0], axis=dim)
            left.append(factor)
        operands.append(([1 if d == dim else n for d, n in enumerate(extents(tensor))], tuple(left)))
    tr.set(out, tr.merge(operands, [1 if d == dim else n for d, n in enumerate(out.shape)]))


@rule("index_select", "embedding")
def rows(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A table's rows: the dimension looked up by number must stay, the others keep their labels."""
    x, of_table = args[0], func._schema.name == "aten::embedding"
    dim, width = (0, args[1].ndim) if of_table else (nth(args[1], x), 1)
    leaf = tr.leaves.get(id(x)) if of_table else None
    if leaf is not None and not leaf.axes and len(x) > 1:
        leaf.axes[0] = tr.slots.new(1).repeat(len(x))  # all of these stay: one slot will do for a vocabulary
    mark = tr.mark(x)
    factors = _looked_up(tr, mark.factors, [dim], dim, width, x.ndim)
    if mark.leaf is not None and of_table:  # any other table follows what it is added to
        for factor in factors:
            tr.use(mark.leaf, factor, consumed=False)
    tr.set(out, factors)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def bags(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Rows of a table [V, D] to the sum, mean or maximum of each bag of them: [bags, D]."""
    mark = tr.mark(args[0])
    factors = _looked_up(tr, mark.factors, [0], 0, 1, 2)
    if mark.leaf is not None:
        for factor in factors:
            tr.use(mark.leaf, factor, consumed=False)
    counts_for = arguments(func, args, kwargs)["per_sample_weights"]
    if counts_for is not None:
        held(tr, tr.mark(counts_for).factors, range(counts_for.ndim), "is the weight of a row in a bag")
    tr.set(out[0], factors)


@rule("index", "_unsafe_index")
def index(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """x[i, j]: as many dimensions as the indices have take the place of those that they name."""
    x, mark = args[0], tr.mark(args[0])
    named, dim, width = _named(args[1])
    tr.set(out, _looked_up(tr, mark.factors, named, dim, width, x.ndim), mark.leaf)


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(tr: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """x[i, j] = values, or += them: along the dimensions that no index names both have the same channels."""
    x, values = args[0], args[2]
    masks = [i for i in args[1] if i is not None]
    if len(masks) == 1 and masks[0].dtype == torch.bool and masks[0].shape == x.shape and values.numel() == 1:
        both = [(extents(t), tr.mark(t).factors) for t in (x, masks[0])]
        tr.set(out, tr.merge(both, x.shape), tr.mark(x).leaf)  # which elements is decided one by one
        return
    named, dim, width = _named(args[1])
    for i in masks:
        tr.freeze(tr.mark(i).factors, WRITTEN)
    shape = [n for d, n in enumerate(x.shape) if d not in named]
    shape[dim:dim] = [1] * width
    shape = [1] * (values.ndim - len(shape)) + shape
    put = [f.reshape((1,) * (len(shape) - f.ndim) + f.shape) for f in tr.mark(values).factors]
    sizes = [1] * (len(shape) - values.ndim) + extents(values)
    places = [d for d, n in enumerate(shape) if n == 1]
    own = [(shape, _looked_up(tr, tr.mark(x).factors, named, dim, width, x.ndim))]
    own.append(([n if d not in places else 1 for d, n in enumerate(sizes)], held(tr, put, places, WRITTEN)))
    tr.merge(own, shape)
    tr.set(out, tr.mark(x).factors)


def _named(indices: Any) -> tuple[list[int], int, int]:
    """The dimensions that ``indices`` name, where what takes their place stands, and how many dimensions that has.

    A mask of several dimensions names as many, and puts one in their place.
    """
    named: list[int] = []
    dim, wide, apart = 0, 1, False
    for i in indices:
        if i is None:
            dim += 1
            continue
        masks = i.dtype in (torch.bool, torch.uint8)
        apart = apart or (bool(named) and named[-1] != dim - 1)
        named += range(dim, dim + (i.ndim if masks else 1))
        wide = max(wide, 1 if masks else i.ndim)
        dim = named[-1] + 1
    return named, 0 if apart else named[0], wide


def _looked_up(tr: Tracer, factors: Factors, named: list[int], dim: int, width: int, ndim: int) -> Factors:
    """Labels without the dimensions ``named``, with ``width`` new ones at ``dim``."""
    left = []
    for factor in held(tr, factors, named, "is looked up by number"):
        shape = [n for d, n in enumerate(factor.shape) if d not in named]
        shape[dim:dim] = [1] * width
        left.append(factor.reshape(shape))
    return tuple(left)
