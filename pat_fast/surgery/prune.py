"""The prune: everything that can be refused is checked, then the tensors are cut, batch by batch.

Every step can be undone, so a prune happens as a whole or not at all. Parameters and buffers keep their identity:
optimizers, schedulers, hooks and the user's own references stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SurgeryError
from ..plan.bind import Binding
from ..plan.held import Seen
from ..plan.types import Kept, Plan, TensorMap
from .compiled import forget_compiled
from .gather import Gathering, Part
from .journal import Batch, Moves, batches
from .layout import Layout, dense_strides
from .modules import Change, apply_changes, attribute_changes, tabulate
from .optimizer import StateTensor, check_state, counts, joint_states, numbers_in, state_tensors
from .put import accumulators, is_alone, set_tensor
from .record import note_dense, note_prune, restorer
from .undo import Undo, take_back, uninterrupted

__all__ = ["Held", "Smaller", "dense_strides", "prepare", "prune", "prune_checked", "set_tensor"]

LAYOUT = "layout"  # what a binding keeps it under


@dataclass
class Smaller:
    """The binding to a model after a prune, made when it is called for: a pruner's last prune needs none.

    Attributes:
        before: the binding before the prune.
        kept: what stayed.
        plan: the plan after it, if it is known.
    """

    before: Binding
    kept: Kept
    plan: Plan | None = None

    def __call__(self) -> Binding:
        """The binding.

        Raises:
            PlanError: tensors of the model came to have other shapes since.
        """
        before = self.before
        plan = before.plan.shrink(self.kept) if self.plan is None else self.plan
        smaller = Binding(plan, before.model, after=before)
        tabulate(smaller, before)
        smaller.derived[LAYOUT] = before.derived[LAYOUT].smaller(before.plan, plan, before.look().strides)
        return smaller


@dataclass(slots=True)
class Held:
    """The tensors of a binding as they are at a moment, in the order of the plan.

    Attributes:
        tensors: parameters and buffers.
        data: what they hold.
        grads: the gradients that there are, by the places of their tensors.
        accumulated: places of tensors of which autograd may have a gradient accumulator.
        seen: their strides, devices and dtypes.
    """

    tensors: list[Tensor]
    data: list[Tensor | None]
    grads: dict[int, Tensor]
    accumulated: set[int]
    seen: Seen

    @classmethod
    def of(cls, binding: Binding) -> Held:
        """Look at all that a prune may cut."""
        tensors = list(binding.tensors.values())
        accumulated = {place for place, t in enumerate(tensors) if not is_alone(t)}
        grads = {place: grad for place, t in enumerate(tensors) if (grad := t.grad) is not None}
        return cls(tensors, [t.data for t in tensors], grads, accumulated, binding.look())


def prune(
    binding: Binding,
    keep: Tensor | NDArray[np.bool_],
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    then: Callable[[Binding], None] | None = None,
) -> Binding:
    """Remove the channels ``~keep`` from the model, and from what trains it.

    Args:
        binding: the plan, bound to the model.
        keep: bool ``[N]``; whole units, and something left of every axis.
        optimizers: whose state is to shrink along.
        copies: of the model (averages of its weights), which are to lose the same channels.
        then: called with the new binding when all is done; if it raises, all is undone.
    Returns:
        The binding of the smaller plan to the same model.
    Raises:
        PlanError: ``keep`` is not possible, or the model is not the one that the plan was made for.
        SurgeryError: an optimizer's state cannot be shrunk, or an error came up on the way; model and optimizers are
            as they were. Errors of this package and interrupts are raised as they are, with the model as it was. An
            interrupt from the keyboard comes before the first change or after the last.
    """
    keep = keep.cpu().numpy() if isinstance(keep, Tensor) else np.asarray(keep)
    kept = binding.plan.check_keep(keep)
    plan = binding.plan.shrink(kept)
    made: list[Binding] = []

    def finish(smaller: Smaller) -> None:
        smaller.plan = plan
        made.append(smaller())
        if then is not None:
            then(made[0])

    prune_checked(binding, kept, optimizers, copies, finish)
    return made[0]


@torch.inference_mode(False)
@torch.no_grad()
def prune_checked(
    binding: Binding,
    kept: Kept,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    then: Callable[[Smaller], None] | None = None,
    room: int = 0,
    held: Held | None = None,
) -> Smaller:
    """As :func:`prune`, to what ``binding.plan.check_keep`` has let pass; the smaller binding is made when asked for.

    ``then`` is called with what is returned. Beside the model there are never more bytes than ``room``, or the largest
    tensor's if these are more. ``held`` are its tensors, if nothing has changed the model since they were looked
    at, and :meth:`Binding.check` let it pass then; of no use afterwards.
    """
    sizes, _ = binding.plan.shapes.left(kept)
    bindings = [binding, *(Binding(binding.plan, copy) for copy in copies)]
    optimizers = list(optimizers)
    for bound in bindings if held is None else bindings[1:]:
        bound.check()
    every = [held or Held.of(binding), *map(Held.of, bindings[1:])]
    moves = _moves(binding.plan, every, sizes, kept, optimizers)
    counted = counts(optimizers)
    undo: list[Undo] = []
    try:
        gathering = Gathering(binding.plan, layout_of(binding, every[0].seen.strides), kept, sizes, moves.joints)
        parts = batches(gathering, moves, room)
        with uninterrupted():
            _cut(moves, parts, undo, partial(_follow, counted, bindings, kept, undo), final=then is None)
            smaller = Smaller(binding, kept)
            if then is not None:
                then(smaller)
            # An interrupt that has waited is raised at the end of this block: the prune is done. What it needed may not
            # live on in the traceback.
            for needed in (undo, parts, moves.olds, moves.made, moves.grads):
                needed.clear()
    except BaseException as error:
        take_back(undo, error)
        raise
    return smaller


def _cut(moves: Moves, parts: list[Batch], undo: list[Undo], follow: Callable[[], None], final: bool) -> None:
    """Cut the tensors, and ``follow``; what takes each step back is appended to ``undo`` first.

    If that is ``final``, there is nothing left that could fail, and no way back.
    """
    moves.nodes = accumulators(moves.accumulated)

    def attach() -> None:
        for tensor, grads, place in moves.grads:
            tensor.grad = grads[place]

    undo.append(attach)
    for tensor, _, _ in moves.grads:
        tensor.grad = None

    def finish() -> None:
        attach()
        follow()
        if final:
            undo.clear()
            parts[-1].let_go()

    for part in parts:
        undo.append(part.back)
        part.cut(finish if part is parts[-1] else None)


def _follow(counted: list[Change], bindings: list[Binding], kept: Kept, undo: list[Undo]) -> None:
    """Set the attributes and write down what was done; what takes each step back is appended to ``undo`` first."""
    changes = [change for b in bindings for change in attribute_changes(b, kept, b.model)] + counted
    attributes: list[Change] = []
    undo.append(lambda: apply_changes(list(reversed(attributes)), []))
    apply_changes(changes, attributes)
    undo += [restorer(b) for b in bindings]
    for bound in bindings:
        note_prune(bound, kept)
    forget_compiled()


def prepare(binding: Binding) -> None:
    """Work out ahead what the first prune needs of the plan and of the model; later ones find it there."""
    binding.remember()
    layout = layout_of(binding, binding.look().strides)
    _ = layout.whole, layout.sides, layout.large
    tabulate(binding)
    note_dense(binding)
    plan = binding.plan
    plan.shapes.left(plan.check_keep(np.ones(plan.n_channels, dtype=np.bool_)))
    _ = plan.shapes.by_ndim


def layout_of(binding: Binding, strides: list[tuple[int, ...]]) -> Layout:
    """How the binding's tensors, of these ``strides``, lie in memory; made anew where that has changed."""
    known: Layout | None = binding.derived.get(LAYOUT)
    if known is None or known.strides != strides:
        known = binding.derived[LAYOUT] = Layout.of(binding.plan, strides)
    return known


