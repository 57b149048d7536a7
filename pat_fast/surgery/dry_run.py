"""The dry run: a copy that is a little smaller in every group must run; it finds shapes written in the code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import PlanError
from ..plan.bind import Binding
from ..plan.lower import call, output_tensors, undisturbed
from ..plan.types import BoolArray, Plan
from ..plan.verify import bisect, kinds
from .prune import prune


def dry_run(plan: Plan, model: nn.Module, example_inputs: Any) -> dict[int, str]:
    """Groups of ``plan`` that cannot shrink, with the error that says so; empty when all can.

    A copy of the model loses a few units of every group (not as many of each, so that widths which the code
    takes for equal come apart), then runs forward and backward; its outputs must have the shapes they had.
    Groups with units of several kinds have another turn for each kind. What fails is found by bisection. The
    model itself is not touched.
    """
    with undisturbed(model), torch.no_grad():
        shapes = [t.shape for t in output_tensors(call(model, example_inputs))]
    failures: dict[int, str] = {}
    spare = _spare_units(plan)
    for turn in range(max((len(units) for units in spare.values()), default=0)):
        units = {g: u[turn] for g, u in spare.items() if turn < len(u) and g not in failures}

        def keep_for(groups: Sequence[int], units: dict[int, list[int]] = units) -> BoolArray | None:
            return _without(plan, [u for g in groups for u in units[g]])

        def fails(groups: Sequence[int]) -> bool:
            keep = keep_for(groups)
            message = None if keep is None else _try(plan, model, example_inputs, keep, shapes)
            if message is not None and len(groups) == 1:
                failures[groups[0]] = message
            return message is not None

        able = [g for g in units if keep_for([g]) is not None]
        if keep_for(able) is None:  # groups that share an axis which cannot spare a channel of each
            able = [g for g in able if keep_for([h for h in able if h <= g]) is not None]
        if able and fails(able):
            for group in bisect(able, fails):
                failures.setdefault(group, "a forward fails when it shrinks together with others")
    return failures


def _spare_units(plan: Plan) -> dict[int, list[list[int]]]:
    """For each group that can shrink, a few units of each kind; the largest kind first."""
    alike: dict[int, int] = {}  # groups seen of each size: the next one loses one unit more
    found: dict[int, list[list[int]]] = {}
    for group, units in sorted(kinds(plan), key=lambda kind: -len(kind[1])):
        total = len(np.unique(plan.unit[plan.groups[group].start : plan.groups[group].stop]))
        spare = min(total - plan.least_units(plan.groups[group]), len(units), 1 + total // 4)
        if spare > 0:
            count = 1 + alike.setdefault(total, 0) % spare
            alike[total] += 1
            found.setdefault(group, []).append([int(plan.unit[channels[0]]) for channels in units[-count:]])
    return found


def _without(plan: Plan, units: list[int]) -> BoolArray | None:
    """Keep everything but ``units``; None if an axis cannot spare them."""
    keep = ~np.isin(plan.unit, units)
    try:
        plan.check_keep(keep)
    except PlanError:
        return None
    return keep


def _try(plan: Plan, model: nn.Module, inputs: Any, keep: BoolArray, shapes: list[torch.Size]) -> str | None:
    """The error of a copy with only the channels ``keep``, or None."""
    twin = copy.deepcopy(model)
    try:
        prune(Binding(plan, twin), keep)
        with undisturbed(twin):
            out = output_tensors(call(twin, inputs))
            loss = sum(t.float().sum() for t in out if t.grad_fn is not None)
            if isinstance(loss, torch.Tensor):
                loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if [t.shape for t in out] != shapes:
        return f"the output changes from {[tuple(s) for s in shapes]} to {[tuple(t.shape) for t in out]}"
    return None
