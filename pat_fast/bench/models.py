"""Models by name: of the repository's zoo, of a factory, or lists of shapes alone."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, did_you_mean
from ..factory import build_model, default_inputs
from .kernels import Shape

Inputs = tuple[Tensor, ...]


def vit_l() -> list[Shape]:
    """ViT-L/16, 304 million."""
    block: list[Shape] = [(1024,)] * 4 + [(3072, 1024), (3072,), (1024, 1024), (1024,)]
    block += [(4096, 1024), (4096,), (1024, 4096), (1024,)]
    return [(1024, 3, 16, 16), (1024,), *block * 24, (1024,), (1024,), (1000, 1024), (1000,)]


def llama_1b() -> list[Shape]:
    """A Llama of 1.24 billion: grouped queries, 16 layers of width 2048, tied embeddings."""
    attention: list[Shape] = [(2048,), (2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    block = [*attention, (2048,), (8192, 2048), (8192, 2048), (2048, 8192)]
    return [(128256, 2048), *block * 16, (2048,)]


def tiny() -> list[Shape]:
    """Runs anywhere in no time, to see that everything works."""
    return [(8, 3, 3, 3), (8,), (16, 8, 1, 1), (16,), (10, 16), (10,)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {"vit_l": vit_l, "llama_1b": llama_1b, "tiny": tiny}
"""What can be measured without the models: tensors of their shapes, for the four ops alone."""
USUAL = {"cpu": ("resnet50", "densenet121", "vit_s16"), "cuda": ("resnet50", "vit_l", "llama_1b")}


@dataclass(frozen=True)
class Model:
    """Something to measure.

    Attributes:
        shapes: of its parameters.
        build: makes the network, with weights that are nowhere constant, and inputs for it; None where there are
            shapes alone.
    """

    name: str
    shapes: Callable[[], list[Shape]]
    build: Callable[[], tuple[nn.Module, Inputs]] | None = None

    def is_convolutional(self) -> bool:
        """Whether most parameters are weights of 2-d convolutions, which have memory formats."""
        sizes = [(len(shape) == 4, math.prod(shape)) for shape in self.shapes()]
        return 2 * sum(n for is_kernel, n in sizes if is_kernel) > sum(n for _, n in sizes)


def usual(device: str) -> tuple[str, ...]:
    """What is measured if no model is named; without the repository, shapes."""
    names = USUAL.get(device, USUAL["cpu"])
    return names if zoo() is not None else tuple(n for n in names if n in SHAPES) or ("vit_l",)


def find(name: str, inputs: Sequence[Tensor], args: Mapping[str, Any], small: bool = False) -> Model:
    """Find a model by name.

    Args:
        name: of a list of shapes, of a network of the zoo, or ``package.module:factory``.
        inputs: example inputs of a factory's network; by default what it seems to read.
        args: keyword arguments of the factory.
        small: take the zoo's small version.

    Raises:
        ConfigError: there is no such model, or it has no values to measure with.
    """
    if ":" in name:
        model = build_model(name, args, "MODEL")
        _check(name, model)
        vary_(model)
        given = tuple(inputs) or default_inputs(model)
        return Model(name, lambda: _shapes(model), lambda: (copy.deepcopy(model), given))
    if name in SHAPES:
        return Model(name, SHAPES[name])
    found = zoo()
    known = [*SHAPES, *(found.ZOO if found is not None else ())]
    if found is None or name not in found.ZOO:
        where = "" if found is not None else " (the zoo is not here: start in a checkout of the repository)"
        raise ConfigError(
            f"MODEL: expected one of {', '.join(known)}, or 'package.module:factory'; got {name!r}"
            f"{did_you_mean(name, known)}{where}"
        )
    entry = found.ZOO[name]

    def build() -> tuple[nn.Module, Inputs]:
        return found.randomize_(entry.small() if small else entry.build(), 0), entry.example(small)

    with torch.device("meta"):
        shapes = _shapes(entry.small() if small else entry.build())
    return Model(name, lambda: shapes, build)


def _check(name: str, model: nn.Module) -> None:
    """Raise ConfigError unless there are values to measure with."""
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        why = "has no shape yet (a lazy layer); run one forward first" if is_lazy(tensor) else ""
        if why or tensor.is_meta:
            why = why or "is on the meta device"
            raise ConfigError(f"MODEL: expected a network whose tensors have values, got {name}, whose {key} {why}")
    if not any(p.numel() for p in model.parameters()):
        raise ConfigError(f"MODEL: expected a network with parameters, got {name}, which has none")


def _shapes(model: nn.Module) -> list[Shape]:
    return [tuple(p.shape) for p in model.parameters()]


def zoo() -> ModuleType | None:
    """The repository's ``benchmarks.zoo``, where it lies around the package or in the working directory."""
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if not (root / "benchmarks" / "zoo.py").is_file():
            continue
        sys.path.insert(0, str(root))
        try:
            found = importlib.import_module("benchmarks.zoo")
        except ImportError:
            continue
        finally:
            sys.path.remove(str(root))
        if hasattr(found, "ZOO"):
            return found
    return None


@torch.no_grad()
def vary_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to parameters that are constant, in place; returns ``model``.

    The channels of fresh norms score alike, and how ties are broken is no property of a result.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.numel() > 1 and p.is_floating_point() and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.3)
    return model
