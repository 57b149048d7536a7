"""Which tensors of an optimizer's state follow which axes of their parameter.

The layouts are written down, not guessed from shapes: a square preconditioner looks like a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SurgeryError

# How a state tensor lies over its parameter:
ELEMENTWISE = "elementwise"  # the parameter's shape, entry by entry
FACTORED = "factored"  # the parameter's number of dimensions; each is the parameter's, or 1 (Adafactor)
SCALAR = "scalar"  # one number, left alone

_LAYOUTS: dict[type[Optimizer], dict[str, str]] = {}


def register_state_layout(optimizer: type[Optimizer], layout: Mapping[str, str]) -> None:
    """Say how an optimizer of your own keeps its state, so that surgery can shrink it.

    Args:
        optimizer: the class; subclasses are covered too.
        layout: for each key of ``optimizer.state[parameter]``: ``"elementwise"`` (the parameter's shape),
            ``"factored"`` (the parameter's shape with some dimensions 1) or ``"scalar"`` (left alone).
    Raises:
        SurgeryError: an unknown layout name.
    """
    for key, kind in layout.items():
        if kind not in (ELEMENTWISE, FACTORED, SCALAR):
            raise SurgeryError(
                f"layout of {optimizer.__name__}.state[...][{key!r}]: expected {ELEMENTWISE!r}, {FACTORED!r} or "
                f"{SCALAR!r}, got {kind!r}"
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


_register_builtin()


@dataclass(frozen=True)
class StateTensor:
    """A tensor of ``optimizer.state[parameter]`` that shrinks with the parameter."""

    optimizer: Optimizer
    key: str
    tensor: Tensor
    factored: bool


def state_tensors(optimizers: Iterable[Optimizer], parameter: nn.Parameter, name: str) -> list[StateTensor]:
    """The state tensors that follow ``parameter``'s axes.

    Raises:
        SurgeryError: a state whose layout is not known, or that does not fit its parameter.
    """
    found = []
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS) and optimizer.state:
            raise SurgeryError(
                "LBFGS keeps one flat history of all parameters together, which cannot shrink with them; train with "
                "another optimizer while the model is pruned"
            )
        layout = _layout(type(optimizer))
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is None or isinstance(value, (bool, int, float, str)):
                continue
            kind = layout.get(key)
            if kind == SCALAR or (kind is None and isinstance(value, Tensor) and value.ndim == 0):
                continue
            if kind not in (ELEMENTWISE, FACTORED) or not isinstance(value, Tensor):
                raise SurgeryError(
                    f"{type(optimizer).__name__} keeps state {key!r} for {name} "
                    f"({_what(value)}), and how it follows the parameter's axes is not known; say so with "
                    f"pat_fast.register_state_layout({type(optimizer).__name__}, {{{key!r}: 'elementwise'}})"
                )
            _check_fit(optimizer, key, value, parameter, name, kind)
            found.append(StateTensor(optimizer, key, value, kind == FACTORED))
    return found


def _layout(cls: type) -> dict[str, str]:
    """What is known of ``cls``: its own layout, and that of its bases for keys that it does not name."""
    known: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        known.update(_LAYOUTS.get(base, {}))
    return known


def _check_fit(
    optimizer: Optimizer, key: str, value: Tensor, parameter: nn.Parameter, name: str, kind: str
) -> None:
    fits = value.shape == parameter.shape
    if kind == FACTORED:
        same = value.ndim == parameter.ndim
        fits = same and all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True))
    if not fits:
        raise SurgeryError(
            f"{type(optimizer).__name__} state {key!r} of {name} has shape {tuple(value.shape)}, expected one that "
            f"fits the parameter's {tuple(parameter.shape)}; was the model changed behind the optimizer's back?"
        )


def _what(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
