"""The engine of a drop-in pruner: the plan as it is now, bound to the model, and the surgery on both."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import gt, sub
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from ...discovery import Discovery
from ...errors import PlanError
from ...plan import Binding, Plan
from ...plan.types import BoolArray, IndexArray
from ...surgery import Held, Smaller, prepare, prune_checked
from ...surgery.journal import ROOM
from .axes import Axes
from .shaping import Spec, lower

Ahead = tuple[Held, list[Optimizer]]  # what a prune needs to know of the model and of what trains it
Listener = Callable[[Plan, BoolArray], None]  # the plan before a prune, and which channels stay


class Engine:
    """Plan, binding and optimizers of one model.

    Every channel has a name for life, its number in the plan as it was lowered (``born [N]``), so that what was
    derived before a prune can be understood after it.

    Args:
        model: pruned in place; parameters keep their identity.
        spec: the forward, and what the user declared of the model.
        optimizer: those whose state shrinks along; found as :class:`pat_fast.Pruner` does by default.
        left_alone: (tensor, dimension) pairs that another machinery prunes: the groups that hold them stay.

    Attributes:
        followers: gives what else is kept for each parameter, laid out as an optimizer's state is.
    """

    _binding: Binding
    _born: IndexArray
    _axes: Axes | None = None
    _smaller: Smaller | None = None  # what the last prune has left, until it is asked for
    # Optimizers that the last search found, and how many others referred to each parameter then.
    _searched: tuple[set[int], list[float]] | None = None
    is_ready = False  # no hooks of the discovery: a drop-in pruner regularises when it is told to

    def __init__(
        self,
        model: nn.Module,
        spec: Spec,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        left_alone: Iterable[tuple[str, int]] = (),
    ) -> None:
        self.model = model
        self.spec = spec
        self.listeners: list[Listener] = []
        self.followers: Callable[[], Iterable[Any]] = tuple
        self.lowered = 0  # how often: channels of an earlier lowering have lost their names
        self.pruned = 0
        self._left_alone = frozenset(left_alone)
        self._searches = optimizer is None
        self._optimizers = Discovery(self, model, optimizer, auto=False)  # type: ignore[arg-type]
        self._lower()

    def _lower(self) -> None:
        plan, self.attentions = lower(self.model, self.spec)
        if self._left_alone:
            plan = leave_alone(plan, self._left_alone)
        self._set(Binding(plan, self.model), np.arange(plan.n_channels))
        prepare(self.binding)
        self.lowered += 1

    def _set(self, binding: Binding, born: IndexArray | None = None) -> None:
        self._binding, self._smaller = binding, None
        if born is not None:
            self._born = born

    def _follow(self) -> None:
        """Bind the plan that the last prune has left, if that was not done yet."""
        if self._smaller is not None:
            smaller, self._smaller = self._smaller, None
            try:
                binding = smaller()
            except PlanError:  # the model was changed by others since
                self._lower()
            else:
                self._set(binding, self._born[np.flatnonzero(smaller.before.plan.movable(smaller.kept))])

    @property
    def binding(self) -> Binding:
        """The plan, bound to the model."""
        self._follow()
        return self._binding

    @property
    def born(self) -> IndexArray:
        """The lifelong names of the plan's channels: ``[N]``."""
        self._follow()
        return self._born

    @property
    def plan(self) -> Plan:
        """The plan of the model as it is."""
        return self.binding.plan

    @property
    def axes(self) -> Axes:
        """Channels along the axes of the model's layers."""
        binding = self.binding
        if self._axes is None or self._axes.binding is not binding:
            self._axes = Axes(binding)
        return self._axes

    def current(self) -> Binding:
        """The binding, made anew if the model was changed by others since.

        Raises:
            PlanError: it was, and its forward fails now.
        """
        if not self.binding.is_current():
            try:
                self._set(Binding(self.plan, self.model))
            except PlanError:  # other shapes
                self._lower()
        return self.binding

    def now(self, born: IndexArray) -> IndexArray:
        """Today's numbers of the channels named ``born``, in their order; those that are gone are left out."""
        place = np.searchsorted(self.born, born)
        place[place == len(self.born)] = 0
        return place[self.born[place] == born] if len(self.born) else place[:0]

    def look_ahead(self) -> Ahead:
        """What a prune needs of the model as it is.

        To be called while the binding is current.
        """
        optimizers = self.optimizers()  # first: it counts who refers to a parameter
        return Held.of(self.binding), optimizers

    def prune(self, keep: BoolArray, ahead: Ahead | None = None) -> None:
        """Remove the channels ``~keep``; see :func:`pat_fast.surgery.prune`.

        ``ahead`` is what :meth:`look_ahead` has found, if nothing has changed the model since.
        """
        plan = self.plan
        kept = plan.check_keep(keep)
        held, optimizers = ahead or (None, self.optimizers())
        self._smaller = prune_checked(self.binding, kept, optimizers, room=ROOM, held=held)
        self.pruned += 1
        for listener in self.listeners:
            listener(plan, keep)

    def optimizers(self) -> list[Optimizer]:
        """The optimizers that hold parameters of the model, and what shrinks as their state does."""
        return [*self._current_optimizers(), *self.followers()]

    def _current_optimizers(self) -> list[Optimizer]:
        """Known optimizers; the search for others goes through all objects of the process, so only if need be."""
        if not self._searches:
            return self._optimizers.current()
        held, expected = self.references()
        counts = _reference_counts(held)
        if len(counts) == len(expected) and not any(map(gt, counts, expected)):
            return []  # nothing but its module and the binding refers to a parameter, as an optimizer would
        others = [*map(sub, counts, expected)]  # who refer to each, beside these
        known = self._optimizers.current(search=False)
        if self._searched is not None:
            then, before = self._searched
            if then == {*map(id, known)} and len(others) == len(before) and not any(map(gt, others, before)):
                return known
        known = self._optimizers.current()
        self._searched = {*map(id, known)}, others
        return known

    def references(self) -> tuple[list[Any], list[float]]:
        """The dicts that hold the model's parameters; how often each is referred to if only by them, the binding and
        its tables.
        """
        binding = self.binding
        known = binding.derived.get("references")
        tables = list(binding._cache.values())
        if known is None or [id(t) for t in known[0]] != [id(t) for t in tables]:
            held = [m._parameters for m in {id(m): m for m in binding.modules.values()}.values() if m._parameters]
            of = Counter(id(p) for parameters in held for p in parameters.values())
            of.update(map(id, binding.tensors.values()))
            of.update(map(id, binding.places.tensors))
            of.update(id(t) for made in tables for tiles in made for t in tiles.tensors)
            (base,) = _reference_counts([{"": nn.Parameter()}])
            expected = [math.inf if p is None else base - 1 + of[id(p)] for at in held for p in at.values()]
            known = binding.derived["references"] = (tables, held, expected)
        return known[1], known[2]


def _reference_counts(held: Iterable[dict[str, Any]]) -> list[int]:
    """How often each entry is referred to; none by a name here, which would be a reference, too."""
    return [*map(sys.getrefcount, chain.from_iterable(map(dict.values, held)))]


def leave_alone(plan: Plan, members: frozenset[tuple[str, int]]) -> Plan:
    """``plan`` without the groups that hold one of ``members``."""
    held = [i for i, g in enumerate(plan.groups) if members.intersection(g.members)]
    return plan.freeze(held, "is pruned layer by layer, with a customised layer or nn.MultiheadAttention")


def whole_units(plan: Plan, channels: NDArray[np.int64]) -> BoolArray:
    """All channels of the units of ``channels``: bool ``[N]``."""
    wanted = np.zeros(plan.n_units, dtype=np.bool_)
    wanted[plan.unit[channels]] = True
    return wanted[plan.unit]
