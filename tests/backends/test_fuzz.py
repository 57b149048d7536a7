"""Thousands of good and bad calls of the public ops: each raises a PatError or does what the reference does.

``PAT_FAST_FUZZ`` sets the number of calls; ``make sanitize`` makes many, under AddressSanitizer and
UndefinedBehaviorSanitizer. A failure names the seed of the one call that shows it.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pat_fast import ops
from pat_fast.backends import cpu, reference
from pat_fast.backends.known import lacks_memory
from pat_fast.errors import PatError
from pat_fast.ops import Tile, TileTable

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ extension is not built")
CALLS = int(os.environ.get("PAT_FAST_FUZZ", "2000"))
BATCH = 250
OPS = ("channel_reduce", "channel_axpy_", "channel_scale_", "channel_compact")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOVABLE = (*FLOATS, torch.int8, torch.int64, torch.bool, torch.complex64)
RTOL = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass
class View:
    """A tensor of a call: a view of one of its buffers."""

    buffer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    change: Callable[[Tensor], Tensor] | None = None


@dataclass
class Call:
    """All that goes into one call, so that it can be made twice, from equal memory."""

    op: str
    buffers: list[Tensor]
    xs: list[View]
    others: list[View]  # ys, or outs
    tiles: list[Tile]
    slots: int
    vector: Tensor  # coef, scale or index
    out_tiles: list[Tile] = field(default_factory=list)
    tabled: tuple[list[View], list[View]] | None = None  # what the tables are made from, if not xs and others
    f: str = "pow"
    p: float = 2.0
    notes: list[str] = field(default_factory=list)

    def tensors(self, views: list[View], buffers: list[Tensor]) -> list[Tensor]:
        made = [buffers[v.buffer].as_strided(v.shape, v.strides, v.offset) for v in views]
        return [v.change(x) if v.change is not None else x for v, x in zip(views, made, strict=True)]

    def run(self, buffers: list[Tensor], how: str, before: int = 0) -> Tensor | None:
        """Call the public wrapper, or the reference on what the wrapper would hand on.

        Args:
            before: how often to call the wrapper before with other tensors like those of the table, which recognises
                its tensors from the third time on.
        """
        tabled = self.tabled or (self.xs, self.others)
        of_xs, of_others = (self.tensors(views, buffers) for views in tabled)
        like = of_xs if self.op in ("channel_reduce", "channel_scale_", "channel_compact") else of_others
        tables = [TileTable.from_tiles(like, self.tiles, self.slots)]
        if self.op == "channel_compact":
            tables.append(TileTable.from_tiles(of_others, self.out_tiles, len(self.vector), shared_slots=True))
        for _ in range(before):
            other = [b.clone() for b in buffers]
            with suppress(PatError):
                self._call(*(self.tensors(views, other) for views in tabled), tables, how)
        return self._call(self.tensors(self.xs, buffers), self.tensors(self.others, buffers), tables, how)

    def _call(self, xs: list[Tensor], others: list[Tensor], tables: list[TileTable], how: str) -> Tensor | None:
        is_reference = how == "reference"
        module: Any = reference if is_reference else ops
        given = [table.table for table in tables] if is_reference else tables
        if self.op == "channel_compact":
            pair = (bits(others), bits(xs)) if is_reference else (others, xs)
            module.channel_compact(*pair, *given, self.vector)
            return None
        if self.op == "channel_reduce":
            ys: Any = others if self.f != "pow" or others else None
            if is_reference:
                return reference.channel_reduce(xs, ys or [], *given, self.slots, self.f, self.p)
            return ops.channel_reduce(xs, *tables, ys, self.f, self.p)
        if self.op == "channel_axpy_":
            module.channel_axpy_(others, xs, *given, self.vector)
        else:
            module.channel_scale_(xs, *given, self.vector)
        return None


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """The same memory as integers: the reference cannot index every dtype, and NaN is not equal to itself."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.view(integer[t.element_size()]) for t in tensors]


