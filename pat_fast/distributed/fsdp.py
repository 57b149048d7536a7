"""FSDP2: channels of a model that ``fully_shard`` has split by rows are scored and removed where they lie.

Scores are sums over entries, so each rank adds up its rows and one all-reduce makes them whole. A prune compacts each
rank's rows, and hands them on to the rank whose chunk they are in now; no tensor is ever whole on one rank.
:class:`pat_fast.Pruner` does it by itself; the two functions here are for loops of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ..criteria.group_norm import GroupNorm
from ..errors import SurgeryError
from ..plan.types import Axis, Kept, Plan, TensorMap
from ..surgery.compiled import forget_compiled
from ..surgery.modules import Change, apply_changes, attribute_changes
from ..surgery.optimizer import StateTensor, check_state, state_tensors
from ..surgery.put import refuse_backward, set_tensor
from ..surgery.record import note_prune, restorer
from ..surgery.undo import Undo, take_back, uninterrupted
from .peers import Peers
from .sharded import ShardedBinding

HOOKS = ("_pre_backward", "_register_root_post_backward_final_callback")
NEEDED = ("_init_sharded_param", "_setattr_on_modules", "to_sharded_dtensor", "padded_sharded_param_size")


def rows_of(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rows ``start .. stop`` of a dimension of ``size`` that ``torch.chunk`` gives to ``rank``."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


@torch.no_grad()
def sharded_scores(plan: Plan, model: nn.Module, p: float = 2.0) -> Tensor:
    """The scores of :class:`pat_fast.criteria.GroupNorm`, of the shards: ``[N]`` float64, the same on every rank.

    Args:
        plan: made by :func:`pat_fast.build_plan` before ``fully_shard(model)``.
    Raises:
        SurgeryError: the model is sharded in a way that is not known here.
    """
    binding = ShardedBinding(plan, model)
    scores = GroupNorm(p).score(binding).double()
    dist.broadcast(scores, dist.get_process_group_ranks(binding.group)[0], group=binding.group)
    return scores


@torch.no_grad()
def prune_sharded(plan: Plan, keep: NDArray[np.bool_], model: nn.Module, optimizers: Iterable[Any] = ()) -> Plan:
    """Remove the channels ``~keep [N]`` from a sharded model and from the state of its optimizers, on all ranks.

    Parameters stay the objects that optimizers hold. Every rank makes its new shards before any swaps them in.

    Returns:
        The plan of the smaller model.
    Raises:
        PlanError: ``keep`` is not possible.
        SurgeryError: the ranks do not agree on it, one failed, or the model or an optimizer's state is sharded in a
            way that is not known here; nothing was changed.
    """
    plan.check_keep(keep)
    binding = ShardedBinding(plan, model)
    peers = Peers(model, binding.group)
    with peers.guard("prune of a sharded model"):
        peers.agree("the channels to keep", keep.tobytes())
        return prune_shards(binding, keep, optimizers, lambda _: peers.ready()).plan


@torch.inference_mode(False)
@torch.no_grad()
def prune_shards(
    binding: ShardedBinding,
    keep: NDArray[np.bool_],
    followers: Iterable[Any],
    then: Callable[[ShardedBinding], None],
) -> ShardedBinding:
    """What :func:`pat_fast.surgery.prune` does, on this rank's shards; all ranks do it together.

    Args:
        followers: whose state is to shrink along.
        then: called with the new binding when all is done; if it raises, all is undone.
    Raises:
        PlanError: ``keep`` is not possible, or the model is not the one that the plan was made for.
        SurgeryError: an optimizer's state cannot be shrunk; model and optimizers are as they were.
    """
    binding.check()
    plan, model = binding.plan, binding.model
    kept = plan.check_keep(keep)
    smaller = plan.shrink(kept)
    changes = attribute_changes(binding, kept, model)
    given = list(followers)
    check_state(given)
    cut = [s for s in binding.shards.values() if kept.of(s.map)[1] != s.map.shape]
    waiting = [s.map.name for s in cut if s.has_whole_gradient]
    if waiting:
        raise SurgeryError(
            f"{waiting[0]} has gradients that were not reduced yet (set_requires_gradient_sync(False)); prune between "
            "the optimizer's step and the next backward"
        )
    for shard in cut:
        shard.states = state_tensors(given, shard.parameter, shard.map.name)
        if any(state.factored for state in shard.states):
            raise SurgeryError(f"{shard.map.name}: expected element-wise optimizer state, got a factored one")
    new = [shard.compacted(kept) for shard in cut]
    buffers = _compacted_buffers(plan, kept, binding)
    undo: list[Undo] = []
    try:
        with uninterrupted():
            for shard, tensors in zip(cut, new, strict=True):
                shard.swap(kept.of(shard.map)[1], tensors, undo)
            for buffer, value in buffers:
                undo.append(partial(set_tensor, buffer, buffer.data, None))
                set_tensor(buffer, value, None)
            attributes: list[Change] = []
            undo.append(lambda: apply_changes(list(reversed(attributes)), []))
            apply_changes(changes, attributes)
            for state in _states(model):
                Forwards(state).begin(undo)
            undo.append(restorer(binding))
            note_prune(binding, kept)
            found = ShardedBinding(smaller, model, after=binding)
            forget_compiled()
            then(found)
            undo.clear()
    except BaseException as error:
        take_back(undo, error)
        raise
    return found


class Forwards:
    """The forwards of a sharded module since its last prune: the backward of earlier ones is refused.

    FSDP puts hooks on what a module puts out, which gather its weights anew, as they are by then. An error after that
    would leave FSDP in the middle of a backward, so these hooks have to refuse it themselves.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self._admitted = False

    def begin(self, undo: list[Undo]) -> None:
        """Refuse those before; what takes that back is appended to ``undo``."""
        own = vars(self.state)
        before = {name: own[name] for name in HOOKS if name in own}

        def back() -> None:
            for name in HOOKS:
                own.pop(name, None)
            own.update(before)

        undo.append(back)
        own.update(zip(HOOKS, (self._pre_backward, self._register), strict=True))

    def _pre_backward(self, grad: Tensor) -> Tensor:
        if self.state._pre_backward != self._pre_backward:
            refuse_backward()
        self._admitted = True
        try:
            found: Tensor = getattr(type(self.state), HOOKS[0])(self.state, grad)
        finally:
            self._admitted = False
        return found

    def _register(self) -> None:
        """The first thing that the class's own hook calls, that of a forward before the first prune, too."""
        if not self._admitted:
            self.state._training_state = type(self.state._training_state).IDLE
            refuse_backward()
        getattr(type(self.state), HOOKS[1])(self.state)


