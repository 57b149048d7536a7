"""Growing regularisation: a strength for each channel that rises while training goes on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..criteria import Criterion, GroupNorm
from ..errors import PlanError, check, check_flag
from ..plan.bind import Binding
from ..plan.types import Plan
from .penalty import Penalty
from .push import push_layers, shrink_layers, without_nan_groups

EPSILON = 1e-8  # Torch-Pruning's


class GrowingRegularizer(Penalty):
    """A decay that grows, fastest for the least important: ``g += lambda_c * w``.

    ``lambda`` starts at ``strength`` for every channel, and each :meth:`grow` adds
    ``delta * (s_max - s_c) / (s_max - s_min + 1e-8)``, with the extremes of the scores s over the group. A weight
    gets the term of its output channel plus that of its input channel. Wang et al., "Neural Pruning via Growing
    Regularization", ICLR 2021, https://arxiv.org/abs/2012.09243.

    The strengths belong to the channels of a plan: after a prune, :meth:`shrink` keeps those of the channels
    that are left.

    Args:
        strength: at least 0, where every channel starts.
        delta: at least 0, what one :meth:`grow` adds for the least important channel of a group.
        criterion: what scores the channels; group magnitude (p = 2) by default.
        bias: push the biases of the same layers, too.
        warmup, decoupled: see :class:`Penalty`.
    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        strength: float = 1e-5,
        delta: float = 1e-5,
        criterion: Criterion | None = None,
        bias: bool = False,
        warmup: int = 0,
        decoupled: bool = False,
    ) -> None:
        super().__init__(strength, warmup, decoupled)
        check_flag("bias", bias)
        check("delta", delta, lambda v: 0 <= v < math.inf, "a number, at least 0")
        self.delta = delta
        self.criterion = criterion or GroupNorm(2.0)
        self.bias = bias
        self._grown: Tensor | None = None

    def strengths(self, binding: Binding) -> Tensor:
        """How hard each channel is pushed: ``[N]`` float32.

        Raises:
            PlanError: the strengths belong to another plan, one with more or fewer channels.
        """
        n = binding.plan.n_channels
        if self._grown is None:
            self._grown = torch.full((n,), float(self.strength), device=binding.device)
        self._grown = self._grown.to(binding.device)  # the model may have moved since, or they are from a file
        if len(self._grown) != n:
            raise PlanError(
                f"the grown strengths are those of {len(self._grown)} channels, the plan has {n}; call shrink(plan, "
                "keep) with each prune, or reset() to start anew"
            )
        return self._grown

    def reset(self) -> None:
        """Back to ``strength`` for every channel."""
        self._grown = None

    @torch.no_grad()
    def grow(self, binding: Binding) -> None:
        """Raise the strengths by the scores as they are now; groups without scores keep theirs."""
        now = self.strengths(binding)
        scores = self.criterion.score(binding)
        low, high = binding.over_groups(scores, "min"), binding.over_groups(scores, "max")
        place = (binding.spread(high) - scores) / binding.spread(high - low + EPSILON)
        self._grown = now + self.delta * without_nan_groups(binding, place).clamp(0.0, 1.0).to(now)

    def shrink(self, plan: Plan, keep: Tensor | NDArray[np.bool_]) -> None:
        """Keep the strengths of the channels that a prune leaves.

        Args:
            plan: of the model before the prune.
            keep: bool ``[N]``, as it was given to :func:`pat_fast.surgery.prune`.
        """
        if self._grown is not None:
            kept = keep.cpu().numpy() if isinstance(keep, Tensor) else keep
            movable = plan.movable(plan.check_keep(kept))
            self._grown = self._grown[torch.from_numpy(movable).to(self._grown.device)]

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        gamma = self.strengths(binding) * factor
        push_layers(binding, gamma if where is None else gamma * where, self.bias, only)

    def _shrink(self, binding: Binding, factor: float, lr: Mapping[int, float], where: Tensor | None) -> None:
        gamma = self.strengths(binding) * factor
        shrink_layers(binding, gamma if where is None else gamma * where, self.bias, lr)

    def state_dict(self) -> dict[str, Any]:
        """The grown strengths and the steps: ``{"grown": [N] or None, "steps": int}``."""
        return {"grown": None if self._grown is None else self._grown.clone(), **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._grown = None if state["grown"] is None else state["grown"].clone()
        super().load_state_dict(state)
