"""What several tests need: small models, random prunes, masks made the slow way, a plan's canonical form."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks import zoo
from pat_fast.plan import Axis, Plan
from pat_fast.plan.types import is_grouped


def zoo_names() -> list[str]:
    return list(zoo.ZOO)


@dataclass
class Case:
    """A small model and inputs for it."""

    name: str
    model: nn.Module
    inputs: Any

    @classmethod
    def build(cls, name: str, dtype: torch.dtype = torch.float64) -> Case:
        torch.manual_seed(0)
        entry = zoo.ZOO[name]
        model = entry.small()
        zoo.randomize_(model, 0)
        inputs = tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, entry.example(small=True))
        return cls(name, model.to(dtype), inputs)


class Small(nn.Module):
    """Convolution, batch norm, residual sum, linear: the least that has groups of several layers."""

    def __init__(self, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.inner = nn.Conv2d(width, width + 4, 3, padding=1)
        self.outer = nn.Conv2d(width + 4, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.mean((2, 3)))


def small_inputs(batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def random_keep(plan: Plan, seed: int, ratio: float = 0.3) -> np.ndarray:
    """A random keep vector that respects units and empties no axis.

    Of coupled channels two units stay, so that a plan lowered afresh still sees that they are (see `Plan.shrink`).
    """
    rng = np.random.default_rng(seed)
    kept = rng.random(plan.n_units) > ratio
    for group in plan.groups:
        units = np.unique(plan.unit[group.start : group.stop])
        kept[units[: max(plan.least_units(group), 1 if len(units) == group.channels else 2)]] = True
        step = plan.unit_step(group)
        spared = units[~kept[units]]
        kept[spared[: -int(kept[units].sum()) % step]] = True
    for tensor, axis in plan.axes():
        if (axis.channels >= 0).all():
            units = np.unique(plan.unit[axis.channels])
            least = 2 if plan.least(tensor, axis) > 1 else 1
            if kept[units].sum() < least:
                kept[units[:least]] = True
    return kept[plan.unit]


def masked_copy(model: nn.Module, plan: Plan, keep: np.ndarray) -> nn.Module:
    """A copy with everything that belongs to the channels ``~keep`` at zero, index by index."""
    copied = copy.deepcopy(model)
    named = dict(copied.named_parameters())
    with torch.no_grad():
        for tensor_map in plan.tensors:
            if not tensor_map.is_parameter:
                continue
            tensor = named[tensor_map.name]
            for axis in tensor_map.axes:
                for index in np.flatnonzero((axis.channels >= 0) & ~keep[axis.channels]).tolist():
                    if is_grouped(tensor_map, axis):
                        group, column = divmod(index, tensor_map.shape[1])
                        rows = tensor_map.shape[0] // tensor_map.groups
                        tensor[group * rows : (group + 1) * rows, column] = 0
                    else:
                        tensor.select(axis.dim, index).zero_()
    return copied


def is_weight(local: str) -> bool:
    """Whether a tensor called ``local`` in its module is a weight; recurrent layers have several."""
    return local == "weight" or local.startswith(("weight_ih", "weight_hh", "weight_hr"))


def canonical(plan: Plan) -> dict[str, Any]:
    """A plan as plain data, without what depends on history (frozen reasons) or on order alone."""
    return {
        "channels": plan.n_channels,
        "unit": plan.unit.tolist(),
        "groups": [(g.root, g.start, g.stop, g.layers, g.members, bool(g.statistic)) for g in plan.groups],
        "tensors": [
            (t.name, t.is_parameter, t.shape, t.groups, t.whole_groups, [_plain(a) for a in t.axes])
            for t in plan.tensors
        ],
        "work": sorted((w.scale, [a.tolist() for a in w.axes]) for w in plan.work),
        "widths": sorted(
            (w.module, w.attribute, w.index or 0, w.channels.tolist(), w.per) for w in plan.widths if not w.told
        ),
        "batch": plan.batch,
        "other_params": plan.other_params,
    }


def _plain(axis: Axis) -> tuple[int, str, list[int]]:
    return axis.dim, axis.role, axis.channels.tolist()
