"""The prune: everything that can be refused is checked, then the tensors are cut, batch by batch.

Every step can be undone, so a prune happens as a whole or not at all. Parameters and buffers keep their identity:
optimizers, schedulers, hooks and the user's own references stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
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
from ..plan.types import Kept, Plan, TensorMap
from .compiled import forget_compiled
from .gather import Gathering
from .journal import Batch, Move, batches
from .layout import Layout, dense_strides
from .modules import Change, apply_changes, attribute_changes, tabulate
from .optimizer import StateTensor, check_state, state_tensors
from .record import note_prune, restorer
from .undo import Undo, uninterrupted

__all__ = ["Smaller", "dense_strides", "prepare", "prune", "prune_checked", "set_tensor"]

LAYOUT = "layout"  # what a binding keeps it under


Blanks = dict[tuple[torch.device, torch.dtype], Tensor]


@dataclass(slots=True, eq=False)
class Cut:
    """One parameter or buffer that shrinks.

    Attributes:
        grad: its gradient, which is not with it while both are of different shapes.
        blanks: empty tensors of other dtypes, by device and dtype.
        node: its gradient accumulator, if that is at hand.
    """

    tensor: Tensor
    grad: Tensor | None
    blanks: Blanks
    node: Any = None

    def detach_grad(self) -> None:
        """Take the gradient off."""
        self.tensor.grad = None

    def attach_grad(self) -> None:
        """Give the tensor its gradient back."""
        if self.grad is not None:
            self.tensor.grad = self.grad

    def put_grad(self, grad: Tensor) -> None:
        """Let the gradient be another."""
        self.tensor.grad = None
        self.grad = grad

    def put_data(self, data: Tensor) -> None:
        """Give the tensor other data."""
        key = data.device, data.dtype
        if key not in self.blanks:
            self.blanks[key] = _blank(data)
        node, self.node = self.node, None  # it is dropped now
        set_tensor(self.tensor, data, None, self.blanks[key], node)


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


@torch.no_grad()
def prune_checked(
    binding: Binding,
    kept: Kept,
    optimizers: Iterable[Optimizer] = (),
    copies: Iterable[nn.Module] = (),
    then: Callable[[Smaller], None] | None = None,
    room: int = 0,
) -> Smaller:
    """As :func:`prune`, to what ``binding.plan.check_keep`` has let pass; the smaller binding is made when asked for.

    ``then`` is called with what is returned. Beside the model there are never more bytes than ``room``, or the largest
    tensor's if these are more.
    """
    sizes, _ = binding.plan.shapes.left(kept)
    bindings = [binding, *(Binding(binding.plan, copy) for copy in copies)]
    cuts, moves = _cuts(bindings, sizes, kept, list(optimizers))
    changes = [change for b in bindings for change in attribute_changes(b, kept, b.model)]
    undo: list[Undo] = []
    try:
        gathering = Gathering(binding.plan, layout_of(binding), kept, sizes)
        parts = batches(gathering, moves, room)
        with uninterrupted():
            _cut(cuts, parts, undo)
            smaller = _follow(changes, bindings, kept, undo)
            forget_compiled()
            if then is not None:
                then(smaller)
            # An interrupt that has waited is raised at the end of this block: the prune is done. What it needed may not
            # live on in the traceback.
            for needed in (undo, parts, moves):
                needed.clear()
    except BaseException as error:
        _take_back(undo, error)
        if isinstance(error, PatError) or not isinstance(error, Exception):
            raise
        raise SurgeryError(
            f"the prune failed ({type(error).__name__}: {error}) and was undone; the model and its optimizers are "
            "as they were"
        ) from error
    return smaller


def _take_back(undo: list[Undo], error: BaseException) -> None:
    """Undo what was done before ``error``, the last first.

    Raises:
        SurgeryError: that failed, too; what could be undone was.
    """
    try:
        with uninterrupted(), ExitStack() as steps:  # which takes all of them, even if one fails
            for step in undo:
                steps.callback(step)
    except Exception as other:
        raise SurgeryError(
            f"the prune failed ({type(error).__name__}: {error}) and could not be undone ({type(other).__name__}: "
            f"{other}): the model is in pieces, load the last checkpoint"
        ) from other


def _cut(cuts: list[Cut], parts: list[Batch], undo: list[Undo]) -> None:
    """Cut the tensors; what takes each step back is appended to ``undo`` first."""
    nodes = _accumulators([c.tensor for c in cuts if c.tensor.requires_grad])
    for cut in cuts:
        cut.node = nodes.get(id(cut.tensor))
    with_grad = [cut for cut in cuts if cut.grad is not None]

    def attach() -> None:
        for cut in with_grad:
            cut.attach_grad()

    undo.append(attach)
    for cut in with_grad:
        cut.detach_grad()
    for part in parts:
        undo.append(part.back)
        part.cut()
    attach()


def _follow(changes: list[Change], bindings: list[Binding], kept: Kept, undo: list[Undo]) -> Smaller:
    """Set the attributes and write down what was done; what takes each step back is appended to ``undo`` first."""
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


def _cuts(
    bindings: list[Binding], sizes: NDArray[np.int64], kept: Kept, optimizers: list[Optimizer]
) -> tuple[list[Cut], list[Move]]:
    """Those of the plan's tensors that come to have other ``sizes [T, D]``, and all that is cut with them.

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
    cuts: list[Cut] = []
    moves: list[Move] = []
    blanks: Blanks = {}
    for number in np.flatnonzero((sizes != plan.shapes.sizes).any(1)).tolist():
        for tensor in (held[number] for held in holders):
            if id(tensor) in seen:  # a copy may share some
                continue
            seen.add(id(tensor))
            cut = Cut(tensor, tensor.grad, blanks)
            cuts.append(cut)
            moves.append(Move(number, tensor.data, cut.put_data, holders=2))
            if cut.grad is not None:
                if cut.grad.layout != torch.strided:
                    raise SurgeryError(
                        f"{plan.tensors[number].name} has a sparse gradient; call zero_grad() before pruning"
                    )
                moves.append(Move(number, cut.grad, cut.put_grad))
            if optimizers and isinstance(tensor, nn.Parameter):
                for state in state_tensors(optimizers, tensor, plan.tensors[number].name):
                    factored = partial(_gathered, plan.tensors[number], state, kept) if state.factored else None
                    moves.append(Move(number, state.tensor, state.putter(tensor), factored))
    return cuts, moves


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
