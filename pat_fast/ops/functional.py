"""The public ops: one pass over all tiles of a list of tensors.

Each wrapper checks its arguments once against the tile table and calls ``torch.ops.pat_fast``; what cannot be seen
while a graph is traced is checked whenever the graph runs. They run without autograd: a leaf that requires grad is
modified in place, and its version counter moves as with any in-place op, so a backward that needs the old values fails
instead of using the new ones.

All tensors of a call share one device and one of the dtypes float32, float64, bfloat16, float16.
Sums, coefficients and scales are float32 (float64 for float64 tensors): the *accumulator dtype*.
Tensors that are written share no memory with one another or with tensors that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from pat_fast.backends.known import check_memory, is_plain, is_watched, lacks_memory, remembered
from pat_fast.errors import OpError, did_you_mean
from pat_fast.ops.at_run import check_lists
from pat_fast.ops.memory import check_apart
from pat_fast.ops.register import implementation
from pat_fast.ops.schema import accumulator
from pat_fast.ops.tiles import COL, ROW, C, K, R, TileTable, not_strided

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUNCTIONS = ("pow", "mul", "absmul", "sqmul")
MOVABLE_BYTES = (1, 2, 4, 8)

@torch.no_grad()
def channel_reduce(
    xs: Sequence[Tensor], table: TileTable, ys: Sequence[Tensor] | None = None, f: str = "pow", p: float = 2.0
) -> Tensor:
    """Sum a function of every element over rows and over columns, reading each element once.

    ``out[ROW + r] = sum_ck f(x[r, c, k])`` and ``out[COL + c] = sum_rk f(x[r, c, k])`` for each tile.

    Args:
        xs: the tensors that ``table`` describes.
        ys: tensors with the shapes and strides of ``xs``; for every ``f`` but ``"pow"``.
        f: ``"pow"``: ``|x|^p``; ``"mul"``: ``x*y``; ``"absmul"``: ``|x*y|``; ``"sqmul"``: ``x*x*y``.
        p: exponent of ``"pow"``.

    Returns:
        ``[table.slots]`` in the accumulator dtype; 0 for slots that no tile names.

    Raises:
        OpError: tensors that do not fit the table, tiles that name the same slots, an unknown ``f``, ``ys`` missing or
            superfluous.
    """
    if not isinstance(f, str) or f not in FUNCTIONS:
        _fail(f"f to be one of {', '.join(FUNCTIONS)}", f"{f!r}{did_you_mean(str(f), FUNCTIONS)}")
    if (ys is None) != (f == "pow"):
        wanted = "no ys" if f == "pow" else "ys like xs"
        _fail(f"{wanted} for f={f!r}", "none" if ys is None else "ys")
    try:
        exponent = float(p)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last from tensors
        _fail("p to be a number", f"{p!r:.40}")
    if isinstance(table, TileTable) and table.shares_slots:
        _fail("tiles that name slots of their own", "a table of shared slots, as a compaction's destination has it")
    plain = _check_tensors("xs", xs, table)
    if ys is not None:
        plain = _check_tensors("ys", ys, table, like=xs) and plain
    run = implementation("channel_reduce", xs[0].device.type) if plain else _dispatched("channel_reduce")
    return run(xs, ys or (), table.table, table.slots, f, exponent)


@torch.no_grad()
def channel_axpy_(ys: Sequence[Tensor], xs: Sequence[Tensor], table: TileTable, coef: Tensor) -> None:
    """Add ``(coef[ROW + r] + coef[COL + c]) * x[r, c, k]`` to ``y[r, c, k]``, in place, for each tile.

    Rows (columns) without slots count as coefficient 0. Computed in the accumulator dtype and rounded
    once. Elements outside the tiles stay as they are.

    Args:
        ys: tensors to change, with the shapes and strides of ``xs``.
        xs: the tensors that ``table`` describes.
        coef: ``[table.slots]`` in the accumulator dtype, on the tensors' device.

    Raises:
        OpError: tensors that do not fit the table, tiles or tensors that overlap.
    """
    plain = _check_tensors("ys", ys, table)
    plain = _check_tensors("xs", xs, table, like=ys) and plain
    _check_slots("coef", coef, table, ys)
    _check_writable("ys", table)
    _check_apart("ys", ys, xs, coef, table)
    plain = plain and is_plain(coef)
    run = implementation("channel_axpy_", ys[0].device.type) if plain else _dispatched("channel_axpy_")
    run(ys, xs, table.table, coef)


@torch.no_grad()
def channel_scale_(xs: Sequence[Tensor], table: TileTable, scale: Tensor) -> None:
    """Multiply ``x[r, c, k]`` by ``scale[ROW + r] * scale[COL + c]``, in place, for each tile.

    Rows (columns) without slots count as scale 1. A product of 0 writes 0, over inf and nan too.

    Args:
        xs: the tensors that ``table`` describes.
        scale: ``[table.slots]`` in the accumulator dtype, on the tensors' device.

    Raises:
        OpError: tensors that do not fit the table, tiles or tensors that overlap.
    """
    plain = _check_tensors("xs", xs, table)
    _check_slots("scale", scale, table, xs)
    _check_writable("xs", table)
    _check_apart("xs", xs, (), scale, table)
    plain = plain and is_plain(scale)
    run = implementation("channel_scale_", xs[0].device.type) if plain else _dispatched("channel_scale_")
    run(xs, table.table, scale)


@torch.no_grad()
def channel_compact(
    outs: Sequence[Tensor], xs: Sequence[Tensor], table: TileTable, out_table: TileTable, index: Tensor
) -> None:
    """Copy the kept rows and columns of each tile: ``out[i, j, k] = x[rows[i], cols[j], k]``.

    Bits are moved, not converted: any dtype of 1, 2, 4 or 8 bytes will do.

    Args:
        outs: tensors to fill; they share no storage with ``xs``.
        xs: the tensors that ``table`` describes.
        out_table: one tile for each tile of ``table``, over ``outs``. Its ``ROW`` (``COL``) is the
            offset in ``index`` of the ascending list of its R (C) kept rows (columns), or -1 to keep
            all. Build it with ``shared_slots=True`` and ``slots=len(index)``.
        index: int32 vector.

    Raises:
        OpError: tensors that do not fit their table, lists that are out of bounds or not ascending,
            ``outs`` that overlap ``xs`` or one another.
    """
    _check_tensors("xs", xs, table, dtypes=None)
    _check_tensors("outs", outs, out_table, dtypes=None)
    if xs and outs and (outs[0].dtype != xs[0].dtype or outs[0].device != xs[0].device):
        _fail("outs of the dtype and device of xs", f"{outs[0].dtype} on {outs[0].device}")
    if xs and xs[0].element_size() not in MOVABLE_BYTES:
        _fail(f"elements of {MOVABLE_BYTES} bytes", f"{xs[0].dtype} ({xs[0].element_size()} bytes)")
    _check_writable("outs", out_table)
    _check_index(xs, table, out_table, index)
    if not torch.compiler.is_compiling():
        sources = {x.untyped_storage().data_ptr() for x in xs if x.numel()}
        if any(out.numel() and out.untyped_storage().data_ptr() in sources for out in outs):
            _fail("outs with storage of their own", "an output that shares its storage with an input")
    _check_apart("outs", outs, (), index, out_table)
    _dispatched("channel_compact")(outs, xs, table.table, out_table.table, index)


def _dispatched(op: str) -> Callable[..., Any]:
    """The op by way of the dispatcher; where a graph is traced, it looks at its arguments when the graph runs."""
    checked = not torch.compiler.is_compiling() and not is_watched()
    return partial(getattr(torch.ops.pat_fast, op).default, checked=checked)


def _fail(expected: str, got: str, todo: str = "") -> NoReturn:
    raise OpError(f"expected {expected}; got {got}" + (f"; {todo}" if todo else ""))


def _check_tensors(
    name: str,
    xs: Sequence[Tensor],
    table: TileTable,
    *,
    dtypes: Sequence[torch.dtype] | None = FLOATS,
    like: Sequence[Tensor] | None = None,
) -> bool:
    """Compare a tensor list with the layouts of ``table``.

    Returns whether these are plain tensors, and some, that nothing else wants to see: the dispatcher, which takes as
    long as it takes to look at them, would lead to the kernel and nowhere else.
    """
    if not isinstance(table, TileTable):
        _fail("a TileTable", type(table).__name__)
    try:
        count = len(xs)
    except TypeError:
        count = -1
    if count < 0 or isinstance(xs, (Tensor, Set, Mapping, str)):
        _fail(f"a list of tensors in {name}", type(xs).__name__)
    if count != table.n_tensors:
        _fail(f"{table.n_tensors} tensors in {name}, as in the table", str(count))
    if not count:
        return False
    first = like[0] if like is not None else xs[0]
    if not isinstance(first, Tensor):
        _fail(f"a list of tensors in {name}", f"a list of {type(first).__name__}")
    dtype, device = first.dtype, first.device
    eager = not torch.compiler.is_compiling()
    known = table.known.get(name) if eager and dtypes is not None else None
    if known is not None and known.dtype is dtype and known.device == device and known.matches(xs):
        return not is_watched()
    if dtypes is not None and dtype not in dtypes:
        _fail(f"{name} of dtype {', '.join(str(d) for d in dtypes)}", str(dtype))
    for i, (x, (shape, strides)) in enumerate(zip(xs, table.layouts)):  # noqa: B905 (length checked above)
        odd = not_strided(x)
        if odd is not None:
            _fail(f"{name}[{i}] to be a strided tensor", odd)
        if eager and is_lazy(x):
            _fail(f"{name}[{i}] to have its shape", "a lazy parameter", "run a forward first")
        if x.shape != shape or x.stride() != strides:
            _fail(
                f"{name}[{i}] of shape {shape} and strides {strides}, as in the table",
                f"{tuple(x.shape)} and {x.stride()}",
                "build a new table after a tensor changes",
            )
        if x.dtype is not dtype or x.device != device:
            _fail(f"{name}[{i}] of {dtype} on {device}, as its companions", f"{x.dtype} on {x.device}")
        if eager and lacks_memory(x):  # or each would be given a name
            check_memory(f"{name}[{i}]", [x])
        if eager and (x.is_neg() or (dtypes is None and x.is_conj())):
            _fail(f"{name}[{i}] as it stands in memory", "a lazily negated or conjugated view", "call resolve_neg()")
    if eager and dtypes is not None:
        _remember(name, xs, table)
    return False


def _remember(name: str, xs: Sequence[Tensor], table: TileTable) -> None:
    """Recognise tensors like ``xs`` from now on; from their second time on, since many tables serve a single call."""
    if name not in table.known:
        table.known[name] = None
    else:
        table.known[name] = remembered(xs)


@torch.no_grad()
def expect(xs: Sequence[Tensor], table: TileTable) -> None:
    """Look at tensors ahead of the first call of an op with them as its ``xs``.

    Raises:
        OpError: they do not fit the table.
    """
    if len(xs) and "xs" not in table.known:
        for _ in range(2):
            _check_tensors("xs", xs, table)


def _check_slots(name: str, values: Tensor, table: TileTable, xs: Sequence[Tensor]) -> None:
    if not isinstance(values, Tensor):
        _fail(f"{name} a tensor of shape [{table.slots}]", type(values).__name__)
    dtype = accumulator(xs[0].dtype) if len(xs) else values.dtype
    device = xs[0].device if len(xs) else values.device
    wanted = (dtype, (table.slots,), device, torch.strided)
    if (values.dtype, values.shape, values.device, values.layout) != wanted or not values.is_contiguous():
        strides = values.stride() if values.layout is torch.strided else values.layout
        _fail(
            f"{name} contiguous of shape [{table.slots}], {dtype} on {device}",
            f"{list(values.shape)}, {values.dtype} on {values.device}, strides {strides}",
        )
    if not torch.compiler.is_compiling():
        check_memory(name, [values])


def _check_writable(name: str, table: TileTable) -> None:
    if not table.writable:
        _fail(f"tiles that name each element of {name} once", "tiles or strides that overlap")


def _check_apart(
    name: str, written: Sequence[Tensor], read: Sequence[Tensor], vector: Tensor, table: TileTable
) -> None:
    """Refuse written tensors that share memory with one another, with those ``read``, or with ``vector``.

    ``written`` and ``read`` (none, or as many) have the layouts of ``table``.
    """
    if torch.compiler.is_compiling() or not len(written) or isinstance(written[0], FakeTensor):
        return
    addresses = list(map(Tensor.data_ptr, (*written, *read, vector)))
    own, more = written[0].element_size(), vector.numel() * vector.element_size()
    key = (own, more, len(read), *addresses)
    if key == table.apart:
        return
    bytes_each = table.extents * own
    # Gradients may have new addresses at every step, but hardly ever reach into one another.
    if not _surely_apart(addresses, np.concatenate([bytes_each, bytes_each[: len(read)], [more]])):
        check_apart(name, written, [*read, vector])
    table.apart = key


def _surely_apart(addresses: list[int], sizes: NDArray[np.int64]) -> bool:
    """Whether tensors of so many bytes do not even reach into one another."""
    starts = np.array(addresses, np.int64)
    order = starts.argsort(kind="stable")
    order = order[sizes[order] > 0]
    return bool(((starts + sizes)[order[:-1]] <= starts[order[1:]]).all())


def _check_index(xs: Sequence[Tensor], table: TileTable, out_table: TileTable, index: Tensor) -> None:
    if not isinstance(index, Tensor):
        _fail(f"index int32 of shape [>= {out_table.slots}]", type(index).__name__)
    devices = [torch.device("cpu")] + [x.device for x in xs[:1]]
    if index.layout is not torch.strided or index.device not in devices:
        _fail(f"index on {' or '.join(map(str, devices))}", f"{index.layout} on {index.device}")
    fits = index.dim() == 1 and index.is_contiguous() and len(index) >= out_table.slots
    if index.dtype != torch.int32 or not fits:
        _fail(f"index int32 of shape [>= {out_table.slots}]", f"{list(index.shape)} {index.dtype}")
    if not torch.compiler.is_compiling():
        check_memory("index", [index])
    if len(table) != len(out_table):
        _fail(f"{len(table)} output tiles, one for each tile", str(len(out_table)))
    pairs = zip(table.rows, out_table.rows, strict=True)
    for number, (source, target) in enumerate(pairs):
        if source[K] != target[K]:
            _fail(f"output tile {number} with K = {source[K]}, as its source", str(target[K]))
        for size, start in ((R, ROW), (C, COL)):
            if target[start] < 0 and target[size] != source[size]:
                _fail(
                    f"output tile {number} to keep {source[size]} entries, as its list is -1",
                    str(target[size]),
                )
    if not torch.compiler.is_compiling():
        check_lists(table.rows, out_table.rows, index)
