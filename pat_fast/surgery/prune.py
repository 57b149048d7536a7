"""The prune: everything that can be refused is checked, everything new is made, then it is swapped in.

Until the swap nothing of the model has been touched, and every swap can be undone, so a prune happens as a
whole or not at all. Parameters and buffers keep their identity: optimizers, schedulers, hooks and the
user's own references stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, increment_version
from torch.optim import Optimizer

from ..errors import PatError, PlanError, SurgeryError
from ..ops import NONE, Tile, TileTable, channel_compact
from ..plan.bind import Binding, Block, blocks
from ..plan.types import Axis, ChannelArray, Kept, Plan, TensorMap, groups_left
from .compiled import forget_compiled
from .modules import Change, apply_changes, attribute_changes
from .optimizer import StateTensor, check_state, state_tensors
from .record import note_prune, restorer
from .undo import Undo, uninterrupted


@dataclass
class Cut:
    """One parameter or buffer that shrinks, with everything that shrinks along with it."""

    tensor_map: TensorMap
    smaller: TensorMap  # same axes, only what is kept
    kept: list[NDArray[np.int64]]
    tensor: Tensor
    states: list[StateTensor] = field(default_factory=list)
    # made by _compact, in the order data, gradient (if any), states
    new: list[Tensor] = field(default_factory=list)

    def sources(self) -> list[Tensor]:
        """Tensors of the parameter's own shape: data, gradient, element-wise state."""
        found = [self.tensor.detach()]
        if self.tensor.grad is not None:
            found.append(self.tensor.grad)
        return found + [s.tensor for s in self.states if not s.factored]


@torch.no_grad()
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
    bindings = [binding, *(Binding(binding.plan, copy) for copy in copies)]
    cuts = _cuts(bindings, kept, list(optimizers))
    changes = [change for b in bindings for change in attribute_changes(b, kept, b.model)]
    undo: list[Undo] = []
    try:
        _compact(cuts)
        if ready is not None:
            ready()
        with uninterrupted():
            smaller = _change(cuts, changes, bindings, kept, plan, undo)
            forget_compiled()
            if then is not None:
                then(smaller)
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


def _change(
    cuts: list[Cut], changes: list[Change], bindings: list[Binding], kept: Kept, plan: Plan, undo: list[Undo]
) -> Binding:
    """Swap the new tensors in, set the attributes; what takes each step back is appended to ``undo`` first."""
    for cut in cuts:
        _swap(cut, undo)
    attributes: list[Change] = []
    undo.append(lambda: apply_changes(list(reversed(attributes)), []))
    apply_changes(changes, attributes)
    undo += [restorer(b.model) for b in bindings]
    for bound in bindings:
        note_prune(bound, kept)
    smaller, *_ = [Binding(plan, b.model) for b in bindings]
    return smaller


def _cuts(bindings: list[Binding], keep: Kept, optimizers: list[Optimizer]) -> list[Cut]:
    check_state(optimizers)
    found: list[Cut] = []
    shared: dict[int, ChannelArray] = {}

    def left(channels: ChannelArray) -> ChannelArray:
        if id(channels) not in shared:
            shared[id(channels)] = channels[keep(channels)]
        return shared[id(channels)]

    seen: set[int] = set()
    for tensor_map in bindings[0].plan.tensors:
        kept, shape = keep.of(tensor_map)
        if shape == tensor_map.shape:
            continue
        axes = tuple(Axis(a.dim, left(a.channels), a.role) for a in tensor_map.axes)
        groups = groups_left(tensor_map, kept)
        smaller = TensorMap(
            tensor_map.name, tensor_map.is_parameter, shape, groups, tensor_map.whole_groups, axes
        )
        for tensor in (b.tensors[tensor_map.name] for b in bindings):
            if id(tensor) not in seen:  # a copy may share some
                seen.add(id(tensor))
                found.append(_cut(tensor_map, smaller, kept, tensor, optimizers))
    return found


