"""Cutting tensors in batches, so that a prune can be undone and needs little memory beside the model.

When a tensor has been cut, what went of it is kept with what stayed, and the old tensor is let go of: together they
are as large as it was. The last batch keeps its old tensors; its new ones are all that comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SurgeryError
from ..ops.tiles import NONE, WIDTH
from ..plan.flat import IndexArray
from .gather import Gathering, Pair, Row, pairs
from .layout import dense_strides

ROOM = 64 * 2**20
"""Bytes that a prune may take beside the model where speed counts more than memory, in place of its largest tensor's.
To copy what goes takes as long as to copy what stays: small models are spared that."""
STEP = 16 * 2**20
"""Bytes that are cut at once if there is room for them and the largest tensor is no larger. What comes next finds its
memory where these were; more than 32 MiB at once the C library would ask of the system, page by page."""
SOME = 2**20  # elements that are put back at once
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes that hold what is moved, by size

_use_count: Any = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)


@dataclass(slots=True, eq=False)
class Move:
    """A tensor that is to be cut.

    Attributes:
        number: of the plan's tensor that it is laid out as.
        old: the tensor as it is, until it is let go of.
        put: puts another in its place.
        cut: makes the new tensor, where the old one is of another shape than the plan's.
        holders: tensors that share its memory and are known here.
    """

    number: int
    old: Tensor | None
    put: Callable[[Tensor], object]
    cut: Callable[[], Tensor] | None = None
    holders: int = 1

    @property
    def frees(self) -> bool:
        """Whether its memory is free when it is let go of, and can be laid out again as it was."""
        old = self.old
        if self.cut is not None or old is None or old.is_neg() or old.is_conj():
            return False
        storage = old.untyped_storage()
        return (
            storage.nbytes() == old.nbytes
            and _use_count(storage._cdata) <= self.holders + 1
            and dense_strides(old.shape, old.stride()) == old.stride()
        )


class Copy:
    """The copies of tensors of one device and dtype."""

    def __init__(self, gathering: Gathering) -> None:
        self._gathering = gathering
        self._moves: list[Move] = []
        self._xs: list[Tensor] = []
        self._outs: list[Tensor] = []  # what stays of each; then what goes of all, if that is copied
        self._layouts: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._plain: list[int] = []  # tensors of the plan ...
        self._places: list[int] = []  # ... and where they stand in the lists above
        self._odd: list[Pair] = []
        self._odd_gone: list[Pair] = []
        self._tables: tuple[IndexArray, IndexArray, Tensor] | None = None

    def add(self, move: Move) -> None:
        """Plan a copy."""
        gathering, number, place, source = self._gathering, move.number, len(self._xs), move.old
        assert source is not None
        if source.is_neg() or source.is_conj():
            source = source.resolve_neg().resolve_conj()
        stride, shape = source.stride(), gathering.shapes[number]
        plain = gathering.plain[number] and stride == gathering.layout.strides[number]
        strides = gathering.strides[number] if plain else dense_strides(shape, stride)
        # No name here for what is new: the traceback of an error would keep it.
        self._outs.append(torch.empty_strided(shape, strides, dtype=source.dtype, device=source.device))
        if plain:
            self._plain.append(number)
            self._places.append(place)
        else:
            for stays, pair in pairs(gathering, number, place, stride, strides):
                (self._odd if stays else self._odd_gone).append(pair)
        self._xs.append(source)
        self._moves.append(move)

    def run(self, lets_go: bool) -> None:
        """Copy what stays of the tensors, and what goes of them if they are to be let go of."""
        before, after = self._kept()
        if lets_go:
            sources, targets, length = self._gone()
            before, after = np.concatenate([before, sources]), np.concatenate([after, targets])
            self._layouts = [(x.shape, x.stride()) for x in self._xs]
            self._outs.append(self._xs[0].new_empty(length))
        index = self._gathering.index()
        self._tables = before, after, index
        xs, self._xs = self._xs, []
        # The tables were made from the plan and from tensors that were held against it just now: the public
        # wrapper's checks of each tensor would say the same again.
        torch.ops.pat_fast.channel_compact.default(
            self._outs, xs, torch.from_numpy(before), torch.from_numpy(after), index.to(xs[0].device)
        )

    def put(self, lets_go: bool) -> None:
        """Put what stays in the places of the tensors."""
        for move, new in zip(self._moves, self._outs, strict=not lets_go):
            move.put(new)
            if lets_go:
                move.old = None

    def back(self) -> None:
        """Make the tensors that were let go of again, of what stayed of them and what went."""
        lost = {place: move for place, move in enumerate(self._moves) if move.old is None}
        if not lost:
            return
        assert self._tables is not None
        made, like = {}, self._outs[0]
        for place in lost:
            shape, stride = self._layouts[place]
            made[place] = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        before, after, index = self._tables
        for source, target in zip(before.tolist(), after.tolist(), strict=True):
            if source[0] in made:
                _put_back(_view(made[source[0]], source), _view(self._outs[target[0]], target), target, index)
        for place, move in lost.items():
            move.old = made[place]

    def _kept(self) -> tuple[IndexArray, IndexArray]:
        """The two tables of what stays."""
        tables = []
        for side, tiles in enumerate((self._gathering.before, self._gathering.after)):
            table = np.zeros((len(self._plain) + len(self._odd), WIDTH), dtype=np.int64)
            table[: len(self._plain), 0] = self._places
            table[: len(self._plain), 2:] = tiles[self._plain]
            if self._odd:
                table[len(self._plain) :] = [pair[side] for pair in self._odd]
            tables.append(table)
        return tables[0], tables[1]

    def _gone(self) -> tuple[IndexArray, IndexArray, int]:
        """The two tables of what goes, which is laid end to end, and how long it is."""
        plain = np.zeros((2, 2 * len(self._plain), WIDTH), dtype=np.int64)
        plain[0, :, 0] = np.repeat(self._places, 2)
        plain[0, :, 2:] = np.repeat(self._gathering.before[self._plain], 2, axis=0)
        plain[1, :, 2:] = self._gathering.gone[self._plain].reshape(-1, WIDTH - 2)
        odd = np.array(self._odd_gone, dtype=np.int64).reshape(len(self._odd_gone), 2, WIDTH).swapaxes(0, 1)
        sources, targets = np.concatenate([plain, odd], axis=1)
        length = targets[:, 2:5].prod(1)
        targets[:, 0], targets[:, 1] = len(self._outs), np.cumsum(length) - length
        some = length > 0
        return sources[some], targets[some], int(length.sum())


def _view(tensor: Tensor, tile: Row) -> Tensor:
    """The tile ``[R, C, K]`` of ``tensor``, as whole numbers: a copy of these is one of the bits."""
    offset = tensor.storage_offset() + tile[1]
    return tensor.view(INTEGERS[tensor.element_size()]).as_strided(tile[2:5], tile[5:8], offset)


def _put_back(whole: Tensor, part: Tensor, target: Row, index: Tensor) -> None:
    """Copy ``part``, which was gathered from ``whole`` by the lists of ``target``, to where it was."""
    rows, columns = (
        None if start == NONE else index[start : start + size].to(whole.device, torch.int64)
        for start, size in zip(target[8:], target[2:4], strict=True)
    )
    if rows is None:
        whole.copy_(part) if columns is None else whole.index_copy_(1, columns, part)
    elif columns is None:
        whole.index_copy_(0, rows, part)
    else:  # in pieces: what PyTorch makes of the indices may be larger than the tensor
        step = max(1, SOME // (part.shape[1] * part.shape[2]))
        for some, piece in zip(rows.split(step), part.split(step), strict=True):
            whole[some[:, None], columns] = piece


class Batch:
    """Tensors that are cut together.

    Args:
        gathering: says what stays of them.
        moves: the tensors.
        lets_go: whether the old tensors are let go of; they are made again if need be.
    """

    def __init__(self, gathering: Gathering, moves: list[Move], lets_go: bool) -> None:
        self._gathering, self._moves, self._lets_go = gathering, moves, lets_go
        self._copies: dict[tuple[torch.device, torch.dtype], Copy] = {}

    def cut(self) -> None:
        """Make the new tensors, then put them in the places of the old ones."""
        for move in self._moves:
            if move.cut is None:
                assert move.old is not None
                key = move.old.device, move.old.dtype
                copy = self._copies.get(key)
                if copy is None:
                    copy = self._copies[key] = Copy(self._gathering)
                copy.add(move)
        for copy in self._copies.values():
            copy.run(self._lets_go)
        for move in self._moves:
            if move.cut is not None:
                move.put(move.cut())
        for copy in self._copies.values():
            copy.put(self._lets_go)

    def back(self) -> None:
        """Put the old tensors in their places, however many of them have been replaced."""
        for copy in self._copies.values():
            copy.back()
        for move in self._moves:
            assert move.old is not None
            move.put(move.old)
        self._copies.clear()


def batches(gathering: Gathering, moves: list[Move], room: int) -> list[Batch]:
    """The batches in which to cut these tensors.

    Args:
        gathering: says what stays of them.
        moves: the tensors.
        room: bytes that may be taken beside them, if the largest takes fewer.
    Raises:
        SurgeryError: a dtype that cannot be moved.
    """
    olds: list[Any] = [move.old for move in moves]
    for dtype in {old.dtype for old in olds}:
        if dtype.itemsize not in INTEGERS:
            raise SurgeryError(f"expected elements of {(*INTEGERS,)} bytes, got {dtype}; convert the model first")
    counts = gathering.sizes.prod(1)[[move.number for move in moves]]
    left = counts * np.array([old.itemsize for old in olds], dtype=np.int64)
    size_of = [old.nbytes for old in olds]
    del olds
    largest = max(size_of, default=0)
    if left.sum() <= max(room, largest):
        return [Batch(gathering, moves, lets_go=False)]
    extra = np.where([move.frees for move in moves], left, 0)  # of what frees nothing the old tensor may as well stay
    smallest_first = np.argsort(extra, kind="stable")
    stay = set(smallest_first[np.cumsum(extra[smallest_first]) <= max(room, largest)].tolist())
    found: list[list[Move]] = [[]]
    size = 0
    for number, move in enumerate(moves):
        if number not in stay:
            size += size_of[number]
            if size > max(min(STEP, room), largest):
                found.append([])
                size = size_of[number]
            found[-1].append(move)
    last = [moves[number] for number in sorted(stay)]
    return [*(Batch(gathering, some, lets_go=True) for some in found), Batch(gathering, last, lets_go=False)]