def _moves(
    plan: Plan, every: list[Held], sizes: NDArray[np.int64], kept: Kept, optimizers: list[Optimizer]
) -> Moves:
    """All that is cut: those of the plan's tensors that come to have other ``sizes [T, D]``, and what follows them.

    Raises:
        SurgeryError: a gradient or an optimizer's state cannot be shrunk.
    """
    check_state(optimizers)
    order, is_smaller = plan.shapes.by_ndim, (sizes != plan.shapes.sizes).any(1)
    smaller = order[is_smaller[order]].tolist()  # what is alike is made in one go
    moves = Moves()
    seen: set[int] = set()
    for place, held in enumerate(every):
        # A copy may share some.
        numbers = [n for n in smaller if id(held.tensors[n]) not in seen] if place else smaller
        moves.add_held(held.data, held.seen, held.tensors, numbers)
        if len(every) > 1 or optimizers:
            seen.update(id(held.tensors[n]) for n in numbers)
        if held.accumulated:
            moves.accumulated += [held.tensors[n] for n in numbers if n in held.accumulated]
        if held.grads:
            _add_grads(moves, plan, numbers, held)
        for number in sorted(numbers) if optimizers else ():
            if isinstance(tensor := held.tensors[number], nn.Parameter):
                _add_states(moves, plan, number, tensor, kept, optimizers)
    _add_joints(moves, plan, every, seen, optimizers)
    return moves


