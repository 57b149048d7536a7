"""Importance traded against what a channel costs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cost import channel_macs
from ..errors import ConfigError, check
from ..plan.bind import Binding
from ..plan.types import Plan
from .accumulator import Accumulator
from .base import Criterion, Watching, check_choice
from .history import History

MIXES = ("product", "sum")


class MACAware(Watching):
    """Another criterion's score s against the share of MACs that goes with a channel.

    With ``k_c`` the MACs of the channel (:func:`pat_fast.cost.channel_macs`) over their mean over all living
    channels, the mean of a unit's channels for each of them:

    - ``how="product"``: ``score[c] = s_c / k_c ^ weight``, importance per cost, as the greedy solution of a knapsack;
    - ``how="sum"``: ``score[c] = s_c / mean|s| - weight * k_c``; Molchanov et al., "Pruning Convolutional Neural
      Networks for Resource Efficient Inference", ICLR 2017, section 2.2, https://arxiv.org/abs/1611.06440; Theis et
      al., 2018, https://arxiv.org/abs/1801.05787.

    Costs are those of the model as it is at each prune. A channel without any work keeps its score. With
    ``weight=0`` the ranking is that of the criterion.

    Args:
        criterion: what scores the channels.
        weight: at least 0.
        how: ``"product"`` or ``"sum"``.
    Raises:
        ConfigError: a value out of range, or ``"product"`` with scores that may be negative: dividing by a cost
            would move those of dear channels up.
    """

    def __init__(self, criterion: Criterion, weight: float = 1.0, how: str = "product") -> None:
        check("weight", weight, lambda v: 0 <= v < math.inf, "a number, at least 0")
        check_choice("how", how, MIXES)
        if not callable(getattr(criterion, "score", None)):
            raise ConfigError(f"criterion: expected an object with score(binding), got {criterion!r}")
        negative = getattr(criterion, "signed", False) or getattr(criterion, "normalizer", None) == "gaussian"
        if how == "product" and negative:
            raise ConfigError(
                f"how: expected 'sum' with {type(criterion).__name__}, whose scores may be negative, got 'product': "
                "divided by its cost, a dear channel with a negative score would be kept"
            )
        self.criterion = criterion
        self.weight = weight
        self.how = how

    @torch.no_grad()
    def score(self, binding: Binding) -> Tensor:
        """Scores ``[N]``."""
        scores = self.criterion.score(binding)
        cost = self._cost(binding).to(scores)
        if self.how == "product":
            return scores / cost.where(cost > 0, torch.ones_like(cost)) ** self.weight
        known = scores.isfinite() if binding.alive is None else scores.isfinite() & binding.alive
        size = scores[known].abs().mean() if bool(known.any()) else scores.new_ones(())
        return scores / size.where(size > 0, torch.ones_like(size)) - self.weight * cost

    def _cost(self, binding: Binding) -> Tensor:
        """``k [N]``."""
        plan = binding.plan
        alive = None if binding.alive is None else binding.alive.cpu().numpy()
        macs = channel_macs(plan, alive)
        units = np.bincount(plan.unit, macs, plan.n_units) / np.bincount(plan.unit, minlength=plan.n_units)
        macs = units[plan.unit]
        mean = macs.mean() if alive is None else macs[alive].mean()
        return torch.from_numpy(macs / mean if mean > 0 else np.zeros_like(macs))

    # The criterion inside watches the training.

    @property
    def _inner(self) -> Watching:
        return self.criterion if isinstance(self.criterion, Watching) else Watching()

    @property
    def histories(self) -> Sequence[History]:  # type: ignore[override]
        """Those of the criterion."""
        return self._inner.histories

    @property
    def accumulators(self) -> Sequence[Accumulator]:  # type: ignore[override]
        """Those of the criterion."""
        return self._inner.accumulators

    def observe(self, binding: Binding, scale: float = 1.0, only: Collection[int] | None = None) -> None:
        """See :class:`Watching`."""
        self._inner.observe(binding, scale, only)

    def attach(self, binding: Binding) -> None:
        """See :class:`Watching`."""
        self._inner.attach(binding)

    def detach(self) -> None:
        """See :class:`Watching`."""
        self._inner.detach()

    def shrink(self, plan: Plan, keep: Tensor | NDArray[np.bool_]) -> None:
        """See :class:`Watching`."""
        self._inner.shrink(plan, keep)

    def reset(self) -> None:
        """See :class:`Watching`."""
        self._inner.reset()

    def state_dict(self, binding: Binding) -> dict[str, Any]:
        """See :class:`Watching`."""
        return self._inner.state_dict(binding)

    def load_state_dict(self, state: dict[str, Any], binding: Binding) -> None:
        """See :class:`Watching`."""
        self._inner.load_state_dict(state, binding)
