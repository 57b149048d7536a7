"""What a pruner gathers while it prunes: it shrinks with the model, and is saved and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from .criteria import Criterion, Watching
from .errors import ConfigError, PlanError
from .modes import Mode
from .plan import Binding, Plan
from .plan.types import Kept
from .regularizers import GrowingRegularizer, Penalty, Regularizer
from .resume import fit, structure_of
from .stability import Steady
from .surgery.undo import remember
from .targets import Goal

VERSION = 2


@dataclass
class State:
    """The parts of a pruner that last between its steps."""

    goal: Goal
    mode: Mode
    steady: Steady
    criterion: Criterion
    watching: Watching
    regularizer: Regularizer | None
    unscored: tuple[str, ...] = ()  # groups that the criterion cannot score

    def grow(self, binding: Binding) -> None:
        """Let a regulariser that grows with the steps do so."""
        if isinstance(self.regularizer, GrowingRegularizer):
            self.regularizer.grow(binding)

    def note_scores(self, plan: Plan, scores: NDArray[np.float64]) -> None:
        """Note which groups have no score in ``scores [N]``."""
        self.unscored = tuple(g.root for g in plan.groups if np.isposinf(scores[g.start : g.stop]).all())

    def notes(self, plan: Plan) -> list[str]:
        """What a report is to say of the parts."""
        unscored = [f"{type(self.criterion).__name__} has no score for {root}: it stays" for root in self.unscored]
        return [*plan.notes, *self.goal.notes, *unscored, *self.mode.notes(plan), *self.steady.notes(plan)]

    @contextmanager
    def shrunk(self, before: Binding, after: Binding, keep: NDArray[np.bool_]) -> Iterator[None]:
        """Follow a prune that kept the channels ``keep [N]`` of ``before``; as it was if this or the block fails."""
        growing = [self.regularizer] if isinstance(self.regularizer, GrowingRegularizer) else []
        forget = remember([*self.watching.histories, *growing, self.mode, self.steady.settling])
        try:
            self.watching.shrink(before.plan, keep)
            for regularizer in growing:
                regularizer.shrink(before.plan, keep)
            self.mode.attach(after)
            self.steady.settling.shrink(before.plan.movable(Kept(keep)))
            yield
        except BaseException:
            forget()
            raise

    def save(self, binding: Binding) -> dict[str, Any]:
        """What :meth:`load` takes up; tensors are copies."""
        return {
            "version": VERSION,
            "structure": structure_of(binding.model),
            "channels": binding.plan.n_channels,
            "goal": self.goal.state_dict(),
            "mode": self.mode.state_dict(),
            "stability": self.steady.state_dict(),
            "criterion": self.watching.state_dict(binding),
            "regularizer": self.regularizer.state_dict() if isinstance(self.regularizer, Penalty) else None,
        }

    def load(self, state: Mapping[str, Any], binding: Binding, optimizers: Callable[[], list[Optimizer]]) -> None:
        """Take up what :meth:`save` gave, on a model of the same shapes.

        Raises:
            PlanError: the model has other channels than the one that was saved.
            ConfigError: the state is of another mode.
        """
        if state["channels"] != binding.plan.n_channels:
            raise PlanError(
                f"the state is of a model with {state['channels']} prunable channels, this one has "
                f"{binding.plan.n_channels}; load the pruned model first (pat.load)"
            )
        self.mode.load_state_dict(state["mode"], optimizers)
        self.steady.load_state_dict(state["stability"])
        self.watching.load_state_dict(state["criterion"], binding)
        if isinstance(self.regularizer, Penalty) and state["regularizer"] is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        self.goal.load_state_dict(state["goal"])


def fit_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a dense model the shapes that it had when ``state`` was saved.

    Raises:
        CheckpointError: the state is of another model.
        ConfigError: the state is of another version.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"state: expected what state_dict() gave, got {type(state).__name__}")
    if state.get("version") != VERSION:
        raise ConfigError(
            f"state: expected version {VERSION}, got {state.get('version')!r}; load it with the pat_fast that saved it"
        )
    if "structure" in state:
        fit(model, state["structure"])
