"""What the regularising pruners hand to :mod:`pat_fast.regularizers`: their scores, and what may be pushed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...plan.bind import Binding

if TYPE_CHECKING:
    from ..pruner.algorithms.base_pruner import BasePruner


class Scores:
    """The importance of a pruner as a criterion."""

    def __init__(self, pruner: BasePruner) -> None:
        self.pruner = pruner

    def score(self, binding: Binding) -> Tensor:
        """The scores of the pruner's plan, whose binding this is: ``[N]``; NaN for what it may not prune."""
        return torch.from_numpy(self.pruner._scores()).to(binding.device)


def open_channels(pruner: BasePruner) -> Tensor:
    """The channels that the pruner may prune: bool ``[N]``, on the model's device."""
    plan = pruner.engine.plan
    mask = np.zeros(plan.n_channels, dtype=np.bool_)
    for group in (plan.groups[number] for number in pruner._open_groups()):
        mask[group.start : group.stop] = True
    return torch.from_numpy(mask).to(pruner.engine.binding.device)


def pushed_parameters(pruner: BasePruner) -> set[int]:
    """``id`` of the parameters of all layers that are not in ``ignored_layers``."""
    held = {id(p) for layer in pruner.ignored_layers for p in layer.parameters()}
    held.update(id(p) for p in pruner.ignored_params)
    return {id(p) for p in pruner.model.parameters()} - held
