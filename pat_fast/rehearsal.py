"""Both proofs of a plan in one: a smaller model whose channels have changed places computes what the model computes.

A few channels of every group are kept, and change places; every weight is random. The model at its full size, with
everything else at zero, must put out what the smaller one does. Channels that take part in a statistic (a layer norm)
all stay in that comparison and only change places; for them a model that is smaller everywhere is run once more. So two
forwards, or three, and one backward say of all groups at once that their maps hold and that they can shrink. If that is
in doubt, the permutation test and the dry run find out what is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import PlanError
from .plan.bind import Binding
from .plan.double import InDouble
from .plan.running import call, undisturbed
from .plan.thin import Standing, Thin, Values
from .plan.trace import fixed_outputs
from .plan.types import Axis, BoolArray, IntArray, Kept, Plan, TensorMap, is_grouped
from .plan.verify import FINE, TOLERANCE, channel_order, distance
from .plan.walk import named_modules, named_tensors
from .surgery.modules import Change, apply_changes, attribute_changes

FEW = 4  # units of a group that are kept at least: of fewer, too many orders are alike
MANY = 48  # units of a group that are kept at most, and as many again so that groups of one size come apart
_FLOATS = (torch.float32, torch.float64)


def rehearse(plan: Plan, model: nn.Module, example_inputs: Any, smaller: Any = None, seed: int = 0) -> bool:
    """Whether all of ``plan`` is proven; False says nothing but that it was not.

    The model itself is not written to. It runs on the inputs ``smaller``, if there are such and it takes them.
    """
    if any(isinstance(m, torch.jit.ScriptModule) for _, m in named_modules(model)):
        return False  # it reads its tensors past what stands in for them
    try:
        return _Rehearsal(plan, model, [smaller] * (smaller is not None) + [example_inputs], seed).holds()
    except Exception:
        return False


class _Rehearsal:
    def __init__(self, plan: Plan, model: nn.Module, inputs: list[Any], seed: int) -> None:
        self.plan, self.model = plan, model
        self._inputs = inputs  # the first that the model takes is used
        self._binding = Binding(plan, model)
        self._generator = np.random.default_rng(seed)
        self._values = Values(seed)
        parameters = named_tensors(named_modules(model), "_parameters")
        self._exact = all(p.dtype in _FLOATS for _, p in parameters if p.is_floating_point())
        self._lone = 0  # the most kinds of one unit that a group has

    def holds(self) -> bool:
        """Run the test."""
        statistic = np.array([g.statistic is not None for g in self.plan.groups], dtype=np.bool_)[self.plan.group_of]
        turn = 0
        while turn <= max(self._lone, 1).bit_length() - 1:
            few = self._few(turn)
            backward = self._exact and not statistic.any()
            shapes = self._compare(few | statistic, backward)
            if shapes is None or not (backward or self._runs(few, shapes)):
                return False
            turn += 1
        return True

    # Which channels

    def _few(self, turn: int) -> BoolArray:
        """A few units of each kind.

        Of kinds of one unit those go whose number has bit ``turn``: each in some turn, no two in the same ones.

        Raises:
            PlanError: so few cannot stay.
        """
        plan = self.plan
        order, starts = plan.by_unit
        kind = plan.kind_of_unit
        sizes = np.bincount(kind).tolist()
        home = dict(zip(kind.tolist(), plan.group_of[order[starts]].tolist(), strict=True))
        kinds: list[list[int]] = [[] for _ in plan.groups]
        for k, group in home.items():
            kinds[group].append(k)
        left = list(sizes)
        seen: dict[int, int] = {}
        for group, own, least in zip(plan.groups, kinds, plan.least_units_of_groups.tolist(), strict=True):
            total = sum(sizes[k] for k in own)
            step = group.multiple * total // group.channels or 1
            if total - max(least, step) < 1:
                continue
            count = self._how_many(total, least, seen)
            lone = 0
            for k in own:
                left[k] = min(max(round(count * sizes[k] / total), 1), sizes[k] - 1)
                if sizes[k] == 1:
                    lone += 1
                    left[k] = 1 - (lone >> turn & 1)
            self._lone = max(self._lone, lone)
            while (now := sum(left[k] for k in own)) < least or now % step:
                left[max(own, key=lambda k: sizes[k] - left[k])] += 1
        rank = _ranks(kind, self._generator.random(len(kind)))
        keep: BoolArray = (rank < np.array(left)[kind])[plan.unit]
        plan.check_keep(keep)
        return keep

    def _how_many(self, total: int, least: int, seen: dict[int, int]) -> int:
        """How many units of a group of ``total`` stay: not as many of each, so that equal widths come apart."""
        low = max(least, min(max(-(-total // 4), FEW, 1), MANY, total - 1))
        spread = max(min(total - low, max(total // 4, 3), MANY), 1)
        seen[total] = seen.get(total, int(self._generator.integers(spread))) + 1
        return low + seen[total] % spread

    def _moves(self, keep: BoolArray) -> IntArray:
        """For each channel the one whose place it takes: units that stay change places with others of their kind."""
        plan = self.plan
        order, starts = plan.by_unit
        stay = np.flatnonzero(keep[order[starts]])
        rank = _ranks(plan.kind_of_unit[stay], self._generator.random(len(stay)))
        by_rank = np.lexsort((rank, plan.kind_of_unit[stay]))
        kinds, first, many = np.unique(plan.kind_of_unit[stay][by_rank], return_index=True, return_counts=True)
        # One cycle in random order. Of few units one stays: a cycle of all might be the very shift that is wrong.
        cycle = np.where((many > 2) & (many < 7), many - 1, many)
        which = np.searchsorted(kinds, plan.kind_of_unit[stay])
        target = np.where(rank < cycle[which], (rank + 1) % cycle[which], rank)
        other = np.arange(plan.n_units)
        other[stay] = stay[by_rank[first[which] + target]]
        place = np.empty(plan.n_channels, dtype=np.int64)
        place[order] = np.arange(plan.n_channels) - starts[plan.unit[order]]
        moves: IntArray = order[starts[other[plan.unit]] + place]
        return moves

    # The runs

    def _compare(self, keep: BoolArray, backward: bool) -> list[torch.Size] | None:
        """The shapes of the outputs if the smaller model, its channels shuffled, puts out what the model does."""
        kept = Kept(keep)
        large, small = self._tensors(kept, self._moves(keep))
        precision = nullcontext() if self._exact else InDouble()
        expected = self._expected(large, precision)
        with self._smaller(kept, small) as own, torch.set_grad_enabled(backward), precision:
            out = fixed_outputs(call(self.model, self._inputs[0]))
        if distance(expected, [t.detach() for t in out]) > (FINE if self._exact else TOLERANCE):
            return None
        if backward:
            _backward(out, own)
        return [t.shape for t in expected]

    def _expected(self, large: dict[int, Thin], precision: Any) -> list[Tensor]:
        """What the model puts out with the tensors of ``large`` standing in for its own."""
        while True:
            try:
                with undisturbed(self.model), torch.no_grad(), precision, Standing(large):
                    return [t.detach() for t in fixed_outputs(call(self.model, self._inputs[0]))]
            except Exception:
                if len(self._inputs) == 1:
                    raise
                self._inputs = self._inputs[1:]

    def _runs(self, keep: BoolArray, shapes: list[torch.Size]) -> bool:
        """Whether a model of the channels ``keep`` alone runs, forward and backward, to outputs of ``shapes``."""
        kept = Kept(keep)
        small = {
            id(t): _blank(t, kept.of(m)[1])
            for m in self.plan.tensors
            for t in (self._binding.tensors[m.name],)
        }
        with self._smaller(kept, small) as own:
            out = fixed_outputs(call(self.model, self._inputs[0]))
        if [t.shape for t in out] != shapes:
            return False
        _backward(out, own)
        return True

    @contextmanager
    def _smaller(self, kept: Kept, small: dict[int, Tensor]) -> Iterator[list[Tensor]]:
        """The model with tensors of ``small`` in the places of its own (known by their ids); those with gradients."""
        undo: list[Change] = []
        with undisturbed(self.model):
            parameters = {k: nn.Parameter(t, t.is_floating_point()) for k, t in small.items()}
            try:
                apply_changes(attribute_changes(self._binding, kept, self.model), undo)
                for _, module in named_modules(self.model):
                    for own, new in ((module._parameters, parameters), (module._buffers, small)):
                        _exchange(own, new)
                    if isinstance(module, nn.RNNBase):  # keeps its tensors in a list, too
                        module._flat_weights[:] = [parameters.get(id(t), t) for t in module._flat_weights]
                yield [p for p in parameters.values() if p.requires_grad]
            finally:
                apply_changes(list(reversed(undo)), [])

    def _tensors(self, kept: Kept, moves: IntArray) -> tuple[dict[int, Thin], dict[int, Tensor]]:
        """What stands in for the model's tensors in the two forwards, by their ids."""
        large: dict[int, Thin] = {}
        small: dict[int, Tensor] = {}
        places = _Places(kept, moves)
        for one in self.plan.tensors:
            tensor = self._binding.tensors[one.name]
            shape = kept.of(one)[1]
            where, columns = places.of(one)
            if not tensor.is_floating_point() or (not one.is_parameter and tensor.ndim > 1):
                new = tensor.detach()  # a table: its own values, which are no weights
                for dim, index in where.items():
                    new = new.index_select(dim, index)
                small[id(tensor)] = new.clone()
                continue
            new = self._values.like(tensor, shape, one.name, self._fan_in(one.name, shape))
            small[id(tensor)] = new
            large[id(tensor)] = Thin(new, one.shape, where, columns, 0.0 if one.is_parameter else 1.0)
        for _, module in named_modules(self.model):
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in small and _alike(parameter):
                    new = self._values.like(parameter, parameter.shape, name, parameter.shape[-1])
                    small[id(parameter)] = new
                    large[id(parameter)] = Thin(new, parameter.shape, {}, None, 0.0)
        return large, small

    def _fan_in(self, name: str, shape: tuple[int, ...]) -> int:
        """How many terms the sums have that a weight takes part in."""
        if isinstance(self._binding.owner(name)[0], nn.modules.conv._ConvNd):
            return torch.Size(shape[1:]).numel()
        return shape[-1]


