"""Building a plan that was put to the proof: what does not hold is frozen, by name."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .dry_run import dry_run
from .errors import PlanError, check_flag, check_model, in_a_line
from .plan import Plan
from .plan import build_plan as lower
from .plan.double import in_single
from .plan.named import Named
from .plan.running import Still, call
from .plan.verify import ANOTHER
from .plan.verify import verify as permutation_test
from .rehearsal import failure, rehearse
from .surgery.modules import check_registered
from .surgery.undo import uncollected
from .turns import plainly

SIDES = {4: 64, 5: 16}  # pixels of images and volumes, by the dimensions of their tensors
TOKENS = 16


@plainly()
def build_plan(model: nn.Module, example_inputs: Any, verify: bool = True) -> Plan:
    """Trace ``model``, lower it to a plan, and let the plan prove itself.

    Two things are tested: channels that change places consistently must not move the output, and a copy that is
    smaller in every group must run, and compute what the model does with these channels at zero. All groups are
    tested at once (:func:`~pat_fast.rehearsal.rehearse`); if that fails, the permutation test and the dry run find the
    groups at fault, which are frozen with the reason. A plan that cannot be tested is returned with a warning and a
    note, which every report of a prune repeats. The tests take images and sequences cropped to a few pixels or
    steps where the model accepts that: maps do not depend on it. A note of the plan says what they cost.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward; small
            ones will do.
        verify: False skips the tests.
    Raises:
        PlanError: the forward fails on these inputs.
        ConfigError: ``model`` is no module, or ``verify`` neither True nor False.
    """
    check_model(model)
    check_flag("verify", verify)
    check_registered(model)
    start = time.perf_counter()
    # A trace holds on to what it makes, and little of that is in cycles: collecting finds nothing and takes a while.
    with uncollected():
        still = Still(model)
        plan = lower(model, example_inputs, still)
    traced = f"traced in {time.perf_counter() - start:.2f} s, "
    return _proven(plan, model, example_inputs, still, traced) if verify and plan.groups else plan


@plainly()
def prove(plan: Plan, model: nn.Module, example_inputs: Any) -> Plan:
    """See :meth:`Plan.verify`."""
    check_model(model)
    still = Still(model)
    Named(plan, model, still)  # the tensors that it names are there
    try:
        with still.running(), torch.no_grad():
            call(model, example_inputs)
    except Exception as error:
        raise PlanError(f"the model's forward fails on the example inputs: {in_a_line(error)}") from error
    still.compares, still.trains_more = True, bool(still.in_training)  # no trace has seen that it does not
    return _proven(plan, model, example_inputs, still, "")


Plan._prove = staticmethod(prove)


@in_single()
def _proven(plan: Plan, model: nn.Module, example_inputs: Any, still: Still, traced: str) -> Plan:
    start = time.perf_counter()
    smaller = smaller_inputs(example_inputs)
    with uncollected():
        at_once = rehearse(plan, model, example_inputs, smaller, still=still)
    try:
        if not at_once:
            plan = _found_out(plan, model, example_inputs, smaller)
            if still.trains_more:
                plan = _found_out(plan, model, example_inputs, smaller, training=True)
    except Exception as error:  # a model that cannot be copied, or not be run twice
        why = f"the plan could not be verified ({type(error).__name__}: {error})"
        warnings.warn(
            f"{why}; if its maps are wrong, what is pruned is wrong: compare outputs before and after a prune, or keep "
            "layers with ignored_layers=",
            stacklevel=5,  # past two decorators: who called build_plan or Plan.verify
        )
        return _note(plan, why)
    how = "" if at_once else ", group by group"
    return _note(plan, f"{traced}verified in {time.perf_counter() - start:.2f} s{how}")


def _found_out(plan: Plan, model: nn.Module, example_inputs: Any, smaller: Any, training: bool = False) -> Plan:
    """``plan`` with the groups frozen that fail one of the two tests; ``training``: in the model's branches of it.

    Where these draw random numbers, there is nothing to compare.
    """
    inputs, drawn = _taken(model, example_inputs, smaller, training)
    if not drawn:
        found = permutation_test(plan, model, inputs, training=training)
        plan = plan.freeze(found.wrong, "its map does not hold: the output moves when its channels change places")
        failures = dry_run(plan, model, inputs, found.shapes, training)
        for group, error in sorted(failures.items(), reverse=True):
            plan = plan.freeze([group], _reason(error, ""))
    return _without_culprits(plan, model, inputs, training)


def _without_culprits(plan: Plan, model: nn.Module, example_inputs: Any, training: bool) -> Plan:
    """``plan`` with as many groups as can be smaller at the same time; those are frozen that fail only with others."""
    every = range(len(plan.groups))
    able: list[int] = []
    wrong: dict[int, str] = {}

    def admit(groups: list[int]) -> None:
        trial = {*able, *groups}
        fewer = plan.freeze([g for g in every if g not in trial], "")
        error = failure(fewer, model, example_inputs, training=training)
        if error is None:
            able.extend(groups)
        elif len(groups) == 1:
            wrong[groups[0]] = error
        else:
            half = len(groups) // 2
            admit(groups[:half])
            admit(groups[half:])

    admit(list(every))
    for group, error in sorted(wrong.items(), reverse=True):
        plan = plan.freeze([group], _reason(error, " together with others"))
    return plan


def _reason(error: str, how: str) -> str:
    return error if error == ANOTHER else f"the model does not run when it is smaller{how} ({error})"


def smaller_inputs(example_inputs: Any) -> Any:
    """``example_inputs`` with at most two examples and short sides; None if they are no larger than that."""
    cropped: list[Tensor] = []

    def crop(value: Any) -> Any:
        smaller = _crop(value)
        if smaller is not value and smaller.shape != value.shape:
            cropped.append(smaller)
        return smaller

    try:
        smaller = _map(crop, example_inputs)
    except Exception:  # a tensor of a kind that cannot be cut: it is taken as it is
        return None
    return smaller if cropped else None


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """As ``tree_map``, which takes a while to find out what plain tuples and dicts are."""
    if type(value) in (tuple, list):
        return type(value)([_map(change, v) for v in value])
    if type(value) is dict:
        return {key: _map(change, v) for key, v in value.items()}
    return change(value) if isinstance(value, Tensor) else tree_map(change, value)


def _taken(model: nn.Module, example_inputs: Any, smaller: Any, training: bool) -> tuple[Any, bool]:
    """``smaller`` if ``model`` takes it, else ``example_inputs``; and whether its branches of training draw numbers."""
    for inputs in [smaller] * (smaller is not None) + [example_inputs] * training:
        try:
            still = Still(model)
            with still.running(training), torch.no_grad():
                before = still.random_states()
                call(model, inputs)
                return inputs, training and still.has_drawn(before)
        except Exception:
            continue
    return example_inputs, False


def _crop(value: Any) -> Any:
    """At most two examples; of images and volumes a corner, of token sequences the beginning."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.is_floating_point():
        sides = [slice(None)] + [slice(SIDES.get(value.ndim))] * (value.ndim - 2)
    else:
        sides = [slice(TOKENS)] * (value.ndim - 1)
    where = (slice(2), *sides[: value.ndim - 1])
    return value[where]


def _note(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))
