"""Network slimming: sparse scales of batch norms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..criteria.ledger import book
from ..criteria.reductions import reduce_members
from ..errors import check_flag
from ..ops import channel_reduce
from ..plan.bind import Binding
from .penalty import Penalty
from .push import NORMS, is_norm_weight, push, shrink

EPSILON = 1e-9  # Torch-Pruning's, below the root


class BNScaleRegularizer(Penalty):
    """Network slimming, added to the gradients of the scales of all batch norms: ``g += strength * sign(w)``.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    https://arxiv.org/abs/1708.06519. With ``group_lasso``: ``g += strength * w / n_c``, where
    ``n_c = sqrt(1e-9 + mean w_c^2)`` over the batch norms of the channel's group; only the scales of prunable
    channels are pushed then.

    Args:
        strength: at least 0; 1e-5 to 1e-3 are usual.
        group_lasso: push the scales of a group together.
        warmup, decoupled: see :class:`Penalty`; decoupled ``w -= lr * strength * sign(w)``.
    Raises:
        ConfigError: the strength is out of range.
    """

    def __init__(
        self, strength: float = 1e-5, group_lasso: bool = False, warmup: int = 0, decoupled: bool = False
    ) -> None:
        super().__init__(strength, warmup, decoupled)
        check_flag("group_lasso", group_lasso)
        self.group_lasso = group_lasso

    @torch.no_grad()
    def gamma(self, binding: Binding) -> Tensor:
        """``1 / n_c``: ``[N]``."""
        tally = book(binding, "norm scales", lambda m: is_norm_weight(m, *binding.owner(m.name)))
        squares = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=2.0) for t in tally.tiles])
        return (reduce_members(squares, tally.ledger, "mean") + EPSILON).rsqrt()

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        if self.group_lasso:
            push(binding, "norm scales", is_norm_weight, self._rates(binding, factor, where), only)
            return
        for weight, step in self._signs(binding, where):
            if only is None or id(weight) in only:
                weight.grad.add_(step, alpha=self.strength * factor)  # type: ignore[union-attr]

    def _shrink(self, binding: Binding, factor: float, lr: Mapping[int, float], where: Tensor | None) -> None:
        if self.group_lasso:
            shrink(binding, "norm scales", is_norm_weight, self._rates(binding, factor, where), lr)
            return
        for weight, step in self._signs(binding, where):
            weight.sub_(step, alpha=self.strength * factor * lr.get(id(weight), 0.0))

    def _rates(self, binding: Binding, factor: float, where: Tensor | None) -> Tensor:
        gamma = self.gamma(binding) * (self.strength * factor)
        return gamma if where is None else gamma * where

    def _signs(self, binding: Binding, where: Tensor | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The scales of batch norms that have a gradient, and the signs of those to push."""
        held = {} if where is None else _held(binding)
        for name, module in binding.model.named_modules():
            weight = module.weight if isinstance(module, NORMS) else None
            if weight is None or weight.grad is None:
                continue
            step = weight.sign()
            index = held.get(f"{name}.weight")
            if where is not None and index is not None:
                step *= where.to(step.device)[index.clamp_min(0)] | (index < 0)
            yield weight, step


def _held(binding: Binding) -> dict[str, Tensor]:
    """The channel of each scale of a batch norm, or a negative number, on its device; to fetch them waits for a GPU."""
    if "held scales" not in binding.derived:
        binding.derived["held scales"] = {
            m.name: torch.from_numpy(m.axes[0].channels).to(binding.tensors[m.name].device, torch.int64)
            for m in binding.plan.tensors
            if is_norm_weight(m, *binding.owner(m.name))
        }
    found: dict[str, Tensor] = binding.derived["held scales"]
    return found
