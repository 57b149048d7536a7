"""Both proofs of a plan in one: a smaller model whose channels have changed places computes what the model computes.

A few channels of every group are kept, and change places; every weight is random. The model at its full size, with
everything else at zero, must put out what the smaller one does. Layer and group norms, whose statistics would see the
zeros, take them over the channels that are kept. So two forwards say of all groups at once that their maps hold and
that they can shrink. Where another statistic of channels is taken, or one of these written out in the model's code,
those channels all stay in the comparison and only change places, and a model that is smaller everywhere is run once
more. A backward is run where not all of it is PyTorch's own. If that is in doubt, the permutation test and the dry run
find out what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import PlanError, in_a_line
from .plan.double import InDouble
from .plan.named import Named
from .plan.outputs import fixed_outputs
from .plan.running import Still, as_ops, call, calls_made_by
from .plan.thin import LEAST, Standing, Thin, Values, Wanted, fill
from .plan.types import Axis, BoolArray, IntArray, Kept, Plan, TensorMap, is_grouped
from .plan.verify import ANOTHER, FINE, TOLERANCE, channel_order, distance
from .surgery.modules import Change, apply_changes, attribute_changes

_NORMS = ("layer norm over", "group norm over")  # notes of statistics that smaller norms take as they should
FEW = 4  # units of a group that are kept at least: of fewer, too many orders are alike
DRAWS = {2: 6, 3: 4, 4: 2}  # of groups of so many channels: one draw of those that stay may hide what another shows
MANY = 48  # units of a group that are kept at most, and as many again so that groups of one size come apart
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_FLOATS = (torch.float32, torch.float64)


def rehearse(
    plan: Plan, model: nn.Module, example_inputs: Any, smaller: Any = None, seed: int = 0, still: Still | None = None
) -> bool:
    """Whether all of ``plan`` is proven; False says nothing but that it was not.

    The model itself is not written to. It runs on the inputs ``smaller``, if there are such and it takes them.
    """
    still = still or Still(model)
    if still.of(torch.jit.ScriptModule):
        return False  # it reads its tensors past what stands in for them
    try:
        return Rehearsal(plan, model, [smaller] * (smaller is not None) + [example_inputs], seed, still).holds()
    except Exception:
        return False


def failure(
    plan: Plan, model: nn.Module, example_inputs: Any, seed: int = 0, training: bool = False
) -> str | None:
    """What is wrong with a model that is smaller in all groups at once, or None; ``training``: in its branches of it.

    It fails; or, where no statistic explains it, it computes something else. Of nothing wrong, too, a model that this
    cannot be asked of: it is no better at its full size.
    """
    try:
        test = Rehearsal(plan, model, [example_inputs], seed)
        test._training = training
        few, alike = test.few(0), test.few(0, alike=True)
    except Exception:
        return None
    every = np.ones(plan.n_channels, dtype=np.bool_)
    errors: list[str | None] = []
    for keep in (few, alike, every):
        try:
            with test.made(keep), torch.no_grad():
                call(model, example_inputs)
            errors.append(None)
        except Exception as error:
            errors.append(in_a_line(error))
    if errors[-1] is not None:
        return None
    return errors[0] or errors[1] or (ANOTHER if test.differs(few, every) else None)


class Rehearsal:
    """One plan put to the test; ``inputs`` are some that the model may take, the first that it does is used."""

    def __init__(self, plan: Plan, model: nn.Module, inputs: list[Any], seed: int, still: Still | None = None) -> None:
        self.plan, self.model = plan, model
        self.inputs = inputs
        self._still = still = still or Still(model)
        self._modules = still.modules
        self._named = Named(plan, model, still)
        self._generator = np.random.default_rng(seed)
        self._values = Values(seed)
        kinds = {p.dtype for _, p in still.parameters}
        self._exact = all(kind in _FLOATS or not kind.is_floating_point for kind in kinds)
        self._held: list[tuple[Any, str, Tensor, int]] = [
            (space, name, tensor, id(tensor))
            for _, module in self._modules
            for space in (module._parameters, module._buffers)
            for name, tensor in space.items()
            if tensor is not None
        ]
        self._parameters = {id(p) for _, p in still.parameters}
        # Layers of one op do not ask whether what they hold is a parameter, and to become one takes a while.
        others = [m for _, m in self._modules if id(m) not in still.of_one_op]
        self._asked = {id(p) for m in others for p in m._parameters.values()}
        self._lone = 0  # the most kinds of one unit that a group has
        self._draws = 1
        self._training = False  # whether the branches of training are run

    @property
    def by_norms(self) -> bool:
        """Whether no statistic of channels is taken but by norms that are PyTorch's."""
        return all(g.statistic is None or g.statistic.startswith(_NORMS) for g in self.plan.groups)

    def holds(self) -> bool:
        """Run the test, and once more with the branches of training if the trace saw some."""
        return self._hold() and (not self._still.trains_more or self._hold_in_training())

    def _hold_in_training(self) -> bool:
        """Where the model's code draws random numbers, there is nothing to compare: it is only run."""
        self._training = True
        few = self.few(0)
        with self.made(few), torch.no_grad():
            before = self._still.random_states()
            call(self.model, self.inputs[0])
            drawn = self._still.has_drawn(before)
        return self._runs(few, None) if drawn else self._hold()

    def _hold(self) -> bool:
        statistic = np.array([g.statistic is not None for g in self.plan.groups], dtype=np.bool_)[self.plan.group_of]
        by_norms, turn = self.by_norms, 0
        while turn < max(max(self._lone, 1).bit_length(), self._draws):
            few, shapes = self.few(turn), None
            by_norms = by_norms and self._shown(few, bool(statistic.any()))
            if not by_norms:
                shapes = self._compare(few | statistic, False) if statistic.any() else None
                if shapes is None or not self._runs(few, shapes):
                    return False
            turn += 1
        if not self._minds_equal_widths():
            return True
        alike = self.few(0, alike=True)
        return self._shown(alike, False) if by_norms else self._runs(alike, shapes, backward=False)

    def differs(self, keep: BoolArray, every: BoolArray) -> bool:
        """Whether a model of the channels ``keep``, and those of statistics, computes something else than the model.

        Not if one of all channels does, too: then the cause is another. Nor of what is no number (0 / 0 of zeros).
        """
        statistic = np.array([g.statistic is not None for g in self.plan.groups], dtype=np.bool_)[self.plan.group_of]
        try:
            apart, _ = self._apart(keep | statistic, False)
            return self._tolerance < apart < math.inf and self._apart(every, False)[0] <= self._tolerance
        except Exception:
            return False

    def _minds_equal_widths(self) -> bool:
        """Whether the model may do something else where widths that were different before come to be equal.

        Its code compares sizes, or an attribute that several groups have as their width is told it once they agree.
        """
        told: dict[tuple[str, str, int | None], set[int]] = {}
        for w in self.plan.widths:
            if w.told:
                told.setdefault((w.module, w.attribute, w.index), set()).add(id(w.channels))
        return len(self.plan.groups) > 1 and (self._still.compares or any(len(ids) > 1 for ids in told.values()))

    def _shown(self, few: BoolArray, forgiving: bool) -> bool:
        """Whether a model of the channels ``few`` alone computes what the large one does; ``forgiving``: or fails."""
        try:
            if not self._exact:
                return self._compare(few, False) is not None and self._runs(few, None)
            return self._compare(few, self._training or not self._still.plain_backward) is not None
        except Exception:
            if not forgiving:
                raise
            return False

    # Which channels

    def few(self, turn: int, alike: bool = False) -> BoolArray:
        """A few units of each kind, of groups of one size not as many of each, or ``alike``.

        Of kinds of one unit those go whose number has bit ``turn``: each in some turn, no two in the same ones. (In
        turns beyond that all of these stay.)

        Raises:
            PlanError: so few cannot stay.
        """
        plan = self.plan
        order, starts = plan.by_unit
        kind = plan.kind_of_unit
        sizes = np.bincount(kind).tolist()
        first = np.zeros(len(sizes), dtype=np.int64)  # unit of each kind
        first[kind[::-1]] = np.arange(len(kind))[::-1]
        homes = plan.group_of[order[starts[first]]].tolist()
        kinds: list[list[int]] = [[] for _ in plan.groups]
        for k in np.argsort(first).tolist():
            kinds[homes[k]].append(k)
        left = list(sizes)
        seen: dict[int, int] = {}
        for group, own, least in zip(plan.groups, kinds, plan.least_units_of_groups.tolist(), strict=True):
            total = sum(sizes[k] for k in own)
            step = group.multiple * total // group.channels or 1
            if total - max(least, step) < 1:
                continue
            count = self._how_many(total, least, None if alike else seen)
            self._draws = max(self._draws, DRAWS.get(group.channels, 1))
            lone = 0
            for k in own:
                left[k] = min(max(round(count * sizes[k] / total), 1), sizes[k] - 1)
                if sizes[k] == 1:
                    lone += 1
                    left[k] = 1 - (lone >> turn & 1)
            self._lone = max(self._lone, lone)
            while (now := sum(left[k] for k in own)) < least or now % step:
                left[max(own, key=lambda k: sizes[k] - left[k])] += 1
        _, rank, _ = _shuffled(kind, self._generator)
        keep: BoolArray = (rank < np.array(left)[kind])[plan.unit]
        plan.check_keep(keep)
        return keep

    def _how_many(self, total: int, least: int, seen: dict[int, int] | None) -> int:
        """How many units of a group of ``total`` stay: not as many of each ``seen``, so that widths come apart."""
        low = max(least, min(max(-(-total // 4), FEW, 1), MANY, total - 1))
        if seen is None:
            return low
        spread = max(min(total - low, max(total // 4, 3), MANY), 1)
        seen[total] = seen.get(total, int(self._generator.integers(spread))) + 1
        return low + seen[total] % spread

    def _moves(self, keep: BoolArray) -> IntArray:
        """For each channel the one whose place it takes: units that stay change places with others of their kind."""
        plan = self.plan
        order, starts = plan.by_unit
        stay = np.flatnonzero(keep[order[starts]])
        kind = plan.kind_of_unit[stay]
        by_rank, rank, first = _shuffled(kind, self._generator)
        many = np.diff(first)
        # One cycle in random order. Of few units one stays: a cycle of all might be the very shift that is wrong.
        cycle = np.where((many > 2) & (many < 7), many - 1, many)[kind]
        target = np.where(rank < cycle, (rank + 1) % cycle, rank)
        other = np.arange(plan.n_units)
        other[stay] = stay[by_rank[first[kind] + target]]
        place = np.empty(plan.n_channels, dtype=np.int64)
        place[order] = np.arange(plan.n_channels) - starts[plan.unit[order]]
        moves: IntArray = order[starts[other[plan.unit]] + place]
        return moves

    # The runs

    def _compare(self, keep: BoolArray, backward: bool) -> list[torch.Size] | None:
        """The shapes of the outputs if the smaller model, its channels shuffled, puts out what the model does."""
        apart, shapes = self._apart(keep, backward)
        return shapes if apart <= self._tolerance else None

    @property
    def _tolerance(self) -> float:
        return FINE if self._exact else TOLERANCE

    def _apart(self, keep: BoolArray, backward: bool) -> tuple[float, list[torch.Size]]:
        """How far the outputs of the smaller model are from those of the model, and the shapes of these."""
        kept = Kept(keep, self.plan.vectors)
        large, small = self._tensors(kept, self._moves(keep))
        precision = nullcontext() if self._exact else InDouble()
        expected = self._expected(large, precision)
        with self._smaller(kept, small) as own, torch.set_grad_enabled(backward), precision, as_ops(self._still):
            out = fixed_outputs(call(self.model, self.inputs[0]))
        apart = distance(expected, [t.detach() for t in out])
        if backward and apart <= self._tolerance:
            _backward(out, own)
        return apart, [t.shape for t in expected]

    def _expected(self, large: dict[int, Thin], precision: Any) -> list[Tensor]:
        """What the model puts out with the tensors of ``large`` standing in for its own."""
        filled = {k: thin for k, thin in large.items() if math.prod(thin.shape) < LEAST}
        fill(list(filled.values()))
        swapped: dict[int, Tensor] = {k: self._put_in(k, thin.full(), False) for k, thin in filled.items()}
        by_id = {**large, **{id(tensor): filled[k] for k, tensor in swapped.items()}}
        standing, runs = Standing(by_id), self._still.of_one_op
        layers = [m for _, m in self._modules if id(m) in runs]
        way = standing.calls(layers, large.keys() - filled.keys(), runs)
        while True:
            try:
                with (
                    self._still.running(self._training), torch.no_grad(), precision, standing, self._exchanged(swapped),
                    calls_made_by(layers, way),
                ):  # fmt: skip
                    return [t.detach() for t in fixed_outputs(call(self.model, self.inputs[0]))]
            except Exception:
                if len(self.inputs) == 1:
                    raise
                self.inputs = self.inputs[1:]

    def _runs(self, keep: BoolArray, shapes: list[torch.Size] | None, backward: bool = True) -> bool:
        """Whether a model of the channels ``keep`` alone runs, forward and backward, to outputs of ``shapes``."""
        kept = Kept(keep, self.plan.vectors)
        small = {id(t): _blank(t, kept.of(m)[1]) for m in self.plan.tensors for t in (self._named.tensors[m.name],)}
        with self._smaller(kept, small) as own:
            out = fixed_outputs(call(self.model, self.inputs[0]))
        if shapes is not None and [t.shape for t in out] != shapes:
            return False
        if backward:
            _backward(out, own)
        return True

    @contextmanager
    def made(self, keep: BoolArray) -> Iterator[None]:
        """The model with the channels ``keep`` alone and random values."""
        kept = Kept(keep, self.plan.vectors)
        with self._smaller(kept, self._tensors(kept, self._moves(keep))[1]):
            yield

    @contextmanager
    def _smaller(self, kept: Kept, small: dict[int, Tensor]) -> Iterator[list[Tensor]]:
        """The model with tensors of ``small`` in the places of its own (known by their ids); those with gradients."""
        undo: list[Change] = []
        made = {own: self._put_in(own, tensor, tensor.is_floating_point()) for own, tensor in small.items()}
        with self._still.running(self._training):
            try:
                apply_changes(attribute_changes(self._named, kept, self.model), undo)
                with self._exchanged(made):
                    for _, module in self._still.of(nn.RNNBase):  # these keep their tensors in a list, too
                        flat: Any = module._flat_weights
                        flat[:] = [made.get(id(t), t) for t in flat]
                    yield [p for p in made.values() if p.requires_grad]
            finally:
                apply_changes(list(reversed(undo)), [])

    def _put_in(self, own: int, tensor: Tensor, requires_grad: bool) -> Tensor:
        """``tensor`` as what is to stand in the place of that of the id ``own``: a parameter, or a buffer."""
        if own in self._asked:
            return Tensor._make_subclass(nn.Parameter, tensor, requires_grad)  # without the questions of nn.Parameter
        return tensor.requires_grad_() if requires_grad and own in self._parameters else tensor

    @contextmanager
    def _exchanged(self, new: Mapping[int, Tensor]) -> Iterator[None]:
        """Tensors of ``new`` in the places of the model's own, which have these ids."""
        try:
            for space, name, _, own in self._held:
                if own in new:
                    space[name] = new[own]
            yield
        finally:
            for space, name, tensor, _ in self._held:
                space[name] = tensor

    def _tensors(self, kept: Kept, moves: IntArray) -> tuple[dict[int, Thin], dict[int, Tensor]]:
        """What stands in for the model's tensors in the two forwards, by their ids."""
        small: dict[int, Tensor] = {}
        large: dict[int, Thin] = {}
        places = _Places(kept, moves)
        shapes = self.plan.shapes.tuples(self.plan.shapes.left(kept)[0])
        wanted: list[Wanted] = []
        stand: list[tuple[tuple[int, ...], dict[int, Tensor], Tensor | None, float]] = []
        for one, shape in zip(self.plan.tensors, shapes, strict=True):
            tensor = self._named.tensors[one.name]
            where, columns = places.of(one, tensor.device)
            if not tensor.is_floating_point() or (not one.is_parameter and tensor.ndim > 1):
                new = tensor.detach()  # a table: its own values, which are no weights
                for dim, index in where.items():
                    new = new.index_select(dim, index)
                small[id(tensor)] = new = new.clone()
                if one.is_parameter and tensor.is_complex():
                    large[id(tensor)] = Thin(new, one.shape, where, columns, 0.0)
                continue
            wanted.append(self._wanted(tensor, shape, one))
            stand.append((one.shape, where, columns, 0.0 if one.is_parameter else 1.0))
        known = small.keys() | {id(tensor) for tensor, *_ in wanted}
        for _, module in self._modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in known and _alike(parameter):
                    known.add(id(parameter))
                    wanted.append(Wanted(parameter, tuple(parameter.shape), name, parameter.shape[-1]))
                    stand.append((tuple(parameter.shape), {}, None, 0.0))
        for (tensor, *_), new, rest in zip(wanted, self._values.of(wanted), stand, strict=True):
            small[id(tensor)] = new
            large[id(tensor)] = Thin(new, *rest)
        return large, small

    def _wanted(self, tensor: Tensor, shape: tuple[int, ...], one: TensorMap) -> Wanted:
        if len(shape) < 2:
            return Wanted(tensor, shape, one.name, 1)
        owner = self._named.owner(one.name)[0]
        terms = math.prod(shape[1:]) if isinstance(owner, nn.modules.conv._ConvNd) else shape[-1]
        is_table = isinstance(owner, _TABLES) and all(axis.dim for axis in one.axes)
        return Wanted(tensor, shape, one.name, terms, is_table)


def _shuffled(kind: IntArray, generator: np.random.Generator) -> tuple[IntArray, IntArray, IntArray]:
    """Items kind by kind, in random order within a kind, and for each item its rank among its kind.

    The last are the places where the kinds begin, and the end.
    """
    order = np.argsort(kind + generator.random(len(kind)))
    first = np.cumsum([0, *np.bincount(kind)])
    rank = np.empty(len(kind), dtype=np.int64)
    rank[order] = np.arange(len(kind)) - first[kind[order]]
    return order, rank, first


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
        self._found = self._of_ascending()
        # What was found, on which device, for tensors without blocks: many of them are alike.
        self._plain: dict[tuple[Axis, ...], tuple[torch.device, tuple[dict[int, Tensor], Tensor | None]]] = {}

    def _of_ascending(self) -> dict[int, tuple[IntArray, Tensor | None]]:
        """What :meth:`_axis` finds, at once for all vectors whose indices have ascending channels, each its own."""
        vectors, kept, moves = self._kept.vectors, self._kept, self._moves
        assert vectors is not None
        starts, channels = vectors.starts, vectors.channels
        number = np.repeat(np.arange(len(vectors.arrays)), vectors.lengths)
        plain = np.ones(len(vectors.arrays), dtype=np.bool_)
        plain[number[1:][(channels[1:] <= channels[:-1]) & (number[1:] == number[:-1])]] = False
        plain[number[channels < 0]] = False
        of = number[kept.positions]
        ranked = number * len(moves) + np.where(plain[number], channels, 0)
        target = np.searchsorted(ranked, of * len(moves) + moves[channels[kept.positions]])
        target = np.minimum(target, starts[of + 1] - 1)  # a plan that lies leads out of the vector
        plain[number[np.bincount(target, minlength=len(number)) > 1]] = False  # two in one place
        moved = np.bincount(of[target != kept.positions], minlength=len(plain)) + vectors.lengths - kept.counts > 0
        places = target - starts[of]
        parts = torch.from_numpy(places).split(kept.counts.tolist())
        bounds = kept.bounds.tolist()
        return {
            id(vectors.arrays[i]): (places[bounds[i] : bounds[i + 1]], parts[i] if moved[i] else None)
            for i in np.flatnonzero(plain).tolist()
        }

    def of(self, tensor: TensorMap, device: torch.device) -> tuple[dict[int, Tensor], Tensor | None]:
        """By dimension, and for dimension 1 of a grouped convolution by block."""
        if tensor.groups > 1:
            return self._look(tensor, device)
        found = self._plain.get(tensor.axes)  # axes that are alike are one object
        if found is None or found[0] != device:
            found = self._plain[tensor.axes] = device, self._look(tensor, device)
        return found[1]

    def _look(self, tensor: TensorMap, device: torch.device) -> tuple[dict[int, Tensor], Tensor | None]:
        where, columns = {}, None
        for axis in tensor.axes:
            vector, places = self._axis(axis.channels, axis)
            if not is_grouped(tensor, axis):
                if places is not None:
                    where[axis.dim] = places.to(device)
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
