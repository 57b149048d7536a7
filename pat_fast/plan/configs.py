"""Numbers that a model was made from: those in its config, and those that its modules keep for others to read.

A ``transformers`` model is made from a config, and its modules keep sizes (``num_heads``, ``all_head_size``) that their
forward may not use. Building the model once more without memory, from a config whose integers know where they stand
(see :mod:`pat_fast.plan.numbers`), shows which of them is which dimension of which layer.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .numbers import Number, NumberWatch, Symbol, numbered
from .types import ChannelArray, TensorMap, Width

# The attributes of PyTorch's layers and the dimension of the weight that each sizes.
_DIMENSIONS = {
    nn.Linear: {"in_features": 1, "out_features": 0},
    nn.modules.conv._ConvNd: {"in_channels": 1, "out_channels": 0},
    nn.Embedding: {"num_embeddings": 0, "embedding_dim": 1},
    nn.LayerNorm: {"normalized_shape": 0},
}
_COUNTS_HEADS = re.compile(r"(?!.*(dim|size|kv|key|value|group))(^|_)n?_?heads?($|_)")
Expression = tuple[tuple[str, ...], int]  # symbols and value of a number


def follow_config(
    model: nn.Module,
    watch: NumberWatch,
    tensors: tuple[TensorMap, ...],
    unit: ChannelArray,
    heads: list[tuple[str, ChannelArray]],
) -> list[Width]:
    """The attributes of ``model``'s config and modules that are sizes of what ``tensors`` hold, as far as a twin tells.

    ``heads`` are the (module, channels: one for each head) that views were seen to make: a number of heads, by its
    name and value, counts these where no layer was made from it. Attributes that the traced forward used otherwise
    (``watch.other``) are left out: they must stay.
    """
    own = NumberWatch(watch.tracer)  # what __init__ does with the numbers is no reason to hold them
    twin, planted = _twin(model, own)
    if twin is None:
        return []
    held = {str(symbol) for symbol in watch.other if isinstance(symbol, Symbol)} | watch.read
    attributes = [(Symbol(p, n, int(v)), v) for p, n, v in _attributes(twin, own)]
    # What a module keeps that must stay, was made from a number of the config that must stay.
    stay = held - watch.counting
    held |= {str(v.symbols[0]) for symbol, v in attributes if str(symbol) in stay and len(v.symbols) == 1}
    axes = {(t.name, a.dim): (t, a.channels) for t in tensors for a in t.axes if t.groups == 1}
    sized = [
        _Sized(path, number, axes[key][1], held, unit)
        for path, key, number in _layer_sizes(twin)
        if key in axes and axes[key][0].shape[key[1]] == number
    ]
    found = [w for symbol in planted if str(symbol) not in held for s in sized for w in s.counted_by(symbol, symbol)]
    for symbol, value in attributes:
        if str(symbol) not in held:
            inside = [s for s in sized if (s.path + ".").startswith(symbol.module + ".")]
            same = [s for s in inside if s.expression == _expression(value)]
            found += [Width(symbol.module, symbol.attribute, None, s.channels, told=True) for s in same]
            if not same and len(value.symbols) == 1 and value.symbols[0].value == value:
                counted = [w for s in inside for w in s.counted_by(value.symbols[0], symbol)]
                if not counted and _COUNTS_HEADS.search(symbol.attribute):
                    made = [c for path, c in heads if path == symbol.module and len(c) == value]
                    origin = [s for s in value.symbols if isinstance(s, Symbol) and str(s) not in held]
                    for place in (symbol, *origin):
                        counted += [Width(place.module, place.attribute, place.index, c, told=True) for c in made]
                found += counted
    return found


def _attributes(twin: nn.Module, watch: NumberWatch) -> Iterator[tuple[str, str, Number]]:
    """(module, attribute, number) of the modules that are not PyTorch's own."""
    for path, module in twin.named_modules():
        if not type(module).__module__.startswith("torch.nn"):
            for name, value in vars(module).items():
                if isinstance(value, Number) and value.watch is watch:
                    yield path, name, value


def _expression(number: Number) -> Expression:
    return tuple(sorted(str(s) for s in number.symbols)), int(number)


class _Sized:
    """A dimension of a layer's weight and the number that it was made from."""

    def __init__(self, path: str, number: Number, channels: ChannelArray, held: set[str], unit: ChannelArray) -> None:
        self.path, self.channels = path, channels
        self.expression = _expression(number)
        self._number = number
        # Of a product (heads times their dimension) one factor changes.
        self._variable = [str(s) for s in number.symbols if str(s) not in held]
        self._times = np.bincount(unit[channels[channels >= 0]])

    def counted_by(self, source: Any, place: Symbol) -> list[Width]:
        """The width of attribute ``place``, if ``source`` is the factor that changes with these channels."""
        if self._variable != [str(source)]:
            return []
        per = int(self._number) // source.value
        if (self._times % per).any() or (per > 1 and (self.channels < 0).any()):
            return []
        return [Width(place.module, place.attribute, place.index, self.channels, per, told=True)]


def _twin(model: nn.Module, watch: NumberWatch) -> tuple[nn.Module | None, list[Symbol]]:
    """The model built again on the meta device from a config of numbers; None if it is not one that can be."""
    config = getattr(model, "config", None)
    if not hasattr(type(model), "config_class") or not hasattr(config, "to_dict"):
        return None, []
    planted: list[Symbol] = []
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return type(model)(_plant(config, "config", watch, planted)), planted
    except Exception:  # a model that needs more than a config, or checks its types: nothing is told then
        return None, []


def _plant(config: Any, path: str, watch: NumberWatch, planted: list[Symbol]) -> Any:
    """A copy of ``config`` with a number for every integer, nested configs and lists included."""
    twin = copy.copy(config)

    def number(name: str, value: int, index: int | None) -> Number:
        symbol = Symbol("", f"{path}.{name}", value, index)
        planted.append(symbol)
        return Number.make(value, (symbol,), watch)

    vars(twin).update(numbered(vars(config), number))
    for name, value in vars(config).items():
        if type(value).__name__.endswith("Config") and hasattr(value, "__dict__"):
            vars(twin)[name] = _plant(value, f"{path}.{name}", watch, planted)
    return twin


def _layer_sizes(twin: nn.Module) -> Iterator[tuple[str, tuple[str, int], Number]]:
    """(module, (weight, dimension), number) for every size of PyTorch's layers that is a number."""
    for path, module in twin.named_modules():
        if type(module).__name__ == "Conv1D":  # transformers' linear layer with its weight transposed
            for attribute, dim in (("nx", 0), ("nf", 1)):
                if isinstance(value := vars(module).get(attribute), Number):
                    yield path, (f"{path}.weight", dim), value
        for kind, dimensions in _DIMENSIONS.items():
            if isinstance(module, kind):
                for attribute, dim in dimensions.items():
                    value = getattr(module, attribute)
                    value = value[0] if isinstance(value, tuple) and len(value) == 1 else value
                    if isinstance(value, Number):
                        swap = getattr(module, "transposed", False)
                        yield path, (f"{path}.weight", 1 - dim if swap else dim), value
