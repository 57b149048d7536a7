"""What every backend must do as the reference does: the same cases for all, on the CPU and on a GPU.

A backend is its ``OPS``. Each function here runs one case, or all that a :class:`Scope` holds for an order of axes
and a dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pat_fast.backends import reference
from pat_fast.backends.known import Known
from pat_fast.ops import Tile, TileTable, accumulator
from pat_fast.ops.grouped import runs_of
from tests.ops.layouts import DTYPES, ORDERS, SIZES, SLOTS, Made, make

Ops = Mapping[str, Callable[..., Any]]
Sizes = tuple[int, int, int]

EPS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
FUNCTIONS = (("pow", 1.0), ("pow", 2.0), ("pow", 0.7), ("mul", 2.0), ("absmul", 2.0), ("sqmul", 2.0))


@dataclass(frozen=True)
class Scope:
    """How much to try.

    Args:
        sizes: of tiles.
        big: sizes of several blocks of rows and columns.
        thorough: each size with and without gaps between its runs, and with all kinds of slots; else they take turns.
    """

    sizes: tuple[Sizes, ...] = SIZES
    big: tuple[Sizes, ...] = ((300, 150, 9), (150, 2000, 1), (3, 50000, 1), (70000, 1, 3), (1100, 5, 25))
    thorough: bool = True

    def cases(self, order: str, dtype: torch.dtype, device: str) -> Iterator[tuple[Made, Made, str]]:
        """Two tensors of a layout, and a kind of slots."""
        turn = ORDERS.index(order) + DTYPES.index(dtype)
        for sizes in self.sizes:
            kinds = itertools.product((0, 1), SLOTS) if self.thorough else [(turn % 2, SLOTS[turn // 2 % len(SLOTS)])]
            turn += 1
            for gap, slots in kinds:
                pair = [make(sizes, order, gap, dtype, seed, device) for seed in (0, 1)]
                yield pair[0], pair[1], slots


FULL = Scope()


def poison(slots: int, dtype: torch.dtype, device: str) -> None:
    """Leave NaN in the memory that the next allocation of this size is likely to get."""
    torch.full((slots,), float("nan"), dtype=accumulator(dtype), device=device)


def exact_reduce(made: Made, ys: list[Tensor], table: TileTable, f: str, p: float) -> Tensor:
    """Return what the reference says in float64 on the CPU, on copies of the same layout."""
    doubles = []
    for tensor in (made.x, *ys):
        buffer = torch.zeros(made.base.numel(), dtype=torch.float64)
        doubles.append(buffer.as_strided(made.sizes, made.strides).copy_(tensor))
    return reference.channel_reduce(doubles[:1], doubles[1:], table.table, table.slots, f, p)


def check_reduce(ops: Ops, made: Made, other: Made, slots: str, f: str, p: float) -> None:
    table = made.table(slots, start=2, length=sum(made.sizes[:2]) + 5)
    ys = [] if f == "pow" else [other.x]
    poison(table.slots, made.x.dtype, str(made.x.device))
    found = ops["channel_reduce"]([made.x], ys, table.table, table.slots, f, p)
    assert found.dtype == accumulator(made.x.dtype)
    assert found.device == made.x.device
    found = found.cpu()
    exact = exact_reduce(made, ys, table, f, p)
    terms = exact_reduce(made, [y.abs() for y in ys], table, "absmul" if f == "mul" else f, p)
    tolerance = (1e-12 if made.x.dtype == torch.float64 else 1e-5) * terms + 1e-30
    assert ((found.double() - exact).abs() <= tolerance).all(), (made.sizes, made.strides, slots, f, p)
    assert (found[terms == 0] == 0).all()  # slots that no tile names


def reduce(ops: Ops, order: str, dtype: torch.dtype, scope: Scope = FULL, device: str = "cpu") -> None:
    for number, (made, other, slots) in enumerate(scope.cases(order, dtype, device)):
        if scope.thorough:
            functions = FUNCTIONS if slots == "both" else FUNCTIONS[1:4]
        else:
            functions = FUNCTIONS[number % 6 : number % 6 + 1]
        for f, p in functions:
            check_reduce(ops, made, other, slots, f, p)


def reduce_big(ops: Ops, sizes: Sizes, order: str, device: str = "cpu") -> None:
    made, other = make(sizes, order, device=device), make(sizes, order, seed=1, device=device)
    for slots in SLOTS[:3]:
        check_reduce(ops, made, other, slots, "pow", 2.0)
    check_reduce(ops, made, other, "both", "mul", 2.0)


def check_writes(ops: Ops, made: Made, other: Made, slots: str) -> None:
    """``channel_axpy_`` and ``channel_scale_``, with some coefficients 0 and 1."""
    dtype = made.x.dtype
    table = made.table(slots, start=1, length=sum(made.sizes[:2]) + 3)
    values = torch.randn(table.slots, dtype=accumulator(dtype)).to(made.x.device)
    values[::3] = 0
    values[1::5] = 1
    y, want_y = other.twin(), other.twin()
    ops["channel_axpy_"]([y.x], [made.x], table.table, values)
    reference.channel_axpy_([want_y.x], [made.x], table.table, values)
    bound = EPS[dtype] * (other.x.double().abs() + 8 * made.x.double().abs())
    assert ((y.x.double() - want_y.x.double()).abs() <= bound).all(), (made.sizes, made.strides, slots)
    x, want_x = made.twin(), made.twin()
    ops["channel_scale_"]([x.x], table.table, values)
    reference.channel_scale_([want_x.x], table.table, values)
    torch.testing.assert_close(x.x, want_x.x, rtol=EPS[dtype], atol=0)
    for written in (x, y):
        assert (written.outside() == 42).all()


def writes(ops: Ops, order: str, dtype: torch.dtype, scope: Scope = FULL, device: str = "cpu") -> None:
    for made, other, slots in scope.cases(order, dtype, device):
        check_writes(ops, made, other, slots)


def writes_big(ops: Ops, sizes: Sizes, device: str = "cpu") -> None:
    for order in ("rck", "rkc", "crk"):
        check_writes(ops, make(sizes, order, device=device), make(sizes, order, seed=1, device=device), "both")


def unaligned(ops: Ops, device: str = "cpu") -> None:
    """Rows of whole vectors at addresses that are no multiple of one: a GPU refuses to read vectors there."""
    for dtype in DTYPES:
        base = torch.randn(8 * 256 + 1, device=device).to(dtype)
        x, y = base[1:].view(8, 256), torch.randn(8, 256, device=device).to(dtype)
        table = TileTable.from_tiles([x], [Tile(0, 0, (8, 256, 1), (256, 1, 1), 0, 8)])
        found = ops["channel_reduce"]([x], [], table.table, table.slots, "pow", 2.0)
        squares = x.to(accumulator(dtype)).square()
        torch.testing.assert_close(found, torch.cat([squares.sum(1), squares.sum(0)]))
        values = torch.ones_like(found)
        for written, read in ((x.clone(), x), (x, y)):
            want = written + 2 * read
            ops["channel_axpy_"]([written], [read], table.table, values)
            torch.testing.assert_close(written, want)
        want = 2 * x
        ops["channel_scale_"]([x], table.table, torch.cat([2 * values[:8], values[8:]]))
        assert torch.equal(x, want)
        out = torch.empty(3, 256, dtype=dtype, device=device)
        target = TileTable.from_tiles([out], [Tile(0, 0, (3, 256, 1), (256, 1, 1), 0)], 3, shared_slots=True)
        index = torch.tensor([1, 4, 6], dtype=torch.int32, device=device)
        ops["channel_compact"]([out], [x], table.table, target.table, index)
        assert torch.equal(out, want[[1, 4, 6]])


def zero_clears(ops: Ops, dtype: torch.dtype, device: str = "cpu") -> None:
    """A product of 0 writes 0, over inf and nan too, in tiles that are read in vectors and in others."""
    for sizes in ((2, 3, 2), (8, 64, 1)):
        made = make(sizes, dtype=dtype, device=device)
        made.x[0, 0] = float("nan")
        made.x[1, 2] = float("inf")
        want = made.x.clone()
        want[0] = 0
        want[:, 2] = 0
        scale = torch.ones(sum(sizes[:2]), dtype=accumulator(dtype), device=device)
        scale[0] = scale[sizes[0] + 2] = 0
        ops["channel_scale_"]([made.x], made.table().table, scale)
        assert torch.equal(made.x, want)


def halves_convert(
    ops: Ops, dtype: torch.dtype, factors: tuple[float, ...] = (1.0, 2.0, 1 / 3, 1e-3, 3e-8, 7e4, -5.0), device="cpu"
) -> None:
    """Every value of a half type, scaled, is rounded as torch rounds it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for factor in factors:
        x = bits.view(dtype).clone().reshape(2, -1)
        scale = torch.tensor([factor, 1.0] + [1.0, 1.0 + 2**-12] * (x.shape[1] // 2))
        table = TileTable.from_tiles([x], [Tile(0, 0, (*x.shape, 1), (x.shape[1], 1, 1), 0, 2)])
        want = (x.float() * (scale[:2, None] * scale[2:])).to(dtype)
        found = x.to(device)
        ops["channel_scale_"]([found], table.table, scale.to(device))
        found = found.cpu()
        assert torch.equal(found.isnan(), want.isnan())
        assert torch.equal(found[~found.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def halves_sum(ops: Ops, dtype: torch.dtype, device: str = "cpu") -> None:
    """Infinities, NaN and denormal values in sums."""
    tiny = torch.finfo(dtype).smallest_normal / 2
    values = torch.tensor([[1.0, tiny, -tiny, 0.0] * 16, [float("inf")] + [1.0] * 63], dtype=dtype)
    x = values.to(device)
    table = TileTable.from_tiles([x], [Tile(0, 0, (2, 64, 1), (64, 1, 1), 0, -1)])
    column = TileTable.from_tiles([x[:, 1:2].clone()], [Tile(0, 0, (2, 1, 1), (1, 1, 1), 0, -1)])

    def sums(x: Tensor, table: TileTable) -> Tensor:
        return ops["channel_reduce"]([x], [], table.table, table.slots, "pow", 1.0)

    assert sums(x, table)[1] == float("inf")
    x[1, 0] = float("nan")
    assert sums(x, table)[1].isnan()
    assert sums(x[:, 1:2].clone(), column)[0] == tiny


def model(dtype: torch.dtype = torch.float32, device: str = "cpu", long: int = 50000) -> tuple[list[Tensor], TileTable]:
    """Return a mixed list: convs in two formats, a transposed and a grouped one, linears, vectors; some empty."""
    shapes = ((64, 32, 9, "rck"), (128, 64, 9, "rkc"), (96, 33, 4, "crk"), (200, 1000, 1, "rck"), (5, 0, 1, "rck"))
    mades = [make((r, c, k), order, seed=r) for r, c, k, order in shapes]
    tensors, tiles, slot = [m.x for m in mades], [], 0
    for at, made in enumerate(mades):
        tiles.append(made.tile("both", slot, at))
        slot += made.sizes[0] + made.sizes[1]
    grouped = torch.randn(24, 4, 3, 3)
    tensors.append(grouped)
    for group in range(6):
        tiles.append(Tile(len(tensors) - 1, group * 4 * 36, (4, 4, 9), (36, 9, 1), slot, slot + 4))
        slot += 8
    for length in (0, 1, 3, 64, long):
        tensors.append(torch.randn(length))
        tiles.append(Tile(len(tensors) - 1, 0, (length, 1, 1), (1, 1, 1), slot))
        slot += length
    tensors.append(torch.randn(70, 1, 3, 3))
    tiles.append(Tile(len(tensors) - 1, 0, (70, 1, 9), (9, 9, 1), slot))
    moved = [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device).copy_(t) for t in tensors]
    return moved, TileTable.from_tiles(moved, tiles, slot + 70 + 3)


def many_kinds(ops: Ops, dtype: torch.dtype = torch.float32, device: str = "cpu", long: int = 50000) -> None:
    """All ops on one list of many kinds of tensors."""
    tensors, table = model(dtype, device, long)
    found = ops["channel_reduce"](tensors, [], table.table, table.slots, "pow", 2.0)
    want = reference.channel_reduce(tensors, [], table.table, table.slots, "pow", 2.0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    assert (found[-3:] == 0).all()
    values = want / want.max()
    ys, want_ys = ([torch.empty_like(t).copy_(t) for t in tensors] for _ in range(2))
    for some, to in ((ops, ys), (reference.OPS, want_ys)):
        some["channel_axpy_"](to, tensors, table.table, values)
        some["channel_scale_"](to, table.table, values)
    torch.testing.assert_close(ys, want_ys, rtol=max(1e-5, EPS[dtype]), atol=max(1e-5, 8 * EPS[dtype]))


def everything(ops: Ops, tensors: list[Tensor], table: TileTable) -> list[Tensor]:
    """The results of the three ops that compute, for comparing runs bit by bit."""
    generator = torch.Generator().manual_seed(0)
    dtype = accumulator(tensors[0].dtype)
    coef = torch.randn(table.slots, generator=generator, dtype=dtype).to(tensors[0].device)
    ys = [torch.empty_like(t).copy_(t) for t in tensors]
    sums = ops["channel_reduce"](tensors, [], table.table, table.slots, "pow", 2.0)
    products = ops["channel_reduce"](tensors, ys, table.table, table.slots, "mul", 0.0)
    ops["channel_axpy_"](ys, tensors, table.table, coef)
    ops["channel_scale_"](ys, table.table, coef)
    return [sums, products, *ys]


def check_compact(
    ops: Ops, source: Made, keep_rows: Tensor | None, keep_cols: Tensor | None, order: str, gap: int
) -> None:
    r, c, k = source.sizes
    rows = torch.arange(r) if keep_rows is None else keep_rows
    cols = torch.arange(c) if keep_cols is None else keep_cols
    target = make((len(rows), len(cols), k), order, gap, source.x.dtype, device=str(source.x.device))
    target.x.fill_(-7)
    index = torch.cat([torch.tensor([-1]), rows, cols]).to(torch.int32)  # offset 0 is nobody's
    starts = -1 if keep_rows is None else 1, -1 if keep_cols is None else 1 + len(rows)
    tile = Tile(0, 0, target.sizes, target.strides, *starts)
    out_table = TileTable.from_tiles([target.x], [tile], len(index), shared_slots=True)
    table = source.table("none")
    ops["channel_compact"]([target.x], [source.x], table.table, out_table.table, index.to(source.x.device))
    want = source.x.cpu()[rows][:, cols]
    assert torch.equal(target.x.cpu(), want), (source.sizes, source.strides, target.strides)
    assert (target.outside() == 42).all()


def compact(ops: Ops, order: str, dtype: torch.dtype, scope: Scope = FULL, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(0)
    big = ((300, 90, 9), (150, 1000, 1)) if scope.thorough else ((40, 9, 9), (9, 300, 1))
    for sizes in (*scope.sizes, *big):
        r, c, _ = sizes
        rows = torch.randperm(r, generator=generator)[: (r + 1) // 2].sort().values
        cols = torch.randperm(c, generator=generator)[: (2 * c + 2) // 3].sort().values
        source = make(sizes, order, 0, dtype, device=device)
        check_compact(ops, source, rows, None, order, 0)
        if scope.thorough:
            check_compact(ops, source, rows, cols, order, 0)
            check_compact(ops, source, None, cols, order, 0)
            check_compact(ops, source, None, torch.arange(c // 2, c), order, 1)
        check_compact(ops, make(sizes, order, 1, dtype, device=device), rows, cols, "rck", 0)
        check_compact(ops, source, rows[:0], cols, order, 0)


def compact_moves_bits(ops: Ops, dtype: torch.dtype, device: str = "cpu") -> None:
    """Two widths: rows of single elements, and rows of whole vectors."""
    for width in (4, 32):
        x = torch.randint(0, 2, (6, width)).to(dtype).to(device)
        out = torch.zeros(3, width, dtype=dtype, device=device)
        table = TileTable.from_tiles([x], [Tile(0, 0, (6, width, 1), (width, 1, 1))])
        tile = Tile(0, 0, (3, width, 1), (width, 1, 1), 0)
        out_table = TileTable.from_tiles([out], [tile], 3, shared_slots=True)
        index = torch.tensor([1, 2, 5], dtype=torch.int32, device=device)
        ops["channel_compact"]([out], [x], table.table, out_table.table, index)
        assert torch.equal(out, x[[1, 2, 5]])


@dataclass(frozen=True)
class Grouped:
    """Three tensors, their slots and channels: several slots a channel, slots without one, groups of odd sizes."""

    xs: list[Tensor]
    table: TileTable
    slot_channel: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, dtype: torch.dtype, device: str) -> Grouped:
        rows, cols, more = 300, 77, 5
        xs = [make((rows, cols, 1), seed=0), make((more, rows, 9), seed=1), make((cols, 1, 1), seed=2)]
        tensors = [made.x.to(device, dtype) for made in xs]
        tiles = [
            Tile(0, 0, (rows, cols, 1), tensors[0].stride(), 0, rows),
            Tile(1, 0, (more, rows, 9), tensors[1].stride(), rows + cols, rows + cols + more),
            Tile(2, 0, (cols, 1, 1), tensors[2].stride(), 2 * rows + cols + more),
        ]
        table = TileTable.from_tiles(tensors, tiles)
        outer, inner = torch.arange(rows), torch.arange(rows, rows + cols)
        n = rows + cols
        without = torch.full((more,), n)
        channels = torch.cat([outer, inner, without, outer.flip(0), inner])
        return cls(tensors, table, channels.to(device), [rows, 40, cols - 40])

    def totals(self, p: float) -> Tensor:
        """In double precision, on the CPU."""
        xs = [x.double().cpu() for x in self.xs]
        sums = reference.channel_reduce(xs, [], self.table.table, self.table.slots, "pow", p)
        return torch.zeros(sum(self.sizes) + 1).double().index_add_(0, self.slot_channel.cpu(), sums)[:-1]

    def gamma(self, p: float, alpha: float, strength: float) -> Tensor:
        """In double precision, on the CPU; groups with what is not finite have none."""
        found = []
        for part in self.totals(p).split(self.sizes):
            norm = part.sqrt()
            span = (norm.max() - norm.min()).clamp_min(torch.finfo(torch.float32).tiny)
            place = ((norm.max() - norm) / span).clamp_max(1)
            found.append(strength * alpha**place if part.isfinite().all() else torch.zeros_like(part))
        return torch.cat(found)

    def native(self, shortcuts: Ops) -> Any:
        """What the backend knows of the channels."""
        sizes = torch.tensor(self.sizes)
        runs = runs_of(self.table, self.slot_channel, int(sizes.sum()))
        return shortcuts["grouping"](
            self.table.table, runs, self.table.slots, sizes, int(sizes.sum()), self.xs[0].device
        )


def totals(shortcuts: Ops, dtype: torch.dtype, p: float, device: str = "cpu") -> None:
    """Sums over channels, and their shares of the group's mean; in a group of zeros and one with a NaN, too."""
    case = Grouped.of(dtype, device)
    case.xs[2][:40] = 0
    case.xs[0][:, :40] = 0
    case.xs[2][50] = torch.nan
    groups = case.native(shortcuts)
    expected = case.totals(p)
    rtol = {torch.float64: 1e-10}.get(dtype, 1e-5)
    for divided in (False, True):
        found = shortcuts["channel_totals"](case.xs, Known(case.xs), groups, p, divided).cpu()
        if divided:
            tiny = torch.finfo(found.dtype).tiny
            expected = torch.cat([part / part.mean().clamp_min(tiny) for part in expected.split(case.sizes)])
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=0, equal_nan=True)


def push(shortcuts: Ops, dtype: torch.dtype, p: float, device: str = "cpu") -> None:
    """The penalty of the groups' norms, for some of the tensors and channels; a group with an infinity has none."""
    for value, chosen, some in ((1.0, (0, 1, 2), False), (torch.inf, (0, 2), True), (torch.nan, (1, 2), False)):
        case = Grouped.of(dtype, device)
        case.xs[2][3] = value
        xs = [x.double().cpu() for x in case.xs]
        n = sum(case.sizes)
        where = torch.arange(n, device=device) % 3 > 0 if some else None
        gamma = case.gamma(p, 16.0, 1e-2)
        if where is not None:
            gamma = gamma * where.cpu()
        coef = torch.cat([gamma, gamma.new_zeros(1)])[case.slot_channel.cpu()]
        ys = [torch.ones_like(x) for x in case.xs]
        expected = [torch.ones_like(x) for x in xs]
        reference.channel_axpy_(expected, [x.nan_to_num(0, 0) for x in xs], case.table.table, coef)
        groups = case.native(shortcuts)
        arguments = case.xs, Known(case.xs), groups, p, 16.0, 1e-2, where
        shortcuts["group_push"](lambda ys=ys, chosen=chosen: ([ys[i] for i in chosen], chosen), *arguments)
        for i, (y, want) in enumerate(zip(ys, expected, strict=True)):
            if i not in chosen:
                want = torch.ones_like(want)
            finite = xs[i].isfinite()
            rtol = max(EPS[dtype], 1e-9 if dtype == torch.float64 else 1e-6)
            torch.testing.assert_close(y.double().cpu()[finite], want[finite], rtol=rtol, atol=0)
