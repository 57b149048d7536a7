"""First-order Taylor expansion in the activations, for each example on its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .activation import Activation, _channels
from .normalizers import Normalizer
from .reductions import Reduction


class ActivationTaylor(Activation):
    """What the removal of a channel does to the loss of each example, to first order, in the mean over examples.

    ``v[m, c] = E_n |sum_p x_ncp dL/dx_ncp|`` over examples n, with the sum over the positions p of an example: unlike
    :class:`Taylor`, whose gradients are sums over the batch, examples that a channel helps and those that it harms do
    not cancel. Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017,
    equations 7 and 8, https://arxiv.org/abs/1611.06440. Members and steps as in :class:`Activation`; behind a flatten
    each position counts on its own. Gathered in the backward; a loss scale multiplies the steps it is used in, so while
    it changes these count by it. Costs a product with the gradient of every layer's inputs per backward.

    Args:
        decay: in ``[0, 1]``; 0: the last step alone; 1: all steps alike.
        window: only so many last steps count; by default all.
        reduction, normalizer: as :class:`MemberCriterion`.
    Raises:
        ConfigError: a value out of range.
        PlanError: (from ``score``) no training forward and backward was seen.
    """

    def __init__(
        self,
        decay: float = 0.9,
        window: int | None = None,
        reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
    ) -> None:
        super().__init__("mean", decay, window, reduction, normalizer)

    def _watcher(self, name: str, layer: nn.Module) -> Callable[..., None]:
        mine, me = weakref.ref(layer), weakref.ref(self)

        def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if me() is None or module is not mine() or not module.training or not inputs or not inputs[0].requires_grad:
                return
            x = inputs[0].detach()

            def take(grad: Tensor) -> None:
                criterion = me()
                if criterion is not None:
                    criterion._take(name, x, grad, -1 if isinstance(module, nn.Linear) else _channels(module))

            inputs[0].register_hook(take)

        return watch

    @torch.no_grad()
    def _take(self, name: str, x: Tensor, grad: Tensor, dim: int) -> None:
        product = x * grad
        product = product.float() if product.dtype in (torch.float16, torch.bfloat16) else product
        if product.ndim == -dim:  # without a batch: one example
            product = product[None]
        rest = [d for d in range(1, product.ndim) if d != dim % product.ndim]
        each = (product.sum(rest) if rest else product).abs()
        sums, count = [each.sum(0)], len(each)
        known = self._sums.get(name)
        if known is not None and known[0][0].shape == sums[0].shape:
            sums, count = [known[0][0] + sums[0]], count + known[1]
        self._sums[name] = [sums, count]
