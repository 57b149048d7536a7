"""What a pruner does around each step of an optimizer: it watches gradients, regularises, and holds masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from .criteria import Watching
from .discovery import held
from .modes import Mode
from .plan import Binding
from .regularizers import Regularizer
from .regularizers.stepping import at_weights


@dataclass
class Upkeep:
    """The parts that take part in a step; ``optimizers`` finds those of the model."""

    watching: Watching
    regularizer: Regularizer | None
    mode: Mode
    optimizers: Callable[[], list[Optimizer]]

    @torch.no_grad()
    def before_step(
        self, binding: Binding, scale: float, optimizer: Optimizer | None, eligible: Tensor, stage: str, done: bool
    ) -> None:
        """Let the criterion see the gradients, add the regulariser to them, clear those of masked channels.

        Args:
            scale: a loss scale that is still in the gradients.
            optimizer: the one that steps; None for all.
            eligible: bool ``[N]``, the channels that may be pruned.
            stage: the pruner's; in the last the regulariser rests.
            done: whether the target is reached: nothing more is watched.
        """
        only = None if optimizer is None else binding.known(held([optimizer]))
        with binding.gradients():
            if not done:
                self.watching.observe(binding, scale, only)
            if self.regularizer is not None and stage != "finetune":
                pushed = self._pushed(eligible)
                self.regularizer.apply(binding, scale, pushed, only)
                at_weights(self.regularizer, "before_step", binding, optimizer, self.optimizers, pushed)
            if self.mode.mask is not None and self.mode.mask.is_active:
                self.mode.mask.hold_gradients(only)

    def after_step(self, binding: Binding, optimizer: Optimizer | None, eligible: Tensor, stage: str) -> None:
        """Take a proximal regulariser's step, clear the weights of masked channels; arguments as above."""
        if stage != "finetune":
            at_weights(
                self.regularizer, "after_step", binding, optimizer, self.optimizers, self._pushed(eligible)
            )
        if self.mode.mask is not None and self.mode.mask.is_active:
            self.mode.mask.hold_weights(None if optimizer is None else binding.known(held([optimizer])))

    def _pushed(self, eligible: Tensor) -> Tensor:
        """The channels that are regularised: bool ``[N]``."""
        return eligible if self.mode.mask is None else eligible & self.mode.mask.alive
