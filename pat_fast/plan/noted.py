"""Notes about tensors that keep none of them alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

T = TypeVar("T")


class Noted(Generic[T]):
    """What is noted of a tensor, by its identity; many times faster than ``WeakTensorKeyDictionary``.

    A tensor that is gone is not found, even if another one has its id. (What a plain weak reference gives back is
    compared with a tensor that the caller holds, and no more: that needs no care for tensors which C++ alone owns.)
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[ref[Tensor], T]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, tensor: Tensor) -> bool:
        found = self._found.get(id(tensor))
        return found is not None and found[0]() is tensor

    def any(self, tensors: Iterable[Tensor]) -> bool:
        """Whether something is noted of one of ``tensors``."""
        for tensor in tensors:
            found = self._found.get(id(tensor))
            if found is not None and found[0]() is tensor:
                return True
        return False

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        self._found[id(tensor)] = (ref(tensor), value)

    def get(self, tensor: Tensor, default: T) -> T:
        """What is noted of ``tensor``, or ``default``."""
        found = self._found.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else default

    def pop(self, tensor: Tensor, default: T) -> T:
        """The same, and forget it."""
        value = self.get(tensor, default)
        self._found.pop(id(tensor), None)
        return value
