"""Which channels a model has and what they touch: trace, lower, bind."""

from .bind import Binding, bind
from .lower import build_plan
from .types import Axis, Frozen, Group, Plan, TensorMap

__all__ = ["Axis", "Binding", "Frozen", "Group", "Plan", "TensorMap", "bind", "build_plan"]
