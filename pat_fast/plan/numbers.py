"""Numbers that modules keep and forwards use as sizes: ``self.num_heads`` in a view, ``config.hidden_size`` in a split.

While a model is traced, every integer of its modules (and of their ``config`` objects) is replaced by a
:class:`Number`, an int that knows where it stands; the shapes of labelled tensors are numbers, too. A function mode
sees them arrive at views, splits and the like, and so which number sizes which labelled dimension. After the labels
are solved, :func:`resolve` says for each attribute which channels it counts, or freezes the channels of a dimension
that no single attribute can follow; dimensions that the code gives the size of one another shrink together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .hollow import READS
from .labels import IntArray, Slots, Solution, varying

if TYPE_CHECKING:
    from .trace import Tracer


# Of PyTorch's layers, whose sizes are known, those that give sizes to others: first states are made for some in the
# sizes that they keep, and one views by them.
_KEEPING = (nn.RNNBase, nn.RNNCellBase, nn.Unflatten)


@dataclass(frozen=True)
class Symbol:
    """Where a number stands: ``attribute`` (``"config.hidden_size"`` for one of a config) of a module.

    ``index`` is its place in a tuple or list, counted from the end; None for a plain integer.
    """

    module: str
    attribute: str
    value: int
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.attribute}" if self.module else self.attribute
        return path if self.index is None else f"{path}[{self.index}]"


@dataclass(frozen=True, eq=False)
class Extent:
    """The size of a labelled dimension, read from a tensor's shape."""

    factor: IntArray
    dim: int

    @property
    def value(self) -> int:
        return self.factor.shape[self.dim]

    def __str__(self) -> str:
        return "the size of another tensor"


class Number(int):
    """``scale`` times the product of ``symbols``; other arithmetic gives plain numbers."""

    symbols: tuple[Symbol | Extent, ...]
    watch: NumberWatch

    @classmethod
    def make(cls, value: int, symbols: tuple[Symbol | Extent, ...], watch: NumberWatch) -> Number:
        number = cls(value)
        number.symbols, number.watch = symbols, watch
        return number

    def __mul__(self, other: Any) -> Any:
        if type(other) is int:
            return Number.make(int(self) * other, self.symbols, self.watch)
        if isinstance(other, Number):
            return Number.make(int(self) * int(other), self.symbols + other.symbols, self.watch)
        self._valued()
        return int(self) * other

    __rmul__ = __mul__

    def _valued(self) -> None:
        """The number takes part in a value (a scale, say): another one would be another function."""
        for symbol in self.symbols:
            self.watch.other.setdefault(symbol, VALUE)

    def __float__(self) -> float:
        self._valued()
        return float(int(self))

    def __pow__(self, other: Any, *rest: Any) -> Any:
        self._valued()
        return pow(int(self), other, *rest)

    def __rpow__(self, other: Any, *rest: Any) -> Any:
        self._valued()
        return pow(other, int(self), *rest)

    def __truediv__(self, other: Any) -> Any:
        self._valued()
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self._valued()
        return other / int(self)

    def __floordiv__(self, other: Any) -> Any:
        return self if type(other) is int and other == 1 else self._read() // other

    def __rfloordiv__(self, other: Any) -> Any:
        return other // self._read()

    def __mod__(self, other: Any) -> Any:
        return self._read() % other

    def __rmod__(self, other: Any) -> Any:
        return other % self._read()

    def __add__(self, other: Any) -> Any:
        return self._read() + other

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._read() - other

    def __rsub__(self, other: Any) -> Any:
        return other - self._read()

    def __eq__(self, other: object) -> bool:
        self._compared(other)
        return int.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        self._compared(other)
        return int.__ne__(self, other)

    def _compared(self, other: object) -> None:
        """A size that is checked against an attribute, and is equal, must go on being so."""
        if not isinstance(other, Number):
            self._read()
            return
        self.watch.compares = True
        if int(self) == int(other) and len(self.symbols) == len(other.symbols) == 1:
            for number, against in ((self, other), (other, self)):
                symbol, extent = number.symbols[0], against.symbols[0]
                if not isinstance(symbol, Symbol) or not isinstance(extent, Extent):
                    continue
                if symbol.value == extent.value == int(number):
                    self.watch.uses.append((number, extent.factor, extent.dim))
                    return
        self._read()
        other._read()

    __hash__ = int.__hash__

    def _read(self) -> int:
        """The number is reckoned with: what comes of that is not followed."""
        self.watch.read.update(str(symbol) for symbol in self.symbols if isinstance(symbol, Symbol))
        return int(self)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


