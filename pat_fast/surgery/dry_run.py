"""The dry run: a copy that is a little smaller in every group must run; it finds shapes written in the code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import PlanError
from ..plan.bind import Binding
from ..plan.lower import call, output_tensors, undisturbed
from ..plan.types import BoolArray, Kept, Plan, shrunk_shape
from ..plan.verify import bisect
from .modules import apply_changes, attribute_changes
from .prune import dense_strides, prune

SMALL = 256 * 2**20  # bytes of a model that is simply copied: fake tensors would take longer


def dry_run(plan: Plan, model: nn.Module, example_inputs: Any, shapes: list[torch.Size]) -> dict[int, str]:
    """Groups of ``plan`` that cannot shrink, with the error that says so; empty when all can.

    A copy of the model loses a few units of every group (not as many of each, so that widths which the code
    takes for equal come apart), then runs forward and backward; its outputs must have ``shapes``, those of the
    model's. A large model's copy has shapes and no memory, unless the model's code looks at values. Groups with
    units of several kinds have another turn for each kind. What fails is found by bisection. The model itself is
    not touched.
    """
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

        able = list(units)
        if keep_for(able) is None:  # groups that share an axis which cannot spare a channel of each
            able = [g for g in able if keep_for([g]) is not None]
            able = [g for g in able if keep_for([h for h in able if h <= g]) is not None]
        if able and fails(able):
            for group in bisect(able, fails):
                failures.setdefault(group, "a forward fails when it shrinks together with others")
    return failures


def _spare_units(plan: Plan) -> dict[int, list[list[int]]]:
    """For each group that can shrink, a few units of each kind; the largest kind first."""
    alike: dict[int, int] = {}  # groups seen of each size: the next one loses one unit more
    found: dict[int, list[list[int]]] = {}
    for group, units in sorted(plan.kinds, key=lambda kind: -len(kind[1])):
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
    small = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) <= SMALL
    found = _run(lambda: _shapes_only(plan, model, keep), inputs, fake=True) if not small else ""
    if small or (isinstance(found, str) and _looks_at_values(plan, model, inputs)):
        found = _run(lambda: _smaller_copy(plan, model, keep), inputs, fake=False)
    if isinstance(found, str):
        return found
    if found != shapes:
        return f"the output changes from {[tuple(s) for s in shapes]} to {[tuple(s) for s in found]}"
    return None


def _looks_at_values(plan: Plan, model: nn.Module, inputs: Any) -> bool:
    """Whether the model's code needs more than shapes: then a copy without memory does not run even unchanged."""
    return isinstance(_run(lambda: _shapes_only(plan, model, None), inputs, fake=True), str)


def _run(make: Callable[[], nn.Module], inputs: Any, fake: bool) -> str | list[torch.Size]:
    """Forward and backward of the model that ``make`` gives: the shapes of its outputs, or its error."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            twin = make()
            with undisturbed(twin):
                out = output_tensors(call(twin, inputs))
                loss = sum(t.float().sum() for t in out if t.grad_fn is not None)
                if isinstance(loss, torch.Tensor):
                    loss.backward()
            return [t.shape for t in out]
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _shapes_only(plan: Plan, model: nn.Module, keep: BoolArray | None) -> nn.Module:
    """A copy whose tensors have shapes but no memory, with only the channels ``keep``."""
    kept = Kept(np.ones(plan.n_channels, dtype=np.bool_) if keep is None else keep)
    shapes = {t.name: shrunk_shape(t, t.kept(kept)) for t in plan.tensors}
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shape = shapes.get(name, tuple(tensor.shape))
        strides = dense_strides(shape, tensor.stride())
        empty = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    twin = copy.deepcopy(model, memo)
    apply_changes(attribute_changes(Binding(plan, model), kept, twin), [])
    return twin


def _smaller_copy(plan: Plan, model: nn.Module, keep: BoolArray) -> nn.Module:
    twin = copy.deepcopy(model)
    prune(Binding(plan, twin), keep)
    return twin
