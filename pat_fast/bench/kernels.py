"""The four ops of one backend, called directly on tensors with the shapes of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..backends import reference, runner, shortcut
from ..ops import NONE, Tile, TileTable, accumulator
from ..surgery.fresh import fresh
from ..surgery.layout import largest_first
from .clock import Timed
from .results import Mismatch

Shape = tuple[int, ...]
Ops = Mapping[str, Callable[..., Any]]

KEEP = 0.75
"""Share of rows and of columns that ``channel_compact`` keeps."""
RTOL = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 2e-3}
VARIANTS = {
    "channel_reduce": ("channel_reduce", "channel_reduce mul"),
    "channel_axpy_": ("channel_axpy_",),
    "channel_scale_": ("channel_scale_",),
    "channel_compact": ("channel_compact", "channel_compact fresh"),
}
"""For each op the calls that are timed."""
COPIES = 4
"""What "channel_compact fresh" takes of each tensor: a parameter, its gradient and two moments."""
LINE = 64
"""Bytes that memory hands over at a time."""
MOST = 4e9
"""Bytes of these above which it is left out: beside them there are what is left and another library's copies."""


@dataclass(frozen=True)
class Call:
    """One call to time.

    Attributes:
        traffic: which bandwidth bounds it.
        moved: bytes that any implementation must move.
        written: the tensors that it changes.
        along: bytes that are read along with those, since memory hands over whole lines.
        rival: PyTorch's own way to the same, by its name.
    """

    traffic: str
    moved: int
    run: Timed
    written: list[Tensor]
    along: int = 0
    rival: tuple[str, Callable[[], list[Tensor]]] | None = None


class Factors(NamedTuple):
    """What a call adds and multiplies by, a number for each slot."""

    coef: Tensor
    scale: Tensor


class Copied(NamedTuple):
    """Tensors, the shapes and strides of what they become, and the two tables."""

    xs: list[Tensor]
    shapes: list[Shape]
    strides: list[Shape]
    tables: tuple[Tensor, Tensor]

    def fresh(self, outs: list[Tensor], poisoned: bool) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
        """Make what they become, some at a time; ``poisoned``: filled with NaN."""
        parts = fresh(self.xs, self.shapes, self.strides, outs, watched=False)
        return ((_poisoned(made), xs) for made, xs in parts) if poisoned else parts


def _poisoned(tensors: list[Tensor]) -> list[Tensor]:
    """``tensors``, all NaN: what has just been made may lie where an earlier call left the right values."""
    for tensor in tensors:
        tensor.fill_(math.nan)
    return tensors


