"""From a model to its plan: trace, read Torch-Pruning's graph for the order of roots, number the channels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import SCRIPTED, PlanError
from .backward import is_pytorchs, reached
from .configs import follow_config
from .hollow import Hollow, ValuesRead
from .labels import IntArray, Solution, flat, varying
from .numbering import Numbering
from .numbers import Symbol, resolve
from .order import After, torch_prunings_order
from .outputs import fixed_outputs
from .recurrent import Packing, couple_layers, is_plain, recurrent_layers
from .running import Still, call
from .trace import Leaf, Tracer
from .types import PROJECTED, ChannelArray, Frozen, Plan, TensorMap, Width

# Layers whose weights may be summed over or put out: surgery knows their attributes.
LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)


def build_plan(model: nn.Module, example_inputs: Any, still: Still | None = None) -> Plan:
    """Trace ``model`` once and lower it to a plan.

    Args:
        model: any module; it is run once, in eval mode, and left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward.
        still: what is known of ``model`` as it is, if it is run again.
    Raises:
        PlanError: the forward fails on these inputs.
    """
    still = still or Still(model)
    _check_model(model, still)
    batch = _batch(example_inputs)
    if not batch:
        raise PlanError(f"the example inputs ({_shapes(example_inputs)}) hold no example; pass at least one")
    failure: Exception | None = None
    # A forward whose values decide what it does is run with all of its arithmetic. Torch-Pruning's hooks, and the
    # numbers that ours plants, are not for every model: then without.
    for hollow, with_graph, with_numbers in _WAYS:
        notes: list[str] = []
        attempt = _Attempt(model, example_inputs, with_numbers, Hollow() if hollow else None, still)
        try:
            order = attempt.run(with_graph, notes)
            if attempt.failure is None:
                notes += attempt.notes
                return _number(model, still, attempt, order, batch, tuple(notes))
        finally:
            attempt.tracer.forget()
        failure = failure or (None if hollow else attempt.failure)
    raise PlanError(
        f"the model's forward fails on the example inputs ({_shapes(example_inputs)}): "
        f"{type(failure).__name__}: {failure}"
    ) from failure


def _check_model(model: nn.Module, still: Still) -> None:
    """Refuse models whose tensors cannot be traced, permuted and cut as they are."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}; build the plan of the model inside (its .module), and "
            "wrap it after pruning"
        )
    for name, module in still.of(torch.jit.ScriptModule):
        if any(True for _ in module.parameters()):
            raise PlanError(f"{name or 'the model'} {SCRIPTED}")
    if isinstance(model, torch.fx.GraphModule) and not _has_modes(model):
        raise PlanError("the model comes from torch.export, which writes sizes down; prune it first, then export it")
    plain = {torch.Tensor, nn.Parameter, nn.Buffer}
    for name, tensor in (*still.parameters, *still.buffers):
        if type(tensor) in plain and not tensor.is_meta and not tensor.is_quantized:
            continue
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise PlanError(f"{name} has no shape yet (a lazy layer); run one forward first")
        if tensor.is_meta:
            raise PlanError(f"{name} is on the meta device and has no values; load the model's weights first")
        raise PlanError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype}, which cannot be cut like a plain tensor; "
            "prune first, then quantize or shard"
        )
    if any(map(_is_quantized, still.kinds)):
        kinds: list[tuple[str, Any]] = [(name, type(m)) for name, m in still.modules]
        name, kind = next((name, kind) for name, kind in kinds if _is_quantized(kind))
        raise PlanError(f"{name} is a quantized {kind.__name__}; prune first, then quantize")


def _has_modes(model: nn.Module) -> bool:
    """Whether ``model`` can be put into eval mode, as what torch.export made cannot."""
    return getattr(model.eval, "__func__", None) is nn.Module.eval


@cache
def _is_quantized(kind: Any) -> bool:
    return "quantized" in kind.__module__.split(".")


_WAYS = ((True, True, True), (False, True, True), (False, False, True), (False, False, False))


