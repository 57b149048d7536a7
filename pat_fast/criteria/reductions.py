"""Reductions: one score of a channel from the scores of its group's members."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from .ledger import Ledger, Order

Reduction = str | Callable[[Tensor], Tensor] | None
REDUCTIONS = ("sum", "mean", "max", "prod", "first", "gate")


def check_reduction(how: Reduction) -> None:
    """Raise :class:`ConfigError` unless ``how`` is a reduction that this module knows."""
    if how is not None and not callable(how) and how not in REDUCTIONS:
        hint = did_you_mean(how, REDUCTIONS) if isinstance(how, str) else ""
        raise ConfigError(
            f"group_reduction: expected one of {', '.join(REDUCTIONS)}, a function of scores [members, channels], or "
            f"None, got {how!r}{hint}"
        )


def reduce_rows(rows: Tensor, covers: Tensor, how: Reduction) -> Tensor:
    """The scores of one group's channels from its members: ``[channels]``.

    A member's score for a channel is the sum over all that the member holds of it: of a linear layer behind a
    flatten all positions, as of a convolution all taps of the kernel.

    Args:
        rows: ``[members, channels]``, 0 where a member does not hold a channel.
        covers: bool, of the same shape: where it does.
        how: ``"sum"``; ``"mean"``: over all members of the group; ``"max"`` and ``"prod"``: over the members
            that hold the channel; ``"first"`` and ``"gate"``: the first and the last member; a function of
            ``rows``; None: ``rows`` as they are.
    Raises:
        ConfigError: an unknown reduction, or a function that returns another shape.
    """
    check_reduction(how)
    if how is None:
        return rows
    if not isinstance(how, str):
        return _by_function(rows, how)
    if how in ("sum", "mean"):
        return rows.sum(0) / (len(rows) if how == "mean" else 1)
    if how == "max":
        return rows.masked_fill(~covers, -torch.inf).amax(0).masked_fill(~covers.any(0), 0.0)
    if how == "prod":
        return rows.masked_fill(~covers, 1.0).prod(0)
    return rows[0] if how == "first" else rows[-1]


def reduce_members(values: Tensor, ledger: Ledger, how: Reduction, order: Order | None = None) -> Tensor:
    """The scores of all channels: ``[N]``. As :func:`reduce_rows`, for the groups of a whole plan at once.

    Args:
        values: ``[indices]``, what each index of the ledger counts.
        order: the members of each group, for ``"first"``, ``"gate"`` and functions; by default the root's
            output comes first and the others follow as they are executed.
    Raises:
        ConfigError: ``how`` is unknown or None: a plan's channel has one score.
    """
    check_reduction(how)
    if how is None:
        raise ConfigError(
            "group_reduction=None keeps one score for each member, and a plan's channels have one score each; choose "
            f"one of {', '.join(REDUCTIONS)}, or call the importance on single groups"
        )
    if not isinstance(how, str):
        return _groups_by_function(values, ledger, how, order)
    if how in ("sum", "mean"):
        total = ledger.by_channel(values)
        return total / ledger.count if how == "mean" else total
    cells = ledger.by_cell(values)
    _, channel, member = ledger.cells
    if how in ("max", "prod"):
        found = values.new_full((ledger.n_channels,), 0.0 if how == "max" else 1.0)
        return found.scatter_reduce_(0, channel, cells, "amax" if how == "max" else "prod", include_self=how == "prod")
    chosen = torch.zeros(len(ledger.members), dtype=torch.bool)
    chosen[[of[0 if how == "first" else -1] for of in ledger.ordered(order) if of]] = True
    mine = chosen.to(member.device)[member]
    return values.new_zeros(ledger.n_channels).index_add_(0, channel[mine], cells[mine])


def _by_function(rows: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    found = how(rows)
    if not isinstance(found, Tensor) or found.shape != rows.shape[1:]:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"group_reduction: expected a function from {tuple(rows.shape)} (members, channels) to {rows.shape[1:]}, "
            f"got {got}"
        )
    return found


def _groups_by_function(values: Tensor, ledger: Ledger, how: Callable[[Tensor], Tensor], order: Order | None) -> Tensor:
    cells = ledger.by_cell(values)
    _, channel, member = ledger.cells
    found = values.new_zeros(ledger.n_channels)
    for group, of in zip(ledger.plan.groups, ledger.ordered(order), strict=True):
        if of:
            rows = values.new_zeros(len(of), group.channels)
            for row, number in zip(rows, of, strict=True):
                row[channel[member == number] - group.start] = cells[member == number]
            found[group.start : group.stop] = _by_function(rows, how)
    return found
