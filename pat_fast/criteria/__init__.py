"""Importance criteria: a score for every channel of a bound plan, from one pass over the weights.

A criterion is built of four parts, each for the whole plan at once: ``channel_reduce`` sums over what belongs
to each index of each tensor, a :class:`Ledger` says which channel of which member that index is,
:func:`reduce_members` makes one number of a channel's members, :func:`normalize` makes groups comparable.
"""

from __future__ import annotations

from .activation import Activation
from .activation_taylor import ActivationTaylor
from .base import Criterion, MemberCriterion, Watching
from .cost_aware import MACAware
from .gradient import Hessian, Movement, Taylor
from .group_norm import SCORED, GroupNorm, is_scored
from .ledger import Ledger
from .magnitude import FPGM, LAMP, BNScale, Magnitude
from .normalizers import NORMALIZERS, Normalizer, Segments, check_normalizer, normalize
from .reductions import REDUCTIONS, Reduction, check_reduction, reduce_members, reduce_rows
from .registry import CRITERIA, checked_scores, make_criterion
from .simple import Function, Random

__all__ = [
    "CRITERIA",
    "FPGM",
    "LAMP",
    "NORMALIZERS",
    "REDUCTIONS",
    "SCORED",
    "Activation",
    "ActivationTaylor",
    "BNScale",
    "Criterion",
    "Function",
    "GroupNorm",
    "Hessian",
    "Ledger",
    "MACAware",
    "Magnitude",
    "MemberCriterion",
    "Movement",
    "Normalizer",
    "Random",
    "Reduction",
    "Segments",
    "Taylor",
    "Watching",
    "check_normalizer",
    "check_reduction",
    "checked_scores",
    "is_scored",
    "make_criterion",
    "normalize",
    "reduce_members",
    "reduce_rows",
]
