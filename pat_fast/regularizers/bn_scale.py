"""Network slimming: sparse scales of batch norms."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from ..criteria.ledger import book
from ..criteria.reductions import reduce_members
from ..errors import check
from ..ops import channel_reduce
from ..plan.bind import Binding
from .push import NORMS, is_norm_weight, push

EPSILON = 1e-9  # Torch-Pruning's, below the root


class BNScaleRegularizer:
    """Network slimming, added to the gradients of the scales of all batch norms: ``g += strength * sign(w)``.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    https://arxiv.org/abs/1708.06519. With ``group_lasso``: ``g += strength * w / n_c``, where
    ``n_c = sqrt(1e-9 + mean w_c^2)`` over the batch norms of the channel's group; only the scales of prunable
    channels are pushed then.

    Args:
        strength: at least 0; 1e-5 to 1e-3 are usual.
        group_lasso: push the scales of a group together.
    Raises:
        ConfigError: the strength is out of range.
    """

    def __init__(self, strength: float = 1e-5, group_lasso: bool = False) -> None:
        check("strength", strength, lambda v: 0 <= v < math.inf, "a number, at least 0")
        self.strength = strength
        self.group_lasso = group_lasso

    @torch.no_grad()
    def gamma(self, binding: Binding) -> Tensor:
        """``1 / n_c``: ``[N]``."""
        tally = book(binding, "norm scales", lambda m: is_norm_weight(m, *binding.owner(m.name)))
        squares = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=2.0) for t in tally.tiles])
        return (reduce_members(squares, tally.ledger, "mean") + EPSILON).rsqrt()

    @torch.no_grad()
    def apply(
        self,
        binding: Binding,
        scale: float = 1.0,
        where: Tensor | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Add to the gradients of the scales; scales without a gradient are left alone.

        Args:
            scale: multiplies the strength (a loss scale that is still in the gradients).
            where: bool ``[N]``, the channels to push; all by default, and of ``sign(w)`` those of no group, too.
            only: ``id`` of the scales to push; all by default.
        """
        if self.group_lasso:
            gamma = self.gamma(binding) * (self.strength * scale)
            push(binding, "norm scales", is_norm_weight, gamma if where is None else gamma * where, only)
            return
        held = {} if where is None else {m.name: m.axes[0].channels for m in binding.plan.tensors}
        for name, module in binding.model.named_modules():
            weight = module.weight if isinstance(module, NORMS) else None
            if weight is None or weight.grad is None or (only is not None and id(weight) not in only):
                continue
            step = weight.sign() * (self.strength * scale)
            channels = held.get(f"{name}.weight")
            if where is not None and channels is not None:
                index = torch.from_numpy(channels).long().to(step.device)
                step *= where.to(step.device)[index.clamp_min(0)] | (index < 0)
            weight.grad.add_(step)