def _ranks(kind: IntArray, key: NDArray[np.float64]) -> IntArray:
    """The rank of each item among those of its ``kind`` by ``key``."""
    order = np.lexsort((key, kind))
    ranked = kind[order]
    rank = np.empty(len(kind), dtype=np.int64)
    rank[order] = np.arange(len(kind)) - np.searchsorted(ranked, ranked)
    return rank


def _exchange(own: dict[str, Any], new: Mapping[int, Tensor]) -> None:
    """Put tensors of ``new`` in the places of those whose ids they are known by."""
    own.update({name: new[id(t)] for name, t in own.items() if id(t) in new})


def _blank(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros like ``tensor`` in ``shape``; large ones without memory."""
    large = torch.Size(shape).numel() > 2**22
    return tensor.new_zeros(()).expand(shape) if large else tensor.new_zeros(shape)


def _alike(parameter: Tensor) -> bool:
    """Whether the model's own values may hide a mistake: those of a vector, or all the same."""
    if not parameter.is_floating_point() or not parameter.numel():
        return False
    if parameter.ndim < 2:
        return True
    first = parameter.detach().reshape(-1)[:64] if parameter.is_contiguous() else parameter.detach()
    return bool(first.amin() == first.amax()) and bool(parameter.amin() == parameter.amax())


@torch.enable_grad()  # an optimizer's hook, which may call, runs without
def _backward(out: list[Tensor], own: list[Tensor]) -> None:
    """Run a backward to the tensors ``own``, with which the gradients are dropped; the model's own get none."""
    loss = sum(t.float().sum() for t in out if t.grad_fn is not None)
    if isinstance(loss, Tensor):
        loss.backward(inputs=own)


class _Places:
    """Where the channels that stay stand in the large tensors, in the order that they have in the small ones."""

    def __init__(self, kept: Kept, moves: IntArray) -> None:
        self._kept, self._moves = kept, moves
        self._orders: dict[int, IntArray] = {}
        self._found: dict[int, tuple[IntArray, Tensor | None]] = {}

    def of(self, tensor: TensorMap) -> tuple[dict[int, Tensor], Tensor | None]:
        """By dimension, and for dimension 1 of a grouped convolution by block."""
        where, columns = {}, None
        for axis in tensor.axes:
            vector, places = self._axis(axis.channels, axis)
            if not is_grouped(tensor, axis):
                if places is not None:
                    where[axis.dim] = places
                continue
            width = tensor.shape[1]
            if tensor.whole_groups:
                if width != 1:
                    raise PlanError(f"{tensor.name}: blocks of several channels that go as a whole")
                continue
            blocks = vector.reshape(tensor.groups, -1) - np.arange(tensor.groups)[:, None] * width
            if blocks.min() < 0 or blocks.max() >= width:
                raise PlanError(f"{tensor.name}: channels leave their block")
            columns = torch.from_numpy(blocks)
        return where, columns

    def _axis(self, channels: Any, axis: Axis) -> tuple[IntArray, Tensor | None]:
        found = self._found.get(id(channels))
        if found is None:
            vector = channel_order(axis, self._moves, self._orders)[self._kept(channels)]
            if np.bincount(vector, minlength=1).max() > 1:
                raise PlanError("two channels in one place")
            same = len(vector) == len(channels) and bool((vector == np.arange(len(vector))).all())
            found = (vector, None if same else torch.from_numpy(vector))
            self._found[id(channels)] = found
        return found
