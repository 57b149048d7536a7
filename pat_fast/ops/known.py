"""Tensors that were looked at before are recognised in one call; a loop over their properties costs forty times that.

What compares is Dynamo's guard: types, dispatch keys, dtypes, devices, shapes and strides, in C++. It is no public part
of PyTorch, so it is tried out first; where it is missing or misses something, every tensor is looked at every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
is_compiled: Callable[[], bool] = torch.compiler.is_dynamo_compiling
_modes: Callable[[], int] = torch._C._len_torch_function_stack
FIRST, PART = 4, 32
"""Tensors that are compared in one call."""


class Known:
    """Tensors that passed all checks, as far as later ones must be like them.

    Attributes:
        dtype, device: of all of them.
        plain: whether :func:`is_plain` holds for all.
    """

    __slots__ = ("_guards", "_length", "device", "dtype", "plain")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._guards = [(part, _make(tensors[part])) for part in _parts(len(tensors))]
        self._length = len(tensors)
        self.dtype, self.device = tensors[0].dtype, tensors[0].device
        self.plain = all(map(is_plain, tensors))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a table looks at its tensors itself."""
        return type(None), ()

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` would pass, too; the same modes are on."""
        return len(tensors) == self._length and sum(map(len, self.matching(tensors))) == self._length

    def matching(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """The parts of a list that is as long, one after the other, up to the first that would not pass."""
        for part, guards in self._guards:
            some = tensors[part]
            if not guards.check(*some):
                return
            yield some


def _parts(count: int) -> Iterator[slice]:
    """Few at first: others have nothing to do before."""
    at, n = 0, FIRST
    while at < count:
        yield slice(at, at + n)
        at, n = at + n, min(2 * n, PART)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but what stands at its address in the memory of a CPU or GPU."""
    lazy = tensor.is_neg() or tensor.is_conj() or torch._is_zerotensor(tensor)
    return type(tensor) in PLAIN and tensor.device.type in ("cpu", "cuda") and not lazy


def is_intercepted() -> bool:
    """Whether a mode sees even that something looks at tensors."""
    return _modes() > 0


def is_watched() -> bool:
    """Whether something wants to see the ops that are called: a mode, a transform, a trace or a profiler."""
    c: Any = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or is_intercepted()
        or c._autograd._profiler_enabled()
        or c._get_tracing_state() is not None
        or c._functorch.peek_interpreter_stack() is not None
    )


def _make(tensors: Sequence[Tensor]) -> Any:
    guards: Any = torch._C._dynamo.guards
    return guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


@cache
def is_reliable() -> bool:
    """Whether this PyTorch has the guard and it sees every difference that matters."""
    one = torch.zeros(4, 3)
    others: list[Callable[[], Tensor]] = [
        lambda: torch.zeros(3, 3),
        lambda: torch.zeros(3, 4).t(),
        lambda: torch.zeros(4, 3, 1),
        lambda: torch.zeros(4, 3, dtype=torch.float64),
        lambda: torch.zeros(4, 3, device="meta"),
        lambda: torch._neg_view(torch.zeros(4, 3)),
        lambda: torch.zeros(4, 3).to_sparse(),
        lambda: nn.Parameter(torch.zeros(4, 3)),
    ]
    try:
        is_watched()
        guards = _make([one, one])
        seen = guards.check(one, torch.ones(4, 3))
        return bool(seen) and not any(guards.check(one, make()) or guards.check(make(), one) for make in others)
    except Exception:  # whatever a private function does in another version
        return False
