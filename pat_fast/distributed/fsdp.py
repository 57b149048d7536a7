"""FSDP2: channels of a model that ``fully_shard`` has split by rows are scored and removed where they lie.

The plan is made before the model is sharded; names and sizes are the same after it. Scores are sums over entries, so
each rank adds up its rows and one all-reduce makes them whole. A prune compacts each rank's rows, and hands them on to
the rank whose chunk they are in now; no tensor is ever whole on one rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..criteria.group_norm import is_scored
from ..errors import SurgeryError
from ..ops import channel_reduce
from ..plan.bind import Binding
from ..plan.types import Axis, Kept, Plan, TensorMap
from ..surgery.modules import apply_changes, attribute_changes
from ..surgery.optimizer import StateTensor, state_tensors
from ..surgery.prune import set_tensor
from ..surgery.record import note_prune
from .peers import Peers

NEEDED = ("_init_sharded_param", "_setattr_on_modules", "to_sharded_dtensor", "padded_sharded_param_size")


def rows_of(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rows ``start .. stop`` of a dimension of ``size`` that ``torch.chunk`` gives to ``rank``."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


@torch.no_grad()
def sharded_scores(plan: Plan, model: nn.Module, p: float = 2.0) -> Tensor:
    """The scores of :class:`pat_fast.GroupNorm`, of the shards: ``[N]`` float64, the same on every rank.

    Args:
        plan: made by :func:`pat_fast.build_plan` before ``fully_shard(model)``.
    Raises:
        SurgeryError: the model is sharded in a way that is not known here.
    """
    shards = _shards(plan, model)
    group = _group(shards)
    binding = Binding(plan, model)
    local = Binding(replace(plan, tensors=()), model)
    local.plan = replace(plan, tensors=tuple(s.own_map for s in shards.values() if s.own_map.shape[0]))
    local.tensors = {m.name: shards[m.name].local for m in local.plan.tensors}
    total = torch.zeros(plan.n_channels, dtype=torch.float64, device=local.device)
    for tiles in local.tiles("scored", is_scored):
        sums = channel_reduce(tiles.tensors, tiles.table, f="pow", p=p)
        total += local.to_channels(tiles, sums).to(total)
    dist.all_reduce(total, group=group)
    dist.broadcast(total, dist.get_process_group_ranks(group)[0], group=group)
    scored = {m.name for m in plan.tensors if is_scored(m, *binding.owner(m.name))}
    members = [max(sum(name in scored for name, _ in g.members), 1) for g in plan.groups]
    total /= torch.tensor(members, dtype=total.dtype, device=total.device)[local.group_of.to(total.device)]
    mean = binding.spread(binding.over_groups(total.to(binding.device), "mean"))
    return total / mean.where(mean > 0, torch.ones_like(mean)).to(total)


@torch.no_grad()
def prune_sharded(
    plan: Plan, keep: NDArray[np.bool_], model: nn.Module, optimizers: Iterable[Optimizer] = ()
) -> Plan:
    """Remove the channels ``~keep [N]`` from a sharded model and from the state of its optimizers, on all ranks.

    Parameters stay the objects that optimizers hold. Every rank makes its new shards before any swaps them in.

    Returns:
        The plan of the smaller model.
    Raises:
        PlanError: ``keep`` is not possible.
        SurgeryError: the ranks do not agree on it, one failed, or the model or an optimizer's state is sharded in a
            way that is not known here; nothing was changed.
    """
    kept = plan.check_keep(keep)
    peers = Peers(model, _group(_shards(plan, model)))
    with peers.guard("prune of a sharded model"):
        peers.agree("the channels to keep", keep.tobytes())
        modules: list[Any] = list(model.modules())
        for module in modules:
            if hasattr(module, "reshard"):
                module.reshard()
        shards = _shards(plan, model)
        smaller = plan.shrink(kept)
        binding = Binding(plan, model)
        changes = attribute_changes(binding, kept, model)
        given = list(optimizers)
        cut = [s for s in shards.values() if kept.of(s.map)[1] != s.map.shape]
        for shard in cut:
            shard.states = state_tensors(given, shard.parameter, shard.map.name)
            if any(state.factored for state in shard.states):
                raise SurgeryError(f"{shard.map.name}: expected element-wise optimizer state, got a factored one")
        new = [shard.compacted(kept) for shard in cut]
        buffers = _compacted_buffers(plan, kept, binding)
        peers.ready()
        for shard, tensors in zip(cut, new, strict=True):
            shard.swap(kept.of(shard.map)[1], tensors)
        for buffer, value in buffers:
            set_tensor(buffer, value, None)
        apply_changes(changes, [])
        note_prune(binding, kept)
    return smaller


@dataclass
class _Shard:
    """A parameter that is sharded by rows, its own rows, and what FSDP knows of it."""

    map: TensorMap
    own_map: TensorMap
    parameter: nn.Parameter
    local: Tensor
    fsdp: Any
    group: Any
    states: list[StateTensor] = field(default_factory=list)

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

    def swap(self, shape: tuple[int, ...], tensors: list[Tensor]) -> None:
        """Put the new rows in the place of the old ones; the parameter stays the object that it is."""
        parameter, fsdp = self.parameter, self.fsdp
        data, *rest = tensors
        has_grad = parameter.grad is not None
        parameter.grad = None
        meta = nn.Parameter(torch.empty(shape, dtype=data.dtype, device="meta"), requires_grad=parameter.requires_grad)
        fsdp._init_sharded_param(meta, fsdp.device, None, fsdp.mesh_info)
        if fsdp.post_forward_mesh_info:
            fsdp._init_sharded_post_forward_param_metadata(meta)
        padded = data.new_zeros(fsdp.padded_sharded_param_size)
        padded[: len(data)] = data
        fsdp._sharded_param_data = padded.view(-1)
        fresh = nn.Parameter(fsdp.to_sharded_dtensor(padded[: len(data)]), requires_grad=parameter.requires_grad)
        torch.utils.swap_tensors(parameter, fresh)
        fsdp.sharded_param = parameter
        fsdp._setattr_on_modules(parameter)
        fsdp.all_gather_outputs = []
        vars(fsdp).pop("_unsharded_param", None)
        if has_grad:
            parameter.grad = fsdp.to_sharded_dtensor(rest.pop(0))
        for state, value in zip(self.states, rest, strict=True):
            state.put(parameter, fsdp.to_sharded_dtensor(value))


def _overlap(one: tuple[int, int], two: tuple[int, int]) -> int:
    return max(min(one[1], two[1]) - max(one[0], two[0]), 0)


def _shards(plan: Plan, model: nn.Module) -> dict[str, _Shard]:
    """The plan's parameters as they are sharded."""
    from torch.distributed.tensor import DTensor, Shard

    known: dict[int, Any] = {}
    modules: list[Any] = list(model.modules())
    for module in modules:
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        one = getattr(state, "_fsdp_param_group", None)
        for group in [one] if one is not None else getattr(state, "_fsdp_param_groups", ()):
            known.update({id(p.sharded_param): p for p in group.fsdp_params})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter:
            continue
        parameter: Any = parameters.get(tensor_map.name)
        sharded: Any = parameter
        fsdp = known.get(id(parameter))
        if fsdp is None or any(not hasattr(fsdp, name) for name in NEEDED):
            raise SurgeryError(
                f"{tensor_map.name}: expected a parameter that fully_shard (of PyTorch 2.13) has sharded, got a "
                f"{type(parameter).__name__}; shard the whole model, or prune before sharding"
            )
        if not isinstance(sharded, DTensor) or sharded.placements != (Shard(0),) or fsdp.offload_to_cpu:
            raise SurgeryError(
                f"{tensor_map.name}: expected one mesh dimension and shards by rows on their device; prune before "
                "sharding"
            )
        if tensor_map.groups > 1 and not tensor_map.whole_groups:
            raise SurgeryError(f"{tensor_map.name} is of a grouped convolution, whose shards cut its groups")
        mesh = sharded.device_mesh
        start, stop = rows_of(tensor_map.shape[0], mesh.size(), mesh.get_local_rank())
        axes = tuple(Axis(a.dim, a.channels[start:stop] if a.dim == 0 else a.channels, a.role) for a in tensor_map.axes)
        own = replace(
            tensor_map,
            shape=(stop - start, *tensor_map.shape[1:]),
            groups=stop - start if tensor_map.whole_groups else 1,
            axes=axes,
        )
        found[tensor_map.name] = _Shard(tensor_map, own, parameter, sharded.to_local(), fsdp, mesh.get_group())
    return found


def _group(shards: dict[str, _Shard]) -> Any:
    if not shards:
        raise SurgeryError("expected a plan with parameters to prune, got one without")
    return next(iter(shards.values())).group


def _compacted_buffers(plan: Plan, kept: Kept, binding: Binding) -> list[tuple[Tensor, Tensor]]:
    """Buffers, which every rank has whole, and what is left of them."""
    found = []
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter and kept.of(tensor_map)[1] != tensor_map.shape:
            own = value = binding.tensors[tensor_map.name]
            for axis, index in zip(tensor_map.axes, kept.of(tensor_map)[0], strict=True):
                value = value.index_select(axis.dim, torch.from_numpy(index).to(value.device))
            found.append((own, value))
    return found
