"""What channels cost: multiply-accumulates, from the plan alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .plan.types import BoolArray, Kept, Plan


def channel_macs(plan: Plan, keep: BoolArray | None = None) -> NDArray[np.float64]:
    """MACs per example that go with each channel, all others as in ``keep [N]``: ``[N]``, 0 for channels gone.

    ``cost[c] = sum_terms scale * sum_axes n_a(c) * prod_(b != a) kept(b)``: the derivative of the work. For a channel
    in one axis of a term, exactly what its removal saves; in two (a layer that reads what it writes), too much by
    the product.
    """
    alive = np.ones(plan.n_channels, dtype=np.bool_) if keep is None else keep
    kept = Kept(alive)
    cost = np.zeros(plan.n_channels)
    for term in plan.work:
        sizes = [len(kept(axis)) for axis in term.axes]
        for place, axis in enumerate(term.axes):
            others = term.scale * math.prod(size for i, size in enumerate(sizes) if i != place)
            cost += others * np.bincount(axis[axis >= 0], minlength=plan.n_channels)
    return np.where(alive, cost / plan.batch, 0.0)
