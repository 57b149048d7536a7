"""DepGraph's group-norm regulariser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch_pruning.pruner.algorithms.group_norm_pruner import *  # noqa: F403

from ....regularizers import GroupNormRegularizer
from ...engine.regularizing import Scores, open_channels, pushed_parameters
from .base_pruner import BasePruner


class GroupNormPruner(BasePruner):
    """:class:`BasePruner` with a penalty that pushes whole groups to zero, the less important the harder.

    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900.

    Args:
        reg: strength.
        alpha: the least important channel of a group is pushed ``2 ** alpha`` times as hard as the best.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        reg: float = 1e-4,
        alpha: float = 4,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        GroupNormRegularizer(reg, 2.0**alpha)  # refuses what is out of range
        super().__init__(model, example_inputs, importance, *args, **kwargs)
        self.reg = reg
        self.alpha = alpha
        self.cnt = 0

    @torch.no_grad()
    def regularize(self, model: nn.Module, alpha: float | None = None, bias: bool = False) -> None:
        """Add ``reg * gamma_c * w`` to the gradients of what belongs to channel c; call after backward.

        ``gamma_c = alpha ** ((n_max - n_c) / (n_max - n_min))`` over the square roots n of a group's scores.
        Layers in ``ignored_layers`` are left alone, and groups whose scores are not all numbers.

        Args:
            alpha: the base; ``2 ** self.alpha`` by default.
            bias: push biases, too.
        """
        binding = self.engine.current()
        base = 2.0**self.alpha if alpha is None else float(alpha)
        regularizer = GroupNormRegularizer(self.reg, base, Scores(self), bias)
        regularizer.apply(binding, where=open_channels(self), only=pushed_parameters(self))