def _add_grads(moves: Moves, plan: Plan, numbers: list[int], held: Held) -> None:
    for number in numbers:
        grad = held.grads.get(number)
        if grad is not None:
            if grad.layout != torch.strided:
                raise SurgeryError(
                    f"{plan.tensors[number].name} has a sparse gradient; call zero_grad() before pruning"
                )
            moves.grads.append((held.tensors[number], held.grads, number))
            moves.add(number, grad, held.grads, number)


def _add_states(
    moves: Moves, plan: Plan, number: int, parameter: nn.Parameter, kept: Kept, optimizers: list[Optimizer]
) -> None:
    tensor = plan.tensors[number]
    for state in state_tensors(optimizers, parameter, tensor.name):
        if state.factored:
            moves.made[len(moves.numbers)] = partial(_gathered, tensor, state, kept)
        moves.add(number, state.tensor, *state.slot(parameter))


def _add_joints(
    moves: Moves, plan: Plan, every: list[Held], cut: set[int], optimizers: list[Optimizer]
) -> None:
    """The vectors that optimizers keep over all of their parameters, if one is cut, whose ``id`` says so."""
    for joint in joint_states(optimizers):
        if not any(id(parameter) in cut for parameter in joint.parameters):
            continue
        known = {id(t): number for held in every for number, t in enumerate(held.tensors)}
        number = len(plan.tensors) + len(moves.joints)
        moves.joints.append([Part(known.get(id(p)), tuple(p.shape), numbers_in(p)) for p in joint.parameters])
        for under, state in joint.states:
            moves.add(number, state.tensor, *state.slot(under))


def _gathered(tensor: TensorMap, state: StateTensor, keep: Kept) -> Tensor:
    """Statistics of rows, columns or both: each dimension that follows one of the parameter is gathered."""
    assert state.follows is not None
    value = state.tensor
    by_dim = {axis.dim: (axis, kept) for axis, kept in zip(tensor.axes, tensor.kept(keep), strict=True)}
    for dim, followed in enumerate(state.follows):
        if followed is None or followed not in by_dim:
            continue
        axis, kept = by_dim[followed]
        if len(axis.channels) != tensor.shape[followed]:
            raise SurgeryError(
                f"{tensor.name}: the factored optimizer state of a grouped convolution's inputs is shared by "
                "its groups and cannot be pruned; use an optimizer with element-wise state"
            )
        value = value.index_select(dim, torch.from_numpy(kept).to(value.device))
    return value