def _cut(
    tensor_map: TensorMap,
    smaller: TensorMap,
    kept: list[NDArray[np.int64]],
    tensor: Tensor,
    optimizers: list[Optimizer],
) -> Cut:
    if tuple(tensor.shape) != tensor_map.shape:
        raise PlanError(
            f"{tensor_map.name} has shape {tuple(tensor.shape)}, the plan expects {tensor_map.shape}: the model "
            "was changed since the plan was bound; build a new plan"
        )
    cut = Cut(tensor_map, smaller, kept, tensor)
    if isinstance(tensor, nn.Parameter):
        cut.states = state_tensors(optimizers, tensor, tensor_map.name)
    if tensor.grad is not None and tensor.grad.layout != torch.strided:
        raise SurgeryError(f"{tensor_map.name} has a sparse gradient; call zero_grad() before pruning")
    return cut


# Making the new tensors


def _compact(cuts: list[Cut]) -> None:
    """Fill ``cut.new`` for all cuts: one op call per device and dtype."""
    batches: dict[tuple[torch.device, torch.dtype], _Batch] = {}
    for cut in cuts:
        for source in cut.sources():
            batch = batches.setdefault((source.device, source.dtype), _Batch())
            cut.new.append(batch.add(cut, source))
        cut.new += [_gathered(cut, s) for s in cut.states if s.factored]
    for batch in batches.values():
        batch.run()


class _Batch:
    """Copies of one device and dtype, gathered into one call of ``channel_compact``."""

    def __init__(self) -> None:
        self.xs: list[Tensor] = []
        self.outs: list[Tensor] = []
        self.tiles: list[Tile] = []
        self.out_tiles: list[Tile] = []
        self.index: list[NDArray[np.int32]] = []
        self._length = 0
        self._known: dict[tuple[int, int, int], int] = {}
        self._planned: dict[tuple[int, tuple[int, ...]], list[tuple[Block, Block, int, int]]] = {}

    def add(self, cut: Cut, source: Tensor) -> Tensor:
        """Plan the copy of what is kept of ``source``; returns the tensor that will hold it."""
        out = torch.empty_strided(
            cut.smaller.shape,
            dense_strides(cut.smaller.shape, source.stride()),
            dtype=source.dtype,
            device=source.device,
        )
        number = len(self.xs)
        self.xs.append(source)
        self.outs.append(out)
        for one, two, rows, cols in self._copies(cut, source, out):
            (r, sr), (c, sc), (k, sk) = one.row, one.col, one.kernel
            self.tiles.append(Tile(number, one.offset, (r, c, k), (sr, sc, sk)))
            (r, sr), (c, sc), (k, sk) = two.row, two.col, two.kernel
            self.out_tiles.append(Tile(number, two.offset, (r, c, k), (sr, sc, sk), rows, cols))
        return out

    def _copies(self, cut: Cut, source: Tensor, out: Tensor) -> list[tuple[Block, Block, int, int]]:
        """Blocks of ``source``, where they go, and the lists of their rows and columns."""
        key = (id(cut), source.stride())  # the same for gradient and optimizer state
        if key not in self._planned:
            sources = blocks(cut.tensor_map, source.stride())
            if cut.tensor_map.groups != cut.smaller.groups and len(sources) > 1:
                sources = [b for b in sources if _survives(cut, b)]
            targets = blocks(cut.smaller, out.stride(), order=source.stride())
            self._planned[key] = [
                (
                    one,
                    two,
                    self._list(cut, one.row_channels, one.row[0], two.row[0]),
                    self._list(cut, one.col_channels, one.col[0], two.col[0]),
                )
                for one, two in zip(sources, targets, strict=True)
            ]
        return self._planned[key]

    def _list(self, cut: Cut, channels: NDArray[np.int32] | None, before: int, after: int) -> int:
        """Offset in the index of the kept positions along one side of a block."""
        if before == after:
            return NONE
        assert channels is not None
        for axis, kept in zip(cut.tensor_map.axes, cut.kept, strict=True):
            start = _offset_in(axis.channels, channels)
            if start is not None:
                key = (id(kept), start, before)
                if key not in self._known:
                    inside = kept[(kept >= start) & (kept < start + before)] - start
                    self._known[key] = self._length
                    self._length += len(inside)
                    self.index.append(inside.astype(np.int32))
                return self._known[key]
        raise AssertionError("a block's channels are not a part of its axes")

    def run(self) -> None:
        """Copy."""
        index = torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *self.index]))
        table = TileTable.from_tiles(self.xs, self.tiles)
        out_table = TileTable.from_tiles(self.outs, self.out_tiles, slots=len(index), shared_slots=True)
        device = self.xs[0].device
        channel_compact(self.outs, self.xs, table, out_table, index.to(device))


