"""Averaged copies of a model (EMA, SWA): found, and pruned with the same channels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from .discovery import living, remove_hooks, retire_hooks, subclasses
from .errors import ConfigError, SurgeryError

if TYPE_CHECKING:
    from .pruner import Pruner

Signature = dict[str, tuple[int, ...]]
WRAPPERS = ("module", "_orig_mod")  # of AveragedModel, DataParallel and other wrappers; of torch.compile


class Averages:
    """The averaged copies that shrink along with a pruner's model.

    ``torch.optim.swa_utils.AveragedModel`` is found by itself: those that live when the pruner is made or at its
    first prune, and those that are made in between and after. Only weak references are kept.
    """

    def __init__(
        self, pruner: Pruner, model: nn.Module, given: nn.Module | Sequence[nn.Module] | None, auto: bool
    ) -> None:
        self._model = weakref.ref(model)
        self._ours: weakref.WeakSet[nn.Module] = weakref.WeakSet(_as_list(given))
        self._candidates: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._searched = not (auto and given is None)
        for copy in self._ours:
            if _inner(copy, _signature(model)) is None:
                raise ConfigError(
                    f"averaged: expected copies of the model, or modules that wrap one, got {type(copy).__name__} "
                    "whose parameters have other names or shapes"
                )
        if not self._searched:
            candidates = weakref.ref(self._candidates)

            def made(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
                seen = candidates()
                if seen is not None and isinstance(module, AveragedModel):
                    seen.add(module)

            self._handles.append(register_module_module_registration_hook(made))
            weakref.finalize(pruner, retire_hooks, self._handles).atexit = False

    def current(self) -> list[nn.Module]:
        """The copies, each with the names of the model's tensors.

        Raises:
            SurgeryError: an average of this model or of another one just like it: which is not known.
        """
        model = self._model()
        if model is None:
            return []
        if not self._searched:
            self._searched = True
            self._candidates.update(living(AveragedModel))
        wanted = _signature(model)
        undecided = [c for c in self._candidates if _inner(c, wanted) is not None]
        if undecided:
            rival = _rival(model, wanted)
            if rival is not None:
                raise SurgeryError(
                    f"an AveragedModel fits this model and another {type(rival).__name__} just like it, so whose "
                    "average it is cannot be told; pass averaged= to the pruner (the model's averages, or [] for none)"
                )
            self._ours.update(undecided)
        self._candidates.clear()
        inner = [_inner(copy, wanted) for copy in self._ours]
        return [_named_like(model, copy) for copy in inner if copy is not None]

    def close(self) -> None:
        """Look for no more of them."""
        remove_hooks(self._handles)


def _as_list(given: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    found: list[Any] = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for copy in found:
        if not isinstance(copy, nn.Module):
            raise ConfigError(f"averaged: expected modules that are copies of the model, got {type(copy).__name__}")
    return found


def _unwrapped(module: nn.Module) -> nn.Module:
    """What torch.compile and wrappers for several devices hold."""
    while len(module._modules) == 1 and next(iter(module._modules)) in WRAPPERS and not module._parameters:
        module = next(m for m in module._modules.values() if m is not None)
    return module


def _signature(module: nn.Module) -> Signature:
    return {name: tuple(p.shape) for name, p in _unwrapped(module).named_parameters()}


def _inner(copy: nn.Module, wanted: Signature) -> nn.Module | None:
    """The copy of the model inside ``copy``, without wrappers; None if there is none."""
    inner = _unwrapped(copy)
    return inner if _signature(inner) == wanted else None


def _named_like(model: nn.Module, copy: nn.Module) -> nn.Module:
    """``copy`` in as many wrappers as ``model``, so that their tensors have the same names."""
    names: list[str] = []
    while model is not _unwrapped(model):
        name, inner = next(iter(model._modules.items()))
        assert inner is not None
        names.append(name)
        model = inner
    for name in reversed(names):
        holder = nn.Module()
        holder._modules[name] = copy
        copy = holder
    return copy


def _rival(model: nn.Module, wanted: Signature) -> nn.Module | None:
    """Another living model of which an average could be."""
    gc.collect()  # models that nothing refers to any more are no rivals
    kinds = {type(_unwrapped(model)), *subclasses(AveragedModel)}
    everything = [o for o in gc.get_objects() if type(o) in kinds]
    averaged = {id(m) for a in everything if isinstance(a, AveragedModel) for m in a.modules()}
    own = {id(m) for m in model.modules()} | averaged
    return next((m for m in everything if id(m) not in own and _signature(m) == wanted), None)
