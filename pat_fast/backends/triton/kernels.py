"""The Triton kernels: one program for each item that :mod:`.work` cut, straight from its record.

Every program takes one of two ways through the same code: in vectors of 16 bytes where the record says that rows
are runs of whole vectors and the tensors' addresses are multiples of 16, else element by element. ``VECTOR`` is
the vector's length on the first way and 1 on the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .work import COPY, ITEM, KERNEL_INNER, SCALAR, SUM


def _columns(names: tuple[str, ...], wanted: str) -> tl.constexpr:
    return tl.constexpr(names.index(wanted))


I_WIDTH, C_WIDTH, S_WIDTH = (tl.constexpr(len(names)) for names in (ITEM, COPY, SUM))
# Both kinds of records begin alike.
TENSOR, OFFSET, ROWS, ROW_STRIDE = (_columns(ITEM, n) for n in ("tensor", "offset", "rows", "row_stride"))
START, FLAT, COLS, KERNEL = (_columns(ITEM, n) for n in ("start", "flat", "c", "k"))
COL_STRIDE, KERNEL_STRIDE, FLAGS = (_columns(ITEM, n) for n in ("col_stride", "kernel_stride", "flags"))
ROW_SLOT, COL_SLOT, ROW_PART, COL_PART = (
    _columns(ITEM, n) for n in ("row_slot", "col_slot", "row_part", "col_part")
)
ROW_LIST, COL_LIST, FROM_TENSOR, FROM_OFFSET = (
    _columns(COPY, n) for n in ("row_list", "col_list", "from_tensor", "from_offset")
)
FROM_ROW, FROM_COL, FROM_KERNEL = (_columns(COPY, n) for n in ("from_row", "from_col", "from_kernel"))
ALONE, INNER = tl.constexpr(SCALAR), tl.constexpr(KERNEL_INNER)


@triton.jit
def _places(item, WIDTH: tl.constexpr):
    """Flat indices of the item, which of them exist, and their columns and kernel elements."""
    j = tl.load(item + START) + tl.arange(0, WIDTH)
    cols, kernel = tl.load(item + COLS), tl.load(item + KERNEL)
    kernel_inner = (tl.load(item + FLAGS) & INNER) // INNER
    near = kernel_inner * kernel + (1 - kernel_inner) * cols
    far_index, near_index = j // near, j % near
    c = kernel_inner * far_index + (1 - kernel_inner) * near_index
    k = kernel_inner * near_index + (1 - kernel_inner) * far_index
    return j, c, k


@triton.jit
def _offsets(item, j, c, k, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Elements from a row's first to each flat index, and the stride of rows and the end, as vectors allow."""
    stride, flat = tl.load(item + ROW_STRIDE), tl.load(item + FLAT)
    if VECTOR > 1:
        # Says to the compiler what the record promises.
        at = tl.load(item + START) // WIDTH * WIDTH + tl.arange(0, WIDTH)
        stride = stride // VECTOR * VECTOR
        flat = flat // VECTOR * VECTOR
        inside = at < flat
    else:
        # Said to be contiguous so that neighbouring lanes take neighbouring offsets, not neighbouring rows. As
        # nothing is said about alignment, no access gets wider by that.
        at = tl.max_contiguous(c * tl.load(item + COL_STRIDE) + k * tl.load(item + KERNEL_STRIDE), WIDTH)
        inside = j < flat
    return at, inside, stride


@triton.jit
def _pointer(address, offset, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE)) + offset
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _value(x, y, F: tl.constexpr, P: tl.constexpr):
    if F == "mul":
        return x * y
    if F == "absmul":
        return tl.abs(x * y)
    if F == "sqmul":
        return x * (x * y)
    if P == 1.0:
        return tl.abs(x)
    if P == 2.0:
        return x * x
    if P == 0.0:
        return tl.full(x.shape, 1.0, x.dtype)
    return tl.exp2(P * tl.log2(tl.abs(x)))