@dataclass
class Count:
    """``symbol`` is the number of ``slots`` that are kept, divided by ``per``."""

    symbol: Symbol
    slots: IntArray
    per: int


VALUE = "takes part in a value"
Planted = tuple[dict[str, Any], str, Any]  # where, under which name, what was there

# Functions whose arguments, from this position on, are the sizes of the result.
_SIZED = {
    "view": 1, "reshape": 1, "expand": 1, "new_zeros": 1, "new_ones": 1, "new_empty": 1, "new_full": 1, "zeros": 0,
    "ones": 0, "empty": 0, "full": 0, "rand": 0, "randn": 0,
    "repeat": 1,
}  # fmt: skip
_PARTLY = {"unflatten", "rms_norm", "repeat_interleave"}  # that are given sizes of some of the dimensions
_NO_NUMBERS = {Tensor, nn.Parameter, type(None), int, bool, float, str, torch.dtype, torch.device}
_REPEATING = {"expand", "repeat", "repeat_interleave"}
_FRESH = {"new_zeros", "new_ones", "new_empty", "new_full", "zeros", "ones", "empty", "full", "rand", "randn"}


class NumberWatch(TorchFunctionMode):
    """Sees numbers of the traced modules arrive at PyTorch's functions."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.uses: list[tuple[Number, IntArray, int]] = []  # number, factor, dimension
        self.other: dict[Symbol | Extent, str] = {}  # numbers that (also) have another use
        self.read: set[str] = set()  # those that the forward reckons with, by name
        self.counting: set[str] = set()  # those that were found to count channels
        self.hooked = False  # whether the forward hangs hooks of its own into the backward
        self.compares = False  # whether it holds sizes against one another
        self._current: list[Number] = []
        self._taken: list[Number] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _function_name(func)
        if name in READS and args and self.tracer.hollow is not None:
            self.tracer.hollow.look(args[0])
        elif name == "register_hook":
            self.hooked = True
        numbers: list[Number] = []
        for value in (*args, *kwargs.values()) if kwargs else args:
            if type(value) not in _NO_NUMBERS and not isinstance(value, Tensor):
                numbers += self._numbers(value)
        if not numbers:
            out = func(*args, **kwargs)
            return self._shape(args, kwargs, out) if _reads_shape(func) else out
        before = self._current, self._taken
        self._current, self._taken = numbers, []
        try:
            out = func(*args, **kwargs)
            if name in _SIZED or name in _PARTLY:
                self._sized(name, args, kwargs, out)
            for number in numbers:
                if name not in _SIZED and name not in _PARTLY and not any(number is t for t in self._taken):
                    self._otherwise(number, f"is an argument of {name}")
        finally:
            self._current, self._taken = before
        return out

    def _shape(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """The shape, or one size, of a labelled tensor as numbers."""
        tensor = args[0]
        factors = self.tracer.mark(tensor).factors if self.tracer.labelled(tensor) else ()
        if not factors:
            return out
        sizes: list[int] = list(tensor.shape)
        for factor in factors:
            for dim in varying(factor):
                sizes[dim] = Number.make(sizes[dim], (Extent(factor, dim),), self)
        if isinstance(out, torch.Size):
            return torch.Size(sizes)
        return sizes[args[1] if len(args) > 1 else kwargs["dim"]]

    def _numbers(self, value: Any) -> Iterator[Number]:
        if isinstance(value, Number):
            if value.watch is self:  # one of another trace may have been remembered by the code
                yield value
        elif isinstance(value, (tuple, list)):
            for item in value:
                yield from self._numbers(item)
        elif isinstance(value, slice):
            yield from self._numbers((value.start, value.stop))

    def _sized(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        offset = 0
        if name == "unflatten":
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            sizes = args[2] if len(args) > 2 else kwargs["sizes"]
            offset = dim % args[0].ndim if isinstance(dim, int) else 0
        elif name == "rms_norm":
            sizes = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            offset = out.ndim - len(sizes)
        elif name == "repeat_interleave":
            given = {**dict(zip(("repeats", "dim"), args[1:], strict=False)), **kwargs}
            sizes, dim = (given["repeats"],), given.get("dim")
            offset = 0 if dim is None else dim % out.ndim
        else:
            rest = args[_SIZED[name] :]
            sizes = rest if rest and isinstance(rest[0], int) else next(iter([*rest, *kwargs.values()]), ())
        if not isinstance(sizes, (tuple, list)):
            return
        for dim, number in enumerate(sizes[: out.ndim - offset], start=offset):
            if not isinstance(number, Number) or number.watch is not self:
                continue
            times = out.shape[dim] // int(number) if name in _REPEATING else 1
            if not times or out.shape[dim] != int(number) * times:  # no times: nothing was repeated
                continue
            if name in _FRESH:
                self.tracer.add_factor(out, dim)
            elif name in _REPEATING and not any(dim in varying(f) for f in self.tracer.mark(out).factors):
                self.tracer.add_follower(out, dim, times, in_turns=name == "repeat_interleave")
            self.use(number, self.tracer.mark(out).factors, dim)

    def use(self, number: Number, factors: Sequence[IntArray], dim: int) -> None:
        """Note that ``number`` is the size of dimension ``dim`` of a tensor that is labelled by ``factors``."""
        self._taken.append(number)
        found = [f for f in factors if dim in varying(f)]
        if not found:
            self._otherwise(number, "sizes something that does not shrink")
        for factor in found:
            self.uses.append((number, factor, dim))

    def _otherwise(self, number: Number, what: str) -> None:
        for symbol in number.symbols:
            if symbol not in self.other:
                self.other[symbol] = f"{what} ({self.tracer.where()})"

    def find(self, values: Sequence[int]) -> list[Number | None]:
        """For each of ``values`` the number among the arguments of the function that is running, in order."""
        left = list(self._current)
        found: list[Number | None] = []
        for value in values:
            at = next((i for i, n in enumerate(left) if int(n) == value), None)
            found.append(None if at is None else left.pop(at))
        return found

    @contextmanager
    def planted(self, modules: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
        """Replace the integers that ``modules`` keep, for as long as the forward runs."""
        undo: list[Planted] = []
        seen: set[int] = set()
        try:
            kinds: set[Any] = set(map(type, chain.from_iterable(vars(m).values() for _, m in modules)))
            configs = set(filter(_is_config, kinds))
            for path, module in modules:
                space = module.__dict__
                if not type(module).__module__.startswith("torch.nn") or isinstance(module, _KEEPING):
                    self._plant(space, path, "", undo)
                for name, value in space.items() if configs else ():
                    if type(value) in configs and hasattr(value, "__dict__") and id(value) not in seen:
                        seen.add(id(value))
                        self._plant(value.__dict__, path, f"{name}.", undo)
            yield
        finally:
            for space, name, value in undo:
                space[name] = value

    def _plant(self, space: dict[str, Any], path: str, prefix: str, undo: list[Planted]) -> None:
        def number(name: str, value: int, index: int | None) -> Number:
            return Number.make(value, (Symbol(path, prefix + name, value, index),), self)

        for name, planted in numbered(space, number):
            undo.append((space, name, space[name]))
            space[name] = planted


@cache
def _is_config(kind: Any) -> bool:
    return bool(kind.__name__.endswith("Config"))


def numbered(
    space: dict[str, Any], number: Callable[[str, int, int | None], Number]
) -> list[tuple[str, Number | tuple[int, ...] | list[int]]]:
    """The integers above 1 among the attributes ``space``, and its lists and tuples of integers, made of numbers.

    ``number(name, value, index)`` makes one; ``index`` is its place in a list or tuple, counted from the end.
    """
    found: list[tuple[str, Any]] = []
    for name, value in space.items():
        if type(value) is int and value > 1:
            found.append((name, number(name, value, None)))
        elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
            places = zip(range(-len(value), 0), value, strict=True)
            found.append((name, type(value)(number(name, v, i) if v > 1 else v for i, v in places)))
    return found


_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


@cache
def _function_name(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


@cache
def _reads_shape(func: Any) -> bool:
    return bool(func == torch.Tensor.size or func == _SHAPE)


def resolve(watch: NumberWatch, slots: Slots) -> tuple[Solution, list[Count]]:
    """Solve the labels, and say which channels each number counts.

    A number that also does something else, or that sizes two dimensions which may shrink differently, cannot
    follow them: these channels are frozen, with its name.
    """
    for extent, reason in watch.other.items():
        if isinstance(extent, Extent) and reason == VALUE:
            slots.note(extent.factor, f"its size {VALUE}")
    while True:
        solution = slots.solve()
        attempt = _Resolution(watch, solution, slots)
        if not attempt.wrong and not attempt.ties:
            watch.other, watch.counting = attempt.other, {str(symbol) for symbol in attempt.counts}
            return solution, list(attempt.counts.values())
        for one, two in attempt.ties:
            slots.couple(one, two)
        for held, reason in attempt.wrong:
            slots.freeze(held, reason)


class _Resolution:
    """One attempt: what each symbol counts, and the uses that nothing can follow."""

    def __init__(self, watch: NumberWatch, solution: Solution, slots: Slots) -> None:
        self.counts: dict[Symbol, Count] = {}
        self.wrong: list[tuple[IntArray, str]] = []
        self.ties: list[tuple[IntArray, IntArray]] = []
        self.other = dict(watch.other)
        self._solution = solution
        self._slots = slots
        self._frozen = solution.frozen.mask
        self._leaves = watch.tracer.leaves.values()
        shrinking = []
        for number, factor, dim in watch.uses:
            places = self._places(factor, dim)
            if places is not None and self._free(places):
                shrinking.append((number.symbols, places))
            elif len(number.symbols) == 1 and number.symbols[0].value == factor.shape[dim]:
                self.other.setdefault(number.symbols[0], "also sizes something that stays")
        for symbols, places in sorted(shrinking, key=lambda use: len(use[0])):
            reason = self._follow(symbols, places)
            if reason is not None:
                self.wrong.append((places, reason))

    def _places(self, factor: IntArray, dim: int) -> IntArray | None:
        """A slot for each place along ``dim``; None if that keeps its size (of a head, where whole heads go)."""
        rows = np.moveaxis(factor, dim, 0).reshape(factor.shape[dim], -1)
        if rows.shape[1] > 1:
            units = self._solution.unit[self._slots.index(rows)]
            if (units == units[:1]).all():
                return None
        return rows[:, 0]

    def _free(self, slots: IntArray) -> dict[int, int]:
        """The units of ``slots`` that may go, and how many of the slots each takes along."""
        unit, times = np.unique(self._solution.unit[self._slots.index(slots)], return_counts=True)
        loose = ~self._frozen[unit]
        return dict(zip(unit[loose].tolist(), times[loose].tolist(), strict=True))

    def _follow(self, symbols: tuple[Symbol | Extent, ...], places: IntArray) -> str | None:
        """Let one of ``symbols`` count what is kept of ``places``; why that is not possible, or None."""
        free = self._free(places)
        first = symbols[0]
        if isinstance(first, Extent):
            source = self._places(first.factor, first.dim)
            if source is not None and first.value == len(places) and self._free(source) != free:
                self.ties.append((source, places))
            return None
        symbol = self._variable(symbols, len(places), len(free))
        if symbol is None:
            return None  # another factor may come from a tensor's shape; if not, the dry run finds out
        if symbol in self.other:
            return f"its size is {symbol}, which {self.other[symbol]}"
        per = len(places) // symbol.value
        known = self.counts.setdefault(symbol, Count(symbol, places, per))
        if any(times % per for times in free.values()):
            return f"its size is a multiple of {symbol}"
        expected = {unit: times // known.per for unit, times in self._free(known.slots).items()}
        if expected != {unit: times // per for unit, times in free.items()}:
            if len(known.slots) == len(places) and self._made(known.slots) and self._made(places):
                self.ties.append((known.slots, places))
                return None
            return f"its size is {symbol}, which also sizes something that shrinks by itself"
        return None

    def _made(self, slots: IntArray) -> bool:
        """Whether all that may go of ``slots`` are channels that layers put out, which may shrink alike."""
        made = [leaf.axes[d] for leaf in self._leaves if leaf.is_parameter for d in leaf.producers if d in leaf.axes]
        roots = self._solution.unit[self._slots.index(np.concatenate(made))] if made else made
        return bool(np.isin(list(self._free(slots)), roots).all())

    def _variable(self, symbols: tuple[Symbol | Extent, ...], size: int, units: int) -> Symbol | None:
        """The symbol of a product that changes when units go; the others are constants."""
        own = [s for s in symbols if isinstance(s, Symbol)]
        if len(own) < len(symbols):
            return None  # a size of a tensor, which changes by itself
        if own[0].value == size:
            return own[0]
        known = [s for s in own if s in self.counts]
        if not known:
            known = [s for s in own if s.value == units and s not in self.other]
        return known[0] if len(known) == 1 else None
