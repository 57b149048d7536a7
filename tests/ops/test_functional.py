"""The public wrappers: the reference against float64 loops, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from pat_fast import ops
from pat_fast.backends import reference
from pat_fast.errors import OpError
from pat_fast.ops import Tile, TileTable
from tests.ops.layouts import DTYPES, ORDERS, SLOTS, Made, make

SMALL = ((1, 1, 1), (1, 5, 3), (5, 1, 4), (2, 3, 2), (7, 3, 1))
VALUE = {
    "pow": lambda x, y, p: abs(x) ** p,
    "mul": lambda x, y, p: x * y,
    "absmul": lambda x, y, p: abs(x * y),
    "sqmul": lambda x, y, p: x * x * y,
}
EPS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def naive_reduce(made: Made, y: Tensor, table: TileTable, f: str, p: float) -> Tensor:
    out = [0.0] * table.slots
    (_, _, r_n, c_n, k_n, _, _, _, row, col) = table.table[0].tolist()
    xs, ys = made.x.double().tolist(), y.double().tolist()
    for r in range(r_n):
        for c in range(c_n):
            for k in range(k_n):
                value = VALUE[f](xs[r][c][k], ys[r][c][k], p)
                if row >= 0:
                    out[row + r] += value
                if col >= 0:
                    out[col + c] += value
    return torch.tensor(out, dtype=torch.float64)


def naive_coefficient(values: Tensor, start: int, at: int, missing: float) -> float:
    return missing if start < 0 else float(values[start + at])


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("order", ORDERS)
def test_reduce_is_the_sum_that_the_docs_say(order: str, slots: str) -> None:
    for sizes in SMALL:
        made, other = make(sizes, order, gap=1), make(sizes, order, gap=1, seed=1)
        table = made.table(slots, start=2, length=sum(sizes) + 5)
        for f, p in (("pow", 1.0), ("pow", 2.0), ("pow", 0.5), ("mul", 0), ("absmul", 0), ("sqmul", 0)):
            ys = [] if f == "pow" else [other.x]
            found = reference.channel_reduce([made.x], ys, table.table, table.slots, f, p)
            expected = naive_reduce(made, other.x, table, f, p)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", SLOTS)
def test_axpy_and_scale_are_what_the_docs_say(dtype: torch.dtype, slots: str) -> None:
    for sizes in SMALL:
        x, y = make(sizes, "rkc", 1, dtype), make(sizes, "rkc", 1, dtype, seed=1)
        before, scaled = y.x.double().clone(), x.twin()
        table = x.table(slots, start=1, length=sum(sizes) + 3)
        values = torch.randn(table.slots, dtype=ops.accumulator(dtype))
        row, col = table.table[0, 8].item(), table.table[0, 9].item()
        reference.channel_axpy_([y.x], [x.x], table.table, values)
        reference.channel_scale_([scaled.x], table.table, values)
        for r in range(sizes[0]):
            for c in range(sizes[1]):
                add = naive_coefficient(values, row, r, 0.0) + naive_coefficient(values, col, c, 0.0)
                times = naive_coefficient(values, row, r, 1.0) * naive_coefficient(values, col, c, 1.0)
                tolerance = {"rtol": EPS[dtype], "atol": 4 * EPS[dtype]}
                expected = before[r, c] + add * x.x[r, c].double()
                torch.testing.assert_close(y.x[r, c].double(), expected, **tolerance)
                torch.testing.assert_close(scaled.x[r, c].double(), times * x.x[r, c].double(), **tolerance)
        assert y.outside().eq(42).all()
        assert scaled.outside().eq(42).all()


def compact_case(
    sizes=(6, 5, 4), rows=(0, 2, 5), cols=(1, 4)
) -> tuple[Made, Made, TileTable, TileTable, Tensor]:
    """Return source, poisoned destination, their tables and the index."""
    source = make(sizes)
    target = make((len(rows), len(cols), sizes[2])).twin(fill=float("nan"))
    index = torch.tensor([*rows, *cols], dtype=torch.int32)
    out_table = TileTable.from_tiles([target.x], [target.tile("both")], len(index), shared_slots=True)
    return source, target, source.table("none"), out_table, index


def test_compact_keeps_the_rows_and_columns_that_are_listed() -> None:
    source, target, table, out_table, index = compact_case()
    ops.channel_compact([target.x], [source.x], table, out_table, index)
    assert torch.equal(target.x, source.x[[0, 2, 5]][:, [1, 4]])
    assert target.outside().eq(42).all()


def test_a_product_of_zero_clears_inf_and_nan() -> None:
    made = make((2, 3, 2))
    made.x[0, 0] = float("nan")
    made.x[1, 2] = float("inf")
    expected = made.x.clone()
    expected[0] = 0
    expected[:, 2] = 0
    ops.channel_scale_([made.x], made.table(), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))
    assert torch.equal(made.x, expected)


def test_a_leaf_that_requires_grad_is_changed_in_place_and_autograd_notices() -> None:
    made = make((2, 3, 2))
    leaf = torch.nn.Parameter(made.x)
    loss = leaf.square().sum()
    ops.channel_scale_([leaf], made.table(), torch.full((5,), 2.0))
    assert leaf.is_leaf
    assert leaf.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        made = make((2, 3, 2))
        before = made.x.clone()
        ops.channel_scale_([made.x], made.table(), torch.full((5,), 2.0))
    assert torch.equal(made.x, 4 * before)


def test_no_tensors_at_all() -> None:
    table = TileTable.from_tiles([], [], 3)
    assert torch.equal(ops.channel_reduce([], table), torch.zeros(3))
    ops.channel_scale_([], table, torch.ones(3))
    ops.channel_axpy_([], [], table, torch.ones(3))
    ops.channel_compact([], [], table, table, torch.zeros(3, dtype=torch.int32))


BASE = make((4, 3, 2))
TABLE = BASE.table()
COEF = torch.ones(7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.channel_reduce([], TABLE), "1 tensors in xs"),
        (lambda: ops.channel_reduce([BASE.x.clone().mT], TABLE), r"xs\[0\] of shape \(4, 3, 2\)"),
        (
            lambda: ops.channel_reduce([BASE.x.contiguous().clone().as_strided((4, 3, 2), (6, 1, 3))], TABLE),
            "strides",
        ),
        (lambda: ops.channel_reduce([BASE.x.int()], TABLE), "dtype"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, f="powr"), "did you mean 'pow'"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, f="mul"), "ys like xs"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, [BASE.x]), "no ys"),
        (
            lambda: ops.channel_reduce([BASE.x], TABLE, [BASE.x.double()], f="mul"),
            r"ys\[0\] of torch.float32",
        ),
        (lambda: ops.channel_axpy_([BASE.x], [BASE.x[:2]], TABLE, COEF), r"xs\[0\] of shape"),
        (lambda: ops.channel_axpy_([BASE.x], [BASE.x], TABLE, COEF[:6]), r"coef contiguous of shape \[7\]"),
        (lambda: ops.channel_axpy_([BASE.x], [BASE.x], TABLE, COEF.double()), "coef contiguous"),
        (lambda: ops.channel_scale_([BASE.x], TABLE, torch.ones(14)[::2]), "scale contiguous"),
        (lambda: ops.channel_scale_([BASE.x.to("meta")], TABLE, COEF), "on meta"),
        (lambda: ops.channel_reduce(None, TABLE), "a list of tensors in xs; got NoneType"),
        (lambda: ops.channel_reduce(iter([BASE.x]), TABLE), "a list of tensors in xs; got list_iterator"),
        (lambda: ops.channel_reduce([[1.0]], TABLE), "a list of tensors in xs; got a list of list"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, ["y"], f="mul"), r"ys\[0\] to be a strided tensor; got str"),
        (lambda: ops.channel_reduce([BASE.x], TABLE.table), "a TileTable; got Tensor"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, p="two"), "p to be a number; got 'two'"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, p=10**400), "p to be a number"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, p=torch.ones((), device="meta")), "p to be a number"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, f=np.array(["pow"])), "f to be one of"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, 5), "no ys"),
        (lambda: ops.channel_reduce([BASE.x], TABLE, 5, f="mul"), "a list of tensors in ys; got int"),
        (lambda: ops.channel_reduce({BASE.x}, TABLE), "a list of tensors in xs; got set"),
        (lambda: ops.channel_reduce({0: BASE.x}, TABLE), "a list of tensors in xs; got dict"),
        (lambda: ops.channel_reduce(BASE.x[None], TABLE), "a list of tensors in xs; got Tensor"),
        (lambda: ops.channel_reduce([UninitializedParameter()], TABLE), r"xs\[0\] to have its shape"),
        (lambda: ops.channel_reduce([torch.nested.nested_tensor([BASE.x])], TABLE), r"xs\[0\] to be a strided tensor"),
        (lambda: ops.channel_scale_([BASE.x], TABLE, 2.0), r"scale a tensor of shape \[7\]; got float"),
    ],
)
def test_bad_calls_are_refused_before_anything_changes(call, message: str) -> None:
    before = BASE.base.clone()
    with pytest.raises(OpError, match=message):
        call()
    assert torch.equal(BASE.base, before)


def test_an_expanded_tensor_is_read_but_not_written() -> None:
    x = torch.arange(3.0).expand(4, 3)
    table = TileTable.from_tiles([x], [Tile(0, 0, (4, 3, 1), (0, 1, 1), 0, 4)])
    assert ops.channel_reduce([x], table, p=1.0).tolist() == [3, 3, 3, 3, 0, 4, 8]
    with pytest.raises(OpError, match="overlap"):
        ops.channel_scale_([x], table, torch.ones(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(index=torch.tensor([0, 2, 6, 1, 4], dtype=torch.int32)), r"\[0, 6\)"),
        (lambda a: a.update(index=torch.tensor([0, -2, 5, 1, 4], dtype=torch.int32)), "ascending"),
        (lambda a: a.update(index=torch.tensor([0, 2, 5, 4, 4], dtype=torch.int32)), "ascending"),
        (lambda a: a.update(index=torch.tensor([0, 2, 5, 1, 4])), "int32"),
        (lambda a: a.update(index=torch.tensor([0, 2], dtype=torch.int32)), r"\[>= 5\]"),
        (lambda a: a.update(index=[0, 2, 5, 1, 4]), "got list"),
        (lambda a: a.update(outs=[a["outs"][0].double()]), "outs of the dtype"),
        (lambda a: a.update(out_table=TileTable.from_tiles(a["outs"], [])), "1 output tiles"),
    ],
)
def test_bad_compactions_are_refused(change, message: str) -> None:
    source, target, table, out_table, index = compact_case()
    arguments = {"outs": [target.x], "xs": [source.x], "table": table, "out_table": out_table, "index": index}
    change(arguments)
    with pytest.raises(OpError, match=message):
        ops.channel_compact(**arguments)
    assert target.x.isnan().all()


def test_sums_into_slots_that_tiles_share_are_refused() -> None:
    """Threads would add to them side by side."""
    x = torch.ones(4, 3)
    tile = Tile(0, 0, (4, 3, 1), (3, 1, 1), 0, 4)
    shared = TileTable.from_tiles([x, x.clone()], [tile, replace(tile, tensor=1, col=7)], shared_slots=True)
    with pytest.raises(OpError, match="slots of their own"):
        ops.channel_reduce([x, x.clone()], shared)
    alone = TileTable.from_tiles([x], [tile], shared_slots=True)
    assert ops.channel_reduce([x], alone).tolist() == [3] * 4 + [4] * 3


def test_a_destination_inside_the_source_is_refused() -> None:
    source, _, table, _, index = compact_case()
    inside = source.x[:3, :2]
    tile = Tile(0, 0, (3, 2, 4), source.strides, 0, 3)
    out_table = TileTable.from_tiles([inside], [tile], 5, shared_slots=True)
    with pytest.raises(OpError, match="storage of their own"):
        ops.channel_compact([inside], [source.x], table, out_table, index)


def test_lists_of_minus_one_must_keep_everything() -> None:
    source, target, table, _, index = compact_case()
    out_table = TileTable.from_tiles([target.x], [target.tile("cols", 3)], 5, shared_slots=True)
    with pytest.raises(OpError, match="to keep 6 entries"):
        ops.channel_compact([target.x], [source.x], table, out_table, index)
