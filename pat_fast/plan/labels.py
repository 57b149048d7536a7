"""Channel labels: which element of a tensor belongs to which channel, and what must go together.

Every prunable axis of every parameter owns *slots*, one per index. While the model is traced, each
activation carries *factors*: integer arrays that name, for every position along some of its dimensions,
the slot whose removal would remove that position. A factor has as many dimensions as its tensor, each of
the tensor's size or of size 1 (the label does not depend on that dimension), so moving data moves labels:
a transpose of the activation is a transpose of the factor.

Ops relate labels in four ways, all recorded here and solved once at the end:

- ``unify``: two slots are the same channel (they are pruned together, as one thing);
- ``couple``: two channels go together, though each has a score of its own (the j-th channel of every
  block of a grouped convolution): they form one *unit*;
- ``freeze``: a channel must stay, with the reason;
- ``note``: a channel takes part in a statistic (a layer norm), so that masking it is not the same as
  removing it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Factors = tuple[IntArray, ...]

# Slots from here on stand for whole units (a head of which only the scores are left, say): what is unified with
# them is coupled.
PHANTOM = 1 << 40


def varying(factor: IntArray) -> tuple[int, ...]:
    """Dimensions that ``factor`` depends on."""
    return _varying(factor.shape)


@lru_cache(maxsize=1024)
def _varying(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(d for d, n in enumerate(shape) if n > 1)


def flat(factor: IntArray) -> IntArray:
    """``factor.reshape(-1)``, as the very vector that it is a view of, if it is all of it in that order."""
    whole = factor.base
    if type(whole) is np.ndarray and whole.ndim == 1 and whole.size == factor.size and factor.flags.c_contiguous:
        return whole
    return factor.reshape(-1)


def along(factor: IntArray, dim: int) -> IntArray | None:
    """The slots along ``dim`` as a vector, or None if ``factor`` is not a function of ``dim`` alone."""
    return flat(factor) if varying(factor) == (dim,) else None


def place(slots: IntArray, dim: int, ndim: int) -> IntArray:
    """The factor of an ``ndim``-dimensional tensor whose dimension ``dim`` is labelled by ``slots``."""
    shape = [1] * ndim
    shape[dim] = len(slots)
    return slots.reshape(shape)


def is_phantom(factor: IntArray) -> bool:
    """Whether ``factor`` labels whole units."""
    return bool((factor >= PHANTOM).any())


def components(n: int, pairs: IntArray, start: IntArray | None = None) -> IntArray:
    """Smallest member of each item's connected component: ``[n]``, for undirected ``pairs [2, m]``.

    ``start`` holds components already found (same convention), which are only ever merged.
    """
    root = np.arange(n) if start is None else start.copy()
    if pairs.size == 0:
        return root
    a, b = pairs
    while True:
        one, two = root[a], root[b]
        apart = one != two
        if not apart.any():
            return root
        # Hook the larger of two roots to the smaller, then shorten every path; what is together stays so.
        a, b, one, two = a[apart], b[apart], one[apart], two[apart]
        np.minimum.at(root, np.maximum(one, two), np.minimum(one, two))
        while True:
            jumped = root[root]
            if (jumped == root).all():
                break
            root = jumped


@dataclass
class Solution:
    """What the constraints add up to; all arrays have one entry per slot."""

    count: int  # slots proper; phantoms come behind them
    channel: IntArray  # smallest slot of the same channel
    unit: IntArray  # smallest slot of the same unit
    frozen: Reasons  # unit (smallest slot) -> why it must stay
    noted: Reasons  # channel (smallest slot) -> statistic that it takes part in


class Reasons(Mapping[int, str]):
    """What was said of units or channels, by their smallest slots; the first thing said of one counts.

    ``root [n]`` maps every slot to the smallest one of its unit or channel; ``said`` are indices into it, with texts.
    """

    def __init__(self, root: IntArray, said: Sequence[tuple[IntArray, str]]) -> None:
        self._texts = [text for _, text in said]
        self._which = np.full(len(root), -1, dtype=np.int64)
        if said:
            order = range(len(said))[::-1]  # of what is assigned to one place the last counts
            slots = np.concatenate([said[i][0] for i in order])
            self._which[root[slots]] = np.repeat(order, [len(said[i][0]) for i in order])

    @property
    def mask(self) -> BoolArray:
        """Of whom something was said: ``[n]``, True at smallest slots only."""
        return self._which >= 0

    def __getitem__(self, root: int) -> str:
        if not 0 <= root < len(self._which) or self._which[root] < 0:
            raise KeyError(root)
        return self._texts[self._which[root]]

    def __iter__(self) -> Iterator[int]:
        return iter(np.flatnonzero(self.mask).tolist())

    def __len__(self) -> int:
        return int(self.mask.sum())


class Slots:
    """Hands out slots and collects what the traced ops say about them."""

    def __init__(self) -> None:
        self.count = 0
        self.phantoms = 0
        self._followers: list[tuple[int, int]] = []  # the first of some, and how many
        self._unify: list[tuple[IntArray, IntArray]] = []
        self._couple: list[IntArray] = []
        self._freeze: list[tuple[IntArray, str]] = []
        self._notes: list[tuple[IntArray, str]] = []
        # What was solved last: of how much, the channels and units found, and how many couples they take in.
        self._merged: tuple[tuple[int, int, int], IntArray, IntArray, int] | None = None

    def new(self, n: int) -> IntArray:
        """``n`` fresh slots."""
        slots = np.arange(self.count, self.count + n, dtype=np.int64)
        self.count += n
        return slots

    def fixed(self, n: int, reason: str) -> IntArray:
        """``n`` fresh slots that must stay: positions that no parameter makes."""
        slots = self.new(n)
        self.freeze(slots, reason)
        return slots

    def phantom(self, members: IntArray, dim: int) -> IntArray:
        """One slot for each row of ``members`` along ``dim``, which stands for all of them together."""
        first = members.take([0], axis=dim)  # rows that repeat (once for each example, say) share a slot
        distinct, which = np.unique(first, return_inverse=True)
        slots = PHANTOM + self.phantoms + which.reshape(first.shape)
        self.phantoms += len(distinct)
        self.couple(slots, members)
        return slots

    def followers(self, n: int) -> IntArray:
        """``n`` slots for what is repeated so often: each stands for the unit that it will meet, if any."""
        slots = PHANTOM + self.phantoms + np.arange(n, dtype=np.int64)
        self.phantoms += n
        self._followers.append((int(slots[0]), n))
        return slots

    def waits(self, factor: IntArray) -> bool:
        """Whether it is for later to say what ``factor`` counts of labels that vary along more dimensions.

        Of units it does not wait: these are what it stands for. Of followers it does.
        """
        first = int(factor.flat[0])
        return not is_phantom(factor) or any(start <= first < start + n for start, n in self._followers)

    def unify(self, a: IntArray, b: IntArray) -> None:
        """Say that ``a`` and ``b`` (broadcast against each other) are the same channels."""
        if a is b:
            return
        if self.proper(a) and self.proper(b):
            if a.shape != b.shape:
                a, b = np.broadcast_arrays(a, b)
            self._unify.append((a, b))
            return
        pairs = _pairs(a, b)
        coarse = (pairs >= PHANTOM).any(axis=0)
        self._couple.append(pairs[:, coarse])
        self._unify.append((pairs[0, ~coarse], pairs[1, ~coarse]))

    def proper(self, slots: IntArray) -> bool:
        """Whether none of ``slots`` stands for a whole unit."""
        return not self.phantoms or not slots.size or bool(slots.max() < PHANTOM)

    def couple(self, a: IntArray, b: IntArray) -> None:
        """Say that ``a`` and ``b`` (broadcast against each other) are removed together or not at all."""
        self._couple.append(_pairs(a, b))

    def couple_blocks(self, slots: IntArray, blocks: int) -> None:
        """Say that ``slots [blocks * n]`` must shrink alike in every block: position j goes in all or none."""
        block = slots.reshape(blocks, -1)
        if blocks > 1:
            self.couple(block[:1], block[1:])

    def freeze(self, slots: IntArray, reason: str) -> None:
        """Say that ``slots`` must stay; the first reason given for a channel is the one reported."""
        self._freeze.append((slots.reshape(-1), reason))

    def note(self, slots: IntArray, text: str) -> None:
        """Say that ``slots`` take part in a statistic over channels."""
        self._notes.append((slots.reshape(-1), text))

    def solve(self) -> Solution:
        """Merge everything said so far. Linear in slots and constraints, up to a logarithm."""
        total = self.count + self.phantoms
        size = (self.count, self.phantoms, len(self._unify))
        if self._merged is None or self._merged[0] != size:
            channel = components(total, _end_to_end(self._unify))
            self._merged = size, channel, channel, 0
        key, channel, unit, done = self._merged
        if done < len(self._couple):  # components only ever merge: what was found before is where to start
            couples = np.concatenate(self._couple[done:], axis=1)
            unit = components(total, self.index(couples), start=unit)
            self._merged = key, channel, unit, len(self._couple)
        frozen = Reasons(unit, [(self.index(slots), reason) for slots, reason in self._freeze])
        noted = Reasons(channel, [(self.index(slots), text) for slots, text in self._notes])
        return Solution(self.count, channel, unit, frozen, noted)

    def index(self, slots: IntArray) -> IntArray:
        """Where ``slots`` stand in a :class:`Solution`: phantoms behind the slots proper."""
        if not self.phantoms:
            return slots
        return np.where(slots >= PHANTOM, slots - PHANTOM + self.count, slots)


def _end_to_end(pairs: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """Pairs of arrays of one shape as one array ``[2, m]``."""
    if not pairs:
        return np.empty((2, 0), dtype=np.int64)
    return np.stack([np.concatenate([side.reshape(-1) for side in sides]) for sides in zip(*pairs, strict=True)])


def _pairs(a: IntArray, b: IntArray) -> IntArray:
    pairs = np.empty((2, *np.broadcast(a, b).shape), dtype=np.int64)
    pairs[0], pairs[1] = a, b
    return pairs.reshape(2, -1)
