"""The prune: everything that can be refused is checked, everything new is made, then it is swapped in.

Until the swap nothing of the model has been touched, and every swap can be undone, so a prune happens as a
whole or not at all. Parameters and buffers keep their identity: optimizers, schedulers, hooks and the
user's own references stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.optim import Optimizer

from ..errors import PatError, SurgeryError
from ..plan.bind import Binding
from ..plan.types import Kept, Plan
from .compiled import forget_compiled
from .gather import Gathering, Layout, dense_strides
from .modules import Change, apply_changes, attribute_changes, tabulate
from .optimizer import StateTensor, check_state, state_tensors
from .record import note_prune, restorer
from .undo import Undo, uninterrupted

__all__ = ["Smaller", "dense_strides", "prepare", "prune", "prune_checked", "set_tensor"]

LAYOUT = "layout"  # what a binding keeps it under


@dataclass
class Cut:
    """One parameter or buffer that shrinks, with everything that shrinks along with it."""

    number: int  # among the plan's tensors
    tensor: Tensor
    data: Tensor  # as they were
    grad: Tensor | None
    states: list[StateTensor] = field(default_factory=list)
    # made by _compact, in the order data, gradient (if any), states
    new: list[Tensor] = field(default_factory=list)


@dataclass
class Smaller:
    """The binding to a model after a prune, made when it is called for: a pruner's last prune needs none.

    Attributes:
        before: the binding before the prune.
        kept: what stayed.
        strides: of the tensors after it.
        plan: the plan after it, if it is known.
    """

    before: Binding
    kept: Kept
    strides: list[tuple[int, ...]]
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
        smaller.derived[LAYOUT] = before.derived[LAYOUT].smaller(before.plan, plan, self.strides)
        return smaller


def prune(
    binding: Binding,
    keep: Tensor | NDArray[np.bool_],
    optimizers: Iterable[Optimizer] = (),
    ready: Callable[[], None] | None = None,
    copies: Iterable[nn.Module] = (),
    then: Callable[[Binding], None] | None = None,
) -> Binding:
    """Remove the channels ``~keep`` from the model, and from what trains it.

    Args:
        binding: the plan, bound to the model.
        keep: bool ``[N]``; whole units, and something left of every axis.
        optimizers: whose state is to shrink along.
        ready: called when everything new is made and nothing of the model was touched; if it raises, nothing is.
        copies: of the model (averages of its weights), which are to lose the same channels.
        then: called with the new binding when all is done; if it raises, all is undone.
    Returns:
        The binding of the smaller plan to the same model.
    Raises:
        PlanError: ``keep`` is not possible, or the model is not the one that the plan was made for.
        SurgeryError: an optimizer's state cannot be shrunk, or an error came up while the new tensors
            were made; model and optimizers are as they were. Other errors are raised as they are, with the model
            as it was. An interrupt from the keyboard comes before the first change or after the last.
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

    prune_checked(binding, kept, optimizers, ready, copies, finish)
    return made[0]


@torch.no_grad()
def prune_checked(
    binding: Binding,
    kept: Kept,
    optimizers: Iterable[Optimizer] = (),
    ready: Callable[[], None] | None = None,
    copies: Iterable[nn.Module] = (),
    then: Callable[[Smaller], None] | None = None,
) -> Smaller:
    """As :func:`prune`, to what ``binding.plan.check_keep`` has let pass; the smaller binding is made when asked for.

    ``then`` is called with what is returned.
    """
    sizes, _ = binding.plan.shapes.left(kept)
    bindings = [binding, *(Binding(binding.plan, copy) for copy in copies)]
    cuts = _cuts(bindings, sizes, list(optimizers))
    changes = [change for b in bindings for change in attribute_changes(b, kept, b.model)]
    undo: list[Undo] = []
    try:
        gathering = Gathering(binding.plan, layout_of(binding), kept, sizes)
        _compact(cuts, gathering, kept)
        if ready is not None:
            ready()
        with uninterrupted():
            smaller = _change(cuts, changes, bindings, kept, undo)
            forget_compiled()
            if then is not None:
                then(smaller)
            undo.clear()  # an interrupt that has waited is raised at the end of this block: the prune is done
    except BaseException as error:
        with uninterrupted(), ExitStack() as steps:  # which takes all of them, the last first, even if one fails
            for step in undo:
                steps.callback(step)
        if isinstance(error, PatError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"the prune failed ({type(error).__name__}: {error}) and was undone; the model and its optimizers are "
            "as they were"
        ) from error
    return smaller


def _change(cuts: list[Cut], changes: list[Change], bindings: list[Binding], kept: Kept, undo: list[Undo]) -> Smaller:
    """Swap the new tensors in, set the attributes; what takes each step back is appended to ``undo`` first."""
    blank: dict[tuple[torch.device, torch.dtype], Tensor] = {}
    nodes = _accumulators([c.tensor for c in cuts if c.tensor.requires_grad])
    for cut in cuts:
        undo.append(partial(_restore, cut))
        _swap(cut, blank, nodes)
    attributes: list[Change] = []
    undo.append(lambda: apply_changes(list(reversed(attributes)), []))
    apply_changes(changes, attributes)
    undo += [restorer(b.modules.values()) for b in bindings]
    for bound in bindings:
        note_prune(bound, kept)
    return Smaller(bindings[0], kept, [t.stride() for t in bindings[0].tensors.values()])


