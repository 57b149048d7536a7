"""Cutting tensors in batches, so that a prune can be undone and needs little memory beside the model.

When a tensor has been cut, what went of it is kept with what stayed, and the old tensor is let go of: together they
are as large as it was. The last batch keeps its old tensors; its new ones are all that comes on top.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import shortcut
from ..backends.known import check_memory, is_watched
from ..errors import SurgeryError
from ..ops.tiles import NONE, WIDTH
from ..plan.flat import IndexArray
from ..plan.held import Kind, Seen
from .fresh import fresh
from .gather import Gathering, Pair, Part, Row, Shape, pairs
from .layout import dense_strides
from .put import Blanks, blank_like, is_alone, set_tensor

ROOM = 64 * 2**20
"""Bytes that a prune may take beside the model where speed counts more than memory, in place of its largest tensor's.
To copy what goes takes as long as to copy what stays: small models are spared that."""
STEP = 16 * 2**20
"""Bytes that are cut at once if there is room for them and the largest tensor is no larger. What comes next finds its
memory where these were; more than 32 MiB at once the C library would ask of the system, page by page."""
SOME = 2**20  # elements that are put back at once
MUCH = 2**20  # bytes from which on the small tensors are cut while others are copied
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # dtypes that hold what is moved, by size

_use_count: Any = getattr(torch._C, "_storage_Use_Count", lambda storage: 0)


class Moves:
    """Tensors side by side, some of which are to be cut.

    Those of a binding are all here, in the order of its plan, so that nothing needs to be picked out of its lists.

    Attributes:
        cut: places of those that are cut.
        numbers: of the plan's tensors that they are laid out as; after these, of ``joints``.
        olds: the tensors as they are, until they are let go of.
        strides, kinds, alike, lazy: of these, see :class:`pat_fast.plan.held.Seen`.
        holders, keys: where each stands: the data of a tensor, whose key is None, or an entry of a dict or a list.
        joints: the parts of vectors of many tensors.
        made: what makes the new tensor, by the place of one that is of another shape than the plan's.
        grads: parameters that have a gradient, which is not with them while both are of different shapes, and where
            that is meanwhile.
        accumulated: parameters that autograd may have a gradient accumulator of.
        nodes: these accumulators, by the ``id`` of the parameter, until they are dropped.
        blanks: empty tensors of other dtypes, by device and dtype.
    """

    def __init__(self) -> None:
        self.cut: list[int] = []
        self.numbers: list[int] = []
        self.olds: list[Tensor | None] = []
        self.strides: list[tuple[int, ...]] = []
        self.kinds: list[Kind] = []
        self.alike, self.lazy = True, False
        self.holders: list[Any] = []
        self.keys: list[Any] = []
        self.joints: list[list[Part]] = []
        self.made: dict[int, Callable[[], Tensor]] = {}
        self.grads: list[tuple[Tensor, dict[int, Tensor], int]] = []
        self.accumulated: list[Tensor] = []
        self.nodes: dict[int, Any] = {}
        self.blanks: Blanks = {}

    def add_held(self, data: list[Tensor | None], seen: Seen, tensors: list[Tensor], cut: Iterable[int]) -> None:
        """Take up all that a binding's ``tensors`` hold, of which those at ``cut`` are cut; it is let go of there."""
        first = len(self.olds)
        self.cut += [first + place for place in cut] if first else cut
        self._add(range(len(tensors)), data, seen, tensors, [None] * len(tensors))
        data.clear()

    def add(self, number: int, old: Tensor, holder: Any, key: Any) -> None:
        """Take up one that is cut and stands in a dict or list."""
        self.cut.append(len(self.olds))
        self._add([number], [old], Seen.of([old]), [holder], [key])

    def _add(
        self, numbers: Iterable[int], olds: Iterable[Tensor | None], seen: Seen, holders: list[Any], keys: list[Any]
    ) -> None:
        self.alike = self.alike and seen.alike and self.kinds[:1] in ([], seen.kinds[:1])
        self.lazy = self.lazy or seen.lazy
        self.numbers += numbers
        self.olds += olds
        self.strides += seen.strides
        self.kinds += seen.kinds
        self.holders += holders
        self.keys += keys

    def put(self, place: int, new: Tensor) -> None:
        """Let ``new`` stand where the tensor of this place stood."""
        holder, key = self.holders[place], self.keys[place]
        if key is not None:
            holder[key] = new
            return
        node = self.nodes.pop(id(holder), None)  # it is dropped now
        if node is None and is_alone(holder):
            holder.data = new
            return
        kind = new.device, new.dtype
        if kind not in self.blanks:
            self.blanks[kind] = blank_like(new)
        set_tensor(holder, new, None, self.blanks[kind], node)

    def put_all(self, places: Iterable[int], new: Iterable[Tensor]) -> None:
        """:meth:`put` for many, none of which has been put yet."""
        if self.nodes:
            for place, tensor in zip(places, new, strict=True):
                self.put(place, tensor)
            return
        holders, keys = self.holders, self.keys
        for place, tensor in zip(places, new, strict=True):
            if keys[place] is None:
                holders[place].data = tensor
            else:
                holders[place][keys[place]] = tensor

    def frees(self, place: int) -> bool:
        """Whether the memory of a tensor is free when it is let go of, and can be laid out again as it was."""
        old = self.olds[place]
        if place in self.made or old is None or old.is_neg() or old.is_conj():
            return False
        storage = old.untyped_storage()
        known = 2 if self.keys[place] is None else 1  # tensors that share its memory and are known here
        return (
            storage.nbytes() == old.nbytes
            and _use_count(storage._cdata) <= known + 1
            and dense_strides(old.shape, old.stride()) == old.stride()
        )


