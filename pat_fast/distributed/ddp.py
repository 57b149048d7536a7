"""``DistributedDataParallel``: found around a model, and made to follow it when its parameters shrink.

A reducer is made for the shapes that parameters have when the model is wrapped: its buckets, and its hooks on their
gradient accumulators. After a prune the wrapper, which the user holds, gets a new one.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ..discovery import subclasses
from ..errors import SurgeryError

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

NEEDED = ("_build_params_for_reducer", "_build_debug_param_to_name_mapping", "_ddp_init_helper")


def unwrapped(model: Any) -> Any:
    """The module inside a ``DistributedDataParallel``; anything else as it is."""
    kinds = _kinds()
    while isinstance(model, kinds):
        model = model.module
    return model


def _kinds() -> tuple[type[Any], ...]:
    """The class of wrappers, if any can be: importing it takes longer than the rest of this package."""
    module = sys.modules.get("torch.nn.parallel.distributed")
    return () if module is None else (module.DistributedDataParallel,)


def wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """The live wrappers that train parameters of ``model``, the outermost first."""
    own = {id(p) for p in model.parameters()}
    kinds = {sub for kind in _kinds() for sub in subclasses(kind)}
    found = [thing for thing in gc.get_objects() if type(thing) in kinds and "module" in thing._modules]
    found = [ddp for ddp in found if not own.isdisjoint(id(p) for p in ddp.parameters())]
    return sorted(found, key=lambda ddp: -len(list(ddp.modules())))


def check_rebuildable(ddp: DistributedDataParallel) -> None:
    """Raise :class:`SurgeryError` if the wrapper does what a new reducer could not take up."""
    reason = None
    if any(not hasattr(ddp, name) for name in NEEDED):
        reason = "this version of PyTorch makes its reducer in another way; wrap the model anew after pruning"
    elif getattr(ddp, "mixed_precision", None) is not None:
        reason = "its mixed_precision keeps copies of the parameters; use torch.autocast in its place"
    elif getattr(ddp, "_delay_all_reduce_params", None):
        reason = "delay_all_reduce_named_params keeps one buffer for several parameters; leave it out"
    elif any(hasattr(p, "_in_backward_optimizers") for p in ddp.parameters()):
        reason = "its optimizers step inside backward; step them after it"
    elif ddp._join_config.enable:
        reason = "ranks inside `with ddp.join()` run out of data and would be waited for; prune after it"
    if reason is not None:
        raise SurgeryError(f"DistributedDataParallel around {type(ddp.module).__name__} cannot be pruned: {reason}")


def rebuild(ddp: DistributedDataParallel) -> None:
    """Give the wrapper a reducer for its parameters as they are; settings and communication hooks stay.

    As ``DistributedDataParallel.__init__`` and ``__setstate__`` make it; no communication takes place. What PowerSGD
    has gathered by bucket goes, since the buckets change: it starts anew, as after ``start_powerSGD_iter`` steps.
    """
    builtin = _builtin_hook(ddp)
    if hasattr(ddp.reducer, "_remove_autograd_hooks"):  # parameters that did not shrink keep their accumulators
        ddp.reducer._remove_autograd_hooks()
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    vars(ddp).update(reducer=None, logger=None)  # the old buckets go before there are new ones
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    logger: Any = ddp.logger
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        _forget_buckets(state)
        logger._set_comm_hook_name(hook.__qualname__)
        dist._register_comm_hook(ddp.reducer, state, hook)
    if builtin is not None:
        ddp._register_builtin_comm_hook(builtin)


def _builtin_hook(ddp: DistributedDataParallel) -> Any:
    """The C++ hook of the present reducer: only its log knows of it."""
    name = str(ddp._get_ddp_logging_data().get("comm_hook", "")).rpartition(".")[2]
    return None if ddp._comm_hooks else dist.BuiltinCommHookType.__members__.get(name)


def _forget_buckets(state: Any) -> None:
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        found = getattr(state, name, None)
        if isinstance(found, dict):
            found.clear()
    if hasattr(state, "start_powerSGD_iter"):
        state.iter = 0