class Kernels:
    """Tensors of a model's shapes, their tables, and the calls to time.

    Args:
        shapes: one that is empty, of a single number, is taken for a vector of one.
        channels_last: lay out convolutions so.
    """

    def __init__(self, shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.generator = torch.Generator(device).manual_seed(0)
        self.xs = [self._new(shape or (1,), dtype, device) for shape in shapes]
        self.ys = [torch.empty_like(x).normal_(generator=self.generator) for x in self.xs]
        self.bytes = sum(x.numel() * x.element_size() for x in self.xs)
        self._more: list[list[Tensor]] = []
        tiles, slots = tiles_of(self.xs)
        self.table = TileTable.from_tiles(self.xs, tiles, slots)
        random = torch.rand(slots, device=device, generator=self.generator, dtype=accumulator(dtype))
        # Near 0 and 1, so that values stay in range over thousands of calls; not 0 and 1, which would not be work.
        self.timed = Factors(random * 1e-3, 1 + (random - 0.5) * 2e-4)
        # Far from them and from one another: with those above, halves are as they should be where nothing was done.
        self.compared = Factors(0.5 + 1.5 * random, 1.25 + 0.75 * random)
        self._cut(device)

    def _new(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        if self.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return x.normal_(generator=self.generator)

    def _cut(self, device: torch.device) -> None:
        """Destinations of a compaction that keeps `KEEP` of the rows and columns of every matrix."""
        self.lists: list[list[Tensor]] = []
        cuts, at = [], 0
        for x in self.xs:
            lists, starts = list[Tensor](), []
            for length in x.shape[:2]:
                kept = torch.randperm(length, generator=torch.Generator().manual_seed(length))
                lists.append(kept[: math.ceil(length * KEEP)].sort().values.to(device))
                starts.append(at)
                at += len(lists[-1])
            self.lists.append(lists)
            out = torch.empty([*map(len, lists), *x.shape[2:]], dtype=x.dtype, device=device)
            if self.channels_last and x.dim() == 4:
                out = out.to(memory_format=torch.channels_last)
            cuts.append((out, starts))
        self.outs = [out for out, _ in cuts]
        self.kept = sum(out.numel() * out.element_size() for out in self.outs)
        plain, _ = tiles_of(self.outs)
        tiles = [
            replace(tile, row=starts[0], col=starts[1] if len(starts) > 1 else NONE)
            for tile, (_, starts) in zip(plain, cuts, strict=True)
        ]
        self.index = torch.cat([kept for lists in self.lists for kept in lists]).to(torch.int32)
        self.out_table = TileTable.from_tiles(self.outs, tiles, at, shared_slots=True)

    def call(self, name: str, ops: Ops, compared: bool = False) -> Call:
        """The call ``name``, one of ``VARIANTS``, of a backend's ``ops``.

        Args:
            compared: it is not for timing: it changes values by much, and poisons what it makes.
        """
        tiles, slots = self.table.table, self.table.slots
        coef, scale = self.compared if compared else self.timed
        op = ops[name.split()[0]]
        if name == "channel_reduce":
            return Call("read", self.bytes, lambda: op(self.xs, [], tiles, slots, "pow", 2.0), [])
        if name == "channel_reduce mul":
            return Call("read", 2 * self.bytes, lambda: op(self.xs, self.ys, tiles, slots, "mul", 2.0), [])
        if name == "channel_axpy_":
            return Call("axpy", 3 * self.bytes, lambda: op(self.ys, self.xs, tiles, coef), self.ys)
        if name == "channel_scale_":
            return Call("scale", 2 * self.bytes, lambda: op(self.ys, tiles, scale), self.ys)
        if name == "channel_compact fresh":
            return self._fresh(op, compared)
        targets = self.out_table.table
        return Call(
            "copy", 2 * self.kept, lambda: op(self.outs, self.xs, tiles, targets, self.index), self.outs, self.along
        )

    @cached_property
    def along(self) -> int:
        """Bytes of what a compaction drops that lie in one line with what it keeps."""
        read = 0
        for x, lists in zip(self.xs, self.lists, strict=True):
            keeps = torch.ones_like(x, dtype=torch.bool)
            for dim, kept in enumerate(lists):
                keeps &= torch.zeros_like(keeps).index_fill_(dim, kept, True)
            in_memory = keeps.as_strided((x.numel(),), (1,))
            each = LINE // x.element_size()
            lines = nn.functional.pad(in_memory, (0, -x.numel() % each)).view(-1, each)
            read += int(lines.any(1).sum()) * LINE
        return read - self.kept

    def _fresh(self, op: Callable[..., Any], poisoned: bool) -> Call:
        """A prune's copies: of every tensor four, into memory that is new; beside it one dimension after the other.

        As in a prune, the backend that can copies the small tensors, with those that have most of the bytes under way.
        """
        xs = [x for copy in (self.xs, self.ys, *self._moments()) for x in copy]
        places, count = largest_first(np.array([out.numel() for out in self.outs] * COPIES))
        order = places.tolist()
        device = self.index.device.type
        beside = shortcut("compact_beside", device) if op is runner("channel_compact", device) else None
        parts = (order, []) if beside is None else (order[:count], order[count:])
        large, small = (self._part(xs, part) for part in parts)

        def ours() -> list[Tensor]:
            if beside is None:
                outs = [out for part, _ in large.fresh([], poisoned) for out in part]
                op(outs, large.xs, *large.tables, self.index)
                return outs
            bytes_, outs, others = xs[0].element_size(), list[Tensor](), list[Tensor]()

            def meanwhile() -> None:
                beside(small.fresh(others, poisoned), *small.tables, self.index, bytes_)

            beside(large.fresh(outs, poisoned), *large.tables, self.index, bytes_, meanwhile)
            return outs + others

        def rival() -> list[Tensor]:
            found: list[Tensor] = []
            for x, kept in cuts:
                for dim, index in enumerate(kept):
                    x = x.index_select(dim, index)
                found.append(x)
            return found

        cuts = [(xs[i], self.lists[i % len(self.lists)]) for i in order]
        return Call("copy", 2 * COPIES * self.kept, ours, [], COPIES * self.along, ("index_select", rival))

    def _part(self, xs: list[Tensor], places: list[int]) -> Copied:
        """Some of the copies."""
        tables = [table.table.repeat(COPIES, 1)[places] for table in (self.table, self.out_table)]
        for table in tables:
            table[:, 0] = torch.arange(len(places))
        outs = [self.outs[i % len(self.outs)] for i in places]
        shapes = [tuple(out.shape) for out in outs]
        return Copied([xs[i] for i in places], shapes, [out.stride() for out in outs], (tables[0], tables[1]))

    def _moments(self) -> list[list[Tensor]]:
        if not self._more:
            self._more = [[torch.empty_like(x).copy_(y) for x, y in zip(self.xs, self.ys, strict=True)] for _ in "mv"]
        return self._more

    def check(self, name: str, ops: Ops) -> None:
        """Compare the call with the reference's on the tensors that are timed.

        Raises:
            Mismatch: they differ; it says by how much, and where.
        """
        before = [y.clone() for y in self.ys]
        results: list[list[Tensor]] = []
        oracle: Any = reference.OPS
        for these in (ops, oracle):
            call = self.call(name, these, compared=True)
            _poisoned(self.outs)
            returned = call.run()
            if isinstance(returned, Tensor):
                results.append([returned])
            else:
                results.append(returned if isinstance(returned, list) else [x.clone() for x in call.written])
            for y, old in zip(self.ys, before, strict=True):
                y.copy_(old)
        if call.rival is not None:
            results.append(call.rival[1]())
        for wanted in results[1:]:
            if len(results[0]) != len(wanted):
                raise Mismatch(f"returned {len(results[0])} tensors, the reference {len(wanted)}")
            for got, want in zip(results[0], wanted, strict=True):
                problem = self._difference(name, got, want)
                if problem:
                    raise Mismatch(problem)

    def _difference(self, name: str, got: Tensor, want: Tensor) -> str:
        # Sums are float32 whatever was summed; compaction moves bits.
        rtol = 0.0 if name.startswith("channel_compact") else RTOL[want.dtype]
        # Sums of products cancel: measured against the largest sum.
        atol = rtol * (1.0 if name != "channel_reduce mul" else float(want.abs().max()))
        if torch.allclose(got, want, rtol=rtol, atol=atol):
            return ""
        worst = float((got.double() - want.double()).abs().max())
        return f"differs from the reference by up to {worst:.1e} in a tensor of shape {list(want.shape)}"


def tiles_of(xs: Sequence[Tensor]) -> tuple[list[Tile], int]:
    """One tile a tensor, outputs by inputs by kernel, each with slots of its own; the number of slots."""
    tiles, slot = [], 0
    for number, x in enumerate(xs):
        if x.dim() < 2:
            tiles.append(Tile(number, 0, (x.numel(), 1, 1), (1, 1, 1), slot))
            slot += x.numel()
            continue
        r, c = x.shape[:2]
        kernel = math.prod(x.shape[2:])
        strides = (x.stride(0), x.stride(1), x.stride(-1) if x.dim() > 2 else 1)
        tiles.append(Tile(number, 0, (r, c, kernel), strides, slot, slot + r))
        slot += r + c
    return tiles, slot
