"""A large model that computes what a small one does: weights that are zero but for a few rows and columns.

A :class:`Thin` tensor is a small tensor and where its rows and columns stand in the large one. :class:`Standing` runs a
model as if its parameters were such tensors, without writing to them or making them: linear layers, convolutions and
embeddings compute with the small tensor, other functions get the large one. Layer and group norms take their statistics
over the channels that the small tensor has, as they do once the others are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import PlanError
from .labels import IntArray
from .layers import Run, is_plain

LEAST = 2**14  # elements below which a weight is simply filled in
POOL = 32771  # a prime, so that rows of a longer tensor do not repeat
# What the large tensor says of itself is right as it is.
_PLAIN = {getattr(Tensor, a).__get__ for a in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")}
_PLAIN |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}


class Thin:
    """``small`` scattered over a tensor of ``shape``: index ``i`` of dimension ``dim`` stands at ``places[dim][i]``.

    A dimension that is not in ``places`` is as it is. ``columns`` are those of each block of a grouped convolution,
    for dimension 1, ``[groups, width]``. Elements beside it are ``fill``.
    """

    def __init__(
        self, small: Tensor, shape: Sequence[int], places: dict[int, Tensor], columns: Tensor | None, fill: float
    ) -> None:
        self.small, self.shape, self.places, self.columns, self.fill = small, tuple(shape), places, columns, fill
        self._full: Tensor | None = None

    def full(self) -> Tensor:
        """The large tensor."""
        if self._full is None:
            self._full = self._scattered()
        return self._full

    def positions(self) -> IntArray:
        """Where the elements of the small tensor stand in the large one's memory."""
        shape, places = self.small.shape, {d: _array(p) for d, p in self.places.items()}
        if len(shape) == 1:
            return places[0] if places else np.arange(shape[0])
        if self.columns is not None:
            places[1] = np.repeat(_array(self.columns), shape[0] // len(self.columns), axis=0)
        last = max(places, default=-1)
        stride = math.prod(shape[last + 1 :])  # what is behind is as it is
        found: IntArray = np.arange(stride)
        for dim in range(last + 1)[::-1]:
            if dim in places or shape[dim] > 1:
                own = places.get(dim, np.arange(shape[dim]))
                found = ((own * stride)[..., None] + found).reshape(*own.shape[:-1], -1)
                stride *= self.shape[dim]
        return found.reshape(-1)

    def _scattered(self) -> Tensor:
        out = self.small
        if self.columns is not None:
            rows = out.shape[0] // len(self.columns)
            parts = [self._spread(out[i * rows : (i + 1) * rows], 1, c) for i, c in enumerate(self.columns)]
            out = torch.cat(parts)
        for dim, places in self.places.items():
            out = self._spread(out, dim, places)
        return out

    def _spread(self, value: Tensor, dim: int, places: Tensor) -> Tensor:
        shape = list(value.shape)
        shape[dim] = self.shape[dim]
        return value.new_full(shape, self.fill).index_copy_(dim, places, value)


def _array(places: Tensor) -> IntArray:
    return places.numpy() if places.is_cpu else places.numpy(force=True)  # which takes three times as long


def fill(thin: Sequence[Thin]) -> None:
    """Make the large tensors of ``thin``, all at once."""
    alike: dict[Any, list[Thin]] = {}
    for one in sorted(thin, key=lambda one: one.fill):
        alike.setdefault((one.small.device, one.small.dtype), []).append(one)
    for ones in alike.values():
        sizes = [math.prod(one.shape) for one in ones]
        starts = np.cumsum([0, *sizes])
        together: dict[Any, list[int]] = {}  # the tensors of a norm stand in the same places
        for i, one in enumerate(ones):
            key = one if one.columns is not None else (one.shape, id(one.places))
            together.setdefault(key, []).append(i)
        where = [(ones[same[0]].positions() + starts[same][:, None]).reshape(-1) for same in together.values()]
        smalls = [ones[i].small for same in together.values() for i in same]
        flat = smalls[0].new_zeros(int(starts[-1]))
        for value in {one.fill for one in ones} - {0.0}:
            own = [i for i, one in enumerate(ones) if one.fill == value]
            flat[starts[own[0]] : starts[own[-1] + 1]] = value
        values = torch.cat([small if small.ndim == 1 else small.reshape(-1) for small in smalls])
        flat.scatter_(0, torch.from_numpy(np.concatenate(where)).to(flat.device), values)
        for one, part in zip(ones, flat.split(sizes), strict=True):
            one._full = part if len(one.shape) == 1 else part.view(one.shape)


class Standing(TorchFunctionMode):
    """Functions that are given a tensor of ``stand_ins`` (by its id) compute with what stands in for it."""

    def __init__(self, stand_ins: dict[int, Thin]) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def calls(self, layers: Sequence[nn.Module], others: Set[int], runs: Mapping[int, Run]) -> Callable[..., Any]:
        """A way to call ``layers``, each by its one op of ``runs``, past this mode where nothing has to be replaced.

        Args:
            others: the ids of tensors that have to be, which are not in their places.
        """
        passing = {id(m) for m in layers if not isinstance(m, _NORMS) and others.isdisjoint(map(id, _held(m)))}

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not is_plain(args, kwargs) or id(args[0]) in self._stand_ins:
                return layer._call_impl(*args, **kwargs)
            if id(layer) not in passing:
                return runs[id(layer)](layer, args[0])
            with torch._C.DisableTorchFunction():
                return runs[id(layer)](layer, args[0])

        return call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN:
            return func(*args, **kwargs)
        short = _SHORT.get(func)
        if short is not None:
            at, least, run = short
            weight = args[at] if len(args) > at else kwargs.get("weight")
            thin = self._stand_ins.get(id(weight))
            if thin is not None and weight.numel() >= least:
                rest = self._filled(args[:at]), self._filled(args[at + 1 :]), self._filled(kwargs)
                out = run(func, thin, *rest)
                if out is not None:
                    return out
        if kwargs:
            return func(*self._filled(args), **self._filled(kwargs))
        return func(*self._filled(args))

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            thin = self._stand_ins.get(id(value))
            return value if thin is None else thin.full()
        if type(value) in (tuple, list):
            return value if _NUMBERS.issuperset(map(type, value)) else type(value)([self._filled(v) for v in value])
        if type(value) is dict:
            return {k: self._filled(v) for k, v in value.items()}
        return value


_NUMBERS = frozenset({int, float, bool, type(None)})
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # whose statistics are to be those of fewer channels


def _held(module: nn.Module) -> tuple[Tensor | None, ...]:
    return (*module._parameters.values(), *module._buffers.values())


def _linear(func: Any, thin: Thin, before: Any, after: Any, kwargs: Any) -> Tensor | None:
    """``linear(x, weight, bias)`` or ``conv(x, weight, bias, ...)``."""
    dim = -1 if func is F.linear else 1
    if "weight" in kwargs or len(before) != 1:
        return None
    x, bias = before[0], after[0] if after else kwargs.get("bias")
    blocks = 1 if thin.columns is None else len(thin.columns)
    if thin.shape[1] * blocks != x.shape[dim] or (dim == 1 and x.ndim != len(thin.shape)):
        return None  # a depthwise convolution; one example without a batch
    enter = thin.places.get(1)
    if thin.columns is not None:
        if not _in_blocks(thin, blocks):
            return None
        starts = torch.arange(blocks, device=x.device) * thin.shape[1]
        enter = (thin.columns + starts[:, None]).reshape(-1)
    if enter is not None:
        x = x.index_select(dim, enter)
    rest = {k: v for k, v in kwargs.items() if k != "bias"}
    y = func(x, thin.small, None, *after[1:], **rest)
    if 0 in thin.places:
        shape = list(y.shape)
        shape[dim] = thin.shape[0]
        y = y.new_zeros(shape).index_copy_(dim, thin.places[0], y)
    return y if bias is None else y.add_(bias if dim == -1 else bias.reshape(-1, *[1] * (y.ndim - 2)))


def _embedding(func: Any, thin: Thin, before: Any, after: Any, kwargs: Any) -> Tensor | None:
    """``torch.embedding(weight, indices)``, or ``embedding`` and ``embedding_bag`` of ``(indices, weight, ...)``."""
    if set(thin.places) != {1} or "weight" in kwargs:
        return None
    y = func(*before, thin.small, *after, **kwargs)
    return y.new_zeros((*y.shape[:-1], thin.shape[1])).index_copy_(-1, thin.places[1], y)


def _norm(func: Any, thin: Thin, before: Any, after: Any, kwargs: Any) -> Tensor | None:
    """``norm(x, normalized_shape or groups, weight, ...)``: statistics of the channels that there are."""
    names = ("eps",) if func in _WITHOUT_BIAS else ("bias", "eps")
    if len(before) != 2 or len(after) > len(names) or thin.small.shape == thin.shape:
        return None
    (x, size), grouped = before, func in _GROUPED
    given = {**dict(zip(names, after, strict=False)), **kwargs}
    bias = given.pop("bias", None)
    given["weight"] = thin.small
    if grouped:
        _check_blocks(thin, size)
    elif tuple(size) != thin.shape:
        return None
    at = {1 if grouped else x.ndim - len(thin.shape) + dim: places for dim, places in thin.places.items()}
    y = x
    for dim, places in at.items():
        y = y.index_select(dim, places)
    y = func(y, size if grouped else list(thin.small.shape), **given)
    for dim, places in at.items():
        shape = list(y.shape)
        shape[dim] = x.shape[dim]
        y = y.new_zeros(shape).index_copy_(dim, places, y)
    return y if bias is None else y + (bias.reshape(-1, *[1] * (x.ndim - 2)) if grouped else bias)


def _check_blocks(thin: Thin, groups: int) -> None:
    """Raise :class:`PlanError` unless every group of a group norm keeps as many channels, and its own."""
    if not _in_blocks(thin, groups):
        raise PlanError("channels leave their block of a group norm")


def _in_blocks(thin: Thin, blocks: int) -> bool:
    """Whether each of equal ``blocks`` of the first dimension has as many places as the others, and its own."""
    if 0 not in thin.places:
        return True
    places = _array(thin.places[0])
    own = np.arange(len(places)) * blocks // len(places)
    return len(places) % blocks == 0 and bool((places * blocks // thin.shape[0] == own).all())


_WITHOUT_BIAS = {F.rms_norm, torch.rms_norm}
_GROUPED = {F.group_norm, torch.group_norm}
_SHORT: dict[Any, tuple[int, int, Callable[..., Tensor | None]]] = {  # where the weight is, how large at least
    F.linear: (1, LEAST, _linear),
    torch.conv1d: (1, LEAST, _linear),
    torch.conv2d: (1, LEAST, _linear),
    torch.conv3d: (1, LEAST, _linear),
    torch.embedding: (0, LEAST, _embedding),
    F.embedding: (1, LEAST, _embedding),
    F.embedding_bag: (1, LEAST, _embedding),
    **dict.fromkeys((F.layer_norm, torch.layer_norm, *_GROUPED, *_WITHOUT_BIAS), (2, 0, _norm)),
}


class Wanted(NamedTuple):
    """A parameter or buffer for which there are to be values."""

    tensor: Tensor
    shape: tuple[int, ...]
    name: str
    terms: int  # in the sums that it takes part in
    is_table: bool = False  # rows are read by their numbers and are no channels


class Values:
    """Random values that no mistake hides behind: no two alike, and of a scale that keeps activations in bounds.

    Of a large table, rows overlap in memory: the row after one begins an element later.
    """

    def __init__(self, seed: int) -> None:
        self._pools = _pools(seed)

    def of(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """The values, one tensor for each that is wanted."""
        found: list[Tensor] = [torch.empty(0)] * len(wanted)
        alike: dict[Any, list[int]] = {}
        for i, one in enumerate(wanted):
            if one.is_table and math.prod(one.shape) > POOL:
                found[i] = self._table(one)
            else:
                kind = _kind(len(one.shape), one.name)
                alike.setdefault((kind, one.tensor.device, one.tensor.dtype), []).append(i)
        for (kind, device, dtype), places in alike.items():
            sizes = [math.prod(wanted[i].shape) for i in places]
            parts = self._take(kind, sum(sizes)).to(device, dtype).split(sizes)
            if kind == "weight":
                torch._foreach_mul_(parts, [max(wanted[i].terms, 1) ** -0.5 for i in places])
            for i, part in zip(places, parts, strict=True):
                shape = wanted[i].shape
                found[i] = part if len(shape) == 1 else part.view(shape)
        return found

    def _table(self, wanted: Wanted) -> Tensor:
        rows, columns = wanted.shape
        line = self._take("weight", rows + columns - 1) * max(wanted.terms, 1) ** -0.5
        return line.to(wanted.tensor.device, wanted.tensor.dtype).as_strided((rows, columns), (1, 1))

    def _take(self, kind: str, count: int) -> Tensor:
        pool = self._pools[kind]
        return pool.repeat(-(-count // POOL))[:count] if count > POOL else pool[:count].clone()


@lru_cache(maxsize=1)
def _pools(seed: int) -> dict[str, Tensor]:
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed), device="cpu")
    squashed = torch.tanh(pool)
    return {"weight": pool, "scale": 1.0 + 0.5 * squashed, "bias": 0.5 + 0.25 * squashed}


def _kind(ndim: int, name: str) -> str:
    if ndim > 1:
        return "weight"
    scale = name.endswith("running_var") or "weight" in name.rpartition(".")[2]
    return "scale" if scale else "bias"  # biases keep a ReLU from hiding its channels