@dataclass
class Shard:
    """A parameter that is sharded by rows, its own rows, and what FSDP knows of it."""

    map: TensorMap
    own_map: TensorMap
    rows: slice
    parameter: nn.Parameter
    local: Tensor
    fsdp: Any
    group: Any
    states: list[StateTensor] = field(default_factory=list)

    @property
    def has_whole_gradient(self) -> bool:
        """Whether a gradient is kept that was not reduced, and split, yet."""
        own = getattr(self.fsdp, "_unsharded_param", None)
        return self.fsdp.unsharded_accumulated_grad is not None or (own is not None and own.grad is not None)

    def compacted(self, kept: Kept) -> list[Tensor]:
        """This rank's new rows of the parameter, of its gradient if it has one, and of the optimizers' state."""
        whole: list[Any] = [self.parameter, *([] if self.parameter.grad is None else [self.parameter.grad])]
        whole += [state.tensor for state in self.states]
        return [self._moved(t.to_local(), kept) for t in whole]

    def _moved(self, local: Tensor, kept: Kept) -> Tensor:
        indices = dict(zip((a.dim for a in self.map.axes), kept.of(self.map)[0], strict=True))
        for dim, index in indices.items():
            if dim != 0:
                local = local.index_select(dim, torch.from_numpy(index).to(local.device))
        if 0 not in indices:
            return local.contiguous()
        ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        old = [rows_of(self.map.shape[0], ranks, r) for r in range(ranks)]
        own = indices[0][(indices[0] >= old[rank][0]) & (indices[0] < old[rank][1])] - old[rank][0]
        local = local.index_select(0, torch.from_numpy(own).to(local.device)).contiguous()
        ends = np.searchsorted(indices[0], [0, *(stop for _, stop in old)])  # of what was each rank's, in the new order
        new = [rows_of(len(indices[0]), ranks, r) for r in range(ranks)]
        mine = (int(ends[rank]), int(ends[rank + 1]))
        send = [_overlap(mine, there) for there in new]
        receive = [_overlap((int(ends[r]), int(ends[r + 1])), new[rank]) for r in range(ranks)]
        found = local.new_empty((sum(receive), *local.shape[1:]))
        dist.all_to_all_single(found, local, receive, send, group=self.group)
        return found

    def swap(self, shape: tuple[int, ...], tensors: list[Tensor], undo: list[Undo]) -> None:
        """Put the new rows in the place of the old ones; the parameter stays the object that it is."""
        parameter, fsdp = self.parameter, self.fsdp
        before, grad = dict(vars(fsdp)), parameter.grad

        def back() -> None:
            vars(fsdp).clear()
            vars(fsdp).update(before)
            fsdp._setattr_on_modules(parameter)
            parameter.grad = grad
            for state in self.states:
                state.put(parameter, state.tensor)

        undo.append(back)
        data, *rest = tensors
        parameter.grad = None
        meta = nn.Parameter(torch.empty(shape, dtype=data.dtype, device="meta"), requires_grad=parameter.requires_grad)
        told = (fsdp.mesh_info,) if "mesh_info" in signature(fsdp._init_sharded_param).parameters else ()  # not in 2.11
        fsdp._init_sharded_param(meta, fsdp.device, None, *told)
        if fsdp.post_forward_mesh_info:
            fsdp._init_sharded_post_forward_param_metadata(meta)
        padded = data.new_zeros(fsdp.padded_sharded_param_size)
        padded[: len(data)] = data
        fsdp._sharded_param_data = padded.view(-1)
        other = nn.Parameter(fsdp.to_sharded_dtensor(padded[: len(data)]), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, other)
        undo.append(partial(_swap_back, parameter, other))
        fsdp.sharded_param = parameter
        fsdp._setattr_on_modules(parameter)
        fsdp.all_gather_outputs = []
        vars(fsdp).pop("_unsharded_param", None)
        if grad is not None:
            parameter.grad = fsdp.to_sharded_dtensor(rest.pop(0))
        for state, value in zip(self.states, rest, strict=True):
            state.put(parameter, fsdp.to_sharded_dtensor(value))


