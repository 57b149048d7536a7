"""The pruners: Torch-Pruning's classes and arguments over pat_fast's plan, scores and surgery."""

from __future__ import annotations

from .base_pruner import BasePruner
from .batchnorm_scale_pruner import BNScalePruner
from .compatibility import MagnitudePruner, MetaPruner
from .group_norm_pruner import GroupNormPruner
from .growing_reg_pruner import GrowingRegPruner

__all__ = ["BNScalePruner", "BasePruner", "GroupNormPruner", "GrowingRegPruner", "MagnitudePruner", "MetaPruner"]
