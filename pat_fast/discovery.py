"""Finding what a training script does not say: example inputs, and the optimizers that train the model."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.modules.module as module_code
import torch.optim.optimizer as optimizer_code
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from .errors import ConfigError, PlanError, SurgeryError
from .plan.hooks import Hook
from .plan.running import Call
from .surgery.modules import apply_changes
from .surgery.optimizer import check_layouts, check_shapes, counts

if TYPE_CHECKING:
    from .pruner import Pruner


class InputCatcher:
    """Takes the inputs of the first forward, and two examples of them where that is possible."""

    def __init__(self, model: nn.Module) -> None:
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle = model.register_forward_pre_hook(Hook(self._catch), with_kwargs=True)

    @property
    def has_inputs(self) -> bool:
        """Whether a forward was seen."""
        return self._inputs is not None

    def _catch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        self._handle.remove()

    def take(self) -> list[Any]:
        """Inputs to try, the smallest first; empty if no forward was seen."""
        if self._inputs is None:
            return []
        plain = tree_map(_outside_inference_mode, self._inputs)
        return [Call(*two) for two in (_first_two(plain), plain) if two is not None]

    def close(self) -> None:
        """Take the hook off and forget the inputs."""
        self._handle.remove()
        self._inputs = None


class Inputs:
    """Example inputs for a model: those that were given, else those of its first forward.

    Raises:
        ConfigError: none are given, and none may be caught.
    """

    def __init__(self, model: nn.Module, given: Any, catch: bool) -> None:
        self.given = given
        if given is None and not catch:
            raise ConfigError("auto=False needs example_inputs: there is no hook to take them from a forward")
        self.catcher: InputCatcher | None = None
        if given is None:
            self.catcher = InputCatcher(model)
            weakref.finalize(self, self.catcher.close).atexit = False

    @property
    def known(self) -> bool:
        """Whether there are inputs to use."""
        return self.given is not None or (self.catcher is not None and self.catcher.has_inputs)

    def use(self, build: Callable[[Any], object]) -> None:
        """Call ``build`` with the inputs; of a caught batch first with two examples, then, on PlanError, with all.

        Raises:
            PlanError: none are known yet, or ``build`` raised it for all of them.
        """
        if not self.known:
            raise PlanError(
                "no forward of the model was seen yet, so there are no example inputs; run one batch first, "
                "or pass example_inputs="
            )
        candidates = [self.given] if self.catcher is None or self.given is not None else self.catcher.take()
        for number, inputs in enumerate(candidates, 1):
            try:
                build(inputs)
            except PlanError:
                if number == len(candidates):
                    raise
            else:
                self.given = inputs
                break
        self.close()

    def close(self) -> None:
        """Catch no more."""
        if self.catcher is not None:
            self.catcher.close()


def _outside_inference_mode(value: Any) -> Any:
    """A tensor made in inference mode takes no part in autograd; a copy of it does."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _first_two(inputs: Any) -> Any:
    """``inputs`` with the batch cut to two examples; None if it is not plain what the batch is."""
    sizes = [t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim > 0]
    if not sizes or sizes[0] <= 2:
        return None

    def cut(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == sizes[0]
        return value[:2].clone() if batched else value

    return tree_map(cut, inputs)


class Discovery:
    """The optimizers that train a pruner's model, and the hooks on their steps.

    Given optimizers are hooked themselves; else one pair of process-wide hooks watches all optimizers and
    picks those that hold the model's parameters. Only weak references are kept, and the hooks go with the
    pruner.

    Attributes:
        foretell: called after an optimizer's first step; may raise what a prune would.
    """

    def __init__(
        self, pruner: Pruner, model: nn.Module, given: Optimizer | Sequence[Optimizer] | None, auto: bool
    ) -> None:
        self._pruner = weakref.ref(pruner)
        self._model = weakref.ref(model)
        self._ours: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        self._strangers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # size when looked at
        self._states: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # identity when checked
        self.foretell: Callable[[], object] = list
        self._foretold: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepping: list[weakref.ref[Optimizer]] = []
        self._searches = given is None
        self._handles: list[Any] = []
        weakref.finalize(pruner, retire_hooks, self._handles).atexit = False
        retire_hooks([])
        groups = [within(optimizer) for optimizer in as_list(given)]
        for optimizer in (o for group in groups for o in group):
            self._ours[optimizer] = True
        optimizers = [group[0] for group in groups]
        if auto:
            me = weakref.WeakMethod(self._before)
            after = weakref.WeakMethod(self._after)
            if optimizers:
                for optimizer in optimizers:
                    self._handles.append(optimizer.register_step_pre_hook(_through(me)))
                    self._handles.append(optimizer.register_step_post_hook(_through(after)))
            else:
                self._handles.append(register_optimizer_step_pre_hook(_through(me)))
                self._handles.append(register_optimizer_step_post_hook(_through(after)))

    def current(self, search: bool = True) -> list[Optimizer]:
        """Optimizers known to train the model. Those that have not stepped yet are looked for, too, on ``search``."""
        model = self._model()
        if search and self._searches and model is not None:
            known = held(self._ours)
            if any(id(p) not in known for p in model.parameters() if p.requires_grad):
                for optimizer in living(Optimizer):
                    self._is_ours(optimizer)
        return list(self._ours)

    def close(self) -> None:
        """Take the hooks off."""
        remove_hooks(self._handles)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        if optimizer in self._ours:
            return True
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._strangers.get(optimizer) == size:
            return False
        model = self._model()
        own = {id(p) for p in model.parameters()} if model is not None else set()
        if own.isdisjoint(held([optimizer])):
            self._strangers[optimizer] = size  # until add_param_group gives it more
            return False
        self._ours[optimizer] = True
        return True

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._pruner() is None or not self._is_ours(optimizer) or self._is_nested(optimizer):
            return None
        self._check_state(optimizer)
        self._stepping.append(weakref.ref(optimizer))
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._regularize(optimizer)
            return None

        def regularized() -> Any:
            """The gradients that count are those that the closure makes."""
            loss = closure()
            self._regularize(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": regularized}
        return (args[0], regularized, *args[2:]), kwargs

    def _check_state(self, optimizer: Optimizer) -> None:
        """Hold a state that is new, as after ``load_state_dict``, against the parameters."""
        known, model = self._states.get(optimizer), self._model()
        if known != id(optimizer.state) and model is not None:
            check_shapes(optimizer, {id(p): name for name, p in model.named_parameters()})
            apply_changes(counts([optimizer]), [])
            self._states[optimizer] = id(optimizer.state)

    def _is_nested(self, optimizer: Optimizer) -> bool:
        """Whether this step is a part of another optimizer's (one that wraps it), which was seen already."""
        outer = [o for o in (ref() for ref in self._stepping) if o is not None]
        if any(o is optimizer for o in outer):  # its last step ended in an error
            self._stepping.clear()
            return False
        return not held(outer).isdisjoint(held([optimizer])) if outer else False

    def _regularize(self, optimizer: Optimizer) -> None:
        pruner = self._pruner()
        if pruner is not None and pruner.is_ready:
            scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer unscales inside its step
            if not _overflowed(optimizer):
                pruner.regularize(1.0 if scale is None else float(scale), optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepping = [ref for ref in self._stepping if ref() is not None and ref() is not optimizer]
        pruner = self._pruner()
        if pruner is not None and self._is_ours(optimizer):
            if not _overflowed(optimizer):
                pruner.hold(optimizer)
            self._foretell(optimizer, pruner)
            pruner.count(optimizer)

    def _foretell(self, optimizer: Optimizer, pruner: Pruner) -> None:
        """Say after an optimizer's first step what would stop the first prune, which may be days away."""
        if pruner.binding is None or optimizer in self._foretold:
            return
        self._foretold.add(optimizer)
        try:
            check_layouts(optimizer, pruner.binding.tensors)
            self.foretell()
        except SurgeryError as error:
            warnings.warn(f"a prune will be refused as things are: {error}", stacklevel=2)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer skips its step because a gradient overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def remove_hooks(handles: list[Any]) -> None:
    """Take the hooks off and forget them."""
    for handle in handles:
        handle.remove()
    handles.clear()


_RETIRED: list[Any] = []  # hooks of pruners that are gone, which do nothing any more
# PyTorch's functions that go through hooks of the whole process: an optimizer's step, and what gives a module another.
_THROUGH_HOOKS = {
    "wrapper": optimizer_code.__file__,
    "__setattr__": module_code.__file__,
    "add_module": module_code.__file__,
}


def retire_hooks(handles: list[Any]) -> None:
    """Take the hooks off when their pruner was collected, as soon as that can be.

    Garbage may be collected while PyTorch goes through its hooks, whose dict must not change then: they stay until the
    next call.
    """
    _RETIRED.extend(handles)
    handles.clear()
    frame = sys._getframe()
    while frame is not None:
        if _THROUGH_HOOKS.get(frame.f_code.co_name) == frame.f_code.co_filename:
            return
        frame = frame.f_back  # type: ignore[assignment]
    remove_hooks(_RETIRED)


def subclasses(cls: type[Any]) -> set[type]:
    """``cls`` and everything that is derived from it."""
    found: set[type] = {cls}
    return found.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def living(cls: type[Any]) -> list[Any]:
    """All objects of the process that are of ``cls`` or of a class derived from it."""
    kinds = subclasses(cls)
    return [thing for thing in gc.get_referrers(*kinds) if type(thing) in kinds]  # an object refers to its class


def _through(method: weakref.WeakMethod[Any]) -> Any:
    """A hook that does not keep its owner alive, and that a compiled optimizer step calls instead of compiling it."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        bound = method()
        return None if bound is None else bound(optimizer, args, kwargs)

    return torch.compiler.disable(hook)


def as_list(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """The optimizers that were given; raises :class:`ConfigError` if something else was."""
    found: list[Any] = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return found


def within(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer that was given, and those that it steps (``ZeroRedundancyOptimizer``, look-ahead); they have state.

    Without one that is no more than a cover, has no hooks and shows what is within it as its own (Accelerate's).
    """
    found = [optimizer]
    for each in found:
        found += [o for o in vars(each).values() if isinstance(o, Optimizer) and not any(o is f for f in found)]
    return [o for o in found if hasattr(o, "_optimizer_step_pre_hooks")]


def check_held(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise :class:`ConfigError` unless the optimizers hold every parameter of ``model`` that is trained."""
    known = held(optimizers)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missing:
        total = sum(p.requires_grad for p in model.parameters())
        raise ConfigError(
            f"optimizer: {len(missing)} of the model's {total} trained parameters are not in it (such as "
            f"{missing[0]}); was it built for another copy of the model? Pass all optimizers that train the "
            "model, or set requires_grad=False on what is not trained"
        )


def held(optimizers: Iterable[Optimizer]) -> set[int]:
    """Identities of all parameters that the optimizers hold."""
    return {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}

