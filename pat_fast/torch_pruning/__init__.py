"""A drop-in for Torch-Pruning: ``import pat_fast.torch_pruning as tp`` in place of ``import torch_pruning as tp``.

The pruners and importances are pat_fast's: the same arguments and, wherever Torch-Pruning is right, the same pruned
model, from one pass over the weights and with the optimizer alive. Everything else *is* Torch-Pruning's: the same
objects under this package's name, submodules included. Where results differ is listed in ``docs/differences.md``.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType

import torch_pruning as _original
from torch_pruning import *  # noqa: F403

__version__, __author__, __email__ = _original.__version__, _original.__author__, _original.__email__

# Torch-Pruning's modules that are replaced, and by which of this package's.
_REPLACED = {".pruner.importance": ".importance"}


def _exists(name: str) -> bool:
    parent, _, local = (__name__ + name).rpartition(".")
    package = sys.modules[parent]  # one that is Torch-Pruning's own holds nothing of ours
    return package.__name__ == parent and any(m.name == local for m in pkgutil.iter_modules(package.__path__))


def _module(name: str) -> ModuleType:
    """What stands for Torch-Pruning's ``name`` (``".utils.benchmark"``, say): a module of ours, or its own."""
    ours = _REPLACED.get(name, name)
    return importlib.import_module(__name__ + ours if _exists(ours) else _original.__name__ + name)


def _mirror(package: ModuleType, name: str) -> None:
    """Give this package all submodules of Torch-Pruning's ``package``, under both ways of importing them."""
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        child = found.name[len(_original.__name__) :]
        module = _module(child)
        sys.modules[__name__ + child] = module
        parent = sys.modules[__name__ + name]
        if parent.__name__ == __name__ + name:
            setattr(parent, child.rpartition(".")[2], module)
        if found.ispkg:
            _mirror(importlib.import_module(found.name), child)


_mirror(_original, "")
importance = sys.modules[__name__ + ".pruner.importance"]
