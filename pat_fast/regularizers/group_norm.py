"""DepGraph's group-norm regulariser."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..criteria import Criterion, GroupNorm
from ..errors import check, check_flag
from ..plan.bind import Binding
from .penalty import Penalty
from .push import push_layers, push_norms, shrink_layers


class GroupNormRegularizer(Penalty):
    """DepGraph's group-norm regulariser, added to the gradients: ``g += strength * gamma_c * w``.

    With ``n_c`` the square root of the channel's score and its extremes taken over the group,
    ``gamma_c = alpha ** ((n_max - n_c) / (n_max - n_min))``: from 1 for the most important channel to
    ``alpha`` for the least. A weight gets the term of its output channel plus that of its input channel.
    A group whose channels all score alike has gamma 1; one with a score that is NaN or infinite is not pushed. Fang et
    al., CVPR 2023, section 3.3, https://arxiv.org/abs/2301.12900.

    Args:
        strength: at least 0; DepGraph uses 1e-4 to 1e-3.
        alpha: at least 1; DepGraph uses 16.
        criterion: what scores the channels; group magnitude (p = 2) by default.
        bias: push the biases of the same layers, too.
        warmup, decoupled: see :class:`Penalty`.
    Raises:
        ConfigError: a value is out of range.
    """

    _autograd_as_it_is = True

    def __init__(
        self,
        strength: float = 1e-4,
        alpha: float = 16.0,
        criterion: Criterion | None = None,
        bias: bool = False,
        warmup: int = 0,
        decoupled: bool = False,
    ) -> None:
        super().__init__(strength, warmup, decoupled)
        check_flag("bias", bias)
        check("alpha", alpha, lambda v: 1 <= v < math.inf, "a number, at least 1")
        self.alpha = alpha
        self.criterion = criterion or GroupNorm(2.0)
        self.bias = bias

    @torch.no_grad()
    def gamma(self, binding: Binding) -> Tensor:
        """How hard each channel is pushed: ``[N]``, in ``1 .. alpha``, or 0."""
        own = type(self.criterion) is GroupNorm  # what it divides by cancels out
        scores = self.criterion.total(binding) if own else self.criterion.score(binding)  # type: ignore[attr-defined]
        norm = scores.clamp_min(0).sqrt_()
        low, high = binding.over_groups(norm, "min"), binding.over_groups(norm, "max")
        per_span = (high - low).clamp_min_(torch.finfo(norm.dtype).tiny).reciprocal_()
        place = (binding.spread(high) - norm).mul_(binding.spread(per_span)).clamp_(0.0, 1.0)
        # A NaN reaches its whole group: through the extremes, or, where a score is infinite, through their distance.
        return torch.pow(self.alpha, place).nan_to_num_(0.0)

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        own = type(self.criterion) is GroupNorm and not self.bias
        if own and push_norms(binding, self.criterion.p, self.alpha, self.strength * factor, where, only):  # type: ignore[attr-defined]
            return
        push_layers(binding, self._rates(binding, factor, where), self.bias, only)

    def _shrink(self, binding: Binding, factor: float, lr: Mapping[int, float], where: Tensor | None) -> None:
        shrink_layers(binding, self._rates(binding, factor, where), self.bias, lr)

    def _rates(self, binding: Binding, factor: float, where: Tensor | None) -> Tensor:
        gamma = self.gamma(binding) * (self.strength * factor)
        return gamma if where is None else gamma * where
