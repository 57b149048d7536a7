"""Which tensors of an optimizer's state follow which axes of their parameter.

The layouts are written down, not guessed from shapes: a square preconditioner looks like a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SurgeryError

# How a state tensor lies over its parameter:
ELEMENTWISE = "elementwise"  # the parameter's shape, entry by entry
FACTORED = "factored"  # the parameter's number of dimensions; each is the parameter's, or 1 (Adafactor)
ROWS = "rows"  # the first dimension follows the parameter's first; further ones are the state's own
COLUMNS = "columns"  # the first dimension follows the parameter's second; further ones are the state's own
PER_AXIS = "per axis"  # a list with an entry for each dimension; of an entry, each size is that dimension's, 0 or 1
FLAT = "flat"  # a vector, or a list of some, over all parameters of the optimizer: see Joint
SCALAR = "scalar"  # left alone, whatever it is
NAMES = (ELEMENTWISE, FACTORED, ROWS, COLUMNS, PER_AXIS, FLAT, SCALAR)

Shape = tuple[int, ...]
Follows = tuple[int | None, ...]  # for each dimension of a state tensor, the parameter's dimension that it follows
Layout = str | Follows | Callable[[Shape], Follows]

_LAYOUTS: dict[type[Optimizer], dict[str, Layout]] = {}


def register_state_layout(optimizer: type[Optimizer], layout: Mapping[str, Layout]) -> None:
    """Say how an optimizer of your own keeps its state, so that surgery can shrink it.

    Args:
        optimizer: the class; subclasses are covered too.
        layout: for each key of ``optimizer.state[parameter]`` one of

            - ``"elementwise"``: the parameter's shape (moments, averages, master copies);
            - ``"factored"``: the parameter's shape with some dimensions 1 (Adafactor's statistics);
            - ``"rows"``, ``"columns"``: the first dimension is the parameter's first, or second;
            - ``"per axis"``: a list with a tensor for each of the parameter's dimensions, ``[size]`` or
              ``[size, size]`` (Shampoo's statistics);
            - a tuple: for each dimension of the state, the parameter's dimension that it follows, or None:
              ``(0, 0)`` is a square of the parameter's rows;
            - a function from the parameter's shape to such a tuple;
            - ``"flat"``: a vector, or a list of vectors, over all parameters of the optimizer, one behind the other in
              the order of its groups (LBFGS's history); under whatever key of ``optimizer.state`` it lies;
            - ``"scalar"``: left alone.
    Raises:
        SurgeryError: an unknown layout, or not a class and a dict.

    Example:
        >>> pat.register_state_layout(Lion, {"exp_avg": "elementwise"})
    """
    if not isinstance(optimizer, type) or not isinstance(layout, Mapping):
        raise SurgeryError(
            "register_state_layout: expected a class of optimizers and a layout for each key of its state, got "
            f"{optimizer!r} and {layout!r}"
        )
    for key, kind in layout.items():
        indices = isinstance(kind, tuple) and all(d is None or (isinstance(d, int) and d >= 0) for d in kind)
        if not (indices or callable(kind) or kind in NAMES):
            names = ", ".join(repr(name) for name in NAMES)
            raise SurgeryError(
                f"layout of {optimizer.__name__}.state[...][{key!r}]: expected {names}, a tuple of the parameter's "
                f"dimensions (or None) or a function that gives one, got {kind!r}"
            )
    _LAYOUTS[optimizer] = {**_LAYOUTS.get(optimizer, {}), **layout}


def _register_builtin() -> None:
    moments = {
        "SGD": ["momentum_buffer"],
        "Adam": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        "AdamW": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
        "SparseAdam": ["exp_avg", "exp_avg_sq"],
        "NAdam": ["exp_avg", "exp_avg_sq"],
        "RAdam": ["exp_avg", "exp_avg_sq"],
        "Adamax": ["exp_avg", "exp_inf"],
        "Adagrad": ["sum"],
        "Adadelta": ["square_avg", "acc_delta"],
        "RMSprop": ["square_avg", "momentum_buffer", "grad_avg"],
        "Rprop": ["prev", "step_size"],
        "ASGD": ["ax"],
        "Muon": ["momentum_buffer"],
        "Adafactor": ["variance"],
    }
    for name, keys in moments.items():
        cls = getattr(torch.optim, name, None)
        if cls is not None:
            register_state_layout(cls, dict.fromkeys(keys, ELEMENTWISE))
    if hasattr(torch.optim, "Adafactor"):
        register_state_layout(torch.optim.Adafactor, {"row_var": FACTORED, "col_var": FACTORED})
    # The numbers stay: whatever is left of the vectors, positive ``ro`` and ``H_diag`` make steps that go downhill.
    vectors = dict.fromkeys(("d", "prev_flat_grad", "old_dirs", "old_stps"), FLAT)
    register_state_layout(torch.optim.LBFGS, {**vectors, "ro": SCALAR, "al": SCALAR})


_register_builtin()


@dataclass(frozen=True)
class StateTensor:
    """A tensor of ``optimizer.state[parameter]`` that shrinks with the parameter (or with all, see :class:`Joint`).

    ``follows``: the parameter's dimension for each of its own, None where it has no part in it; None altogether for
    a tensor of the parameter's shape. ``place``: where it stands in a list under its key.
    """

    optimizer: Optimizer
    key: str
    tensor: Tensor
    follows: Follows | None = None
    place: int | None = None

    @property
    def factored(self) -> bool:
        """Whether it is of another shape than the parameter."""
        return self.follows is not None

    def put(self, parameter: Tensor, value: Tensor) -> None:
        """Let ``value`` stand in its place."""
        holder, key = self.slot(parameter)
        holder[key] = value

    def slot(self, under: Any) -> tuple[Any, Any]:
        """A dict or list of ``state[under]`` that holds it, and its key; neither refers to what is there now."""
        entry = self.optimizer.state[under]
        return (entry, self.key) if self.place is None else (_Places(entry, self.key), self.place)


@dataclass(frozen=True, slots=True)
class _Places:
    """The list or tuple under a key, of which entries can be replaced."""

    entry: dict[str, Any]
    key: str

    def __setitem__(self, place: int, value: Tensor) -> None:
        held = self.entry[self.key]
        self.entry[self.key] = type(held)(value if i == place else old for i, old in enumerate(held))


@dataclass(frozen=True)
class Joint:
    """What an optimizer keeps for all of its parameters together: vectors over them, one behind the other.

    Attributes:
        optimizer: whose they are.
        parameters: in the order in which they lie in a vector; a complex one takes two numbers an entry.
        states: each vector, and under what of the optimizer's state it is.
    """

    optimizer: Optimizer
    parameters: list[Tensor]
    states: list[tuple[Any, StateTensor]]

    def views(self, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter, and its part of ``vector`` as a view of its shape."""
        start = 0
        for parameter in self.parameters:
            stop = start + parameter.numel() * numbers_in(parameter)
            part = vector[start:stop]
            part = torch.view_as_complex(part.view(-1, 2)) if parameter.is_complex() else part
            yield parameter, part.view(parameter.shape)
            start = stop

    def check(self) -> None:
        """Raise :class:`SurgeryError` if a vector does not fit the parameters."""
        length = sum(p.numel() * numbers_in(p) for p in self.parameters)
        for _, state in self.states:
            if state.tensor.shape != (length,) or not state.tensor.is_contiguous():
                got = f"shape {tuple(state.tensor.shape)} and strides {state.tensor.stride()}"
                _refuse(state, got, f"a contiguous vector {(length,)}", "all parameters together")


def numbers_in(parameter: Tensor) -> int:
    """How many numbers of a flat vector an entry of ``parameter`` takes."""
    return 2 if parameter.is_complex() else 1


def joint_states(optimizers: Iterable[Optimizer]) -> list[Joint]:
    """What optimizers keep for all of their parameters together; :func:`check_state` says whether it fits."""
    return [joint for optimizer in optimizers if (joint := _joint(optimizer)) is not None]


def _joint(optimizer: Optimizer) -> Joint | None:
    keys = [key for key, kind in _layout(type(optimizer)).items() if kind == FLAT]
    states = [
        (under, StateTensor(optimizer, key, tensor, place=place))
        for under, entry in (optimizer.state.items() if keys else ())
        for key in (keys if isinstance(entry, dict) else ())
        for place, tensor in _listed(entry.get(key))
    ]
    return Joint(optimizer, [p for g in optimizer.param_groups for p in g["params"]], states) if states else None


def _listed(value: Any) -> list[tuple[int | None, Tensor]]:
    """The tensors of a list, and their places; a tensor alone."""
    listed = isinstance(value, (list, tuple))
    return [(i if listed else None, t) for i, t in enumerate(value if listed else [value]) if isinstance(t, Tensor)]


def counts(optimizers: Iterable[Any]) -> list[tuple[Optimizer, str, None]]:
    """What optimizers have counted of their parameters, as changes of attributes that make them count anew."""
    name = "_numel_cache"  # LBFGS's
    return [(optimizer, name, None) for optimizer in optimizers if getattr(optimizer, name, None) is not None]


def check_state(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that keep something for all parameters together, unless it is known how.

    Raises:
        SurgeryError: there is such state; it cannot shrink with one parameter. Or it is known, and does not fit.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        if getattr(optimizer, "parameters_as_bucket_view", False):  # of ZeroRedundancyOptimizer
            raise SurgeryError(
                f"{name} hands the parameters round in buckets of the sizes that they had; make it with "
                "parameters_as_bucket_view=False"
            )
        layout = _layout(type(optimizer))
        joint = _joint(optimizer)
        if joint is not None:
            _check_joint(joint, layout)
        known = {key for key, kind in layout.items() if kind in (FLAT, SCALAR)}
        for key, value in optimizer.state.items():
            if isinstance(key, Tensor):
                continue
            rest = {k: v for k, v in value.items() if k not in known} if isinstance(value, dict) else value
            if any(t.ndim for t in _tensors(rest)):
                raise SurgeryError(
                    f"{name} keeps state under {key!r}, which is no parameter: how it follows the model's channels "
                    "is not known; train with another optimizer while the model is pruned"
                )


def _check_joint(joint: Joint, layout: Mapping[str, Layout]) -> None:
    if any(hasattr(parameter, "to_local") for parameter in joint.parameters):
        raise SurgeryError(
            f"{type(joint.optimizer).__name__} keeps vectors over all parameters together, which cannot be cut where "
            "the parameters are sharded; use an optimizer with element-wise state"
        )
    joint.check()
    for entry in joint.optimizer.state.values():
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if key not in layout and any(t.ndim for t in _tensors(value)):
                raise _unknown(joint.optimizer, key, value, "its parameters", repr(FLAT))


def check_layouts(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse an optimizer whose state could not shrink with one of these, by name.

    Raises:
        SurgeryError: as a prune would raise it.
    """
    check_state([optimizer])
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.Parameter):
            state_tensors([optimizer], parameter, name)


def check_shapes(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Refuse a state of other shapes than its parameters: PyTorch loads it, and fails in the step without a name.

    Args:
        names: of parameters, by their ``id``; those of others are left alone.
    Raises:
        SurgeryError: it was saved before the model was pruned, or after.
    """
    joint = _joint(optimizer)
    if joint is not None:
        joint.check()
    layout = _layout(type(optimizer))
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if id(parameter) in names and isinstance(state, dict) else ():
            if layout.get(key) == ELEMENTWISE and isinstance(value, Tensor) and value.shape != parameter.shape:
                _refuse(
                    StateTensor(optimizer, key, value), f"shape {tuple(value.shape)}", f"the parameter's "
                    f"{tuple(parameter.shape)}", names[id(parameter)],
                )  # fmt: skip


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def state_tensors(optimizers: Iterable[Optimizer], parameter: nn.Parameter, name: str) -> list[StateTensor]:
    """The state tensors that follow ``parameter``'s axes.

    Raises:
        SurgeryError: a state whose layout is not known, or that does not fit its parameter.
    """
    found: list[StateTensor] = []
    for optimizer in optimizers:
        layout = _layout(type(optimizer))
        state: Mapping[str, Any] = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if value is None or isinstance(value, (bool, int, float, str)):
                continue
            kind: Any = layout.get(key)
            if kind in (SCALAR, FLAT) or (kind is None and isinstance(value, Tensor) and value.ndim == 0):
                continue
            if isinstance(value, Tensor) and _is_packed(value):
                raise SurgeryError(
                    f"{type(optimizer).__name__} keeps state {key!r} for {name} as {type(value).__name__}, whose "
                    "entries cannot be cut one by one; use an optimizer with plain state, or delete that state before "
                    "a prune if the optimizer makes it anew"
                )
            if kind is None or not isinstance(value, (list, tuple) if kind == PER_AXIS else Tensor):
                raise _unknown(optimizer, key, value, name, _likely(value, tuple(parameter.shape)))
            whole: Any = value
            found += _follow(StateTensor(optimizer, key, whole), kind, parameter, name)
    return found


def _is_packed(tensor: Tensor) -> bool:
    """Whether its class stores entries in its own way (quantised in blocks, say); shards of a DTensor are plain."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not hasattr(tensor, "to_local")


def _layout(cls: type) -> dict[str, Layout]:
    """What is known of ``cls``: its own layout, and that of its bases for keys that it does not name.

    What is like an optimizer, but of a part that surgery knows nothing of, names it itself, as its ``state_layout``.
    """
    known: dict[str, Layout] = dict(getattr(cls, "state_layout", {}))
    for base in reversed(cls.__mro__):
        known.update(_LAYOUTS.get(base, {}))
    return known


def _follow(state: StateTensor, kind: Layout, parameter: nn.Parameter, name: str) -> list[StateTensor]:
    """``state`` with the dimensions that it follows, checked; its entries for a list of tensors."""
    shape = tuple(parameter.shape)
    if kind == PER_AXIS:
        entries = [(i, t) for i, t in enumerate(state.tensor) if isinstance(t, Tensor) and t.numel() > 1]
        if len(state.tensor) != len(shape) or any(size not in (1, shape[i]) for i, t in entries for size in t.shape):
            _refuse(state, f"shapes {[_what(t) for t in state.tensor]}", f"'per axis' with {shape}", name)
        return [
            StateTensor(
                state.optimizer, state.key, t, tuple(i if size == shape[i] else None for size in t.shape), place=i
            )
            for i, t in entries
        ]
    got = tuple(state.tensor.shape)
    if kind == ELEMENTWISE:
        follows, fits = None, got == shape
    else:
        follows = _dimensions(kind, got, shape)
        fits = len(follows) == len(got) and all(
            d is None or (d < len(shape) and size == shape[d]) for d, size in zip(follows, got, strict=True)
        )
    if not fits:
        _refuse(state, f"shape {got}", f"one that fits the parameter's {shape}", name)
    return [StateTensor(state.optimizer, state.key, state.tensor, follows)]


def _dimensions(kind: Layout, got: Shape, shape: Shape) -> Follows:
    if kind == FACTORED:
        if len(got) != len(shape):
            return (None,) * (len(got) + 1)
        return tuple(None if size == 1 else d for d, size in enumerate(got))
    if kind in (ROWS, COLUMNS):
        return (0 if kind == ROWS else 1, *(None for _ in got[1:]))
    return tuple(kind(shape)) if callable(kind) else tuple(d for d in kind if not isinstance(d, str))


def _likely(value: Any, shape: Shape) -> str:
    """What layout state of an optimizer that is not known may have, as one would write it; dots if nobody could say."""
    got = tuple(value.shape) if isinstance(value, Tensor) else None
    if got is None:
        return repr(PER_AXIS) if isinstance(value, (list, tuple)) else "..."
    return repr(ELEMENTWISE) if got == shape else repr(ROWS) if got == shape[:1] else "..."


def _unknown(optimizer: Optimizer, key: str, value: Any, name: str, layout: str) -> SurgeryError:
    kind = type(optimizer).__name__
    return SurgeryError(
        f"{kind} keeps state {key!r} for {name} ({_what(value)}), and how it follows the parameter's axes is not "
        f"known; say so with pat_fast.register_state_layout({kind}, {{{key!r}: {layout}}}), or delete that state "
        "before a prune if the optimizer makes it anew"
    )


def _refuse(state: StateTensor, got: str, expected: str, name: str) -> None:
    raise SurgeryError(
        f"{type(state.optimizer).__name__} state {state.key!r} of {name} has {got}, expected {expected}; was the model "
        "changed behind the optimizer's back, or a state loaded that was saved before a prune?"
    )


def _what(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
