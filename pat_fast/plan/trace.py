"""Run a model once and label every activation with the channels it carries.

The tracer is a dispatch mode: it sees each ATen op with its real arguments and shapes, after autograd and
below every Python wrapper, so attention, concatenation, windowing and bare Parameters need no special
case. What an op does to labels is said in :mod:`pat_fast.plan.rules`; an op that no rule knows is a
*barrier*: the channels that enter it are frozen, with its name as the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .hollow import Hollow
from .labels import Factors, IntArray, Slots, flat, place, varying
from .layers import is_plain
from .noted import Noted
from .numbers import Count, NumberWatch, Symbol
from .running import Still, calls_made_by
from .where import line_of_the_model

# Kinds of modules -> a forward in ordinary PyTorch ops, for tracing; see register_layer.
EQUIVALENTS: dict[type[nn.Module], Callable[..., Any]] = {}
_INDEX = torch.ops.aten.index.Tensor


def tensors(value: Any) -> list[Tensor]:
    """The tensors among an op's arguments or results; these are nested in lists at most."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (tuple, list)):
        for item in value:
            if type(item) in _NO_TENSORS:
                continue
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (tuple, list)) and item and type(item[0]) is not int:
                found += tensors(item)
    return found


_NO_TENSORS = {bool, int, float, type(None)}


@cache
def _rules() -> Any:
    from . import rules  # which need this module

    return rules


@cache
def _known(func: Any) -> tuple[str, Any, bool]:
    """An op's name, the rule for it, and whether of its inputs only the shape counts."""
    name = str(func._schema.name)
    return name, _rules().find(func), name in _rules().SHAPE_ONLY


@dataclass(slots=True)
class Leaf:
    """A parameter or buffer that the forward used, and the slots of its axes."""

    names: list[str]  # more than one when it is tied
    tensor: Tensor
    is_parameter: bool
    groups: int = 1  # of a grouped convolution: dimension 1 then has `groups * shape[1]` slots
    whole_groups: bool = False  # such a convolution that loses whole groups (depthwise)
    axes: dict[int, IntArray] = field(default_factory=dict)  # dimension -> slots
    producers: list[int] = field(default_factory=list)  # dimensions whose slots label what an op puts out
    consumers: list[int] = field(default_factory=list)  # dimensions that an op sums over
    mark: Mark | None = None  # what it says of itself as an ordinary tensor, once all of its axes have slots

    @property
    def name(self) -> str:
        return self.names[0]


class Mark(NamedTuple):
    """What is known of one tensor: its factors, the leaf that it is a mere view or copy of, and what made it."""

    factors: Factors
    leaf: Leaf | None = None
    made: tuple[str, str] = ("", "")  # op, and the module that called it


_UNMARKED = Mark(())


class Work(NamedTuple):
    """Multiply-accumulates of one op: ``scale * prod(number of kept positions of each axis)``."""

    scale: float
    axes: tuple[IntArray, ...]


