"""The pruner: the only mutable state, the only orchestrator.

It finds the example inputs (the first forward), the optimizer (its step hooks), decides by its schedule, and
calls plan, criterion, regulariser, mask and surgery in turn.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .arguments import DEFAULT_STRENGTH, check_target, check_unit, make_regularizer
from .averages import Averages
from .criteria import Criterion, Watching, checked_scores, make_criterion
from .discovery import Discovery, Inputs, as_list, check_held
from .distributed import Peers, unwrapped
from .distributed.sharded import as_given, bound, remove, was_sharded, whole
from .errors import ConfigError, check_model
from .limits import Ranking, Ratios, RoundTo, Rules
from .masks import Mask
from .modes import make_mode
from .plan import Binding, Plan
from .proof import build_plan
from .regularizers import Regularizer
from .regularizers.stepping import loss_scale
from .report import Callbacks, Changes, Counts, StepReport, changes, joined, make_report
from .schedules import Curve, OneShot, Schedule
from .selection import Scope, check_any
from .targets import Goal, Target
from .turns import in_turn
from .upkeep import Upkeep

if TYPE_CHECKING:
    from .stability import Batches, Stability

log = logging.getLogger("pat_fast")

DEFAULT_SPARSITY = 0.5


class Pruner:
    """Prunes ``model`` while it trains.

    Call :meth:`step` once per epoch (or at whatever rhythm the schedule counts in). In between, before each
    optimizer step, the regulariser adds to the gradients; both need no change of the training loop. Three
    stages follow one another: ``"regularize"`` until ``start_epoch``, ``"prune"`` until the target is
    reached, then ``"finetune"``, in which the regulariser rests.

    Args:
        model: the module to prune, in place. Parameters keep their identity. In a ``DistributedDataParallel``, or put
            into one later, or split by ``fully_shard``, it is pruned alike on all ranks.
        target_sparsity: fraction of the prunable channels to remove, in ``[0, 1)``.
        target: instead of it, ``{"params": 0.3}`` or ``{"macs": 0.5}``: what is to be left, as a fraction of the dense
            model's or, above 1, as a number; or ``{"latency": 0.5}`` (a fraction) or ``{"latency_ms": 4.0}``, of one
            forward on this device, ``{"latency_ms": 4.0, "batch": 8}`` of one of 8 examples, from layers that are
            measured. The fewest channels go that reach it; the schedule goes by it.
        schedule: a name (``"cubic"``, ``"linear"``, ``"cosine"``, ``"one_shot"``, ... see
            :data:`pat_fast.schedules.CURVES`), a dict of a name and options (``{"name": "polynomial", "power": 2}``),
            or a function of the progress ``t`` in 0 .. 1.
        example_inputs: a tensor, tuple or dict for one forward; by default the inputs of the first forward.
        optimizer: the optimizer or optimizers whose state shrinks along; found by themselves by default.
        averaged: copies of the model whose weights are averages of its own (EMA, SWA), or modules that hold one; they
            lose the same channels. By default every ``AveragedModel`` of this model is found by itself.
        mode: ``"prune"`` removes channels at each step; ``"mask"`` holds them at zero until :meth:`finalize`;
            ``"soft"`` zeroes their filters at each step and lets them learn on; ``"hybrid"`` masks for a few steps,
            then removes. A name or a dict of a name and options, see :mod:`pat_fast.modes`.
        start_epoch: pruning begins after this many steps.
        end_epoch: the whole target is due at this step; ``start_epoch + 10`` by default.
        interval: steps between prunes.
        unit: ``"epoch"``: the three above count calls of :meth:`step`; ``"step"``: they count optimizer steps, pruning
            comes by itself after the optimizer's step that it is due at, and :meth:`step` reports what happened since
            the last call. With several optimizers, the first that steps is counted.
        ranking: ``"global"`` ranks all channels together, ``"local"`` takes the same share of each group,
            ``"isomorphic"`` of each set of groups that are made alike; or lists of layer names (or of blocks), each
            ranked on its own.
        importance: a name (``"group_norm"``, ``"taylor"``, ... see :data:`pat_fast.criteria.CRITERIA`), a dict of a
            name and options (``{"name": "taylor", "decay": 0.5}``), a criterion, or a function from a binding to
            scores ``[N]``. Channels that score ``inf`` stay.
        p: exponent of criteria that are a magnitude; 2 by default.
        regularizer: ``"group_norm"``, ``"bn_scale"`` (slimming), ``"growing"`` (stronger with each :meth:`step`),
            ``"proximal"`` (group lasso, exact zeros), a dict of a name and options (``{"name": "group_norm",
            "decoupled": True, "warmup": 500}``), a regulariser, or None.
        reg_strength: strength of a regulariser that is named.
        round_to: each group keeps a multiple of this many channels; one for each type of layer
            (``{"Conv2d": 8, "Linear": 16}``); or ``"auto"``: what the device computes fastest with, as the report says.
        layers_to_prune: names of layers or blocks (a name covers everything under it); all by default. A
            group is pruned if all layers that make its channels are covered.
        ignored_layers: names or modules whose output channels stay.
        mac_target: stop when the model is down to this fraction of its MACs, in ``(0, 1]``.
        min_channels: what every group keeps at least (of its units).
        layer_ratios: ``{name: fraction to remove}`` for layers that are not to go by ``target_sparsity``; each of their
            groups is ranked on its own.
        max_ratio: the largest fraction of its channels that a group may lose, for all or as ``{name: fraction}``.
        verify: let the plan prove itself (see :func:`pat_fast.build_plan`); costs a few forwards, once.
        auto: find inputs and optimizer, and regularise by hooks. If False, pass ``example_inputs`` and call
            :meth:`regularize` after each backward yourself.
        stability: a :class:`pat_fast.Stability` or a dict of its options; all off by default.
        batches: for ``stability={"recalibrate": n}``, a loader, or a function that makes one.
        scheduler: for ``stability={"rewind_to": step}``, the learning-rate scheduler or schedulers.
        on_stage: called with the new stage and a :class:`StepReport` whenever the stage has changed.
        on_prune: called with a :class:`StepReport` after each prune, of what it did.
    Raises:
        ConfigError: a value is out of range, or a layer name matches nothing. At the first step of the optimizer
            or the pruner: the target cannot be reached; the message says what can.
        PlanError: the model cannot be traced, or nothing of it can be pruned (at once when
            ``example_inputs`` are given, else at the first step).
    """

    def __init__(
        self,
        model: nn.Module,
        target_sparsity: float = DEFAULT_SPARSITY,
        schedule: str | Mapping[str, Any] | Curve = "cubic",
        *,
        example_inputs: Any = None,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        averaged: nn.Module | Sequence[nn.Module] | None = None,
        mode: str | Mapping[str, Any] = "prune",
        start_epoch: int = 0,
        end_epoch: int | None = None,
        interval: int = 1,
        unit: str = "epoch",
        ranking: Ranking = "global",
        importance: str | Mapping[str, Any] | Criterion | Callable[[Binding], torch.Tensor] = "group_norm",
        p: float | None = None,
        regularizer: str | Mapping[str, Any] | Regularizer | None = "group_norm",
        reg_strength: float = DEFAULT_STRENGTH,
        round_to: RoundTo = None,
        layers_to_prune: Sequence[str] | None = None,
        ignored_layers: Sequence[str | nn.Module] | None = None,
        target: Mapping[str, float] | None = None,
        mac_target: float | None = None,
        min_channels: int = 1,
        layer_ratios: Ratios | None = None,
        max_ratio: float | Ratios = 1.0,
        verify: bool = True,
        auto: bool = True,
        stability: Stability | Mapping[str, Any] | None = None,
        batches: Batches | None = None,
        scheduler: Any = None,
        on_stage: Callable[[str, StepReport], object] | None = None,
        on_prune: Callable[[StepReport], object] | None = None,
    ) -> None:
        from .stability import Stability, Steady  # here: an import of the package stays quick

        check_model(model)
        check_target(target_sparsity, mac_target)
        check_unit(unit, auto, verify)
        self.model = model = unwrapped(model)
        self.peers = Peers(model)
        self.unit, self.target_sparsity, self._verify = unit, target_sparsity, verify
        self._mode = make_mode(mode)
        self.schedule = Schedule.of(schedule, start_epoch, end_epoch, interval)
        self._mode.check_beside(self.schedule)
        self.stability = Stability.of(stability)
        self._steady = Steady(self.stability, self._mode, self.schedule, batches, scheduler)
        self._callbacks = Callbacks(on_stage, on_prune)
        self.criterion = make_criterion(importance, p)
        self.regularizer = make_regularizer(regularizer, reg_strength, self.criterion)
        rules = Rules(ranking, round_to, min_channels, layer_ratios, max_ratio)
        goal = Target.of(target, target_sparsity, DEFAULT_SPARSITY)
        self.goal = Goal(goal, mac_target, rules.known(model))
        self._scope = Scope(model, layers_to_prune, ignored_layers)
        self._begin()
        self._attach(example_inputs, optimizer, averaged, auto)
        if end_epoch is None and not isinstance(self.schedule.function, OneShot):
            counted = "step()" if unit == "epoch" else "step of the optimizer"
            end = self.schedule.end
            log.warning("pat_fast: end_epoch was not given; the whole target is reached at the %dth %s", end, counted)

    def _begin(self) -> None:
        """Nothing has been counted, built or pruned yet."""
        from .state import State

        self._lock = threading.RLock()
        self.epoch = 0
        self.done = False
        self.binding: Binding | None = None
        self._counted: weakref.ref[Optimizer] | None = None  # the optimizer whose steps count
        self._since: tuple[Counts, Changes] | None = None
        self._fraction = 0.0  # what was due at the last prune
        self._skipped: tuple[tuple[str, str], ...] = ()
        self._graph: Any = None
        self._pending: dict[str, Any] | None = None  # a state that waits for the first forward
        self._regularized = True  # since the last step
        self._watching = self.criterion if isinstance(self.criterion, Watching) else Watching()
        weakref.finalize(self, self._watching.detach).atexit = False
        self._state = State(self.goal, self._mode, self._steady, self.criterion, self._watching, self.regularizer)

    def _attach(self, example_inputs: Any, optimizer: Any, averaged: Any, auto: bool) -> None:
        """Find what belongs to the training: inputs, optimizers, averages; make the plan, if there are inputs."""
        if optimizer is not None:
            check_held(self.model, as_list(optimizer))
        self._inputs = Inputs(self.model, example_inputs, auto)
        if example_inputs is not None:
            self._build(example_inputs)
        self._optimizers = Discovery(self, self.model, optimizer, auto)
        self._averages = Averages(self, self.model, averaged, auto)
        self._mode.copies = self._optimizers.foretell = self._averages.current
        self._upkeep = Upkeep(self._watching, self.regularizer, self._mode, self._optimizers.current)

    @classmethod
    def from_config(cls, model: nn.Module, config: str | Path | Mapping[str, Any], **overrides: Any) -> Pruner:
        """Build a pruner from a JSON file or a dict; see :class:`pat_fast.config.PruneConfig` for the keys.

        Raises:
            ConfigError: the file is missing or not JSON, a key is unknown, a value out of range.
        """
        from .config import PruneConfig, load_config

        return cls(model, **{**load_config(config, PruneConfig).pruner_kwargs(), **overrides})

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ConfigError(
            "a Pruner cannot be copied or pickled: it belongs to one model, by hooks; save its state_dict(), and load "
            "it into a pruner of the other model"
        )

    # State

    @property
    def mode(self) -> str:
        """``"prune"``, ``"mask"``, ``"soft"`` or ``"hybrid"``."""
        return self._mode.name

    @property
    def mask(self) -> Mask | None:
        """Which channels are held at zero; None in mode ``"prune"``, and before the first forward."""
        return self._mode.mask

    @property
    def plan(self) -> Plan | None:
        """The plan of the model as it is, or None before the first forward."""
        return self.binding.plan if self.binding is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether there is a plan, or example inputs to make it from."""
        return self.binding is not None or self._inputs.known

    @property
    def stage(self) -> str:
        """``"regularize"``, ``"prune"`` or ``"finetune"``."""
        return self.schedule.stage(self.epoch, self.done)

    @property
    def DG(self) -> Any:
        """A Torch-Pruning ``DependencyGraph`` of the model as it is, traced when asked for."""
        from .plan.graph import dependency_graph

        plan = self._ready().plan
        if self._graph is None or self._graph[0] is not plan:
            with whole(self.model):
                self._graph = (plan, dependency_graph(self.model, self._inputs.given))
        return self._graph[1]

    # Work

    @in_turn
    def step(self) -> StepReport:
        """Count an epoch and, when the schedule says so, prune or mask. (For ``unit="step"``: report alone.)

        Raises:
            PlanError: no forward was seen yet and no ``example_inputs`` were given, or the model cannot be
                pruned.
            SurgeryError: the prune was refused or failed; model and optimizers are as they were, and the
                step is not counted. What fails after it (a callback, the report) leaves it done and counted.
        """
        with self._together(self.unit == "epoch"):
            self._ready()
            before, changed = self._since or (self._counts(), ())
            self._since = None
            if self.unit == "epoch":
                changed = self._advance()
        if self.binding is not None and not self.done:
            self._state.grow(self.binding)
        return self._reported(before, changed)

    @in_turn
    def count(self, optimizer: Optimizer) -> None:
        """Count a step of an optimizer, and prune if one is due; done by the optimizer's hook when unit is "step"."""
        if self.unit == "epoch" or self.done:
            return
        if self._counted is None or self._counted() is None:
            self._counted = weakref.ref(optimizer)
        if self._counted() is optimizer:
            with self._together():
                self._ready()
                before, changed = self._since or (self._counts(), ())
                self._since = (before, joined(changed, self._advance()))

    def _together(self, counts: bool = True) -> AbstractContextManager[None]:
        """Around a step that may prune: all ranks of a distributed training make it, or none."""
        step = self.epoch + 1
        due = counts and not self.done and (self._due(step) or self._mode.due(step))
        return self.peers.guard(f"prune {step}") if due else nullcontext()

    def _due(self, step: int) -> bool:
        return self.schedule.due(step) or self._steady.waits

    def _advance(self) -> Changes:
        """Count, and prune or mask if that is due."""
        binding, epoch, stage = self._ready(), self.epoch + 1, self.stage
        before: Counts = self._counts() if self._callbacks else (0, 0, 0, None)
        self.goal.check(binding.plan, self._eligible)
        now, keep, fraction = self._mode.left(), None, self._fraction
        if not self.done and self._due(epoch):
            fraction = self.schedule.risen(epoch, fraction)
            keep = self._select(binding, fraction)
        left = now if keep is None else keep
        changed = changes(binding.plan.groups, now, left)
        ends = epoch >= self.schedule.end and not self._steady.waits
        done = self.done or ends or self.goal.reached(binding.plan, left)
        removed = self._mode.cut(keep, epoch, done, self._optimizers.current)
        if removed is not None:
            self._remove(binding, removed)
        reached = done and not self.done
        self.epoch, self.done, self._fraction = epoch, done, fraction
        if reached:
            self._watching.detach()
        self._steady.after(self.model, bool(changed), reached, self._optimizers.current)
        self._steady.rewinder.record(epoch, self._optimizers.current)
        self._callbacks.tell(stage, self.stage, changed, lambda: self._report(before, changed))
        return changed

    @in_turn
    def finalize(self) -> StepReport:
        """End pruning: remove what is masked, take the hooks off; training may go on."""
        binding, stage = self._ready(), self.stage
        before = self._counts()
        keep = self._mode.finish()
        if keep is not None:
            with self.peers.guard("finalize"):
                self.peers.agree("the channels to keep", keep.tobytes())
                self._remove(binding, keep)
        self.done = True
        self.close()
        self._callbacks.tell(stage, self.stage, (), lambda: self._report(before, ()))
        return self._reported(before, ())

    def _reported(self, before: Counts, changed: Changes) -> StepReport:
        """The report to return, after which what was noted begins anew."""
        report = self._report(before, changed)
        self._regularized = False
        self._steady.clear_notes()
        return report

    @in_turn
    @torch.no_grad()
    def regularize(self, scale: float | GradScaler = 1.0, optimizer: Optimizer | None = None) -> None:
        """Let the criterion see the gradients, add the regulariser to them, clear those of masked channels.

        Done by the optimizer's hook when ``auto`` is on; else call it once per step of the optimizer, before it, when
        all gradients of the step are there (after the last backward, where several add up).

        Args:
            scale: a loss scale that is still in the gradients, or the ``GradScaler``, which knows whether ``unscale_``
                was called, and whether the step will be skipped.
            optimizer: leave alone what this one does not hold; another will step it.
        Raises:
            ConfigError: a decoupled regulariser without a learning rate to go by, or before ``unscale_``.
        """
        if isinstance(scale, GradScaler):
            found = loss_scale(scale, optimizer, getattr(self.regularizer, "decoupled", False))
            if found is None:
                return
            scale = found
        binding = self._ready()
        self._regularized = True
        self._steady.rewinder.record(self.epoch, self._optimizers.current)
        self.goal.check(binding.plan, self._eligible)
        self._upkeep.before_step(binding, scale, optimizer, self._eligible, self.stage, self.done)

    @in_turn
    def hold(self, optimizer: Optimizer | None = None) -> None:
        """Take a proximal regulariser's step, clear the weights of masked channels.

        Done by the optimizer's hook when ``auto`` is on; else call it after each step of the optimizer.
        """
        if self.binding is not None:
            self._upkeep.after_step(self.binding, optimizer, self._eligible, self.stage)

    def close(self) -> None:
        """Take all hooks off."""
        self._optimizers.close()
        self._averages.close()
        self._watching.detach()
        self._inputs.close()

    @in_turn
    def state_dict(self) -> dict[str, Any]:
        """Where the pruner stands, what it has gathered, its masks; the model and the optimizers are saved apart.

        Raises:
            PlanError: no forward of the model was seen yet.
        """
        if self._pending is not None:
            return dict(self._pending)
        return {"epoch": self.epoch, "done": self.done, **self._state.save(self._ready())}

    @in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called.

        A dense model gets the shapes that it had then; load its values, and those of the optimizer, after this. Without
        ``example_inputs`` the rest waits for the first forward (which a criterion of activations does not see then).

        Raises:
            PlanError: the model has other channels than the one that was saved.
            CheckpointError: the state is of another model.
            ConfigError: the state is of another version or mode.
        """
        from .state import fit_model

        fit_model(self.model, state)
        if self.binding is not None and not self.binding.is_true:
            self.binding = None  # it was of the dense model
        if self.is_ready:
            self._state.load(state, self._ready(), self._optimizers.current)
        else:
            self._pending = dict(state)
        self.epoch, self.done = state["epoch"], state["done"]
        if self.done:
            self._watching.detach()

    # Inside

    def _ready(self) -> Binding:
        """The binding, built from the first forward's inputs if need be, and true to the model."""
        if self.binding is None:
            self._inputs.use(self._build)
        if self._pending is not None:
            state, self._pending = self._pending, None
            self.load_state_dict(state)
        assert self.binding is not None
        if was_sharded(self.binding) or self.binding.has_moved():
            held = self._mode.state_dict()
            now = bound(self.binding.plan, self.model, self._state)
            self._take(self.binding.follow(now), self._eligible)
            self._mode.load_state_dict(held, self._optimizers.current)
        return self.binding

    def _build(self, example_inputs: Any) -> None:
        example_inputs = as_given(self.model, example_inputs)
        with whole(self.model):
            plan = build_plan(self.model, example_inputs, verify=self._verify)
        eligible, skipped = self._scope.apply(plan)
        check_any(plan, eligible, skipped)
        binding = bound(plan, self.model, self._state)
        self.goal.start(binding, eligible, example_inputs)
        self._skipped = skipped
        self._take(binding, torch.from_numpy(eligible))

    def _take(self, binding: Binding, eligible: torch.Tensor) -> None:
        """Go on with ``binding``, to the dense model, or to its shards once it is sharded."""
        self.binding, self._eligible = binding, eligible.to(binding.device)
        self._mode.attach(binding)
        if not self.done:
            self._watching.attach(binding)

    def _counts(self) -> Counts:
        assert self.binding is not None
        return self.goal.counts(self.binding.plan, self._mode.left())

    def _select(self, binding: Binding, fraction: float) -> NDArray[np.bool_]:
        binding.check()
        plan = binding.plan
        scores = checked_scores(self.criterion, binding)
        eligible = self._eligible.cpu().numpy()
        scores = self.peers.mean(scores, plan, eligible)
        if self.peers.active:
            self.goal.share(self.peers.of_first)
        self._state.note_scores(plan, scores)

        def keep_at(scores: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
            return self.goal.select(plan, *self._mode.candidates(scores), eligible, fraction)

        keep = self._steady.choose(plan, scores, keep_at, fraction, self._mode.left())
        self.peers.agree("the channels to keep", keep.tobytes())
        return keep

    def _remove(self, binding: Binding, keep: NDArray[np.bool_]) -> None:
        """Shrink the model, and all that is kept of it."""
        followers: list[Any] = [*self._optimizers.current(), *self._watching.accumulators]

        def follow(smaller: Binding) -> None:
            eligible = torch.from_numpy(self._scope.apply(smaller.plan)[0]).to(smaller.device)
            with self._state.shrunk(binding, smaller, keep):
                self.peers.ready()
            self.binding, self._eligible = smaller, eligible

        copies = self._averages.current()
        self.peers.begin()
        remove(binding, keep, followers, copies, follow)

    def _report(self, before: Counts, changed: Changes) -> StepReport:
        plan = self._ready().plan
        ratio = self.goal.ratio(self.schedule.fraction(self.epoch))
        frozen = tuple((f.layer, f.reason) for f in plan.frozen) + self._skipped
        counts = (before, self._counts(), self.goal.dense)
        notes = self._state.notes(plan)
        if not self._regularized and self.regularizer is not None and self.stage != "finetune":
            notes.append("no optimizer step was seen since the last step(): nothing was regularised")
        return make_report(self.epoch, self.stage, ratio, counts, changed, frozen, tuple(notes))
