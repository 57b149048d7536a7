"""Modes: what becomes of the channels that the pruner does without. One strategy each; the pruner orchestrates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import ConfigError, check_count, check_flag, named_options
from .masks import Mask, zero_filters
from .plan.bind import Binding
from .plan.types import Plan
from .schedules import OneShot, Schedule

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Optimizers = Callable[[], Iterable[Optimizer]]  # looked for when they are needed


class Mode:
    """What becomes of the channels that go.

    A mode belongs to one pruner, which tells it of every new binding (:meth:`attach`), asks it for what selection may
    choose from (:meth:`candidates`), and hands it the choice (:meth:`cut`). A mode changes values; shrinking the model
    is left to the pruner, which does it when a mode says what to keep.
    """

    name: str
    shrinks: bool  # while the pruning goes on, not only when it ends
    binding: Binding
    mask: Mask | None = None  # of channels that are held at zero
    copies: Callable[[], Iterable[nn.Module]] = tuple  # averages of the model, from which the same channels go

    def check_beside(self, schedule: Schedule) -> None:
        """Raise :class:`ConfigError` if this mode makes no sense with ``schedule``."""

    def attach(self, binding: Binding) -> None:
        """Start on a model, or go on after it shrank."""
        self.binding = binding

    def due(self, step: int) -> bool:
        """Whether :meth:`cut` shrinks the model at this step even if no prune is due."""
        return False

    def left(self) -> BoolArray:
        """Channels of the plan that count as left: bool ``[N]``."""
        return np.ones(self.binding.plan.n_channels, dtype=np.bool_)

    def candidates(self, scores: FloatArray) -> tuple[FloatArray, BoolArray]:
        """Scores ``[N]`` to rank by (``-inf``: gone for good), and bool ``[N]``, the channels that are not gone."""
        alive = self.left()
        return np.where(alive, scores, -np.inf), alive

    def cut(self, keep: BoolArray | None, step: int, done: bool, optimizers: Optimizers) -> BoolArray | None:
        """Do without the channels ``~keep [N]`` (None: no prune is due at this step).

        Args:
            step: the number of this step.
            done: whether the target is reached.
            optimizers: of the model.
        Returns:
            The channels to keep if the model is to shrink now, else None.
        Raises:
            PlanError: ``keep`` is not possible; nothing was changed.
            SurgeryError: an optimizer keeps state of unknown layout; nothing was changed.
        """
        raise NotImplementedError

    def finish(self) -> BoolArray | None:
        """The channels to keep when pruning ends, if any are still to be removed."""
        keep = self.left()
        return None if keep.all() else keep

    def notes(self, plan: Plan) -> list[str]:
        """What a report is to say of this mode."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; tensors are copies."""
        return {"name": self.name}

    def load_state_dict(self, state: Mapping[str, Any], optimizers: Optimizers) -> None:
        """Take up what :meth:`state_dict` gave, of a model of the same channels.

        Raises:
            ConfigError: it was saved in another mode.
        """
        if state["name"] != self.name:
            raise ConfigError(f"mode: the state was saved with {state['name']!r}, expected {self.name!r}")


class Prune(Mode):
    """``"prune"``: channels leave the model at each step."""

    name = "prune"
    shrinks = True

    def cut(self, keep: BoolArray | None, step: int, done: bool, optimizers: Optimizers) -> BoolArray | None:
        return None if keep is None or keep.all() else keep


class HardMask(Mode):
    """``"mask"``: channels are held at zero, for good, and removed at the end; shapes stay until then.

    Args:
        shrink: remove them as soon as the target is reached, not only at ``finalize()``.
    """

    name = "mask"
    shrinks = False

    def __init__(self, shrink: bool = False) -> None:
        check_flag("mode: shrink", shrink)
        self.shrink = shrink

    def attach(self, binding: Binding) -> None:
        super().attach(binding)
        self.mask = Mask(binding)

    def left(self) -> BoolArray:
        assert self.mask is not None
        return self.mask.alive.cpu().numpy()

    def cut(self, keep: BoolArray | None, step: int, done: bool, optimizers: Optimizers) -> BoolArray | None:
        if keep is not None and (keep != self.left()).any():
            self._hold(keep, optimizers)
        return self.finish() if done and self.shrink else None

    def notes(self, plan: Plan) -> list[str]:
        roots = [g.root for g in plan.groups if g.statistic and not g.statistic.startswith("weight norm")]
        if not roots:
            return []
        shown = ", ".join(roots[:4]) + (f" and {len(roots) - 4} more" if len(roots) > 4 else "")
        return [
            f"a norm takes statistics over masked channels: the model changes when they are removed (groups {shown})"
        ]

    def state_dict(self) -> dict[str, Any]:
        assert self.mask is not None
        return super().state_dict() | {"alive": self.mask.alive.clone()}

    def load_state_dict(self, state: Mapping[str, Any], optimizers: Optimizers) -> None:
        super().load_state_dict(state, optimizers)
        assert self.mask is not None
        if self.mask.is_active or not bool(state["alive"].all()):  # else what was saved had no mask set either
            self.mask.set(state["alive"], optimizers(), self.copies())

    def _hold(self, keep: BoolArray, optimizers: Optimizers) -> None:
        assert self.mask is not None
        self.binding.plan.check_keep(keep)
        self.mask.set(torch.from_numpy(keep), optimizers(), self.copies())


