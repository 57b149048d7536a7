"""Telling pat_fast about a kind of layer that it cannot see into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .errors import PlanError
from .plan.trace import EQUIVALENTS
from .surgery.modules import register_sizes


def register_layer(
    kind: type[nn.Module],
    *,
    forward: Callable[..., Any] | None = None,
    sizes: Mapping[str, tuple[str, int]] | None = None,
) -> None:
    """Say how modules of ``kind`` compute, and which of their attributes are sizes.

    Most layers need none of this: their forward is traced, and attributes that it uses as sizes follow. It is for
    layers that call a kernel of their own (a fused attention, say), which is opaque to the trace, and for attributes
    that a forward does not use but others read.

    Args:
        kind: a module class; its subclasses are meant, too, unless they are registered themselves.
        forward: ``forward(module, *args, **kwargs)``, in ordinary PyTorch ops, computes what the module's own forward
            does. It is only traced: the plan is verified, and the model trained, with the module's own.
        sizes: attribute -> (name of a parameter of the module, dimension): the attribute is that size.
    Raises:
        PlanError: ``kind`` is not a module class, ``forward`` no function, or neither is given. When a plan is built:
            a module of that kind lacks what ``sizes`` names, or its attribute is another number.

    Example::

        pat.register_layer(FusedAttention, forward=attention_in_pytorch, sizes={"embed_dim": ("qkv", 1)})
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise PlanError(f"register_layer: expected a class of modules, got {kind!r}")
    if forward is None and not sizes:
        raise PlanError(f"register_layer({kind.__name__}): give forward=, sizes= or both")
    if forward is not None and not callable(forward):
        raise PlanError(f"register_layer({kind.__name__}): forward: expected a function of the module, got {forward!r}")
    for attribute, of in (sizes or {}).items():
        pair = isinstance(of, tuple) and len(of) == 2 and isinstance(of[0], str) and isinstance(of[1], int)
        if not pair or of[1] < 0:
            raise PlanError(
                f"register_layer({kind.__name__}): sizes[{attribute!r}]: expected (parameter name, dimension), got "
                f"{of!r}"
            )
    if forward is not None:
        EQUIVALENTS[kind] = forward
    if sizes:
        register_sizes(kind, dict(sizes))
