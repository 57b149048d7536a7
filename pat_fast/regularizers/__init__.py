"""Sparsity regularisers: gradients that push unimportant channels towards zero before they are pruned.

Each has ``apply(binding, scale, where, only)``, which adds to the gradients that are there; decoupled ones shrink the
weights before the optimizer's step (``before_step``), proximal ones after it (``after_step``).
"""

from __future__ import annotations

from .bn_scale import BNScaleRegularizer
from .group_norm import GroupNormRegularizer
from .growing import GrowingRegularizer
from .penalty import Penalty
from .proximal import ProximalGroupLasso
from .push import REGULARIZED, Regularizer, is_regularized

__all__ = [
    "REGULARIZED",
    "BNScaleRegularizer",
    "GroupNormRegularizer",
    "GrowingRegularizer",
    "Penalty",
    "ProximalGroupLasso",
    "Regularizer",
    "is_regularized",
]