class Hybrid(HardMask):
    """``"hybrid"``: channels are held at zero for some steps and then removed, all that wait together.

    What a shrink costs (new tensors, another compilation) is paid once in so many steps. What waits when the target is
    reached is removed at once.

    Args:
        steps: at least 1, from the first mask since the last shrink to the shrink; 5 by default.
    """

    name = "hybrid"
    shrinks = True

    def __init__(self, steps: int = 5) -> None:
        super().__init__(shrink=True)
        check_count("mode: steps", steps, 1)
        self.steps = steps
        self.since: int | None = None  # the step of the first mask that waits

    def attach(self, binding: Binding) -> None:
        super().attach(binding)
        self.since = None

    def due(self, step: int) -> bool:
        return self.since is not None and step - self.since >= self.steps

    def cut(self, keep: BoolArray | None, step: int, done: bool, optimizers: Optimizers) -> BoolArray | None:
        removed = super().cut(keep, step, done, optimizers)
        assert self.mask is not None
        if self.since is None and self.mask.is_active:
            self.since = step
        return self.finish() if self.due(step) else removed

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"since": self.since}

    def load_state_dict(self, state: Mapping[str, Any], optimizers: Optimizers) -> None:
        super().load_state_dict(state, optimizers)
        self.since = state["since"]


class SoftMask(HardMask):
    """``"soft"``: the filters of masked channels are zeroed at each prune, and go on learning in between.

    All channels are ranked anew at every prune, so what has grown back may stay and others go in its place. Filters and
    biases that make the channels are zeroed; norms, optimizer state and what reads the channels are not: through them a
    channel comes back. When the target is reached the last choice is held, as by ``"mask"``, until it is removed.
    He et al., "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks", IJCAI 2018,
    https://arxiv.org/abs/1808.06866.

    Args:
        shrink: remove them as soon as the target is reached, not only at ``finalize()``.
    """

    name = "soft"

    def __init__(self, shrink: bool = False) -> None:
        super().__init__(shrink)
        self._chosen: BoolArray | None = None  # bool [N]; the last choice, while it is not held
        self._returned = 0

    def check_beside(self, schedule: Schedule) -> None:
        if isinstance(schedule.function, OneShot):
            raise ConfigError(
                "mode: 'soft' expects several prunes, between which channels may return, and 'one_shot' prunes once; "
                "choose schedule='constant', or mode='mask'"
            )

    def attach(self, binding: Binding) -> None:
        super().attach(binding)
        self._chosen = None

    def left(self) -> BoolArray:
        return super().left() if self._chosen is None else self._chosen

    def candidates(self, scores: FloatArray) -> tuple[FloatArray, BoolArray]:
        return scores, np.ones(self.binding.plan.n_channels, dtype=np.bool_)

    def cut(self, keep: BoolArray | None, step: int, done: bool, optimizers: Optimizers) -> BoolArray | None:
        if keep is not None:
            self.binding.plan.check_keep(keep)
            self._returned = int((keep & ~self.left()).sum())
        if not done:
            if keep is not None:
                zero_filters(self.binding, torch.from_numpy(~keep))
                self._chosen = keep
            return None
        assert self.mask is not None
        if not self.mask.is_active:
            self._hold(self.left() if keep is None else keep, optimizers)
            self._chosen = None
        return self.finish() if self.shrink else None

    def notes(self, plan: Plan) -> list[str]:
        grown = [f"{self._returned} channels that were masked are back: others go in their place"]
        return super().notes(plan) + (grown if self._returned else [])

    def state_dict(self) -> dict[str, Any]:
        chosen = None if self._chosen is None else torch.from_numpy(self._chosen.copy())
        return super().state_dict() | {"chosen": chosen}

    def load_state_dict(self, state: Mapping[str, Any], optimizers: Optimizers) -> None:
        super().load_state_dict(state, optimizers)
        chosen: Tensor | None = state["chosen"]
        self._chosen = None if chosen is None else chosen.cpu().numpy().copy()


MODES: dict[str, Callable[..., Mode]] = {m.name: m for m in (Prune, HardMask, SoftMask, Hybrid)}


def make_mode(given: Any) -> Mode:
    """A mode from a name or ``{"name": ..., options}``.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    name, options = named_options("mode", given, MODES)
    return MODES[name](**options)