class Tracer(TorchDispatchMode):
    """Labels what a forward computes. Use as a context manager around the forward, then read the fields."""

    def __init__(self, still: Still, hollow: Hollow | None = None) -> None:
        super().__init__()
        self.hollow = hollow
        self.slots = Slots()
        self.work: list[Work] = []
        self.leaves: dict[int, Leaf] = {}
        self.module_order: list[str] = []
        self.splits: list[tuple[str, IntArray]] = []  # labels that a view spread over several dimensions, and where
        self.widths: list[Count] = []
        self.numbers = NumberWatch(self)
        self.multiples: list[tuple[IntArray, int]] = []  # labels of which a kernel needs a multiple of so many
        self.shares: list[tuple[IntArray, IntArray]] = []  # labels, and those of a tensor that meets all of a kind
        self._marks: Noted[Mark] = Noted()
        self._poisoned: Noted[tuple[Factors, str]] = Noted()
        self._modules = dict(still.modules)
        self._of_one_op = still.of_one_op
        self._replaced = still.of(*EQUIVALENTS)
        self._path: list[str] = []
        self._op = ""
        for named, is_parameter in ((still.parameters, True), (still.buffers, False)):
            for name, tensor in named:
                leaf = self.leaves.get(id(tensor))
                if leaf is None:
                    self.leaves[id(tensor)] = Leaf([name], tensor, is_parameter)
                else:
                    leaf.names.append(name)

    def forget(self) -> None:
        """Let go of all tensors: the tracer is in a reference cycle, and who holds a parameter may matter to others."""
        for leaf in self.leaves.values():
            leaf.mark = None  # which knows the leaf
        self.leaves.clear()
        self._marks = Noted()
        self._poisoned = Noted()
        self._modules = {}
        self._replaced = []
        self.hollow = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what runs is not compiled anyway, and to say so again for every op takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors((args, tuple(kwargs.values())) if kwargs else args)
        if not inputs:
            return func(*args, **kwargs)
        out = None
        if self.hollow is not None:
            out = self.hollow.run(func, args, kwargs)
            out = self.hollow.skip(func, args, kwargs) if out is None else out
        if out is None:
            out = func(*args, **kwargs)
        results = tensors(out)
        if self.hollow is not None:
            indices = args[1] if func is _INDEX else None
            self.hollow.follow(func, inputs, results, indices)
        self._observe(func, args, kwargs, out, inputs, results)
        return out

    def _observe(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: list[Tensor],
        results: list[Tensor],
    ) -> None:
        used = self._marks.any(inputs) or not self.leaves.keys().isdisjoint(map(id, inputs))
        if not used and not (self._poisoned and self._poisoned.any(inputs)):
            return
        self._op, rule, of_shapes = _known(func)
        if results and not any(t.numel() for t in results):
            return
        if self._poisoned and not of_shapes:
            for tensor in inputs:
                factors, reason = self._poisoned.pop(tensor, ((), ""))
                for factor in factors:
                    self.slots.freeze(factor, reason)
        if rule is None:
            self.barrier(inputs, "no rule for this op")
            return
        try:
            rule(self, func, args, kwargs, out)
        except Exception as error:
            self.barrier(inputs, f"could not be followed: {type(error).__name__}: {error}")

    # What rules call

    @property
    def module(self) -> nn.Module | None:
        """The innermost module that is running."""
        return self._modules[self._path[-1]] if self._path else None

    def split(self, factor: IntArray) -> None:
        """Note that a view spread channels over several dimensions, one of which will be that of units."""
        self.splits.append((self._path[-1] if self._path else "", factor))

    def width(self, slots: IntArray, attribute: str, index: int | None = None) -> None:
        """Note that the running module keeps the number of ``slots`` as an attribute."""
        self.widths.append(Count(Symbol(self._path[-1], attribute, slots.size, index), flat(slots), 1))

    def _root_mean_square(self, module: nn.RMSNorm, x: Tensor) -> None:
        """Its op comes apart into others before it is seen (on a CPU), none of which is told the size."""
        for factor in self.mark(x).factors if self.labelled(x) else ():
            inner = [d for d in varying(factor) if d >= x.ndim - len(module.normalized_shape)]
            if inner and varying(factor) == (inner[-1],):
                self.slots.note(factor, f"layer norm over the channels (rms_norm in {self._path[-1]})")
                self.width(factor, "normalized_shape", inner[-1] - x.ndim)
            elif len(inner) == len(varying(factor)) > 1:
                self.slots.freeze(factor, f"its width is written in the code (rms_norm in {self._path[-1]})")
            for dim in inner if len(inner) < len(varying(factor)) else ():  # of heads that are normalised one by one
                self.pin(factor, dim, "")

    def add_factor(self, tensor: Tensor, dim: int) -> None:
        """Label ``dim`` of a new tensor, whose size was given: it is what it meets."""
        if tensor.shape[dim] > 1:
            self.set(tensor, (*self.mark(tensor).factors, place(self.slots.new(tensor.shape[dim]), dim, tensor.ndim)))

    def add_follower(self, tensor: Tensor, dim: int, times: int, in_turns: bool) -> None:
        """Label ``dim`` of what was repeated, ``times`` places at once or ``in_turns``: it goes with what it meets."""
        slots = self.slots.followers(tensor.shape[dim] // times)
        slots = np.tile(slots, times) if in_turns else np.repeat(slots, times)
        self.set(tensor, (*self.mark(tensor).factors, place(slots, dim, tensor.ndim)))

    def where(self) -> str:
        """The op being traced and the module that called it, for messages."""
        path = self._path[-1] if self._path else ""
        what = f"{self._op} in {path}" if path else self._op
        line = line_of_the_model()
        return f"{what}, {line}" if line else what

    def mark(self, tensor: Tensor) -> Mark:
        """What is known of ``tensor``; a parameter gets slots on all its axes the first time."""
        leaf = self.leaves.get(id(tensor))
        if leaf is None:
            return self._marks.get(tensor, _UNMARKED)
        if leaf.mark is None:
            for dim, n in enumerate(tensor.shape):
                if n > 1 and dim not in leaf.axes:
                    leaf.axes[dim] = self.slots.new(n)
            leaf.mark = Mark(self.leaf_factors(leaf), leaf)
        return leaf.mark

    def adopt(self, tensor: Tensor | None, factor: IntArray) -> bool:
        """Let ``tensor``, if it is a vector that no op has used yet, be labelled by what ``factor`` says of channels.

        That is what :meth:`merge` would come to, with half as many slots: False if it is for :meth:`merge` to say.
        """
        leaf = self.leaves.get(id(tensor))
        if leaf is None or leaf.axes or leaf.mark is not None or leaf.tensor.ndim != 1:
            return False
        if leaf.tensor.shape[0] != factor.size or not self.slots.proper(factor):
            return False
        leaf.axes[0] = factor if factor.ndim == 1 else flat(factor)
        leaf.mark = Mark((leaf.axes[0],), leaf)
        return True

    def unused(self) -> list[str]:
        """Layers whose weight, and bare parameters that, no op has met so far."""
        unmet = [leaf for leaf in self.leaves.values() if leaf.is_parameter and not leaf.axes and leaf.mark is None]
        names = [leaf.name for leaf in unmet if leaf.tensor.ndim > 1]
        return list(dict.fromkeys(name.removesuffix(".weight") for name in names))

    def unused_statistics(self, modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
        """Buffers that code of the user's keeps, and that no op has met so far: averages that training writes, say."""
        found = []
        for name, module in modules:
            kept = module._buffers.keys() - module._non_persistent_buffers_set if module._buffers else ()
            for local in kept if not type(module).__module__.startswith("torch.") else ():
                leaf = self.leaves.get(id(module._buffers[local]))
                if leaf is None or leaf.axes or leaf.mark is not None:
                    continue
                if leaf.tensor.numel() > 1 and leaf.tensor.is_floating_point():
                    found.append(f"{name}.{local}")
        return sorted(found)

    def leaf_factors(self, leaf: Leaf) -> Factors:
        """Factors of a parameter seen as an ordinary tensor."""
        ndim = leaf.tensor.ndim
        factors = []
        for dim, slots in leaf.axes.items():
            n = leaf.tensor.shape[dim]
            if len(slots) != n:  # a grouped convolution's weight used elsewhere too: its groups go together
                self.slots.unify(slots.reshape(-1, n)[:1], slots.reshape(-1, n))
            shape = [1] * ndim
            shape[dim] = n
            factors.append(slots[:n].reshape(shape))
        return tuple(factors)

    def labelled(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` carries channels, or is a parameter or buffer (which get slots when used)."""
        return id(tensor) in self.leaves or tensor in self._marks

    def set(self, tensor: Tensor, factors: Sequence[IntArray], leaf: Leaf | None = None) -> None:
        """Label ``tensor``; factors that depend on nothing are dropped."""
        kept = tuple(f for f in factors if f.size > 1)
        if id(tensor) in self.leaves:
            return  # an in-place op on a parameter or buffer does not relabel it
        if kept or leaf is not None or tensor in self._marks:
            self._marks[tensor] = Mark(kept, leaf, (self._op, self._path[-1] if self._path else ""))

    def freeze(self, factors: Sequence[IntArray], reason: str) -> None:
        """Freeze whole factors."""
        for factor in factors:
            self.slots.freeze(factor, f"{reason} ({self.where()})")

    def give_out(self, tensor: Tensor) -> None:
        """An output of the model keeps its shape."""
        poisoned, _ = self._poisoned.get(tensor, ((), ""))
        mark = self.mark(tensor)
        made = " in ".join(part for part in mark.made if part)
        for factor in (*mark.factors, *poisoned):
            self.slots.freeze(factor, f"is an output of the model ({made})" if made else "is an output of the model")

    def pin(self, factor: IntArray, dim: int, reason: str) -> None:
        """Say that dimension ``dim`` must keep its size: what varies along it goes together, or stays."""
        if varying(factor) == (dim,):
            self.freeze((factor,), reason)
        else:
            self.slots.couple(factor, factor.take([0], axis=dim))

    def poison(self, tensor: Tensor, factor: IntArray, reason: str) -> None:
        """Freeze ``factor`` if the values of ``tensor`` are ever used: some code needs the shape alone."""
        self._poisoned[tensor] = ((factor,), f"{reason} ({self.where()})")

    def barrier(self, inputs: Sequence[Tensor], reason: str) -> None:
        """Freeze all channels that enter the op; what leaves it is of fixed size."""
        for tensor in inputs:
            self.freeze(self.mark(tensor).factors, reason)

    def merge(self, operands: Sequence[tuple[Sequence[int], Factors]], shape: Sequence[int]) -> Factors:
        """Relate the labels of operands that are broadcast against each other to ``shape``.

        Where two operands both have extent, their labels are the same channels; where one is labelled
        and the other has a fixed extent, the labelled one is pinned.
        """
        n = len(shape)
        alike = self._alike(operands, n)
        if alike is not None:
            return alike
        aligned = [
            ((1,) * (n - len(s)) + tuple(s), [f.reshape((1,) * (n - f.ndim) + f.shape) for f in fs])
            for s, fs in operands
        ]
        merged: list[IntArray] = []
        for i, (_, factors) in enumerate(aligned):
            for factor in factors:
                for j, (other_shape, others) in enumerate(aligned):
                    if i != j:
                        self._relate(factor, other_shape, others, once=j > i)
                merged.append(factor)
        return _independent(merged)

    def _alike(self, operands: Sequence[tuple[Sequence[int], Factors]], n: int) -> Factors | None:
        """What :meth:`merge` comes to where all operands have one factor of one shape; None where they have not."""
        found: list[IntArray] = []
        for _, factors in operands:
            if len(factors) != 1 or not self.slots.proper(factors[0]):
                return None
            (factor,) = factors
            found.append(factor if factor.ndim == n else factor.reshape((1,) * (n - factor.ndim) + factor.shape))
            if found[-1].shape != found[0].shape:
                return None
        if not found or found[0].size == 1:
            return None
        for other in found[1:]:
            self.slots.unify(found[0], other)
        return (found[0],)

    def _relate(self, factor: IntArray, shape: Sequence[int], others: list[IntArray], once: bool) -> None:
        dims = varying(factor)
        covered: set[int] = set()
        for other in others:
            shared = set(varying(other))
            if not shared & set(dims):
                continue
            covered |= shared
            if shared < set(dims) and self.slots.waits(other):
                self.shares.append((factor, other))  # one for each head, or one for all: see _choose_units
            elif once and not (set(dims) < shared and self.slots.waits(factor)):
                self.slots.unify(factor, other)
        for dim in dims:
            if shape[dim] > 1 and dim not in covered:
                self.pin(factor, dim, "meets a tensor of fixed size")

    def reduce(self, factors: Factors, dims: Sequence[int], keepdim: bool = False) -> Factors:
        """Labels after a reduction over ``dims``: what is summed over entirely is gone."""
        left = []
        for factor in factors:
            gone = [d for d in varying(factor) if d in dims]
            if gone and len(gone) == len(varying(factor)):
                continue
            for dim in gone:  # what is left stands for all that was summed over
                factor = self.slots.phantom(factor, dim)
            if not keepdim:
                factor = factor.reshape([n for d, n in enumerate(factor.shape) if d not in dims])
            left.append(factor)
        return tuple(left)

    def contract(
        self, a: Mark, a_shape: Sequence[int], b: Mark, b_shape: Sequence[int], shape: Sequence[int]
    ) -> Factors:
        """Labels of ``sum over the last dim of (a * b)``, both broadcast to ``shape``; records the work."""
        merged = self.merge([(a_shape, a.factors), (b_shape, b.factors)], shape)
        self.count_work(merged, shape)
        last = len(shape) - 1
        for mark in (a, b):
            if mark.leaf is not None:
                for factor in mark.factors:
                    self.use(mark.leaf, factor, last in varying(factor))
        return self.reduce(merged, [last])

    def count_work(self, factors: Factors, shape: Sequence[int], scale: float = 1.0) -> None:
        """Record an op of ``scale * prod(shape)`` multiply-accumulates, labelled by ``factors``."""
        labelled = {d for f in factors for d in varying(f)}
        scale *= math.prod(n for d, n in enumerate(shape) if d not in labelled)
        self.work.append(Work(scale, tuple(map(flat, factors))))

    def use(self, leaf: Leaf, slots: IntArray, consumed: bool) -> None:
        """Note that an op sums over the axis of ``leaf`` that owns ``slots``, or puts it out."""
        first = slots.reshape(-1)[0]
        for dim, own in leaf.axes.items():
            if own[0] == first or own[0] <= first <= own[-1]:
                uses = leaf.consumers if consumed else leaf.producers
                if dim not in uses:
                    uses.append(dim)

    # Around the forward

    @contextmanager
    def equivalents(self) -> Iterator[None]:
        """Run modules of registered kinds by what was registered as equivalent to their forward."""
        changed = []
        try:
            for _, module in self._replaced:
                forward = next(EQUIVALENTS[k] for k in type(module).__mro__ if k in EQUIVALENTS)
                changed.append((module, vars(module).get("forward")))
                vars(module)["forward"] = partial(forward, module)
            yield
        finally:
            for module, before in changed:
                if before is None:
                    del vars(module)["forward"]
                else:
                    vars(module)["forward"] = before

    @contextmanager
    def scopes(self, after: Callable[[nn.Module, Any], None] | None = None) -> Iterator[None]:
        """Keep track of which module is running, so that messages can name it.

        ``after`` is called with a module and what it gave back. Layers of PyTorch's whose forward is one op run past
        function modes: neither numbers of the model's code nor its reads of shapes and values are to be seen there.
        """
        names = {id(module): name for name, module in self._modules.items()}
        path, order = self._path, self.module_order
        replaced = {id(module) for _, module in self._replaced}
        plain = {key: run for key, run in self._of_one_op.items() if key not in replaced}

        def named(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            name = names[id(module)]
            path.append(name)
            order.append(name)
            if isinstance(module, nn.RMSNorm) and args:
                self._root_mean_square(module, args[0])
            try:
                run = plain.get(id(module))
                if run is not None and is_plain(args, kwargs):
                    with torch._C.DisableTorchFunction():
                        out = run(module, args[0])
                else:
                    out = module._call_impl(*args, **kwargs)
            finally:
                path.pop()
            if after is not None:
                after(module, out)
            return out

        with calls_made_by(self._modules.values(), named):
            yield


def _independent(factors: list[IntArray]) -> Factors:
    """Drop factors whose dimensions another one (already related to it) covers."""
    kept: list[IntArray] = []
    for factor in sorted(factors, key=lambda f: -len(varying(f))):
        dims = set(varying(factor))
        if dims and not any(dims <= set(varying(k)) for k in kept):
            kept.append(factor)
    return tuple(kept)
