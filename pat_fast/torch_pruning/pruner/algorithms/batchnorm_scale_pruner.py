"""Network slimming: sparse batch-norm scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch_pruning.pruner.algorithms.batchnorm_scale_pruner import *  # noqa: F403

from ....regularizers import BNScaleRegularizer
from ...engine.regularizing import open_channels, pushed_parameters
from .base_pruner import BasePruner


class BNScalePruner(BasePruner):
    """:class:`BasePruner` with a penalty on batch-norm scales.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    https://arxiv.org/abs/1708.06519.

    Args:
        reg: strength.
        group_lasso: the gradient of ``reg * sum_c sqrt(mean of the squared scales of channel c)`` instead of
            that of ``reg * sum |scale|``.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        reg: float = 1e-5,
        group_lasso: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        BNScaleRegularizer(reg, group_lasso)  # refuses what is out of range
        super().__init__(model, example_inputs, importance, *args, **kwargs)
        self.reg = reg
        self.group_lasso = group_lasso

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the penalty to the gradients of batch norms that are not in ``ignored_layers``; call after backward."""
        regularizer = BNScaleRegularizer(self.reg if reg is None else reg, self.group_lasso)
        where = open_channels(self) if self.group_lasso else None
        regularizer.apply(self.engine.current(), where=where, only=pushed_parameters(self))
