"""Network slimming: sparse batch-norm scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch_pruning.pruner.algorithms.batchnorm_scale_pruner import *  # noqa: F403

from ...engine.pushing import BATCHNORM, mean_square, open_channels, parameters_of, push
from .base_pruner import BasePruner

_KEY = "batch-norm scales"


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
        super().__init__(model, example_inputs, importance, *args, **kwargs)
        self.reg = reg
        self.group_lasso = group_lasso

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add the penalty to the gradients of batch norms that are not in ``ignored_layers``; call after backward."""
        reg = self.reg if reg is None else reg
        ignored = {id(m) for m in self.ignored_layers}
        if not self.group_lasso:
            norms = (m for m in model.modules() if isinstance(m, BATCHNORM) and id(m) not in ignored)
            for weight in (m.weight for m in norms if m.affine):
                if weight.grad is not None:
                    weight.grad.add_(weight.sign(), alpha=reg)
            return
        binding = self.engine.current()
        wanted = parameters_of(BATCHNORM, self.ignored_layers, False)
        norm = (mean_square(binding, _KEY, wanted) + 1e-9).sqrt()
        push(binding, reg / norm * open_channels(self), _KEY, wanted)
