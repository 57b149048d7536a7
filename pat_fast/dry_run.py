"""The dry run: a copy that is a little smaller in every group must run; it finds shapes written in the code."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import PlanError, in_a_line
from .masks import Mask
from .plan.bind import Binding
from .plan.outputs import fixed_outputs
from .plan.running import call, undisturbed
from .plan.types import BoolArray, Kept, Plan, shrunk_shape
from .plan.verify import ANOTHER, COARSE, bisect, distance
from .surgery.modules import apply_changes, attribute_changes
from .surgery.prune import dense_strides, prune

SMALL = 256 * 2**20  # bytes of a model that is simply copied: fake tensors would take longer


def dry_run(
    plan: Plan, model: nn.Module, example_inputs: Any, shapes: list[torch.Size], training: bool = False
) -> dict[int, str]:
    """Groups of ``plan`` that cannot shrink, with the error that says so; empty when all can.

    A copy of the model loses a few units of every group (not as many of each, so that widths which the code
    takes for equal come apart), then runs forward and backward; its outputs must have ``shapes``, those of the
    model's. A large model's copy has shapes and no memory, unless the model's code looks at values. Groups with
    units of several kinds have another turn for each kind. What fails is found by bisection. A small model's copy
    must also compute what the model computes with these channels at zero, where no statistic tells the two apart.
    The model itself is not touched. ``training``: the branches that the model's code takes in training are run.
    """
    failures: dict[int, str] = {}
    trial = _Trial(plan, model, example_inputs, shapes, training)
    spare = _spare_units(plan)
    exact = {g for g in spare if plan.groups[g].statistic is None}
    rounds = max((len(units) for units in spare.values()), default=0)
    # Groups that take part in no statistic have rounds of their own, in which they are held against the masked model.
    for turn, among in product(range(rounds), [exact, set(spare)][exact == set(spare) :]):
        units = {g: u[turn] for g, u in spare.items() if turn < len(u) and g in among and g not in failures}

        def keep_for(groups: Sequence[int], units: dict[int, list[int]] = units) -> BoolArray | None:
            return _without(plan, [u for g in groups for u in units[g]])

        def fails(groups: Sequence[int]) -> bool:
            keep = keep_for(groups)
            message = None if keep is None else trial.error(keep)
            if message is not None and len(groups) == 1:
                failures[groups[0]] = message
            return message is not None

        able = list(units)
        if keep_for(able) is None:  # groups that share an axis which cannot spare a channel of each
            able = [g for g in able if keep_for([g]) is not None]
            able = [g for g in able if keep_for([h for h in able if h <= g]) is not None]
        while able and fails(able):
            guilty = bisect(able, fails)
            for group in guilty:
                failures.setdefault(group, "a forward fails when it shrinks together with others")
            able = [g for g in able if g not in guilty]
    return failures


def _spare_units(plan: Plan) -> dict[int, list[list[int]]]:
    """For each group that can shrink, a few units of each kind; the largest kind first."""
    alike: dict[int, int] = {}  # groups seen of each size: the next one loses one unit more
    found: dict[int, list[list[int]]] = {}
    for group, units in sorted(plan.kinds, key=lambda kind: -len(kind[1])):
        total = len(np.unique(plan.unit[plan.groups[group].start : plan.groups[group].stop]))
        spare = min(total - plan.least_units(plan.groups[group]), len(units), 1 + total // 4)
        if spare > 0:
            step = plan.unit_step(plan.groups[group])
            count = 1 + alike.setdefault(total, 0) % spare
            alike[total] += 1
            count = -(-count // step) * step
            if count > min(total - plan.least_units(plan.groups[group]), len(units)):
                continue
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


class _Trial:
    """Runs smaller copies of a model."""

    def __init__(
        self, plan: Plan, model: nn.Module, inputs: Any, shapes: list[torch.Size], training: bool
    ) -> None:
        self.plan, self.model, self.inputs, self.shapes, self._training = plan, model, inputs, shapes, training
        self.backward = True  # until the model itself is found not to have one, in eval mode
        size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        self.fake = size > SMALL
        self._dense = np.ones(plan.n_channels, dtype=np.bool_)
        self._checked = False

    def error(self, keep: BoolArray) -> str | None:
        """What is wrong with a copy that has only the channels ``keep``, or None."""
        found = self._run(keep)
        if isinstance(found, str) and not self._checked:
            self._adapt()
            found = self._run(keep)
        if isinstance(found, str):
            return found
        if found != self.shapes:
            return f"the output changes from {[tuple(s) for s in self.shapes]} to {[tuple(s) for s in found]}"
        return None

    def _adapt(self) -> None:
        """Do not blame a prune for what the model as it is cannot do: run without memory, or backward in eval mode."""
        self._checked = True
        if self.fake and isinstance(self._run(self._dense), str):
            self.fake = False
        if isinstance(self._run(self._dense), str):
            self.backward = False

    def _run(self, keep: BoolArray) -> str | list[torch.Size]:
        """Forward and backward of a smaller copy: the shapes of its outputs, or its error."""
        mode = FakeTensorMode(allow_non_fake_inputs=True) if self.fake else nullcontext()
        with mode:  # a model that cannot be copied is no fault of what is pruned: that error is not caught here
            twin = _shapes_only(self.plan, self.model, keep) if self.fake else copied(self.model, {})
        try:
            with mode:
                expected = None if self.fake else self._masked(twin, keep)
                with undisturbed(twin, self._training):
                    out = fixed_outputs(call(twin, self.inputs))
                    loss = sum(t.float().sum() for t in out if t.grad_fn is not None)
                    if isinstance(loss, torch.Tensor) and self.backward:
                        loss.backward()
            if expected is not None and distance(expected, [t.detach() for t in out]) > COARSE:
                return ANOTHER
            return [t.shape for t in out]
        except Exception as error:
            return in_a_line(error)

    def _masked(self, twin: nn.Module, keep: BoolArray) -> list[torch.Tensor] | None:
        """Prune ``twin``; its outputs with the channels at zero instead, unless a statistic tells these apart."""
        plan, expected = self.plan, None
        binding = Binding(plan, twin)
        gone = np.unique(plan.group_of[~keep])
        if gone.size and not any(plan.groups[g].statistic for g in gone):
            Mask(binding).set(torch.from_numpy(keep), [])
            with undisturbed(twin, self._training), torch.no_grad():
                expected = [t.detach().clone() for t in fixed_outputs(call(twin, self.inputs))]
        prune(binding, keep)
        return expected


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; of tensors that were computed (what a weight norm's hook leaves on a module) the values alone.

    ``copy.deepcopy`` refuses these. A forward of the copy computes them anew.
    """
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _shapes_only(plan: Plan, model: nn.Module, keep: BoolArray) -> nn.Module:
    """A copy whose tensors have shapes but no memory, with only the channels ``keep``."""
    kept = Kept(keep)
    shapes = {t.name: shrunk_shape(t, t.kept(kept)) for t in plan.tensors}
    memo: dict[int, Any] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        shape = shapes.get(name, tuple(tensor.shape))
        strides = dense_strides(shape, tensor.stride())
        empty = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
    twin = copied(model, memo)
    apply_changes(attribute_changes(Binding(plan, model), kept, twin), [])
    return twin