def _offset_in(axis: NDArray[np.int32], part: NDArray[np.int32]) -> int | None:
    """Where the view ``part`` begins in ``axis``, or None if it is a view of something else."""
    if part is axis:
        return 0
    start = part.__array_interface__["data"][0] - axis.__array_interface__["data"][0]
    if not 0 <= start < max(axis.nbytes, 1):
        return None
    return start // axis.itemsize


def _survives(cut: Cut, block: Block) -> bool:
    """Whether the group of a depthwise convolution that ``block`` is stays."""
    per_group = len(cut.tensor_map.axes[0].channels) // cut.tensor_map.groups
    return bool(np.isin(block.group * per_group, cut.kept[0]))


def dense_strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` whose dimensions lie in the order of the strides ``like``."""
    if len(shape) == 1:
        return (1,)
    strides = [1] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (like[d], -d)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _gathered(cut: Cut, state: StateTensor) -> Tensor:
    """Statistics of rows, columns or both: each dimension that follows one of the parameter is gathered."""
    assert state.follows is not None
    value = state.tensor
    by_dim = {axis.dim: (axis, kept) for axis, kept in zip(cut.tensor_map.axes, cut.kept, strict=True)}
    for dim, followed in enumerate(state.follows):
        if followed is None or followed not in by_dim:
            continue
        axis, kept = by_dim[followed]
        if len(axis.channels) != cut.tensor_map.shape[followed]:
            raise SurgeryError(
                f"{cut.tensor_map.name}: the factored optimizer state of a grouped convolution's inputs is shared by "
                "its groups and cannot be pruned; use an optimizer with element-wise state"
            )
        value = value.index_select(dim, torch.from_numpy(kept).to(value.device))
    return value


# Swapping them in


def _swap(cut: Cut, undo: list[Undo]) -> None:
    new = iter(cut.new)
    data = next(new)
    grad = next(new) if cut.tensor.grad is not None else None
    undo.append(_restorer(cut.tensor, cut.tensor.data, cut.tensor.grad))
    set_tensor(cut.tensor, data, grad)
    ordered = [s for s in cut.states if not s.factored] + [s for s in cut.states if s.factored]
    for state, value in zip(ordered, new, strict=True):
        undo.append(partial(state.put, cut.tensor, state.tensor))
        state.put(cut.tensor, value)


def _restorer(tensor: Tensor, data: Tensor, grad: Tensor | None) -> Undo:
    return lambda: set_tensor(tensor, data, grad)


def set_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give ``tensor`` other data and another gradient, in place: the object and its hooks stay.

    While an earlier output or loss is alive, autograd keeps the tensor's gradient accumulator, which
    remembers the old shape and would refuse the next backward. Assigning data of another dtype in between
    makes autograd drop it. A backward of that earlier loss is refused: its graph holds the new data in the place of
    what it was computed from.
    """
    tensor.grad = None
    if tensor.requires_grad:
        get_gradient_edge(tensor).node.register_prehook(_refuse_backward)
        increment_version(tensor)
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data
    tensor.grad = grad


def _refuse_backward(grads: tuple[Tensor, ...]) -> None:
    raise SurgeryError(
        "backward of a loss that was computed before the model was pruned: expected it before the prune, or a new "
        "forward after it; call step() of the pruner between the optimizer's step and the next forward"
    )