@triton.jit
def _reduce(item, x_address, y_address, partials, F: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
            ACC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    j, c, k = _places(item, WIDTH)
    at, inside, stride = _offsets(item, j, c, k, WIDTH, VECTOR)
    offset, rows = tl.load(item + OFFSET), tl.load(item + ROWS)
    x = _pointer(x_address, offset, TYPE, VECTOR)
    y = _pointer(y_address, offset, TYPE, VECTOR)
    row_part, col_part = tl.load(item + ROW_PART), tl.load(item + COL_PART)
    sums = tl.zeros((HEIGHT, WIDTH), ACC)
    first = rows * 0
    while first < rows:
        r = first + tl.arange(0, HEIGHT)
        live = (r < rows)[:, None] & inside[None, :]
        where = r[:, None] * stride + at[None, :]
        one = tl.load(x + where, mask=live, other=0.0).to(ACC)
        other = one
        if F != "pow":
            other = tl.load(y + where, mask=live, other=0.0).to(ACC)
        value = _value(one, other, F, P)
        if F == "pow" and P <= 0.0:  # of the zeros that stand for what is not there
            value = tl.where(live, value, 0.0)
        sums += value
        if row_part >= 0:
            tl.store(partials + row_part + r, tl.sum(value, 1), mask=r < rows)
        first += HEIGHT
    if col_part >= 0:
        tl.store(partials + col_part + j, tl.sum(sums, 0), mask=inside)


@triton.jit
def reduce_items(xs, ys, items, partials, F: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr,
                 ACC: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """First pass of a reduction: leaves the partial sums of each item's rows and flat indices.

    ``xs``, ``ys``: addresses (int64); ``ys`` is not read for ``"pow"``. ``items [n, len(ITEM)]``; grid ``n``.
    """
    item = items + tl.program_id(0).to(tl.int64) * I_WIDTH
    tensor = tl.load(item + TENSOR)
    x = tl.load(xs + tensor)
    y = x
    if F != "pow":
        y = tl.load(ys + tensor)
    if (((x | y) & 15) | (tl.load(item + FLAGS) & ALONE)) == 0:
        _reduce(item, x, y, partials, F, P, TYPE, ACC, HEIGHT, WIDTH, VECTOR)
    else:
        _reduce(item, x, y, partials, F, P, TYPE, ACC, HEIGHT // 4, WIDTH, 1)


@triton.jit
def add_partials(sums, partials, out, ACC: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr):
    """Second pass: ``out[slot]`` is the sum of its partials, in their order. ``sums [n, len(SUM)]``; grid ``n``."""
    record = sums + tl.program_id(0).to(tl.int64) * S_WIDTH
    slot, slots = tl.load(record), tl.load(record + 1)
    base, step = tl.load(record + 2), tl.load(record + 3)
    blocks, block_stride = tl.load(record + 4), tl.load(record + 5)
    kernel, kernel_stride = tl.load(record + 6), tl.load(record + 7)
    s = tl.arange(0, SLOTS)
    wanted = s < slots
    total = tl.zeros((DEPTH, SLOTS), ACC)
    count = blocks * kernel
    first = count * 0
    while first < count:
        n = first + tl.arange(0, DEPTH)
        where = base + n // kernel * block_stride + n % kernel * kernel_stride
        live = (n < count)[:, None] & wanted[None, :]
        total += tl.load(partials + where[:, None] + (s * step)[None, :], mask=live, other=0.0)
        first += DEPTH
    tl.store(out + slot + s, tl.sum(total, 0), mask=wanted)


@triton.jit
def _coefficients(item, values, c, inside, missing, SLOT: tl.constexpr):
    slot = tl.load(item + SLOT)
    return tl.load(values + slot + c, mask=inside & (c * 0 + slot >= 0), other=missing)


@triton.jit
def _axpy(item, y_address, x_address, values, TYPE: tl.constexpr, ACC: tl.constexpr, HEIGHT: tl.constexpr,
          WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    j, c, k = _places(item, WIDTH)
    at, inside, stride = _offsets(item, j, c, k, WIDTH, VECTOR)
    offset, rows = tl.load(item + OFFSET), tl.load(item + ROWS)
    y = _pointer(y_address, offset, TYPE, VECTOR)
    x = _pointer(x_address, offset, TYPE, VECTOR)
    of_cols = _coefficients(item, values, c, inside, 0.0, COL_SLOT)
    first = rows * 0
    while first < rows:
        r = first + tl.arange(0, HEIGHT)
        live = (r < rows)[:, None] & inside[None, :]
        where = r[:, None] * stride + at[None, :]
        of_rows = _coefficients(item, values, r, r < rows, 0.0, ROW_SLOT)
        old = tl.load(y + where, mask=live, other=0.0).to(ACC)
        new = old + (of_rows[:, None] + of_cols[None, :]) * tl.load(x + where, mask=live, other=0.0).to(ACC)
        tl.store(y + where, new.to(TYPE), mask=live)
        first += HEIGHT


@triton.jit
def axpy_items(ys, xs, items, values, TYPE: tl.constexpr, ACC: tl.constexpr, HEIGHT: tl.constexpr,
               WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """``y += (values[row slot] + values[column slot]) * x`` over each item; grid: the items."""
    item = items + tl.program_id(0).to(tl.int64) * I_WIDTH
    tensor = tl.load(item + TENSOR)
    y, x = tl.load(ys + tensor), tl.load(xs + tensor)
    if (((x | y) & 15) | (tl.load(item + FLAGS) & ALONE)) == 0:
        _axpy(item, y, x, values, TYPE, ACC, HEIGHT, WIDTH, VECTOR)
    else:
        _axpy(item, y, x, values, TYPE, ACC, HEIGHT // 4, WIDTH, 1)


@triton.jit
def _scale(item, address, values, TYPE: tl.constexpr, ACC: tl.constexpr, HEIGHT: tl.constexpr,
           WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    j, c, k = _places(item, WIDTH)
    at, inside, stride = _offsets(item, j, c, k, WIDTH, VECTOR)
    offset, rows = tl.load(item + OFFSET), tl.load(item + ROWS)
    x = _pointer(address, offset, TYPE, VECTOR)
    of_cols = _coefficients(item, values, c, inside, 1.0, COL_SLOT)
    first = rows * 0
    while first < rows:
        r = first + tl.arange(0, HEIGHT)
        live = (r < rows)[:, None] & inside[None, :]
        where = r[:, None] * stride + at[None, :]
        product = _coefficients(item, values, r, r < rows, 1.0, ROW_SLOT)[:, None] * of_cols[None, :]
        new = tl.load(x + where, mask=live, other=0.0).to(ACC) * product
        tl.store(x + where, tl.where(product == 0, 0.0, new).to(TYPE), mask=live)  # 0 * inf is nan
        first += HEIGHT


@triton.jit
def scale_items(xs, items, values, TYPE: tl.constexpr, ACC: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """``x *= values[row slot] * values[column slot]`` over each item; grid: the items."""
    item = items + tl.program_id(0).to(tl.int64) * I_WIDTH
    x = tl.load(xs + tl.load(item + TENSOR))
    if ((x & 15) | (tl.load(item + FLAGS) & ALONE)) == 0:
        _scale(item, x, values, TYPE, ACC, HEIGHT, WIDTH, VECTOR)
    else:
        _scale(item, x, values, TYPE, ACC, HEIGHT // 4, WIDTH, 1)


@triton.jit
def _kept(item, index, place, inside, LIST: tl.constexpr):
    """Where in the source a row or column of the destination comes from."""
    start = tl.load(item + LIST)
    found = place
    if start >= 0:
        found = tl.load(index + start + place, mask=inside, other=0).to(tl.int64)
    return found


@triton.jit
def _copy(item, out_address, x_address, index, TYPE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
          VECTOR: tl.constexpr):  # fmt: skip
    j, c, k = _places(item, WIDTH)
    at, inside, stride = _offsets(item, j, c, k, WIDTH, VECTOR)
    rows = tl.load(item + ROWS)
    out = _pointer(out_address, tl.load(item + OFFSET), TYPE, VECTOR)
    x = _pointer(x_address, tl.load(item + FROM_OFFSET), TYPE, VECTOR)
    from_row = tl.load(item + FROM_ROW)
    if VECTOR > 1:
        from_row = from_row // VECTOR * VECTOR
        source = at
    else:
        source = _kept(item, index, c, inside, COL_LIST) * tl.load(item + FROM_COL)
        source = tl.max_contiguous(source + k * tl.load(item + FROM_KERNEL), WIDTH)
    first = rows * 0
    while first < rows:
        r = first + tl.arange(0, HEIGHT)
        live = (r < rows)[:, None] & inside[None, :]
        kept = _kept(item, index, r, r < rows, ROW_LIST)
        bits = tl.load(x + kept[:, None] * from_row + source[None, :], mask=live, other=0)
        tl.store(out + r[:, None] * stride + at[None, :], bits, mask=live)
        first += HEIGHT


@triton.jit
def copy_items(outs, xs, items, index, TYPE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
               VECTOR: tl.constexpr):  # fmt: skip
    """``out[i, j, k] = x[rows[i], columns[j], k]`` over each item (``[n, len(COPY)]``); grid ``n``."""
    item = items + tl.program_id(0).to(tl.int64) * C_WIDTH
    out, x = tl.load(outs + tl.load(item + TENSOR)), tl.load(xs + tl.load(item + FROM_TENSOR))
    if (((x | out) & 15) | (tl.load(item + FLAGS) & ALONE)) == 0:
        _copy(item, out, x, index, TYPE, HEIGHT, WIDTH, VECTOR)
    else:
        _copy(item, out, x, index, TYPE, HEIGHT // 4, WIDTH, 1)
