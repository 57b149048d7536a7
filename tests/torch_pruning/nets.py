"""A small network, and one step of either library on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as original
from torch import Tensor, nn

import pat_fast.torch_pruning as tp
from tests.torch_pruning.against import last_linear, quiet

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with norms and a classifier."""

    def __init__(self, width: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm2 = norm(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


def make(library: Any, model: nn.Module, inputs: Any = X, kind: str = "BasePruner", **arguments: Any) -> Any:
    arguments = {
        "importance": library.importance.MagnitudeImportance(),
        "ignored_layers": [last_linear(model)],
        **arguments,
    }
    with quiet():
        return getattr(library.pruner, kind)(model, inputs, **arguments)


def both(model: nn.Module, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The model after one step of Torch-Pruning's and of the drop-in's pruner."""
    made = []
    for library in (original, tp):
        own = copy.deepcopy(model)
        more = {"in_channel_groups": {}, "out_channel_groups": {}, **arguments}
        with quiet():
            make(library, own, **more).step()
        made.append(own)
    return made[0], made[1]
