"""What an importance can do: score a whole plan at once, or one group at a time."""

from __future__ import annotations

from typing import Any

# How single groups are scored: a class that overrides one of these means groups, not plans.
_OF_GROUPS = ("__call__", "_reduce", "_normalize", "_lamp")
_OURS = __name__.partition(".")[0] + "."


def scores_plans(importance: Any) -> bool:
    """Whether ``importance.score(binding)`` gives what calling it on groups would.

    Not so for a class of the user's own that inherits ``score`` and overrides how single groups are scored.
    """
    if not callable(getattr(importance, "score", None)):
        return False
    line = type(importance).__mro__
    own = next((i for i, cls in enumerate(line) if "score" in vars(cls)), 0)
    theirs = (cls for cls in line[:own] if not cls.__module__.startswith(_OURS))
    return not any(name in vars(cls) for cls in theirs for name in _OF_GROUPS)


def only_reads(importance: Any) -> bool:
    """Whether scores are this package's own, which change nothing."""
    return type(importance).__module__.startswith(_OURS)


def depends_on_order(importance: Any) -> bool:
    """Whether it matters in which order a group's members come: ``score(binding, order)`` takes it then."""
    reduction = getattr(importance, "group_reduction", None)
    return reduction in ("first", "gate") or callable(reduction)