class Copy:
    """The copies of tensors of one device and dtype.

    Args:
        gathering: says what stays of them.
        moves: the tensors.
        places: which of them.
        numbers: what these are laid out as.
    """

    def __init__(self, gathering: Gathering, moves: Moves, places: IndexArray, numbers: IndexArray) -> None:
        self._gathering, self._moves, self._places, self._numbers = gathering, moves, places.tolist(), numbers
        self._outs: list[Tensor] = []  # what stays of each; then what goes of all, if that is copied
        self._layouts: list[tuple[torch.Size, tuple[int, ...]]] = []
        self._plain: IndexArray = np.zeros(0, dtype=np.int64)  # places of tensors that are one dense tile
        self._odd: list[Pair] = []
        self._odd_gone: list[Pair] = []
        self._tables: tuple[IndexArray, IndexArray, Tensor] | None = None

    def run(self, lets_go: bool, meanwhile: Callable[[], None] | None = None) -> None:
        """Copy what stays of the tensors, and what goes of them if they are to be let go of.

        ``meanwhile`` is called on the way, if it can be while other threads copy.
        """
        xs: list[Any] = [self._moves.olds[place] for place in self._places]
        strides = [self._moves.strides[place] for place in self._places]
        if self._moves.lazy:
            xs = [x.resolve_neg().resolve_conj() for x in xs]
            strides = list(map(Tensor.stride, xs))
        shapes = self._lay_out(strides)
        before, after = self._kept()
        gone: int | None = None
        if lets_go:
            sources, targets, gone = self._gone()
            before, after = np.concatenate([before, sources]), np.concatenate([after, targets])
            self._layouts = [(x.shape, x.stride()) for x in xs]
        index = self._gathering.index()
        self._tables = before, after, index
        # The tables were made from the plan and from tensors that were held against it just now: the public
        # wrapper's checks of each tensor would say the same again. Nor has anyone seen the new tensors yet.
        tables = torch.from_numpy(before), torch.from_numpy(after), index.to(xs[0].device)
        watched = is_watched()
        making = self._make(xs, *shapes, gone, watched)
        compact = shortcut("compact_beside", "cpu") if xs[0].device.type == "cpu" and not watched else None
        if compact is not None:
            compact(making, *tables, xs[0].element_size(), meanwhile)
            return
        check_memory("tensors that are moved", xs)
        deque(making, maxlen=0)  # no name here for what is made: the traceback of an error would keep it
        torch.ops.pat_fast.channel_compact.default(self._outs, xs, *tables, checked=True)
        if meanwhile is not None:
            meanwhile()

    def _make(
        self, xs: list[Tensor], shapes: list[Shape], strides: list[Shape], gone: int | None, watched: bool
    ) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
        """Make the new tensors, some at a time."""
        yield from fresh(xs, shapes, strides, self._outs, watched=watched)
        if gone is not None:
            self._outs.append(xs[0].new_empty(gone))
            yield self._outs[-1:], []

    def _lay_out(self, strides: list[tuple[int, ...]]) -> tuple[list[Shape], list[Shape]]:
        """Shapes and strides of the new tensors; note which have one tile, and the tiles of the others."""
        gathering, numbers = self._gathering, self._numbers
        shapes, dense = gathering.rows(gathering.sizes, numbers), gathering.rows(gathering.strides, numbers)
        plain = gathering.plain[numbers]
        expected = [gathering.expected[number] for number in numbers.tolist()]
        if strides != expected:
            plain &= [a == b for a, b in zip(strides, expected, strict=True)]
        for place in np.flatnonzero(~plain).tolist():
            dense[place] = dense_strides(shapes[place], strides[place])
            for stays, pair in pairs(gathering, int(numbers[place]), place, strides[place], dense[place]):
                (self._odd if stays else self._odd_gone).append(pair)
        self._plain = np.flatnonzero(plain)
        return shapes, dense

    def put(self, lets_go: bool) -> None:
        """Put what stays in the places of the tensors."""
        moves = self._moves
        if not lets_go:
            moves.put_all(self._places, self._outs)
            return
        for place, new in zip(self._places, self._outs, strict=False):
            moves.put(place, new)
            moves.olds[place] = None

    def let_go(self, olds: bool) -> None:
        """Let go of the new tensors, which are in their places, and of the ``olds``, too."""
        self._outs.clear()
        for place in self._places if olds else ():
            self._moves.olds[place] = None

    def back(self) -> None:
        """Make the tensors that were let go of again, of what stayed of them and what went."""
        lost = {at: place for at, place in enumerate(self._places) if self._moves.olds[place] is None}
        if not lost:
            self._outs.clear()  # of a copy that failed the traceback holds the list, and others need the memory
            return
        assert self._tables is not None
        made, like = {}, self._outs[0]
        for at in lost:
            shape, stride = self._layouts[at]
            made[at] = torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
        before, after, index = self._tables
        for source, target in zip(before.tolist(), after.tolist(), strict=True):
            if source[0] in made:
                _put_back(_view(made[source[0]], source), _view(self._outs[target[0]], target), target, index)
        for at, place in lost.items():
            self._moves.olds[place] = made[at]

    def _kept(self) -> tuple[IndexArray, IndexArray]:
        """The two tables of what stays."""
        tables, numbers = [], self._numbers[self._plain]
        for side, tiles in enumerate((self._gathering.before, self._gathering.after)):
            table = np.zeros((len(numbers) + len(self._odd), WIDTH), dtype=np.int64)
            table[: len(numbers), 0] = self._plain
            table[: len(numbers), 2:] = tiles[numbers]
            if self._odd:
                table[len(numbers) :] = [pair[side] for pair in self._odd]
            tables.append(table)
        return tables[0], tables[1]

    def _gone(self) -> tuple[IndexArray, IndexArray, int]:
        """The two tables of what goes, which is laid end to end, and how long it is."""
        numbers = self._numbers[self._plain]
        plain = np.zeros((2, 2 * len(numbers), WIDTH), dtype=np.int64)
        plain[0, :, 0] = np.repeat(self._plain, 2)
        plain[0, :, 2:] = np.repeat(self._gathering.before[numbers], 2, axis=0)
        plain[1, :, 2:] = self._gathering.gone[numbers].reshape(-1, WIDTH - 2)
        odd = np.array(self._odd_gone, dtype=np.int64).reshape(len(self._odd_gone), 2, WIDTH).swapaxes(0, 1)
        sources, targets = np.concatenate([plain, odd], axis=1)
        length = targets[:, 2:5].prod(1)
        targets[:, 0], targets[:, 1] = len(self._places), np.cumsum(length) - length
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
        places: which of them.
        numbers: what each of all tensors is laid out as.
        left: bytes that stay of each.
        lets_go: whether the old tensors are let go of; they are made again if need be.
    """

    def __init__(
        self,
        gathering: Gathering,
        moves: Moves,
        places: IndexArray,
        numbers: IndexArray,
        left: IndexArray,
        lets_go: bool,
    ) -> None:
        self._gathering, self._moves, self._places, self._lets_go = gathering, moves, places, lets_go
        self._numbers, self._left = numbers, left
        self._copies: list[Copy] = []
        self._small: list[Copy] = []  # of these, what is copied beside the largest

    def cut(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Make the new tensors, then put them in the places of the old ones.

        Old ones that stay are replaced, and ``meanwhile`` is called, while other threads copy the largest.
        """
        moves, lets_go = self._moves, self._lets_go
        others, self._small, large = (
            [Copy(self._gathering, moves, some, self._numbers[some]) for some in part] for part in self._parts()
        )
        self._copies = [*others, *self._small, *large]

        def put() -> None:
            for copy in self._copies:
                copy.put(lets_go)

        def beside() -> None:
            for copy in self._small:
                copy.run(lets_go)
            for place in self._places.tolist() if moves.made else ():
                if place in moves.made:
                    moves.put(place, moves.made[place]())
            if not lets_go:
                put()
            if meanwhile is not None:
                meanwhile()

        for copy in others:
            copy.run(lets_go)
        if large:
            large[0].run(lets_go, beside)
        else:
            beside()
        if lets_go:
            put()

    def _parts(self) -> tuple[list[IndexArray], list[IndexArray], list[IndexArray]]:
        """Places of what is copied together, of one device and dtype; of the kind with the most, small and large ones.

        A GPU copies beside the CPU anyway.
        """
        moves, kinds = self._moves, dict[Kind, list[int]]()
        gathered = self._places[~np.isin(self._places, [*moves.made])] if moves.made else self._places
        for place in gathered.tolist() if not moves.alike else ():
            kinds.setdefault(moves.kinds[place], []).append(place)
        *others, most = sorted(map(np.array, kinds.values()), key=len) or [gathered]
        if not len(most) or self._lets_go or moves.kinds[most[0]][0].type != "cpu" or self._left[most].sum() < MUCH:
            return others, [], [most] if len(most) else []
        is_large = self._gathering.large[self._numbers[most]]
        large, small = most[is_large], most[~is_large]
        return others, [small] if len(small) else [], [large] if len(large) else []

    def let_go(self) -> None:
        """Let go of all but the largest old tensors, which are read still; it cannot go back then."""
        for copy in self._copies:
            copy.let_go(olds=copy in self._small)

    def back(self) -> None:
        """Put the old tensors in their places, however many of them have been replaced."""
        for copy in reversed(self._copies):  # what the last one has made is let go of first
            copy.back()
        for place in self._places.tolist():
            old = self._moves.olds[place]
            assert old is not None
            self._moves.put(place, old)
        self._copies.clear()


