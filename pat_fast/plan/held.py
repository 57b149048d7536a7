"""Where a model holds its modules and tensors, and what these are: to find out whether it is still the same."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Kind = tuple[torch.device, torch.dtype]


class Places(NamedTuple):
    """Where tensors are held, side by side: the dicts of their modules, their names there, the tensors."""

    spaces: list[dict[str, Any]]
    names: list[str]
    tensors: list[Tensor]

    def are_true(self) -> bool:
        """Whether they are still there."""
        return all(map(is_, map(dict.get, self.spaces, self.names), self.tensors))


class Parts(NamedTuple):
    """Modules that are parts of others, side by side: the dicts that hold them, their names there, the modules."""

    spaces: list[dict[str, Any]]
    names: list[str]
    modules: list[nn.Module | None]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Parts:
        """Those of ``modules``."""
        spaces = [m._modules for m in modules if m._modules]
        return cls(spaces, [*chain.from_iterable(spaces)], [*chain.from_iterable(map(dict.values, spaces))])

    def are_true(self) -> bool:
        """Whether they are still there, and no others."""
        now = chain.from_iterable(map(dict.values, self.spaces))
        return [*chain.from_iterable(self.spaces)] == self.names and all(map(is_, now, self.modules))


class Seen(NamedTuple):
    """What tensors were when they were looked at.

    Attributes:
        strides, kinds: side by side; kinds are devices and dtypes.
        alike: whether all are of one kind.
        lazy: whether one is negated or conjugated, which its memory does not show.
    """

    strides: list[tuple[int, ...]]
    kinds: list[Kind]
    alike: bool
    lazy: bool

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Seen:
        """What they are now; of those that are of one kind it is one object."""
        tensors = list(tensors)
        one: dict[Kind, Kind] = {}
        kinds = [one.setdefault(kind, kind) for kind in ((t.device, t.dtype) for t in tensors)]
        lazy = any(t.is_neg() or t.is_conj() for t in tensors)
        return cls([t.stride() for t in tensors], kinds, len(one) <= 1, lazy)
