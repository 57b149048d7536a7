"""Channels get their numbers in the flat space: group by group, in the order of the root layers' outputs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from .flat import Holdings, Vectors, count_between
from .labels import PHANTOM, IntArray, Solution
from .trace import Leaf, Work
from .types import Axis, ChannelArray, Frozen, Group, TensorMap, WorkTerm, by_first_use


def layer_of(name: str) -> str:
    """The layer that a tensor is known by: a bare parameter's own name, else the module that has the weight."""
    module, _, local = name.rpartition(".")
    return module if module and local == "weight" else name


class Numbering:
    """Numbers the free channels: group by group, in the order of the root layer's outputs."""

    def __init__(self, solution: Solution, roots: list[tuple[Leaf, int]]) -> None:
        self.solution = solution
        self.roots = roots
        self.frozen: list[Frozen] = []
        self.consumed: set[int] = set()  # groups that some layer sums over
        self._is_frozen = solution.frozen.mask[solution.unit]
        claims = self._claim()
        claims = self._merge_coupled(claims)
        classes = np.concatenate([np.zeros(0, np.int64), *[c for _, c in claims]])
        self.count = len(classes)
        number = np.full(len(solution.channel), -1, dtype=np.int32)
        number[classes] = np.arange(self.count, dtype=np.int32)
        self._number = number[solution.channel]
        self._stand_in(classes)
        self._shared: dict[bytes, ChannelArray] = {}
        self._axes: dict[tuple[int, int, str], Axis | None] = {}
        self._alike: dict[tuple[int, int, str], Axis] = {}
        self._phantoms = len(solution.channel) > solution.count
        # By the id of the slots, which are kept alive: their channels, and whether there are some.
        self._known: dict[int, tuple[IntArray, ChannelArray, bool]] = {}
        self.unit = by_first_use(solution.unit[classes])
        self.n_units = int(self.unit.max()) + 1 if self.count else 0
        self._claims = claims

    def _stand_in(self, classes: IntArray) -> None:
        """A phantom lives as long as its unit: it is counted as the unit's first channel."""
        of_unit = np.full(len(self.solution.unit), -1, dtype=np.int32)
        of_unit[self.solution.unit[classes[::-1]]] = np.arange(self.count, dtype=np.int32)[::-1]
        behind = slice(self.solution.count, None)
        self._number[behind] = of_unit[self.solution.unit[behind]]

    def look_up(self, vectors: Iterable[IntArray]) -> None:
        """Find the channels of ``vectors`` of slots in one go: of each alone it takes several times as long."""
        every = list({id(slots): slots for slots in vectors}.values())
        bounds = np.cumsum([0, *map(len, every)])
        where = np.concatenate([np.zeros(0, np.int64), *every])
        if self._phantoms:
            where = np.where(where >= PHANTOM, where - PHANTOM + self.solution.count, where)
        channels = self._number[where]
        live = count_between(bounds, channels >= 0) > 0
        for slots, (start, stop), yes in zip(every, pairwise(bounds.tolist()), live.tolist(), strict=True):
            found = channels[start:stop]
            self._known[id(slots)] = slots, self._shared.setdefault(found.tobytes(), found), yes

    def _of(self, slots: IntArray) -> tuple[IntArray, ChannelArray, bool]:
        if id(slots) not in self._known:
            self.look_up([slots])
        return self._known[id(slots)]

    def channels(self, slots: IntArray) -> ChannelArray:
        """The channels of ``slots``; equal vectors are one object."""
        return self._of(slots)[1]

    def live(self, slots: IntArray) -> bool:
        """Whether some of ``slots`` are channels of the plan."""
        return self._of(slots)[2]

    def axis(self, dim: int, slots: IntArray, role: str) -> Axis | None:
        """The axis of ``slots``, if they are live; axes that are alike are one object."""
        key = (id(slots), dim, role)
        if key not in self._axes:
            _, channels, live = self._of(slots)
            alike = (id(channels), dim, role)
            if live and alike not in self._alike:
                self._alike[alike] = Axis(dim, channels, role)
            self._axes[key] = self._alike.get(alike)
        return self._axes[key]

    def work(self, work: Work) -> WorkTerm:
        """A term of work; axes that hold no channel are multiplied into its scale."""
        scale, axes = work.scale, []
        for _, channels, live in map(self._of, work.axes):
            if live:
                axes.append(channels)
            else:
                scale *= len(channels)
        return WorkTerm(scale, tuple(axes))

    def _claim(self) -> list[tuple[list[Leaf], IntArray]]:
        """Each root takes the free channels of its axis that no earlier root has taken."""
        solution, axes = self.solution, [leaf.axes[dim] for leaf, dim in self.roots]
        bounds = np.cumsum([0, *map(len, axes)])
        slots = np.concatenate([np.zeros(0, np.int64), *axes])
        classes, stuck = solution.channel[slots], self._is_frozen[slots]
        place = np.arange(len(slots))
        first = np.zeros(len(solution.channel), dtype=np.int64)  # where each class comes first
        first[classes[::-1]] = place[::-1]
        mine = (first[classes] == place) & ~stuck
        taken = np.zeros(len(solution.channel), dtype=np.bool_)
        taken[classes[mine]] = True
        for i in np.flatnonzero(count_between(bounds, stuck)).tolist():
            own = slots[bounds[i] : bounds[i + 1]][stuck[bounds[i] : bounds[i + 1]]]
            reason = solution.frozen[int(solution.unit[own[0]])]
            self.frozen.append(Frozen(layer_of(self.roots[i][0].name), len(own), reason))
        ends = np.cumsum([0, *count_between(bounds, mine)]).tolist()
        held = classes[mine]
        claims = [([leaf], held[a:b]) for (leaf, _), (a, b) in zip(self.roots, pairwise(ends), strict=True) if a < b]
        return self._adopt(claims, taken)

    def _adopt(self, claims: list[tuple[list[Leaf], IntArray]], taken: np.ndarray) -> list[tuple[list[Leaf], IntArray]]:
        """Channels that no layer makes go along with the unit that they belong to.

        A bias per head, say. It comes last in the group that has the unit.
        """
        solution = self.solution
        proper = np.arange(len(solution.channel)) < solution.count
        is_class = proper & (solution.channel == np.arange(len(solution.channel)))
        orphans = np.flatnonzero(is_class & ~taken & ~self._is_frozen)
        if not orphans.size:
            return claims
        adopted = []
        for leaves, classes in claims:
            own = np.isin(solution.unit[orphans], solution.unit[classes])
            adopted.append((leaves, np.concatenate([classes, orphans[own]])))
            orphans = orphans[~own]
        return adopted

    def _merge_coupled(self, claims: list[tuple[list[Leaf], IntArray]]) -> list[tuple[list[Leaf], IntArray]]:
        """Groups that share a unit are ranked together: they become one."""
        owner = np.repeat(np.arange(len(claims)), [len(c) for _, c in claims])
        unit = self.solution.unit[np.concatenate([np.zeros(0, np.int64), *[c for _, c in claims]])]
        home = np.full(len(self.solution.unit), -1)  # the first group that was seen to have a unit
        home[unit[::-1]] = owner[::-1]
        if (home[unit] == owner).all():
            return claims
        home[:] = -1
        into = list(range(len(claims)))

        def first(i: int) -> int:
            while into[i] != i:
                i = into[i]
            return i

        for i, (_, classes) in enumerate(claims):
            units = self.solution.unit[classes]
            for other in np.unique(home[units]).tolist():
                if other >= 0:
                    low, high = sorted((first(other), first(i)))
                    into[high] = low
            home[units[home[units] < 0]] = i
        target = [first(i) for i in range(len(claims))]
        merged: dict[int, tuple[list[Leaf], list[IntArray]]] = {}
        for t, (leaves, classes) in zip(target, claims, strict=True):
            entry = merged.setdefault(t, ([], []))
            entry[0].extend(leaves)
            entry[1].append(classes)
        return [(leaves, np.concatenate(parts)) for leaves, parts in merged.values()]

    def groups(self, tensors: list[TensorMap]) -> tuple[Group, ...]:
        """The groups, with every tensor axis that holds their channels."""
        vectors = Vectors(axis.channels for tensor in tensors for axis in tensor.axes)
        of_channel = np.repeat(np.arange(len(self._claims), dtype=np.int32), [len(c) for _, c in self._claims])
        holdings = Holdings(vectors, of_channel, len(self._claims))
        held = {id(channels): holdings.groups(number) for number, channels in enumerate(vectors.arrays)}
        members: list[list[tuple[str, int]]] = [[] for _ in self._claims]
        layers: list[list[str]] = [[] for _ in self._claims]
        for tensor in tensors:
            for axis in tensor.axes:
                for i in held[id(axis.channels)]:
                    members[i].append((tensor.name, axis.dim))
                    if axis.role == "out":
                        layers[i].append(layer_of(tensor.name))
                    elif axis.role == "in":
                        self.consumed.add(i)
        found: list[Group] = []
        roots: set[str] = set()
        is_noted = self.solution.noted.mask
        start = 0
        for i, (leaves, classes) in enumerate(self._claims):
            statistic = classes[is_noted[classes]]
            noted = self.solution.noted[int(statistic[0])] if statistic.size else None
            root = layer_of(leaves[0].name)
            if root in roots:  # a weight that is used transposed, too, makes channels twice
                root += " transposed"
            roots.add(root)
            stop = start + len(classes)
            found.append(Group(root, start, stop, tuple(layers[i]), tuple(members[i]), noted))
            start = stop
        return tuple(found)
