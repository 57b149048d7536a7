"""Sparsity regularisers: gradients that push unimportant channels towards zero before they are pruned."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from .criteria import Criterion, GroupNorm
from .errors import check
from .ops import channel_axpy_
from .plan.bind import Binding, Tiles
from .plan.types import TensorMap

REGULARIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)


def is_regularized(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of convolutions, linear layers and batch norms that are being trained."""
    return local == "weight" and isinstance(owner, REGULARIZED) and tensor_map.is_parameter


class GroupNormRegularizer:
    """DepGraph's group-norm regulariser, added to the gradients: ``g += strength * gamma_c * w``.

    With ``n_c`` the square root of the channel's score and its extremes taken over the group,
    ``gamma_c = alpha ** ((n_max - n_c) / (n_max - n_min))``: from 1 for the most important channel to
    ``alpha`` for the least. A weight gets the term of its output channel plus that of its input channel.
    A group whose channels all score alike has gamma 1. Fang et al., CVPR 2023, section 3.3,
    https://arxiv.org/abs/2301.12900.

    Args:
        strength: at least 0; DepGraph uses 1e-4 to 1e-3.
        alpha: at least 1; DepGraph uses 16.
        criterion: what scores the channels; group magnitude (p = 2) by default.
    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(self, strength: float = 1e-4, alpha: float = 16.0, criterion: Criterion | None = None) -> None:
        check("strength", strength, lambda v: 0 <= v < math.inf, "a number, at least 0")
        check("alpha", alpha, lambda v: 1 <= v < math.inf, "a number, at least 1")
        self.strength = strength
        self.alpha = alpha
        self.criterion = criterion or GroupNorm(2.0)

    @torch.no_grad()
    def gamma(self, binding: Binding) -> Tensor:
        """How hard each channel is pushed: ``[N]``, in ``1 .. alpha``."""
        norm = self.criterion.score(binding).clamp_min(0).sqrt()
        low, high = binding.group_extreme(norm, "amin"), binding.group_extreme(norm, "amax")
        span = high - low
        place = torch.where(span > 0, (high - norm) / span.where(span > 0, torch.ones_like(span)), 0.0)
        return self.alpha ** place.clamp(0.0, 1.0)

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
            only: ``id`` of the weights to push; all by default.
        """
        gamma = self.gamma(binding) * (self.strength * scale)
        if where is not None:
            gamma = gamma * where
        for tiles in binding.tiles("regularized", is_regularized):
            pushed = [t.grad is not None and (only is None or id(t) in only) for t in tiles.tensors]
            if all(pushed):
                self._add(binding, tiles, gamma)
            elif any(pushed):
                for one, yes in zip(binding.each(tiles), pushed, strict=True):
                    if yes:
                        self._add(binding, one, gamma)

    def _add(self, binding: Binding, tiles: Tiles, gamma: Tensor) -> None:
        coef = binding.to_slots(tiles, gamma, fill=0.0)
        channel_axpy_(gradients(tiles), tiles.tensors, tiles.table, coef)


def gradients(tiles: Tiles) -> list[Tensor]:
    """The gradients of ``tiles.tensors``, in the memory layout of their parameters (changed if need be)."""
    found = []
    for tensor in tiles.tensors:
        grad = tensor.grad
        assert grad is not None
        if grad.stride() != tensor.stride():
            grad = torch.empty_like(tensor).copy_(grad)
            tensor.grad = grad
        found.append(grad)
    return found
