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

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
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


def along(factor: IntArray, dim: int) -> IntArray | None:
    """The slots along ``dim`` as a vector, or None if ``factor`` is not a function of ``dim`` alone."""
    return factor.reshape(-1) if varying(factor) == (dim,) else None


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
        low = np.minimum(root[a], root[b])
        # Hook both ends, and both old roots, to the smaller root; then shorten every path.
        new = root.copy()
        for ends in (root[a], root[b]):
            np.minimum.at(new, ends, low)
        while True:
            jumped = new[new]
            if np.array_equal(jumped, new):
                break
            new = jumped
        if np.array_equal(new, root):
            return root
        root = new


@dataclass
class Solution:
    """What the constraints add up to; all arrays have one entry per slot."""

    count: int  # slots proper; phantoms come behind them
    channel: IntArray  # smallest slot of the same channel
    unit: IntArray  # smallest slot of the same unit
    frozen: dict[int, str]  # unit (smallest slot) -> why it must stay
    noted: dict[int, str]  # channel (smallest slot) -> statistic that it takes part in


class Slots:
    """Hands out slots and collects what the traced ops say about them."""

    def __init__(self) -> None:
        self.count = 0
        self.phantoms = 0
        self._unify: list[IntArray] = []
        self._couple: list[IntArray] = []
        self._freeze: list[tuple[IntArray, str]] = []
        self._notes: list[tuple[IntArray, str]] = []

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

    def unify(self, a: IntArray, b: IntArray) -> None:
        """Say that ``a`` and ``b`` (broadcast against each other) are the same channels."""
        if a is b:
            return
        pairs = _pairs(a, b)
        if self.phantoms and pairs.size and pairs.max() >= PHANTOM:
            coarse = (pairs >= PHANTOM).any(axis=0)
            self._couple.append(pairs[:, coarse])
            pairs = pairs[:, ~coarse]
        self._unify.append(pairs)

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
        none = np.empty((2, 0), dtype=np.int64)
        total = self.count + self.phantoms
        channel = components(total, np.concatenate([none, *self._unify], axis=1))
        couples = np.concatenate([none, *self._couple], axis=1)
        unit = components(total, self.index(couples), start=channel)
        frozen: dict[int, str] = {}
        for slots, reason in self._freeze:
            for root in np.unique(unit[self.index(slots)]).tolist():
                frozen.setdefault(root, reason)
        noted: dict[int, str] = {}
        for slots, text in self._notes:
            for root in np.unique(channel[self.index(slots)]).tolist():
                noted.setdefault(root, text)
        return Solution(self.count, channel, unit, frozen, noted)

    def index(self, slots: IntArray) -> IntArray:
        """Where ``slots`` stand in a :class:`Solution`: phantoms behind the slots proper."""
        if not self.phantoms:
            return slots
        return np.where(slots >= PHANTOM, slots - PHANTOM + self.count, slots)


def _pairs(a: IntArray, b: IntArray) -> IntArray:
    if a.shape != b.shape:
        a, b = np.broadcast_arrays(a, b)
    pairs = np.empty((2, a.size), dtype=np.int64)
    pairs[0], pairs[1] = a.reshape(-1), b.reshape(-1)
    return pairs
