"""DepGraph's group-norm regulariser."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from ..criteria import Criterion, GroupNorm
from ..errors import check
from ..plan.bind import Binding
from .push import push_layers, without_nan_groups


class GroupNormRegularizer:
    """DepGraph's group-norm regulariser, added to the gradients: ``g += strength * gamma_c * w``.

    With ``n_c`` the square root of the channel's score and its extremes taken over the group,
    ``gamma_c = alpha ** ((n_max - n_c) / (n_max - n_min))``: from 1 for the most important channel to
    ``alpha`` for the least. A weight gets the term of its output channel plus that of its input channel.
    A group whose channels all score alike has gamma 1; one with a score that is NaN is not pushed. Fang et al.,
    CVPR 2023, section 3.3, https://arxiv.org/abs/2301.12900.

    Args:
        strength: at least 0; DepGraph uses 1e-4 to 1e-3.
        alpha: at least 1; DepGraph uses 16.
        criterion: what scores the channels; group magnitude (p = 2) by default.
        bias: push the biases of the same layers, too.
    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self, strength: float = 1e-4, alpha: float = 16.0, criterion: Criterion | None = None, bias: bool = False
    ) -> None:
        check("strength", strength, lambda v: 0 <= v < math.inf, "a number, at least 0")
        check("alpha", alpha, lambda v: 1 <= v < math.inf, "a number, at least 1")
        self.strength = strength
        self.alpha = alpha
        self.criterion = criterion or GroupNorm(2.0)
        self.bias = bias

    @torch.no_grad()
    def gamma(self, binding: Binding) -> Tensor:
        """How hard each channel is pushed: ``[N]``, in ``1 .. alpha``, or 0."""
        norm = self.criterion.score(binding).clamp_min(0).sqrt()
        low, high = binding.group_extreme(norm, "amin"), binding.group_extreme(norm, "amax")
        span = high - low
        place = torch.where(span > 0, (high - norm) / span.where(span > 0, torch.ones_like(span)), 0.0)
        gamma = torch.where(torch.isnan(norm), norm, self.alpha ** place.clamp(0.0, 1.0))
        return without_nan_groups(binding, gamma)

    @torch.no_grad()
    def apply(
        self,
        binding: Binding,
        scale: float = 1.0,
        where: Tensor | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Add to the gradients of the regularised weights; weights without a gradient are left alone.

        Args:
            scale: multiplies the strength (a loss scale that is still in the gradients).
            where: bool ``[N]``, the channels to push; all by default.
            only: ``id`` of the parameters to push; all by default.
        """
        gamma = self.gamma(binding) * (self.strength * scale)
        push_layers(binding, gamma if where is None else gamma * where, self.bias, only)
