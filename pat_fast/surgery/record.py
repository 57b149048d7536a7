"""What surgery did to a model, written on its modules as plain data: what a checkpoint has to tell.

It lies in the modules' own dictionaries, so that copies, wrappers and submodules of a pruned model have it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from torch import nn

from ..plan.bind import Binding
from ..plan.types import Kept
from .modules import tabulate

KEY = "_pat_fast"
Record = dict[str, Any]
"""Of a module ``"sizes"``: paths of attributes that surgery may have changed (``"config.hidden_size"``).

Of the module that was pruned also ``"prunes"``, ``"dense"`` (channels, parameters, MACs per example before the first
prune) and ``"channels"``: for the root layer of each group ``{"of": n, "kept": [...]}``, the channels of the dense
group that are left, in order. What the last prunes left of them may still lie under ``"noted"``, see :func:`_fold`.
"""
MOST = 16  # prunes that are noted before what they left is put together


def note_prune(binding: Binding, kept: Kept) -> None:
    """Write down that of ``binding`` what is ``kept`` was left."""
    plan, model = binding.plan, binding.model
    for module, attribute in tabulate(binding).unruled:
        note_sizes(module, [attribute])
    record = vars(model).setdefault(KEY, {})
    if "dense" not in record:
        record["dense"] = note_dense(binding)
    record["prunes"] = record.get("prunes", 0) + 1
    record["noted"] = [*record.get("noted", ()), (plan.roots, plan.bounds.tolist(), kept.keep.tobytes())]
    if len(record["noted"]) > MOST:
        _fold(record)


def note_dense(binding: Binding) -> dict[str, int]:
    """What a prune notes of the model as it is before the first one."""
    plan = binding.plan
    if "dense" not in binding.derived:
        binding.derived["dense"] = {"channels": plan.n_channels, "params": plan.params(), "macs": plan.macs()}
    return dict(binding.derived["dense"])


def _fold(record: Record) -> None:
    """Put what prunes have left together with what is known: of each its groups, their bounds, and which channels."""
    noted = record.pop("noted", ())
    if not noted:
        return
    channels: dict[str, dict[str, Any]] = dict(record.get("channels", {}))
    for roots, bounds, keep in noted:
        kept = np.frombuffer(keep, dtype=np.bool_)
        for root, (start, stop) in zip(roots, pairwise(bounds), strict=True):
            known, left = channels.get(root), kept[start:stop]
            if known is None or len(known["kept"]) != len(left):  # a plan of another build: its own count
                channels[root] = {"of": len(left), "kept": np.flatnonzero(left).tolist()}
            else:
                channels[root] = {"of": known["of"], "kept": np.asarray(known["kept"])[left].tolist()}
    record["channels"] = channels


def of(module: nn.Module) -> Record:
    """The record of ``module``, empty at first."""
    found: Record = vars(module).setdefault(KEY, {})
    _fold(found)
    return found


def note_sizes(module: nn.Module, attributes: list[str]) -> None:
    """Write down that ``attributes`` of ``module`` are sizes."""
    if attributes:
        record = of(module)
        record["sizes"] = sorted({*record.get("sizes", ()), *attributes})


def records(model: nn.Module) -> Iterator[tuple[str, Record]]:
    """(path, record) of the modules of ``model`` that have one."""
    for name, module in model.named_modules():
        if KEY in vars(module):
            _fold(vars(module)[KEY])
            yield name, vars(module)[KEY]


def restorer(binding: Binding) -> Callable[[], None]:
    """What puts the records that a prune writes back to what they are now."""
    modules = [binding.model, *(module for module, _ in tabulate(binding).unruled)]
    before = [
        (module, {k: dict(v) if isinstance(v, dict) else v for k, v in record.items()})
        for module in modules
        if (record := vars(module).get(KEY))
    ]

    def restore() -> None:
        for module in modules:
            vars(module).pop(KEY, None)
        for module, record in before:
            vars(module)[KEY] = record

    return restore