def layout(rng: random.Random, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Return strides with the axes in any order and gaps here and there, and the elements they span."""
    strides, step = [0] * len(sizes), 1
    for axis in rng.sample(range(len(sizes)), len(sizes)):
        strides[axis] = step
        step = step * max(1, sizes[axis]) + (rng.randint(1, 5) if rng.random() < 0.2 else 0)
    return tuple(strides), step


def size(rng: random.Random) -> int:
    return rng.choice([0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, rng.randint(1, 150)])


def tile_of(rng: random.Random, tensor: int, view: View, slots: int) -> tuple[Tile, int]:
    r, c, k = view.shape
    row, col = (rng.random() < 0.8 for _ in range(2))
    tile = Tile(tensor, 0, (r, c, k), view.strides, slots if row else -1, slots + (r if row else 0) if col else -1)
    return tile, slots + (r if row else 0) + (c if col else 0)


def good(rng: random.Random) -> Call:
    op = rng.choice(OPS)
    dtype = rng.choice(MOVABLE if op == "channel_compact" else FLOATS)
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    call = Call(op, [], [], [], [], 0, torch.empty(0))

    def new(sizes: tuple[int, ...], strides: tuple[int, ...], span: int) -> View:
        margin = rng.randint(0, 3)
        values = torch.randn(span + margin, generator=generator, dtype=torch.float64)
        call.buffers.append(values.to(dtype) if dtype.is_floating_point else (values * 99).to(dtype))
        return View(len(call.buffers) - 1, sizes, strides, margin)

    kept: list[int] = []
    for number in range(rng.choice([0, 1, 1, 2, 3, 6])):
        sizes = (size(rng), size(rng), rng.choice([1, 1, 2, 9, 25]))
        strides, span = layout(rng, sizes)
        call.xs.append(new(sizes, strides, span))
        tile, call.slots = tile_of(rng, number, call.xs[-1], call.slots)
        if op != "channel_compact":
            call.tiles.append(tile)
            if op == "channel_axpy_" or rng.random() < 0.5:
                call.others.append(new(sizes, strides, span))
            continue
        call.tiles.append(Tile(number, 0, sizes, strides))
        lists, left = [], []
        for length in sizes[:2]:
            rows = sorted(rng.sample(range(length), rng.randint(0, length)))
            lists.append(len(kept) if rng.random() < 0.7 else -1)
            left.append(len(rows) if lists[-1] >= 0 else length)
            kept += rows if lists[-1] >= 0 else []
        out_sizes = (left[0], left[1], sizes[2])
        out_strides, out_span = layout(rng, out_sizes)
        call.others.append(new(out_sizes, out_strides, out_span))
        call.out_tiles.append(Tile(number, 0, out_sizes, out_strides, lists[0], lists[1]))
    if op == "channel_compact":
        call.vector = torch.tensor(kept, dtype=torch.int32)
        return call
    if op == "channel_reduce" and len(call.others) == len(call.xs):
        call.f = rng.choice(["mul", "absmul", "sqmul"])
    if op == "channel_scale_" or (op == "channel_reduce" and call.f == "pow"):
        call.others = []
    call.p = rng.choice([0.0, 0.5, 1.0, 2.0, 3.0])
    call.slots += rng.choice([0, 0, 1, 7])
    call.vector = torch.randn(call.slots, generator=generator, dtype=torch.float64)
    call.vector[torch.rand(call.slots, generator=generator) < 0.3] = rng.choice([0.0, 1.0])
    call.vector = call.vector.to(ops.accumulator(dtype))
    return call


ODD = (-(2**63), -(2**40), -7, -2, -1, 0, 1, 2, 3, 64, 1000, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**70)


def odd_tile(rng: random.Random, tile: Tile) -> Tile:
    entry = list(tile.entry())
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(entry))
        entry[at] = rng.choice([rng.choice(ODD), entry[at] + rng.choice([-1, 1])])
    tensor, offset, r, c, k, sr, sc, sk, row, col = entry
    return Tile(tensor, offset, (r, c, k), (sr, sc, sk), row, col)


CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.real.to(torch.float64),
    lambda x: x.real.to(torch.float16),
    lambda x: x.real.to(torch.int32),
    lambda x: x.to(torch.bool),
    lambda x: x.to(torch.complex128),
    lambda x: x.to(torch.float8_e4m3fn) if not x.is_complex() else x,
    lambda x: x.to("meta"),
    lambda x: x.contiguous().clone(),
    lambda x: x[:0],
    lambda x: x[:-1],
    lambda x: x.mT,
    lambda x: x.reshape(-1),
    lambda x: x.unsqueeze(0),
    lambda x: x.to_sparse(),
    lambda x: torch._neg_view(x) if x.dtype in FLOATS else x,
    lambda x: x.conj(),
    lambda x: x.detach().requires_grad_() if x.dtype in FLOATS else x,
    lambda x: without_memory(x),
    lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
)


def without_memory(x: Tensor) -> Tensor:
    gone = x.clone(memory_format=torch.preserve_format)
    gone.untyped_storage().resize_(0)
    return gone


def other_tensor(rng: random.Random, call: Call) -> None:
    views = rng.choice([v for v in (call.xs, call.others) if v] or [[]])
    if views:
        views[rng.randrange(len(views))].change = rng.choice(CHANGES)


def other_tile(rng: random.Random, call: Call) -> None:
    tiles = rng.choice([t for t in (call.tiles, call.out_tiles) if t] or [[]])
    if tiles:
        at = rng.randrange(len(tiles))
        tiles[at] = odd_tile(rng, tiles[at])


def repeated(rng: random.Random, call: Call) -> None:
    things: list[Any] = rng.choice([call.tiles, call.out_tiles, call.xs, call.others])
    if things:
        things.append(rng.choice(things))


def left_out(rng: random.Random, call: Call) -> None:
    things: list[Any] = rng.choice([call.tiles, call.out_tiles, call.xs, call.others])
    if things:
        things.pop(rng.randrange(len(things)))


def shared_memory(rng: random.Random, call: Call) -> None:
    """Let tensors lie in one another's memory, wholly or in part."""
    views = call.xs + call.others
    if len(views) < 2:
        return
    one, two = rng.sample(views, 2)
    one.buffer, one.offset = two.buffer, rng.choice([two.offset, two.offset + 1, one.offset])
    span = one.offset + sum(max(0, n - 1) * s for n, s in zip(one.shape, one.strides, strict=True)) + 1
    grown = call.buffers[one.buffer]
    call.buffers[one.buffer] = torch.cat([grown, grown.new_zeros(max(0, span - len(grown)))])


def expanded(rng: random.Random, call: Call) -> None:
    for views, tiles in ((call.xs, call.tiles), (call.others, call.out_tiles)):
        if views and rng.random() < 0.5:
            at = rng.randrange(len(views))
            strides = [0 if rng.random() < 0.5 else s for s in views[at].strides]
            views[at].strides = tuple(strides)
            if tiles and len(tiles) > at:
                t = tiles[at]
                tiles[at] = Tile(t.tensor, t.offset, t.sizes, (strides[0], strides[1], strides[2]), t.row, t.col)


def other_vector(rng: random.Random, call: Call) -> None:
    old = call.vector
    if lacks_memory(old):
        return
    changes: list[Callable[[], Tensor]] = [
        lambda: old[:-1],
        lambda: torch.cat([old, old]),
        lambda: old.to(torch.float16),
        lambda: old.to(torch.int64),
        lambda: old.to("meta"),
        lambda: torch.stack([old, old], 1)[:, 0],
        lambda: old.unsqueeze(0),
        lambda: old.flip(0),
        lambda: torch.randint(-3, 200, old.shape, dtype=torch.int32),
        lambda: torch.where(torch.rand(old.shape) < 0.2, torch.tensor(2**31 - 1), old).to(old.dtype),
        lambda: torch._neg_view(old) if old.dtype in FLOATS else old,
        lambda: without_memory(old),
        lambda: torch._efficientzerotensor(old.shape, dtype=old.dtype),
    ]
    if call.op == "channel_scale_" and call.xs and len(call.buffers[call.xs[0].buffer]) >= call.slots:
        buffer = call.buffers[call.xs[0].buffer]
        if buffer.dtype == old.dtype:
            changes.append(lambda: buffer[: call.slots])
    call.vector = rng.choice(changes)()


def other_numbers(rng: random.Random, call: Call) -> None:
    call.f = rng.choice(["pow", "mul", "absmul", "sqmul", "abs", ""])
    call.p = rng.choice([-1.0, 0.0, 64.0, float("inf"), float("nan")])
    call.slots = rng.choice([call.slots - 1, call.slots + 1, -1, 0, 10_000])


def stale(rng: random.Random, call: Call) -> None:
    """Keep the tables while the tensors shrink or change their layout."""
    call.tabled = (copy.deepcopy(call.xs), copy.deepcopy(call.others))
    for view in call.xs + call.others:
        if rng.random() < 0.5 and 0 not in view.shape:
            shape = tuple(rng.randint(1, n) for n in view.shape)
            view.shape, view.strides = shape, rng.choice([view.strides, (shape[1] * shape[2], shape[2], 1)])


SPOILERS = (
    other_tensor,
    other_tile,
    repeated,
    left_out,
    shared_memory,
    expanded,
    other_vector,
    other_numbers,
    stale,
)


def close(found: Tensor, want: Tensor, dtype: torch.dtype, scale: float) -> bool:
    if not dtype.is_floating_point:
        return torch.equal(found, want)
    rtol = RTOL.get(dtype, 0.0)
    return torch.allclose(found.double(), want.double(), rtol=rtol, atol=rtol * scale, equal_nan=True)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def attempt(seed: int) -> str:
    """Make one call; return "refused" or "done".

    Raises:
        AssertionError: anything but a PatError came out, or another result than the reference's.
    """
    rng = random.Random(seed)
    call = good(rng)
    for spoil in rng.choices(SPOILERS, k=rng.choice([0, 1, 1, 1, 2, 3])):
        spoil(rng, call)
        call.notes.append(spoil.__name__)
    what = f"seed {seed}: {call.op} with {call.notes}"
    mine, theirs = [[b.clone() for b in call.buffers] for _ in range(2)]
    # Every other compaction writes past the caches, which else only large ones do.
    cpu._C.set_stream_bytes(0 if seed % 2 else -1)
    try:
        found = call.run(mine, "ops", before=seed % 4)
    except PatError:
        assert all(equal_bits(a, b) for a, b in zip(mine, theirs, strict=True)), what
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        cpu._C.set_stream_bytes(-1)
    want = call.run(theirs, "reference")
    if want is not None:
        assert found is not None
        if found.is_meta:
            return "done"
        scale = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
        assert close(found, want, want.dtype, 10 * scale + 1), what
    for a, b in zip(mine, theirs, strict=True):
        exact = call.op in ("channel_compact", "channel_reduce")
        same = equal_bits(a, b) if exact else close(a, b, a.dtype, 10.0)
        assert same, what
    return "done"


@pytest.mark.parametrize("first", range(0, CALLS, BATCH))
def test_calls_are_refused_or_right(first: int) -> None:
    seen = {attempt(seed) for seed in range(first, min(CALLS, first + BATCH))}
    assert seen == {"refused", "done"}