def _swap_back(parameter: nn.Parameter, other: nn.Parameter) -> None:
    parameter.grad = None  # the two are to have as many references
    torch.utils.swap_tensors(parameter, other)


def _overlap(one: tuple[int, int], two: tuple[int, int]) -> int:
    return max(min(one[1], two[1]) - max(one[0], two[0]), 0)


def shards_of(plan: Plan, model: nn.Module) -> dict[str, Shard]:
    """The plan's parameters as they are sharded.

    Raises:
        SurgeryError: one is not sharded, or in a way that is not known here.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Placed

    known: dict[int, Any] = {}
    for state in _states(model):
        one = getattr(state, "_fsdp_param_group", None)
        for group in [one] if one is not None else getattr(state, "_fsdp_param_groups", ()):
            known.update({id(p.sharded_param): p for p in group.fsdp_params})
    known_version = all(hasattr(type(state), name) for state in _states(model) for name in HOOKS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter:
            continue
        parameter: Any = parameters.get(tensor_map.name)
        sharded: Any = parameter
        fsdp = known.get(id(parameter))
        if fsdp is None or not known_version or any(not hasattr(fsdp, name) for name in NEEDED):
            raise SurgeryError(
                f"{tensor_map.name}: expected a parameter that fully_shard (of PyTorch 2.11 to 2.13) has sharded, got "
                f"a {type(parameter).__name__}; shard the whole model, or prune before sharding"
            )
        if not isinstance(sharded, DTensor) or sharded.placements != (Placed(0),) or fsdp.offload_to_cpu:
            raise SurgeryError(
                f"{tensor_map.name}: expected one mesh dimension and shards by rows on their device; prune before "
                "sharding"
            )
        if tensor_map.groups > 1 and not tensor_map.whole_groups:
            raise SurgeryError(
                f"{tensor_map.name} is of a grouped convolution, whose groups its shards cut; prune before sharding or "
                "under DistributedDataParallel"
            )
        mesh = sharded.device_mesh
        start, stop = rows_of(tensor_map.shape[0], mesh.size(), mesh.get_local_rank())
        axes = tuple(Axis(a.dim, a.channels[start:stop] if a.dim == 0 else a.channels, a.role) for a in tensor_map.axes)
        own = tensor_map._replace(
            shape=(stop - start, *tensor_map.shape[1:]),
            groups=stop - start if tensor_map.whole_groups else 1,
            axes=axes,
        )
        local = sharded._local_tensor
        found[tensor_map.name] = Shard(tensor_map, own, slice(start, stop), parameter, local, fsdp, mesh.get_group())
    if not found:
        raise SurgeryError("expected a plan with parameters to prune, got one without")
    return found


def _states(model: nn.Module) -> list[Any]:
    """What FSDP knows of the modules that were sharded, each once."""
    modules: list[Any] = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
    return list({id(state): state for state in (m._get_fsdp_state() for m in modules)}.values())


def _compacted_buffers(plan: Plan, kept: Kept, binding: ShardedBinding) -> list[tuple[Tensor, Tensor]]:
    """Buffers, which every rank has whole, and what is left of them."""
    found = []
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter and kept.of(tensor_map)[1] != tensor_map.shape:
            own = value = binding.tensors[tensor_map.name]
            for axis, index in zip(tensor_map.axes, kept.of(tensor_map)[0], strict=True):
                value = value.index_select(axis.dim, torch.from_numpy(index).to(value.device))
            found.append((own, value))
    return found
