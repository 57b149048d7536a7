"""Growing regularisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.algorithms.growing_reg_pruner import *  # noqa: F403

from ....plan import Binding
from ....regularizers import GrowingRegularizer
from ...engine.regularizing import Scores, open_channels, pushed_parameters
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
        self._regularizer = GrowingRegularizer(reg, delta_reg, Scores(self))
        super().__init__(model, example_inputs, importance, *args, **kwargs)
        self.base_reg = reg
        self.delta_reg = delta_reg
        self._lowered = self.engine.lowered
        self.engine.listeners.append(self._regularizer.shrink)

    @property
    def strengths(self) -> Tensor:
        """The strength of every channel of the plan: ``[N]``."""
        return self._regularizer.strengths(self._current())

    def _current(self) -> Binding:
        binding = self.engine.current()
        if self._lowered != self.engine.lowered:  # the model was changed by other means: the channels are others
            self._lowered = self.engine.lowered
            self._regularizer.reset()
        self._regularizer.delta = self.delta_reg
        return binding

    @torch.no_grad()
    def update_reg(self) -> None:
        """Let the strengths grow."""
        self._regularizer.grow(self._current())

    def update_regularizer(self) -> None:
        """Nothing to do after a prune: the channels that are left keep the strengths that they have reached."""

    @torch.no_grad()
    def regularize(self, model: nn.Module, bias: bool = False) -> None:
        """Add ``strength_c * w`` to the gradients of what belongs to channel c; call after backward."""
        binding = self._current()
        self._regularizer.bias = bias
        self._regularizer.apply(binding, where=open_channels(self), only=pushed_parameters(self))
