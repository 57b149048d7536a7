"""FSDP2 inside a pruner: a model that ``fully_shard`` has split is traced whole, and scored and pushed by its rows.

A rank's tile tables are over its own rows, and what they sum up to is added over the ranks. Values of channels are then
the same everywhere, as is what is decided from them, and each rank changes the rows that it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import ConfigError, SurgeryError
from ..plan.bind import Binding, Own, Tiles, Wanted, bind
from ..plan.types import Plan, TensorMap
from ..surgery import prepare, prune

if TYPE_CHECKING:
    from ..state import State
    from .fsdp import Shard


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has split the model, or a part of it."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def reshard(model: nn.Module) -> None:
    """Let every module hold its shards, as between a backward and the next forward."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "reshard"):
            module.reshard()


def group_of(model: nn.Module) -> Any:
    """The process group of the ranks that hold the shards of a model; None of one that is not sharded."""
    if not is_sharded(model):
        return None
    reshard(model)
    meshes = [mesh for p in model.parameters() if (mesh := getattr(p, "device_mesh", None)) is not None]
    return meshes[0].get_group() if meshes and meshes[0].ndim == 1 else None


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Around a trace: every rank has the parameters whole, and modules are those that were sharded, without FSDP.

    A model that is not sharded is left alone. Needs the memory of the whole model on each rank meanwhile.
    """
    if not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    reshard(model)
    modules = list(model.modules())
    entries = [
        (m._parameters, name, p)
        for m in modules
        for name, p in m._parameters.items()
        if p is not None and hasattr(p, "full_tensor")
    ]
    full: dict[int, nn.Parameter] = {}
    for _, _, p in entries:
        if id(p) not in full:
            tensor: Any = p.detach()
            full[id(p)] = nn.Parameter(tensor.full_tensor(), requires_grad=p.requires_grad)
    classes = [(m, type(m)) for m in modules if isinstance(m, FSDPModule)]
    hooks = [(h, h.copy()) for m in modules for h in (m._forward_pre_hooks, m._forward_hooks)]
    try:
        for held, name, p in entries:
            held[name] = full[id(p)]
        for module, kind in classes:
            module.__class__ = next(base for base in kind.__bases__ if base is not FSDPModule)
        for now, all_of_them in hooks:
            for number, hook in all_of_them.items():
                if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                    del now[number]
        yield
    finally:
        for now, all_of_them in hooks:
            now.clear()
            now.update(all_of_them)
        for module, kind in classes:
            module.__class__ = kind
        for held, name, p in entries:
            held[name] = p


def as_given(model: nn.Module, inputs: Any) -> Any:
    """``inputs`` that were caught in a forward, in the precision that they had before FSDP lowered it."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if not is_sharded(model):
        return inputs
    policies = [m._get_fsdp_state()._mp_policy for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    lowered = {policy.param_dtype for policy in policies if policy.cast_forward_inputs} - {None}
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def back(value: Any) -> Any:
        return value.to(own) if isinstance(value, Tensor) and value.dtype in lowered else value

    return tree_map(back, inputs)


def bound(plan: Plan, model: nn.Module, parts: State) -> Binding:
    """``plan`` bound to the model, or to this rank's shards of it, for a pruner with these parts.

    Raises:
        ConfigError: one of its parts goes by whole tensors of a model that is sharded.
        SurgeryError: it is sharded in a way that is not known here.
    """
    if is_sharded(model):
        check_parts(parts)
        return ShardedBinding(plan, model)
    binding = bind(plan, model)
    if parts.mode.shrinks:
        prepare(binding)
    return binding


def was_sharded(binding: Binding) -> bool:
    """Whether the model was sharded after it was bound."""
    spaces, names, tensors = binding.places
    if isinstance(binding, ShardedBinding) or not names:
        return False
    return spaces[0].get(names[0]) is not tensors[0] and is_sharded(binding.model)


def remove(
    binding: Binding,
    keep: NDArray[np.bool_],
    followers: Iterable[Any],
    copies: Sequence[nn.Module],
    then: Callable[[Binding], None],
) -> None:
    """Prune a model, whole or sharded; see :func:`pat_fast.surgery.prune`.

    Raises:
        SurgeryError: averages of a sharded model; or the prune failed, and was undone.
    """
    if not isinstance(binding, ShardedBinding):
        prune(binding, keep, followers, copies, then)
        return
    from .fsdp import prune_shards

    if copies:
        raise SurgeryError(
            f"averaged: {type(copies[0]).__name__} is an average of a model that fully_shard has split, which cannot "
            "be pruned along; average after the last prune, or shard later"
        )
    prune_shards(binding, keep, followers, then)


def check_parts(parts: State) -> None:
    """Raise :class:`ConfigError` if a part of a pruner goes by whole tensors, which no rank has."""
    from ..criteria import Activation, GroupNorm, Magnitude, Movement, Random, Taylor
    from ..regularizers import GroupNormRegularizer, GrowingRegularizer, ProximalGroupLasso

    if parts.goal.target.kind.startswith("latency"):
        raise ConfigError("target: layers of a model that fully_shard has split cannot be measured; bound its MACs")
    known: tuple[tuple[str, object, tuple[type, ...]], ...] = (
        ("importance", parts.criterion, (GroupNorm, Magnitude, Taylor, Movement, Random, Activation)),
        ("regularizer", parts.regularizer, (GroupNormRegularizer, GrowingRegularizer, ProximalGroupLasso)),
    )
    for argument, part, kinds in known:
        if part is not None and type(part) not in kinds:
            names = ", ".join(kind.__name__ for kind in kinds)
            raise ConfigError(
                f"{argument}: expected one of {names} for a model that fully_shard has split, got "
                f"{type(part).__name__}, which goes by whole tensors"
            )


class ShardedBinding(Binding):
    """A plan bound to a sharded model: tensors are its ``DTensor`` s, tiles those of this rank's rows.

    Raises:
        SurgeryError: it is sharded in a way that is not known here.
    """

    def __init__(self, plan: Plan, model: nn.Module, after: Binding | None = None) -> None:
        from .fsdp import shards_of

        reshard(model)
        super().__init__(plan, model, after)
        self.shards: dict[str, Shard] = shards_of(plan, model)
        self._has_gradients = False
        self.group = next(iter(self.shards.values())).group

    def check(self) -> None:
        reshard(self.model)
        super().check()

    def has_moved(self) -> bool:
        return False  # FSDP puts others in the places of parameters at every forward

    def tiles(self, key: str, wanted: Wanted, look: bool = True) -> tuple[Tiles, ...]:
        self._follow()
        return super().tiles(key, wanted, look)

    def like(self, name: str, tensor: Tensor) -> Tiles:
        local: Any = tensor
        return super().like(name, local.to_local() if hasattr(local, "to_local") else local)

    def own(self, tensor_map: TensorMap) -> Own:
        self._follow()
        shard = self.shards[tensor_map.name]
        return Own(shard.own_map, shard.rows, shard.local)

    def known(self, by_id: Any) -> Any:
        local = {id(s.parameter): id(s.local) for s in self.shards.values() if id(s.parameter) in by_id}
        if isinstance(by_id, dict):
            return by_id | {own: by_id[parameter] for parameter, own in local.items()}
        return set(by_id) | set(local.values())

    def grouping(self, key: str) -> None:
        return None

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def gradients(self) -> Iterator[None]:
        if self._has_gradients:
            yield
            return
        self._follow()
        self._has_gradients = True
        try:
            for shard in self.shards.values():
                shard.local.grad = None if shard.parameter.grad is None else shard.parameter.grad.to_local()  # type: ignore[attr-defined]
            yield
        finally:
            self._has_gradients = False
            for shard in self.shards.values():
                shard.local.grad = None  # or it would outlive the parameter's own

    def _tabulate(self, maps: list[TensorMap], given: list[Tensor] | None = None) -> Tiles:
        shards = [self.shards[m.name] for m in maps]
        return super()._tabulate([s.own_map for s in shards], [s.local for s in shards] if given is None else given)

    def _follow(self) -> None:
        """FSDP puts other tensors in the place of its shards at its first forward, and when a state is loaded."""
        moved = False
        for shard in self.shards.values():
            local = shard.parameter._local_tensor  # type: ignore[attr-defined]
            moved = moved or local is not shard.local
            shard.local = local
        if moved:
            self._cache.clear()
