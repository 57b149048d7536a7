"""Growing regularisation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_pruning.pruner.algorithms.growing_reg_pruner import *  # noqa: F403

from ....plan.types import IndexArray
from ...engine.pushing import LAYERS, between, open_channels, parameters_of, push
from .base_pruner import BasePruner


class GrowingRegPruner(BasePruner):
    """:class:`BasePruner` with an L2 penalty whose strength grows, for unimportant channels faster.

    Wang et al., "Neural Pruning via Growing Regularization", ICLR 2021, https://arxiv.org/abs/2012.09243.

    Args:
        reg: the strength that every channel begins with.
        delta_reg: what :meth:`update_reg` adds for the least important channel of a group.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        reg: float = 1e-5,
        delta_reg: float = 1e-5,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, example_inputs, importance, *args, **kwargs)
        self.base_reg = reg
        self.delta_reg = delta_reg
        self._restart()
        self.engine.listeners.append(self._follow)

    @property
    def strengths(self) -> Tensor:
        """The strength of every channel of the plan: ``[N]``."""
        self.engine.current()
        if self._lowered != self.engine.lowered:  # the model was changed by other means: the channels are others
            self._restart()
        return self._strengths

    def _restart(self) -> None:
        self._lowered = self.engine.lowered
        self._strengths = torch.full((self.engine.plan.n_channels,), self.base_reg, device=self.engine.binding.device)

    def _follow(self, survivors: IndexArray) -> None:
        self._strengths = self._strengths[torch.from_numpy(np.ascontiguousarray(survivors))]

    @torch.no_grad()
    def update_reg(self) -> None:
        """Let the strengths grow."""
        strengths = self.strengths
        binding = self.engine.binding
        place, span = between(binding, self._scores().to(binding.device))
        self._strengths = strengths + torch.where(torch.isfinite(span), self.delta_reg * place, 0.0)

    def update_regularizer(self) -> None:
        """Nothing to do after a prune: the channels that are left keep the strengths that they have reached."""

    @torch.no_grad()
    def regularize(self, model: nn.Module, bias: bool = False) -> None:
        """Add ``strength_c * w`` to the gradients of what belongs to channel c; call after backward."""
        strengths = self.strengths * open_channels(self)
        wanted = parameters_of(LAYERS, self.ignored_layers, bias)
        push(self.engine.binding, strengths, f"growing, bias {bias}", wanted)