def prepare(binding: Binding) -> None:
    """Work out ahead what the first prune needs of the plan and of the model; later ones find it there."""
    layout_of(binding)
    tabulate(binding)
    binding.plan.macs()
    binding.plan.check_keep(np.ones(binding.plan.n_channels, dtype=np.bool_))


def layout_of(binding: Binding) -> Layout:
    """How the binding's tensors lie in memory; made anew where that has changed."""
    strides = [t.stride() for t in binding.tensors.values()]
    known: Layout | None = binding.derived.get(LAYOUT)
    if known is None or known.strides != strides:
        known = binding.derived[LAYOUT] = Layout.of(binding.plan, strides)
    return known


def _cuts(bindings: list[Binding], sizes: NDArray[np.int64], optimizers: list[Optimizer]) -> list[Cut]:
    """Those of the plan's tensors that come to have other ``sizes [T, D]``.

    Raises:
        PlanError: the model is not the one that the plan was made for.
        SurgeryError: a gradient or an optimizer's state cannot be shrunk.
    """
    check_state(optimizers)
    for binding in bindings:
        binding.check()
    plan = bindings[0].plan
    holders = [list(b.tensors.values()) for b in bindings]
    seen: set[int] = set()
    found = []
    for number in np.flatnonzero((sizes != plan.shapes.sizes).any(1)).tolist():
        for tensor in (held[number] for held in holders):
            if id(tensor) in seen:  # a copy may share some
                continue
            seen.add(id(tensor))
            cut = Cut(number, tensor, tensor.data, tensor.grad)
            if optimizers and isinstance(tensor, nn.Parameter):
                cut.states = state_tensors(optimizers, tensor, plan.tensors[number].name)
            if cut.grad is not None and cut.grad.layout != torch.strided:
                raise SurgeryError(
                    f"{plan.tensors[number].name} has a sparse gradient; call zero_grad() before pruning"
                )
            found.append(cut)
    return found


# Making the new tensors


def _compact(cuts: list[Cut], gathering: Gathering, kept: Kept) -> None:
    """Fill ``cut.new`` for all cuts: one op call per device and dtype."""
    for cut in cuts:
        cut.new.append(gathering.add(cut.number, cut.data))
        if cut.grad is not None:
            cut.new.append(gathering.add(cut.number, cut.grad))
        cut.new += [gathering.add(cut.number, s.tensor) for s in cut.states if not s.factored]
        cut.new += [_gathered(gathering, cut.number, s, kept) for s in cut.states if s.factored]
    gathering.run()


def _gathered(gathering: Gathering, number: int, state: StateTensor, keep: Kept) -> Tensor:
    """Statistics of rows, columns or both: each dimension that follows one of the parameter is gathered."""
    assert state.follows is not None
    value, tensor = state.tensor, gathering.plan.tensors[number]
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


# Swapping them in


def _swap(cut: Cut, blank: dict[tuple[torch.device, torch.dtype], Tensor], nodes: dict[int, Any]) -> None:
    new = iter(cut.new)
    data = next(new)
    grad = next(new) if cut.grad is not None else None
    key = data.device, data.dtype
    if key not in blank:
        blank[key] = _blank(data)
    set_tensor(cut.tensor, data, grad, blank[key], nodes.get(id(cut.tensor)))
    if cut.states:
        ordered = [s for s in cut.states if not s.factored] + [s for s in cut.states if s.factored]
        for state, value in zip(ordered, new, strict=True):
            state.put(cut.tensor, value)


def _restore(cut: Cut) -> None:
    set_tensor(cut.tensor, cut.data, cut.grad)
    for state in cut.states:
        state.put(cut.tensor, state.tensor)


def set_tensor(
    tensor: Tensor, data: Tensor, grad: Tensor | None, blank: Tensor | None = None, node: Any = None
) -> None:
    """Give ``tensor`` other data and another gradient, in place: the object and its hooks stay.

    While an earlier output or loss is alive, autograd keeps the tensor's gradient accumulator, which
    remembers the old shape and would refuse the next backward. Assigning data of another dtype in between
    makes autograd drop it. A backward of that earlier loss is refused: its graph holds the new data in the place of
    what it was computed from. ``blank`` is an empty tensor of another dtype on ``data``'s device and ``node`` the
    accumulator, if they are at hand.
    """
    if tensor.grad is not None:
        tensor.grad = None
    if tensor.requires_grad:
        (get_gradient_edge(tensor).node if node is None else node).register_prehook(_refuse_backward)
        increment_version(tensor)
        tensor.data = _blank(data) if blank is None else blank
    tensor.data = data
    if grad is not None:
        tensor.grad = grad


class _Touch(torch.autograd.Function):
    """Has all of its inputs' gradient accumulators as its neighbours."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)


def _accumulators(tensors: list[Tensor]) -> dict[int, Any]:
    """The gradient accumulators of leaves that require a gradient, by the leaf's ``id``, in one go."""
    if not tensors:
        return {}
    with torch.enable_grad():
        touched: Any = _Touch.apply(*tensors)
    return {id(t): node for t, (node, _) in zip(tensors, touched.grad_fn.next_functions, strict=True)}


def _blank(data: Tensor) -> Tensor:
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    return torch.empty(0, dtype=other, device=data.device)


def _refuse_backward(grads: tuple[Tensor, ...]) -> None:
    raise SurgeryError(
        "backward of a loss that was computed before the model was pruned: expected it before the prune, or a new "
        "forward after it; call step() of the pruner between the optimizer's step and the next forward"
    )