def batches(gathering: Gathering, moves: Moves, room: int) -> list[Batch]:
    """The batches in which to cut these tensors.

    Args:
        gathering: says what stays of them.
        moves: the tensors.
        room: bytes that may be taken beside them, if the largest takes fewer.
    Raises:
        SurgeryError: a dtype that cannot be moved.
    """
    olds: list[Any] = moves.olds
    kinds = moves.kinds[:1] if moves.alike else moves.kinds
    for _, dtype in set(kinds):
        if dtype.itemsize not in INTEGERS:
            raise SurgeryError(f"expected elements of {(*INTEGERS,)} bytes, got {dtype}; convert the model first")
    numbers, cut = np.array(moves.numbers, dtype=np.int64), np.array(moves.cut, dtype=np.int64)
    left = gathering.sizes.prod(1)[numbers] * np.array([dtype.itemsize for _, dtype in kinds], dtype=np.int64)
    total = left[cut].sum()
    before = {} if total <= room else {place: olds[place].nbytes for place in moves.cut}
    largest = max(before.values(), default=0)
    if total <= max(room, largest):
        return [Batch(gathering, moves, cut, numbers, left, lets_go=False)]
    # Of what frees nothing the old tensor may as well stay.
    extra = {place: int(left[place]) if moves.frees(place) else 0 for place in moves.cut}
    smallest_first = sorted(moves.cut, key=extra.__getitem__)
    together = accumulate(extra[place] for place in smallest_first)
    stay = {place for place, bytes_ in zip(smallest_first, together, strict=True) if bytes_ <= max(room, largest)}
    found: list[list[int]] = [[]]
    size = 0
    for place in moves.cut:
        if place not in stay:
            size += before[place]
            if size > max(min(STEP, room), largest):
                found.append([])
                size = before[place]
            found[-1].append(place)
    return [
        *(Batch(gathering, moves, np.array(some, np.int64), numbers, left, lets_go=True) for some in found),
        Batch(gathering, moves, np.array(sorted(stay), np.int64), numbers, left, lets_go=False),
    ]
