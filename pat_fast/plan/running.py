"""Running a model's forward without leaving a trace of it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from itertools import chain, islice
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_leaves

from .layers import is_plain, run_of
from .walk import named_modules, named_tensors


class Call(NamedTuple):
    """Example inputs that are positional and keyword arguments both."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Run ``model``: a dict is keyword arguments, a tuple or list positional ones, anything else one argument."""
    if isinstance(example_inputs, Call):
        return model(*example_inputs.args, **example_inputs.kwargs)
    if isinstance(example_inputs, dict):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Run forwards in eval mode with gradients enabled, and leave nothing behind.

    Restored: the train/eval flag and the attributes of every module (also what its lists and dicts hold), buffers,
    ``requires_grad``, and the random state.

    Args:
        training: modules that are in training mode, and not PyTorch's own, stay in it: the model's code takes its
            branches of training, while dropout layers and batch norms do as in eval mode.
    """
    with Still(model).running(training):
        yield


class Still:
    """What a model is now, for several times :func:`undisturbed` in a row: it is noted once.

    Attributes:
        every: its modules by all of their names.
        modules: its modules, each by its first name.
        kinds: their classes.
        parameters, buffers: its tensors by all of their names.
        of_one_op: by their ids, its modules for which :func:`runs_one_op` holds: what each runs on a tensor.
        plain_backward: whether a forward was seen to leave the backward to PyTorch's own steps, without hooks.
        compares: whether a forward was seen to hold sizes against one another.
        in_training: its modules that are in training mode when nothing runs.
        trains_more: whether a forward in training mode was seen to use weights that one in eval mode does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._noted = False
        self.plain_backward = False
        self.compares = False
        self.trains_more = False
        self._trained = False
        self.in_training: list[nn.Module] = []
        self.every = named_modules(model, once=False)
        first: dict[int, tuple[str, nn.Module]] = {}
        for name, module in self.every:
            first.setdefault(id(module), (name, module))
        self.modules = list(first.values())
        self.kinds: set[Any] = {type(m) for _, m in self.modules}
        self.parameters = named_tensors(self.every, "_parameters")
        self.buffers = named_tensors(self.every, "_buffers")
        self.of_one_op = {id(m): run_of(m) for _, m in self.modules if runs_one_op(m)}

    def of(self, *kinds: type[nn.Module]) -> list[tuple[str, nn.Module]]:
        """Those of its modules that are of one of ``kinds``."""
        wanted = {kind for kind in self.kinds if issubclass(kind, kinds)}
        return [(name, m) for name, m in self.modules if type(m) in wanted] if wanted else []

    def _note(self) -> None:
        self._noted = True
        modules = [m for _, m in self.modules]
        self.in_training = [m for m in modules if m.training]
        self._attributes = _Snapshot(modules)
        self._contents = _Contents(list({id(b): b for _, b in self.buffers}.values()))
        parameters = {id(p): p for _, p in self.parameters}.values()
        self._flags = [(p, p.requires_grad) for p in parameters]
        self._frozen = [p for p, flag in self._flags if not flag and p.is_floating_point()]
        self._devices = sorted({p.device.index or 0 for p in parameters if p.is_cuda})

    @contextmanager
    def running(self, training: bool = False) -> Iterator[None]:
        """See :func:`undisturbed`."""
        if not self._noted:
            self._note()
        fast_path = torch.backends.mha.get_fastpath_enabled()
        random = self.random_states()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # one fused op for a whole layer would hide its structure
            if self.in_training:
                self._model.eval()
            if training:
                self.train()
            for p in self._frozen:
                p.requires_grad_(True)  # a frozen layer has channels like any other
            eager = torch.compiler.set_stance("force_eager")  # a compiled model runs as it was written
            with torch.enable_grad(), eager:
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.default_generator.set_state(random[0])
            for device, state in zip(self._devices, random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            self._restore()

    def train(self) -> None:
        """Let the model's code take its branches of training while this runs; PyTorch's layers do as in eval mode."""
        self._trained = True
        for module in self.in_training:
            module.training = not type(module).__module__.startswith("torch.nn")

    def random_states(self) -> list[Tensor]:
        """Those of the processor's generator and of the generators of the devices that hold its parameters."""
        return [torch.default_generator.get_state(), *map(torch.cuda.get_rng_state, self._devices)]

    def has_drawn(self, before: list[Tensor]) -> bool:
        """Whether random numbers have been drawn since the generators were in the states ``before``."""
        return not all(map(torch.equal, before, self.random_states()))

    def filled(self) -> list[tuple[str, str, Tensor]]:
        """What the forwards of this run left in dicts and lists that were empty: module, attribute, tensor."""
        filled = self._attributes.filled()
        spaces = [(name, vars(m)) for name, m in self.modules] if filled else []
        held = [(n, a, v) for n, space in spaces for a, v in space.items() if id(v) in filled and a not in _STATE]
        return [(n, a, t) for n, a, v in held for t in tree_leaves(v) if isinstance(t, Tensor)]

    def _restore(self) -> None:
        self._attributes.restore()
        for p, flag in self._flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        self._contents.restore(self._trained)
        self._trained = False


@contextmanager
def calls_made_by(modules: Iterable[nn.Module], way: Callable[..., Any]) -> Iterator[None]:
    """Calls of ``modules`` are ``way(module, *args)``; what they were, hooks and all, is ``module._call_impl(*args)``.

    The place is the one that :meth:`torch.nn.Module.compile` uses. Hooks on every module take several times as long,
    and to change the method of the class makes Python forget what it knows of all of its subclasses.
    """
    changed: list[tuple[dict[str, Any], Any]] = []
    try:
        for module in modules:
            space = vars(module)
            changed.append((space, space.get(_CALL, changed)))
            space[_CALL] = partial(way, module)
        yield
    finally:
        for space, before in changed:
            if before is changed:
                del space[_CALL]
            else:
                space[_CALL] = before


def as_ops(still: Still) -> AbstractContextManager[None]:
    """Layers of one op run it without what PyTorch does around it."""
    runs = still.of_one_op

    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return runs[id(module)](module, *args) if is_plain(args, kwargs) else module._call_impl(*args, **kwargs)

    return calls_made_by([m for _, m in still.modules if id(m) in runs], run)


_CALL = "_compiled_call_impl"
_OF_ONE_OP = {
    f"torch.nn.modules.{part}"
    for part in ("activation", "batchnorm", "conv", "dropout", "linear", "normalization", "pooling", "sparse")
}


def runs_one_op(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of PyTorch's that calls a function on what it is given, with hooks of nobody."""
    kind: Any = type(module)
    if not _is_of_one_op(kind) or module._modules or module._forward_pre_hooks or module._forward_hooks:
        return False
    return "forward" not in vars(module) and not _has_any_global_hook()


@cache
def _is_of_one_op(kind: Any) -> bool:
    return kind.__module__ in _OF_ONE_OP and kind is not nn.LocalResponseNorm  # which views by shapes that it reads


class _Contents:
    """What tensors hold, copied kind by kind: a copy of each takes several times as long."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._versions = [t._version for t in tensors]
        self._together: list[tuple[list[Tensor], Tensor]] = []  # tensors, and what they hold end to end
        alike: dict[Any, list[Tensor]] = {}
        for t in tensors:
            plain = type(t) is Tensor and t.layout is torch.strided
            alike.setdefault((t.dtype, t.device) if plain else id(t), []).append(t)
        with torch.no_grad():
            for same in alike.values():
                held = torch.cat([_end_to_end(t) for t in same]) if len(same) > 1 else same[0].clone()
                self._together.append((same, held))

    def restore(self, look: bool) -> None:
        """Put it back, if one of them was written to; ``look``: past the count of versions, as batch norms do."""
        if [t._version for t in self._tensors] == self._versions and not look:
            return
        before: dict[int, Tensor] = {}
        for same, held in self._together:
            if len(same) == 1:
                before[id(same[0])] = held
                continue
            parts = held.split([t.numel() for t in same])
            before.update((id(t), part.view(t.shape)) for t, part in zip(same, parts, strict=True))
        with torch.no_grad():
            for t, version in zip(self._tensors, self._versions, strict=True):
                if t._version != version:
                    t.copy_(before[id(t)])
                elif look and not torch.equal(t, before[id(t)]):
                    t.data.copy_(before[id(t)])


def _end_to_end(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


class _Snapshot:
    """The attributes of modules (hooks, parameters and children among them), and what their lists and dicts hold."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        spaces = [vars(m) for m in modules]
        held = [v for space in spaces for v in space.values() if type(v) in _HELD]
        self._empty = [v for v in held if not v]
        full = [v for v in held if v]
        self._dicts = [*spaces, *(v for v in full if isinstance(v, dict))]
        self._others = [v for v in full if not isinstance(v, dict)]
        self._sizes = self._sizes_now()
        self._keys = [*chain.from_iterable(self._dicts)]
        self._values = [*self._values_now()]

    def filled(self) -> set[int]:
        """Ids of dicts and lists that were empty and are not."""
        return {id(value) for value in self._empty if value} if any(self._empty) else set()

    def restore(self) -> None:
        """Put everything back."""
        if any(self._empty):
            for value in self._empty:
                value.clear()
        if self._is_true():
            return
        keys, values = iter(self._keys), iter(self._values)
        for now, size in zip((*self._dicts, *self._others), self._sizes, strict=True):
            own = list(islice(values, size))
            before = dict(zip(islice(keys, size), own, strict=True)) if isinstance(now, dict) else own
            if not _same(now, before):
                if isinstance(now, list):
                    now[:] = before
                else:
                    now.clear()
                    now.update(before)

    def _is_true(self) -> bool:
        """Whether nothing has changed, found out for all at once."""
        if self._sizes_now() != self._sizes or [*chain.from_iterable(self._dicts)] != self._keys:
            return False
        return all(map(is_, self._values, self._values_now()))

    def _sizes_now(self) -> list[int]:
        return [*map(len, self._dicts), *map(len, self._others)]

    def _values_now(self) -> Iterator[Any]:
        return chain.from_iterable(chain(map(dict.values, self._dicts), self._others))


_STATE = ("_parameters", "_buffers", "_modules")
_HELD = frozenset({dict, OrderedDict, list, set})


def _same(one: Any, two: Any) -> bool:
    if len(one) != len(two) or not all(map(is_, one, two)):
        return False
    return not isinstance(one, dict) or all(map(is_, one.values(), two.values()))
