"""Building a plan that was put to the proof: what does not hold is frozen, by name."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from .plan import Plan
from .plan import build_plan as lower
from .plan.verify import verify as permutation_test
from .surgery.dry_run import dry_run


def build_plan(model: nn.Module, example_inputs: Any, verify: bool = True) -> Plan:
    """Trace ``model``, lower it to a plan, and let the plan prove itself.

    Two tests are made on copies of the model: the permutation test (channels that change places consistently
    must not move the output) and the dry run (the model that is one unit smaller in every group must run).
    Groups that fail are frozen with the reason; a note of the plan says what the tests cost.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments for one forward; small
            ones will do.
        verify: False skips the tests.
    Raises:
        PlanError: the forward fails on these inputs.
    """
    start = time.perf_counter()
    plan = lower(model, example_inputs)
    if not verify or not plan.groups:
        return plan
    lowered = time.perf_counter()
    try:
        found = permutation_test(plan, model, example_inputs)
        plan = plan.freeze(found.wrong, "its map does not hold: the output moves when its channels change places")
        for group, error in sorted(dry_run(plan, model, example_inputs).items(), reverse=True):
            plan = plan.freeze([group], f"the model does not run when it is smaller ({error})")
    except Exception as error:  # a model that cannot be copied, or not be run twice
        return _note(plan, f"the plan could not be verified ({type(error).__name__}: {error})")
    done = time.perf_counter()
    return _note(plan, f"traced in {lowered - start:.2f} s, verified in {done - lowered:.2f} s")


def _note(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))
