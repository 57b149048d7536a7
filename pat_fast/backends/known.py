"""Tensors that were looked at before are recognised in one call; a loop over their properties costs forty times that.

The C++ extension compares what DLPack's exchange API says of them: types, dtypes, devices, shapes and strides. Without
it Dynamo's guard does, which is no public part of PyTorch. Either is tried out first; where it is missing or misses
something, every tensor is looked at every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pat_fast.backends import native
from pat_fast.errors import OpError

_C, _ = native.load("pat_fast._C", "C++")
PLAIN = (Tensor, nn.Parameter)
LOW = 2**33
is_compiled: Callable[[], bool] = torch.compiler.is_dynamo_compiling
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled
_trace: Callable[[], Any] = torch._C._get_tracing_state
_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


class Known:
    """Plain tensors that passed all checks, as far as later ones must be like them.

    Attributes:
        dtype, device: of the first of them.
        likes: what compares others with them; it does not see whether these are lazily negated or conjugated.
    """

    __slots__ = ("_complex", "device", "dtype", "likes")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.likes = _likes(tensors)
        self._complex = any(map(Tensor.is_complex, tensors))
        self.dtype, self.device = tensors[0].dtype, tensors[0].device

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a table looks at its tensors itself."""
        return type(None), ()

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` would pass, too."""
        return self.likes.matches(tensors) and not self._is_lazy(tensors)

    def are_apart(self, tensors: Sequence[Tensor], of: Known, others: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` would pass, ``others`` are like those of ``of``, and surely none share memory.

        All of one dtype and device.
        """
        alike = self.dtype is of.dtype and self.device == of.device
        return alike and self.likes.are_apart(tensors, of.likes, others) and not self._is_lazy(tensors)

    def _is_lazy(self, tensors: Sequence[Tensor]) -> bool:
        return any(map(Tensor.is_neg, tensors)) or (self._complex and any(map(Tensor.is_conj, tensors)))

    def compare(self, tensors: Sequence[Tensor]) -> None:
        """Look at tensors that are to be read past the dispatcher.

        Raises:
            UnknownError: see there.
        """
        if not self.likes.matches(tensors):
            raise UnknownError
        self.compare_rest(tensors)

    def compare_rest(self, tensors: Sequence[Tensor], signs: bool = True) -> None:
        """What is left to do of :meth:`compare` when ``likes`` has compared them.

        Args:
            signs: look whether one is lazily negated.

        Raises:
            UnknownError: see there.
        """
        if is_watched() or (signs and self._is_lazy(tensors)):
            raise UnknownError


def remembered(tensors: Sequence[Tensor]) -> Known | None:
    """What recognises tensors like these from now on; None where nothing does."""
    if is_watched() or not is_reliable() or not all(map(is_plain, tensors)):
        return None
    try:
        return Known(tensors)
    except (BufferError, RuntimeError, TypeError, ValueError):  # a dtype that has no name there
        return None


class UnknownError(Exception):
    """Tensors are not like those that are known, or something wants to see what is called."""


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but what stands at its address in the memory of a CPU or GPU."""
    if type(tensor) not in PLAIN or tensor.device.type not in ("cpu", "cuda"):
        return False
    lazy = tensor.is_neg() or tensor.is_conj()
    return tensor.layout is torch.strided and not tensor.is_quantized and not lazy and has_memory(tensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether the memory of a CPU's or GPU's tensor is there.

    It is not where PyTorch makes up zeros, where FSDP has freed it meanwhile, and where a wrapper has outlived its
    transform. An address in it is then no more than an offset.
    """
    try:
        return tensor.data_ptr() >= LOW or not tensor.numel() or tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:
        return False


def lacks_memory(tensor: Tensor) -> bool:
    """Whether a kernel that was given the tensor would read or write what is not its own.

    Subclasses are not looked at, nor wrappers of a transform of ``torch.func`` that is at work: the dispatcher sees to
    them.
    """
    if type(tensor) not in PLAIN or tensor.device.type not in ("cpu", "cuda"):
        return False
    if has_memory(tensor) and not tensor._is_zerotensor():
        return False
    return _transform() is None or not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_memory(name: str, tensors: Sequence[Tensor], addresses: Sequence[int] = (0,)) -> None:
    """Refuse tensors that lack memory; to know their ``addresses`` saves looking at each.

    Raises:
        OpError: there is one.
    """
    if not addresses or min(addresses) >= LOW:
        return
    for tensor in tensors:
        if lacks_memory(tensor):
            raise OpError(
                f"expected {name} to have memory; got zeros that PyTorch makes up, or what was freed, of shape "
                f"{tuple(tensor.shape)}; clone, gather or load it first"
            )


def is_watched() -> bool:
    """Whether something wants to see the ops that are called: a mode, a transform, a trace or a profiler."""
    return bool(_function_modes() or _dispatch_modes() or _is_profiled() or _trace() or _transform())


class _Guards:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        guards: Any = torch._C._dynamo.guards
        self._length = len(tensors)
        self._guards = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == self._length and self._guards.check(*tensors) and all(map(has_memory, tensors))

    def are_apart(self, *_: Any) -> bool:
        return False  # it does not see where they are

    def expect(self) -> None:
        pass


def _likes(tensors: Sequence[Tensor]) -> Any:
    if _C is None:
        return _Guards(tensors)
    return _C.Known(Tensor.__dlpack_c_exchange_api__, tensors, list(map(_storage, tensors)))


def _storage(tensor: Tensor) -> int:
    """Where PyTorch keeps what it knows of a tensor's memory, for the processor to fetch it ahead; 0: not to be had.

    Half of the time that a tensor takes to be recognised is waiting for that.
    """
    return getattr(tensor.untyped_storage(), "_cdata", 0)


@cache
def is_reliable() -> bool:
    """Whether this PyTorch has what compares tensors and it sees such differences as matter; to be asked unwatched."""

    def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    one = zeros(4, 3)
    others: list[Callable[[], Tensor]] = [
        lambda: zeros(3, 3),
        lambda: zeros(3, 4).t(),
        lambda: zeros(4, 3, 1),
        lambda: zeros(4, 3, dtype=torch.float64),
        lambda: zeros(4, 3, device="meta"),
        lambda: torch._neg_view(zeros(4, 3)),
        lambda: torch._efficientzerotensor((4, 3), dtype=torch.float32, device="cpu"),
        lambda: torch._efficientzerotensor((5, 3), dtype=torch.float32, device="cpu")[1:],
        lambda: zeros(4, 3).to_sparse(),
        lambda: nn.Parameter(zeros(4, 3)),
    ]
    try:
        known = Known([one, one])
        seen = known.matches([one, zeros(4, 3)])
        return bool(seen) and not any(known.matches([one, make()]) or known.matches([make(), one]) for make in others)
    except Exception:  # whatever a private function does in another version
        return False