class _Attempt:
    """One traced forward."""

    def __init__(
        self, model: nn.Module, example_inputs: Any, with_numbers: bool, hollow: Hollow | None, still: Still
    ) -> None:
        self.tracer = Tracer(still, hollow)
        self.failure: Exception | None = None
        self.notes: list[str] = []
        self.outputs: list[torch.Tensor] = []
        self.left: list[tuple[str, str, IntArray]] = []  # labels of what it left in modules, and where
        self._model, self._inputs, self._with_numbers, self._still = model, example_inputs, with_numbers, still

    def run(self, with_graph: bool, notes: list[str]) -> list[str]:
        """Trace; the names of the layers in the order of Torch-Pruning's roots, as far as it can graph the model."""
        self._still.plain_backward = self._still.compares = self._still.trains_more = False
        with self._still.running(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not with_graph:
                self._forward()
                return []
            try:
                order, nodes = torch_prunings_order(self._still.modules, self._forward, LAYERS)
                self._still.plain_backward = not self.tracer.numbers.hooked and is_pytorchs(nodes)
                return order
            except Exception as error:
                notes.append(f"Torch-Pruning cannot graph this model ({type(error).__name__}: {error})")
                return []

    def _forward(self, after: After | None = None) -> list[torch.Tensor]:
        tracer = self.tracer
        try:
            with tracer.equivalents(), tracer.scopes(after), ExitStack() as stack:
                if self._with_numbers:
                    stack.enter_context(tracer.numbers.planted(self._still.modules))
                    stack.enter_context(tracer.numbers)
                if recurrent_layers(self._still):
                    stack.enter_context(Packing())
                stack.enter_context(tracer)
                out = call(self._model, self._inputs)
                self._trace_what_only_training_runs()
        except Exception as error:
            self.failure = error
            return []
        if tracer.hollow is not None and tracer.hollow.read:  # the forward went on all the same
            self.failure = ValuesRead()
            return []
        self._still.compares = tracer.numbers.compares
        if unused := tracer.unused():
            self.notes.append(_unused_note(unused))
        outputs = fixed_outputs(out)
        if not outputs:
            self.failure = TypeError(f"it returned a {type(out).__name__} in which no tensor was found")
        for tensor in outputs:
            tracer.give_out(tensor)
        self.outputs += outputs
        self.left = [(n, a, f) for n, a, t in self._still.filled() for f in tracer.mark(t).factors]
        return [t for t in outputs if t.grad_fn is not None]

    def _trace_what_only_training_runs(self) -> None:
        """Auxiliary heads, averages that are kept: where weights or buffers were not met, the forward of training is
        traced as well; it counts no work.
        """
        tracer, still = self.tracer, self._still

        def unmet() -> list[str]:
            return [*tracer.unused(), *tracer.unused_statistics(still.modules)]

        unused = unmet() if still.in_training else []
        if not unused:
            return
        done = len(tracer.work)
        still.train()
        try:
            for tensor in fixed_outputs(call(self._model, self._inputs)):
                tracer.give_out(tensor)
                self.outputs.append(tensor)
            still.trains_more = unmet() != unused
        except Exception:  # without targets there is no loss, say: then these weights stay unknown
            return
        finally:
            del tracer.work[done:]


def _unused_note(names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"not used by this forward, so a forward that uses them will fail once what feeds them is smaller: {shown} "
        "(name what feeds them in ignored_layers=, or give example inputs with which they are used)"
    )


def _shapes(inputs: Any) -> str:
    leaves = tree_leaves(inputs)
    return ", ".join(str(tuple(t.shape)) if isinstance(t, torch.Tensor) else type(t).__name__ for t in leaves)


def _batch(inputs: Any) -> int:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            return leaf.shape[0]
    return 1


def _number(
    model: nn.Module, still: Still, attempt: _Attempt, order: list[str], batch: int, notes: tuple[str, ...]
) -> Plan:
    tracer = attempt.tracer
    leaves = [leaf for leaf in tracer.leaves.values() if leaf.axes]
    _freeze_unknown_owners(model, still, tracer, leaves)
    projected = _couple_recurrent(still, tracer, leaves)
    _choose_units(tracer)
    _freeze_third_axes(tracer, leaves)
    solution, counts = resolve(tracer.numbers, tracer.slots)
    roots = _roots(leaves, order, tracer.module_order)
    numbers = Numbering(solution, roots)
    channel = numbers.channels
    counted = {c.symbol: c for c in (*tracer.widths, *counts)}.values()
    numbers.look_up((
        *(slots for leaf in leaves for slots in leaf.axes.values()), *(a for w in tracer.work for a in w.axes),
        *(c.slots for c in counted),
    ))  # fmt: skip
    tensors, mapped = [], set()
    for leaf in leaves:
        dims = sorted(leaf.axes) if len(leaf.axes) > 1 else leaf.axes
        axes = [numbers.axis(dim, leaf.axes[dim], _role(leaf, dim)) for dim in dims]
        live = tuple([axis for axis in axes if axis is not None])
        if live:
            name, shape = leaf.name, tuple(leaf.tensor.shape)
            mapped.add(name)
            tensors.append(TensorMap(name, leaf.is_parameter, shape, leaf.groups, leaf.whole_groups, live))
    numbers.frozen += _unused_as_they_are(model, leaves, mapped, solution)
    other = sum(leaf.tensor.numel() for leaf in tracer.leaves.values() if leaf.is_parameter and leaf.name not in mapped)
    work = tuple(numbers.work(w) for w in tracer.work)
    widths = [Width(*_place(c.symbol), channel(c.slots), c.per) for c in counted if numbers.live(c.slots)]
    plan = Plan(
        n_channels=numbers.count,
        n_units=numbers.n_units,
        unit=numbers.unit,
        groups=numbers.groups(tensors),
        tensors=tuple(tensors),
        frozen=tuple(numbers.frozen),
        work=work,
        widths=tuple(widths),
        batch=batch,
        other_params=other,
        notes=notes,
        remembered=tuple({(n, a): None for n, a, labels in attempt.left if numbers.live(flat(labels))}),
    )
    dead = _dead_ends(plan, numbers.consumed, leaves, attempt.outputs)
    known = {(w.module, w.attribute) for w in plan.widths}
    heads = [(path, channel(slots)) for path, slots in _heads(tracer, solution)]
    told = follow_config(model, tracer.numbers, plan.tensors, plan.unit, heads)
    if told:
        plan = replace(plan, widths=(*plan.widths, *(w for w in told if (w.module, w.attribute) not in known)))
    if tracer.multiples:
        plan = _in_multiples(plan, [(channel(slots.reshape(-1)), m) for slots, m in tracer.multiples])
    if projected:
        plan = _above_projections(plan, projected)
    ends = [i for i, g in enumerate(plan.groups) if g.root in dead]
    plan = plan.freeze(ends, "no output of this forward depends on it")
    alone = np.flatnonzero(plan.group_units == 1).tolist()
    return plan.freeze(alone, "its channels all go together: nothing of it can be removed")


def _dead_ends(plan: Plan, consumed: set[int], leaves: list[Leaf], outputs: list[torch.Tensor]) -> set[str]:
    """Roots of groups that nothing sums over and that no output depends on: who else reads them is not seen."""
    if len(consumed) == len(plan.groups) or all(t.grad_fn is None for t in outputs):
        return set()  # without gradients it is not seen either
    met = reached(outputs)
    used = {leaf.name for leaf in leaves if id(leaf.tensor) in met}
    return {g.root for i, g in enumerate(plan.groups) if i not in consumed and used.isdisjoint(n for n, _ in g.members)}


def _in_multiples(plan: Plan, needed: list[tuple[ChannelArray, int]]) -> Plan:
    """Groups that hold channels of which a kernel needs a multiple keep one; those that cannot stay as they are."""
    multiple = [1] * len(plan.groups)
    stuck = set()
    for channels, m in needed:
        live = channels[channels >= 0]
        for number in np.unique(plan.group_of[live]).tolist():
            group = plan.groups[number]
            _, sizes = np.unique(plan.unit[group.start : group.stop], return_counts=True)
            _, times = np.unique(plan.unit[live[plan.group_of[live] == number]], return_counts=True)
            if len(times) != len(sizes) or len(set(sizes.tolist())) > 1 or len(set(times.tolist())) > 1:
                stuck.add(number)
                continue
            units = math.lcm(multiple[number] // sizes[0] or 1, m // math.gcd(int(times[0]), m))
            multiple[number] = units * int(sizes[0])
            if group.channels % multiple[number]:
                stuck.add(number)
    groups = tuple(replace(g, multiple=m) for g, m in zip(plan.groups, multiple, strict=True))
    plan = replace(plan, groups=groups)
    return plan.freeze(stuck, "a kernel reads it in steps of 16 bytes, which do not fit its units")


def _above_projections(plan: Plan, weights: list[str]) -> Plan:
    """Hidden units stay more than the ``weights`` project them to; left alone where other units are in their group."""
    groups = list(plan.groups)
    stuck = set()
    for tensor in plan.tensors:
        columns = next((a.channels for a in tensor.axes if a.dim == 1), None)
        if tensor.name not in weights or columns is None:
            continue
        live = columns[columns >= 0]
        for number in np.unique(plan.group_of[live]).tolist():
            if plan.group_units[number] != len(np.unique(plan.unit[live])):
                stuck.add(number)
            groups[number] = replace(groups[number], above=(*groups[number].above, tensor.name))
    return replace(plan, groups=tuple(groups)).freeze(stuck, PROJECTED)


def _unused_as_they_are(model: nn.Module, leaves: list[Leaf], mapped: set[str], solution: Solution) -> list[Frozen]:
    """Layers of a kind that is pruned whose weight is computed with before it is used: they are named, too."""
    found = []
    for leaf in leaves:
        path, _, local = leaf.name.rpartition(".")
        if leaf.name in mapped or leaf.producers or local not in ("weight", "weight_orig") or not leaf.is_parameter:
            continue
        if isinstance(model.get_submodule(path), LAYERS):
            units = [u for slots in leaf.axes.values() for u in solution.unit[slots].tolist()]
            why = next((solution.frozen[u] for u in units if u in solution.frozen), "is not multiplied as it is")
            if local == "weight_orig":
                why = "its weight is made of weight_orig by a hook"
            found.append(Frozen(path, leaf.tensor.shape[0], why))
    return found


def _place(symbol: Symbol) -> tuple[str, str, int | None]:
    return symbol.module, symbol.attribute, symbol.index


def _choose_units(tracer: Tracer) -> None:
    """Where a view spread channels over several dimensions, one of them may shrink and the others stay.

    The first that is not pinned already is taken: of ``[heads, head_dim]`` whole heads, of
    ``[3, heads, head_dim]``, whose first dimension is unbound, heads again.
    """
    left = [split for _, split in tracer.splits]
    while left:
        solution = tracer.slots.solve()
        touched = np.zeros(len(solution.unit), dtype=np.bool_)
        later = []
        for split in left:
            unit = solution.unit[tracer.slots.index(split)]
            if touched[unit].any():  # another split has just coupled some of these: look again when that is solved
                later.append(split)
                continue
            loose = [d for d in varying(split) if (unit != unit.take([0], axis=d)).any()]
            for dim in loose[1:]:
                tracer.slots.couple(split, split.take([0], axis=dim))
                touched[unit] = True
        left = later
    _choose_shares(tracer)


def _heads(tracer: Tracer, solution: Solution) -> Iterator[tuple[str, IntArray]]:
    """Where a view made heads: the module, and one slot for each of them."""
    for path, split in tracer.splits:
        unit = solution.unit[tracer.slots.index(split)]
        loose = [d for d in varying(split) if (unit != unit.take([0], axis=d)).any()]
        if len(loose) == 1 and len(varying(split)) > 1:
            yield path, np.moveaxis(split, loose[0], 0).reshape(split.shape[loose[0]], -1)[:, 0]


def _choose_shares(tracer: Tracer) -> None:
    """A vector that meets ``[heads, head_dim]``: one entry for each head goes with it, one for all must stay."""
    if not tracer.shares:
        return
    solution = tracer.slots.solve()
    for labels, shared in tracer.shares:
        unit = solution.unit[tracer.slots.index(labels)]
        loose = {d for d in varying(labels) if (unit != unit.take([0], axis=d)).any()}
        along = set(varying(np.broadcast_to(shared, np.broadcast_shapes(shared.shape, (1,) * labels.ndim))))
        if loose <= along:
            tracer.slots.couple(shared, labels)
            continue
        tracer.slots.freeze(shared, "is shared by all heads")
        for dim in along:
            tracer.slots.couple(labels, labels.take([0], axis=dim))


def _freeze_unknown_owners(model: nn.Module, still: Still, tracer: Tracer, leaves: list[Leaf]) -> None:
    """A weight that is multiplied inside a module of unknown kind stays: its attributes are not known."""
    closed = [name for name, m in still.of(nn.MultiheadAttention, nn.RNNBase) if _is_closed(m)]
    if not closed:
        return
    for leaf in leaves:
        reasons = [_why_kept(model, closed, leaf, name) for name in leaf.names]
        reason = next((r for r in reasons if r is not None), None)
        if reason is not None:
            for slots in leaf.axes.values():
                tracer.slots.freeze(slots, reason)


def _is_closed(module: nn.Module) -> bool:
    """Whether its code relies on the sizes of the whole, so that its parameters stay."""
    return isinstance(module, nn.MultiheadAttention) or (isinstance(module, nn.RNNBase) and not is_plain(module))


def _couple_recurrent(still: Still, tracer: Tracer, leaves: list[Leaf]) -> list[str]:
    """The layers and directions of a recurrent module have one width; the weights of their projections."""
    layers = recurrent_layers(still)
    by_name = {name: leaf for leaf in leaves for name in leaf.names} if layers else {}
    for path, module in layers:
        couple_layers(module, path, by_name, tracer.slots)
    weights = [f"{path}.weight_hr_l0".removeprefix(".") for path, module in layers if module.proj_size]
    return [by_name[name].name for name in weights if name in by_name]


def _why_kept(model: nn.Module, closed: list[str], leaf: Leaf, name: str) -> str | None:
    path = name.rpartition(".")[0]
    inside = next((c for c in closed if path == c or path.startswith(c + ".")), None)
    if inside is not None:
        return f"belongs to {type(model.get_submodule(inside)).__name__} {inside}, whose sizes are tied"
    return None


def _freeze_third_axes(tracer: Tracer, leaves: list[Leaf]) -> None:
    """A tile has rows and columns: of a tensor with more prunable axes the last ones stay.

    Unless that would hold what is to go: axes that have units in common go or stay together.
    """
    crowded = [leaf for leaf in leaves if len(leaf.axes) > 2]
    if not crowded:
        return
    solution = tracer.slots.solve()
    stays = solution.frozen.mask
    for leaf in crowded:
        units = {d: solution.unit[slots] for d, slots in sorted(leaf.axes.items())}
        loose = [d for d in units if not stays[units[d]].all()]
        if len(loose) > 2:
            pairs = [(two, [d for d in loose if d not in two]) for two in combinations(loose, 2)]
            apart = (rest for two, rest in pairs if not _meet(units, two, rest))
            for dim in next(apart, loose[2:]):
                tracer.slots.freeze(leaf.axes[dim], f"{leaf.name} has more than two prunable dimensions")


def _meet(units: dict[int, IntArray], some: Sequence[int], others: Sequence[int]) -> bool:
    """Whether one of the dimensions ``some`` has a unit in common with one of ``others``."""
    return bool(np.isin(np.concatenate([units[d] for d in some]), np.concatenate([units[d] for d in others])).any())


def _roots(leaves: list[Leaf], order: list[str], executed: list[str]) -> list[tuple[Leaf, int]]:
    """Output axes of weights: Torch-Pruning's roots in its order, then the others, last executed first."""
    rank = {name: i for i, name in enumerate(reversed(list(dict.fromkeys(executed))), start=len(order))}
    rank.update({name: i for i, name in enumerate(order)})
    found = [(leaf, dim) for leaf in leaves if leaf.is_parameter for dim in leaf.producers if dim in leaf.axes]
    return sorted(found, key=lambda root: rank.get(root[0].name.rpartition(".")[0], len(rank) + len(order)))


def _role(leaf: Leaf, dim: int) -> str:
    if dim in leaf.producers:
        return "out"
    return "in" if dim in leaf.consumers else "both"


def total_params(model: nn.Module) -> int:
    """Elements of all parameters of ``model``."""
    return sum(math.prod(p.shape) for p in model.parameters())
