"""The ops as PyTorch sees them: opcheck, torch.compile, version counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pat_fast import ops
from pat_fast.errors import OpError
from pat_fast.ops import Tile, TileTable
from tests.ops.layouts import make


def samples(op: str) -> list[tuple]:
    x, y, twin = make((4, 3, 2)), make((4, 3, 2), seed=1), make((4, 3, 2), seed=2)
    bias = torch.randn(4)
    table = TileTable.from_tiles([x.x], [x.tile("both")], 9).table
    values, double = torch.rand(9), torch.rand(9, dtype=torch.float64)
    x64 = make((4, 3, 2), "rkc", dtype=torch.float64)
    if op == "channel_reduce":
        return [
            ([x.x], [], table, 9, "pow", 2.0),
            ([x.x, bias], [y.x, bias.clone()], table, 9, "mul", 0.0),
            ([x64.x], [], x64.table(length=9).table, 9, "pow", 3.0),
        ]
    if op == "channel_axpy_":
        return [([y.x], [x.x], table, values), ([x64.twin().x], [x64.x], x64.table(length=9).table, double)]
    if op == "channel_scale_":
        return [([twin.x], table, values), ([x64.x], x64.table(length=9).table, double)]
    out = torch.zeros(2, 3, 2)
    out_table = torch.tensor([[0, 0, 2, 3, 2, 6, 2, 1, 0, -1]])
    return [([out], [x.x], table, out_table, torch.tensor([1, 3], dtype=torch.int32))]


@pytest.mark.parametrize("op", ["channel_reduce", "channel_axpy_", "channel_scale_", "channel_compact"])
def test_opcheck(op: str) -> None:
    for arguments in samples(op):
        torch.library.opcheck(getattr(torch.ops.pat_fast, op).default, arguments)


def test_the_wrappers_run_under_torch_compile() -> None:
    x, y = make((4, 3, 2)), make((4, 3, 2), seed=1)
    table = x.table()

    def shrink(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        norms = ops.channel_reduce([w], table)
        ops.channel_axpy_([g], [w], table, norms.rsqrt())
        ops.channel_scale_([w], table, torch.full_like(norms, 0.5))
        return norms * 2

    compiled = torch.compile(shrink, backend="aot_eager", fullgraph=True)
    w, g = x.x.contiguous().clone(), y.x.contiguous().clone()
    w2, g2 = w.clone(), g.clone()
    torch.testing.assert_close(compiled(w, g), shrink(w2, g2))
    torch.testing.assert_close((w, g), (w2, g2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_that_contains_the_ops_has_no_graph_break(backend: str) -> None:
    """``fullgraph`` refuses anything but one graph; gradients flow past the ops as without a compiler."""
    made, other = make((4, 3, 2)), make((4, 3, 2), seed=1)
    table = made.table()
    kept = torch.tensor([1, 3], dtype=torch.int32)
    narrow = TileTable.from_tiles([torch.empty(2, 3, 2)], [Tile(0, 0, (2, 3, 2), (6, 2, 1), 0)], 2, shared_slots=True)

    def step(w: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        norms = ops.channel_reduce([w], table)
        ops.channel_axpy_([grad], [w], table, 1e-2 * norms)
        ops.channel_scale_([grad], table, (norms > norms.mean()).float())
        smaller = torch.empty(2, 3, 2)
        ops.channel_compact([smaller], [w.detach()], table, narrow, kept)
        return (w * x).sum().square() / norms.sum(), grad, smaller

    results = []
    for run in (torch.compile(step, backend=backend, fullgraph=True), step):
        w, grad = made.x.contiguous().clone().requires_grad_(), other.x.contiguous().clone()
        loss, *rest = run(w, grad, torch.arange(24.0).view(4, 3, 2))
        loss.backward()
        results.append([loss.detach(), *rest, w.grad])
    torch.testing.assert_close(*results)


SOURCE, TARGET = torch.arange(48.0).view(8, 6), torch.zeros(2, 6)
WHOLE = TileTable.from_tiles([SOURCE], [Tile(0, 0, (8, 6, 1), (6, 1, 1), 0, 8)])
PICKED = TileTable.from_tiles([TARGET], [Tile(0, 0, (2, 6, 1), (6, 1, 1), 0)], 2, shared_slots=True)


def freed(*shape: int) -> Tensor:
    x = torch.ones(shape)
    x.untyped_storage().resize_(0)
    return x


def one_inside_another() -> tuple[Tensor, Tensor]:
    memory = torch.arange(60.0)
    return memory[1:49].view(8, 6), memory[:48].view(8, 6)


def compact(out: Tensor, x: Tensor, index: Tensor) -> None:
    ops.channel_compact([out], [x], WHOLE, PICKED, index)


def picking(*index: int) -> tuple[Tensor, Tensor, Tensor]:
    return TARGET.clone(), SOURCE.clone(), torch.tensor(index, dtype=torch.int32)


def axpy(y: Tensor, x: Tensor) -> None:
    ops.channel_axpy_([y], [x], WHOLE, torch.ones(14))


def scaled(x: Tensor, scale: Tensor) -> None:
    ops.channel_scale_([x], WHOLE, scale)


BAD_CALLS: dict[str, tuple[Any, Callable[[], tuple[Tensor, ...]], str]] = {
    "rows past the end": (compact, lambda: picking(3, 2**31 - 1), "ascending indices in"),
    "rows before the start": (compact, lambda: picking(-5, 3), "ascending indices in"),
    "a row twice": (compact, lambda: picking(3, 3), "ascending indices in"),
    "an output inside its source": (
        compact,
        lambda: ((x := SOURCE.clone())[1:3], x, torch.tensor([0, 1], dtype=torch.int32)),
        "share no (memory|storage)|storage of their own",
    ),
    "written inside what is read": (axpy, one_inside_another, "share no memory"),
    "freed, read": (lambda x: ops.channel_reduce([x], WHOLE), lambda: (freed(8, 6),), r"xs(\[0\])? to have memory"),
    "freed, written": (scaled, lambda: (freed(8, 6), torch.ones(14)), "to have memory"),
    "freed, a vector": (scaled, lambda: (SOURCE.clone(), freed(14)), "scale to have memory"),
}


# There the op works on copies, and is right, or PyTorch refuses the tensor itself.
NOT_BY_AOT = ("an output inside its source", "written inside what is read", "freed, written")


@pytest.mark.parametrize(
    ("name", "backend"),
    [(n, b) for b in (None, "eager", "aot_eager") for n in BAD_CALLS if b != "aot_eager" or n not in NOT_BY_AOT],
)
def test_bad_calls_are_refused_compiled_or_not(name: str, backend: str | None) -> None:
    call, arguments, message = BAD_CALLS[name]
    run = call if backend is None else torch.compile(call, backend=backend, fullgraph=True)
    # A graph of the backend "eager" leaves autograd off when something in it raises, whatever raises.
    with torch.enable_grad(), pytest.raises(OpError, match=message):
        run(*arguments())


def test_what_was_traced_by_make_fx_looks_at_its_arguments() -> None:
    graph = make_fx(compact)(*picking(1, 3))
    out, x, index = picking(0, 2)
    graph(out, x, index)
    assert torch.equal(out, x[[0, 2]])
    with pytest.raises(OpError, match="ascending"):
        graph(*picking(1, 9))


@pytest.mark.parametrize("wrapped", [True, False])
def test_writes_move_the_version_counter(wrapped: bool) -> None:
    x, y = make((4, 3, 2)), make((4, 3, 2), seed=1)
    table, coef = x.table(), torch.rand(7)
    read, written = x.x._version, y.x._version
    if wrapped:
        ops.channel_axpy_([y.x], [x.x], table, coef)
    else:
        torch.ops.pat_fast.channel_axpy_.default([y.x], [x.x], table.table, coef)
    assert y.x._version > written
    assert x.x._version == read
