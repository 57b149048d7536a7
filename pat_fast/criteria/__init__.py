"""Importance criteria: a score for every channel of a bound plan, from one pass over the weights.

A criterion is built of four parts, each for the whole plan at once: ``channel_reduce`` sums over what belongs
to each index of each tensor, a :class:`Ledger` says which channel of which member that index is,
:func:`reduce_members` makes one number of a channel's members, :func:`normalize` makes groups comparable.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..plan.bind import Binding
from .group_norm import SCORED, GroupNorm, is_scored
from .ledger import Ledger
from .normalizers import NORMALIZERS, Normalizer, Segments, check_normalizer, normalize
from .reductions import REDUCTIONS, Reduction, check_reduction, reduce_members, reduce_rows

__all__ = [
    "NORMALIZERS",
    "REDUCTIONS",
    "SCORED",
    "Criterion",
    "GroupNorm",
    "Ledger",
    "Normalizer",
    "Reduction",
    "Segments",
    "check_normalizer",
    "check_reduction",
    "is_scored",
    "normalize",
    "reduce_members",
    "reduce_rows",
]


class Criterion(Protocol):
    """Anything that scores channels."""

    def score(self, binding: Binding) -> Tensor:
        """Importance of every channel: ``[N]``, on the model's device; less is pruned first."""
        ...
