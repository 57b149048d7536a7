"""What goes in a step of a drop-in pruner: scores, scopes, ratios and heads, before anything is changed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_pruning.pruner.algorithms.base_pruner import BasePruner as MetaPruner

from ...errors import ConfigError, PatError
from ...plan import Plan
from ...plan.types import BoolArray
from .._groups import member_order
from ..importance import RandomImportance
from . import layerwise
from .graph import LiveGraph
from .planned import Decision, Standing, Standings, head_scores, unit_means
from .ranking import Field, Row, Scores, caps, choose, choose_heads, head_counts
from .scoring import depends_on_order, only_reads, scores_plans
from .shaping import Attention
from .state import Ahead, Engine


class Deciding:
    """The half of a drop-in pruner that decides; what it decides upon is set by the other (:class:`BasePruner`)."""

    model: nn.Module
    engine: Engine
    DG: LiveGraph
    importance: Any
    estimate_importance: Callable[..., Any]
    get_target_pruning_ratio: Callable[..., float]
    get_target_head_pruning_ratio: Callable[..., float]
    _get_channel_groups: Callable[..., int]
    ignored_layers: Sequence[nn.Module]
    root_module_types: tuple[type, ...]
    max_pruning_ratio: float
    global_pruning: bool
    isomorphic: bool
    round_to: int | None
    prune_num_heads: bool
    prune_head_dims: bool
    current_step: int
    per_step_pruning_ratio: list[float]
    per_step_head_pruning_ratio: list[float]
    initial_total_heads: int

    def _begin(self) -> None:
        """Nothing was decided yet."""
        self._layer_to_scope: dict[nn.Module, tuple[str, Sequence[nn.Module]]] = {}
        self._scope_initial_channels: dict[str, int] = {}
        self._units_at_first: dict[str, int] = {}
        self._heads_at_first: dict[str, int] = {}
        self._heads: dict[str, int] = {}
        self._scopes: dict[tuple[int, str], tuple[str, nn.Module | None]] = {}
        self._open: tuple[Any, dict[str, bool]] = (None, {})
        self._stands: tuple[Plan, Any, Standings] | None = None

    def _limits(self) -> tuple[Any, ...]:
        """What decides which groups may be pruned; scripts add to ``ignored_layers`` between steps."""
        return self.engine.lowered, tuple(map(id, self.ignored_layers)), tuple(self.root_module_types)

    def _open_groups(self) -> list[int]:
        """The numbers of the groups that may be pruned."""
        limits = self._limits()
        if self._open[0] != limits:
            self._open = (limits, {})
        known, groups = self._open[1], self.engine.plan.groups
        for number, group in enumerate(groups):
            if group.root not in known:
                known[group.root] = self.DG.is_open(group.root, number, set(limits[1]), (), limits[2])
        return [number for number, group in enumerate(groups) if known[group.root]]

    def _read(self) -> tuple[Scores, Ahead | None]:
        """Importance of every channel of the plan, and what a prune needs of the model, made current first.

        The second is None if code of the user's decides what goes. Where none does, the model is looked at while other
        threads read its weights.
        """
        only_reads = self._only_reads()
        beside = getattr(self.importance, "score_beside", None)
        if only_reads and beside is not None:
            found: list[Ahead] = []

            def look() -> None:
                self.engine.binding.check()
                found.append(self.engine.look_ahead())

            try:
                values = beside(self.engine.binding, look)
                if values is not None:
                    return values.numpy(force=True), found[0]
            except PatError:  # others have changed the model; anything else comes up again
                pass
        self.engine.current()
        ahead = self.engine.look_ahead() if only_reads else None
        return self._scores(), ahead

    def _decide(self, values: Scores) -> tuple[Decision, list[Any]]:
        """What goes of the plan, and ready groups of layers that no plan expresses."""
        stand, loose = self._scored(values), self._loose()
        field, scores = stand.field, _of_units(stand, values)
        modules, stay = stand.modules, stand.caps(self.max_pruning_ratio)
        if loose:
            field = field + Field.of([row for row, *_ in loose])
            scores = np.concatenate([scores, *(units for _, units, *_ in loose)])
            stay = np.append(stay, [cap for _, _, cap, *_ in loose])
            modules = {**{row[1]: module for row, _, _, module, *_ in loose}, **modules}
        ratios = {scope: self._ratio(module) for scope, module in modules.items()}
        gone, _ = choose(field, scores, stay, ratios, self._scope_initial_channels, self.round_to or None)
        ready = []
        for place, (*_, group, blocks) in enumerate(loose, start=len(stand.every)):
            own = gone[field.starts[place] : field.starts[place + 1]]
            if own.any():
                idxs = np.flatnonzero(np.tile(own, blocks)).tolist()
                dep = group[0].dep
                ready.append(layerwise.group(self.DG, dep.target.module, dep.handler, idxs))
        heads = self._choose_heads(stand, values) if self.prune_num_heads else {}
        return Decision(stand, values, gone, heads, self.prune_head_dims), ready

    def _scores(self) -> Scores:
        """Importance of every channel of the plan ``[N]``; NaN where there is none."""
        binding = self.engine.binding
        if self._estimates_by_itself() and type(self.importance) is RandomImportance:
            open_ = self._open_groups()  # as Torch-Pruning, which draws none for the others
            return self.importance.drawn(binding, open_).numpy()
        if self._estimates_by_itself() and scores_plans(self.importance):
            if depends_on_order(self.importance):
                order = member_order(binding, map(self.DG.maker.whole, self._open_groups()))
                return self.importance.score(binding, order).numpy(force=True)
            return self.importance.score(binding).numpy(force=True)
        found = torch.full((binding.plan.n_channels,), torch.nan)
        for number in self._open_groups():
            for group, channels in self.DG.maker.parts(number):
                scores = self.estimate_importance(group)
                if scores is not None:
                    own = of_channels(group, scores, len(channels))
                    found[torch.from_numpy(channels)] = own.to(found.dtype)
        return found.numpy()

    def _estimates_by_itself(self) -> bool:
        """Whether the user's class has no :meth:`estimate_importance` of its own."""
        return type(self).estimate_importance is MetaPruner.estimate_importance

    def _only_reads(self) -> bool:
        """Whether deciding what goes runs no code of the user's, which might change the model."""
        ours = self._estimates_by_itself() and only_reads(self.importance)
        return ours and not layerwise.any_foreign(self.DG)

    def _scored(self, values: Scores) -> Standings:
        """The groups that may be pruned and have scores."""
        stand = self._standing()
        if values.max(initial=-np.inf) < np.inf:  # NaN, if there is one
            return stand
        unknown = np.isnan(values)
        known = [s for s in stand.every if not unknown[s.own].all()]
        return stand if len(known) == len(stand.every) else self._side_by_side(known)

    def _standing(self) -> Standings:
        """The groups that may be pruned."""
        plan = self.engine.plan
        scoping = self.global_pruning, self.isomorphic, *self._limits()
        if self._stands is None or self._stands[0] is not plan or self._stands[1] != scoping:
            all_single = plan.n_units == plan.n_channels
            single = plan.unit_size[plan.unit] == 1
            found = []
            for number in self._open_groups():
                own = slice(plan.groups[number].start, plan.groups[number].stop)
                found.append(self._stand(number, all_single or bool(single[own].all())))
            self._stands = (plan, scoping, self._side_by_side(found))
        return self._stands[2]

    def _side_by_side(self, every: list[Standing]) -> Standings:
        scopes = [self._scope(s.number) for s in every]
        modules: dict[str, nn.Module | None] = {}
        for scope, module in scopes:
            modules.setdefault(scope, module)
        rows = [
            (s.root, scope, s.units, s.group.channels, s.least, s.group.multiple)
            for s, (scope, _) in zip(every, scopes, strict=True)
        ]
        first = [self._units_at_first.setdefault(s.root, s.units) for s in every]
        return Standings(every, Field.of(rows), np.array(first, dtype=np.int64), modules)

    def _ratio(self, module: nn.Module | None) -> float:
        """What is to be gone of a scope after this step, whose ratio is that of ``module`` if it has one."""
        if module is None:
            return self.per_step_pruning_ratio[self.current_step]
        return self.get_target_pruning_ratio(module, step=self.current_step)

    def _stand(self, number: int, single: bool) -> Standing:
        plan = self.engine.plan
        group = plan.groups[number]
        attention = self.engine.attentions.get(group.root)
        unit = None
        if attention is not None and not attention.whole:
            heads = self._heads.setdefault(group.root, attention.heads)
            unit = np.tile(np.arange(group.channels // heads - attention.extras), heads)
        elif not single:
            unit = np.unique(plan.unit[group.start : group.stop], return_inverse=True)[1]
        units = group.channels if unit is None else int(unit.max()) + 1
        root = self.DG.maker.root(group)
        axis = self.engine.axes.of(root.module, root.out)
        assert axis is not None
        side = self.DG.name_of(root.module), root.out, axis
        least = self._least(number, units, group.channels)
        return Standing(number, group, group.root, unit, units, least, attention, side)

    def _least(self, number: int, units: int, channels: int) -> int:
        plan = self.engine.plan
        group = plan.groups[number]
        least = 1 if units == channels or group.root in self.engine.attentions else min(units, 2)
        least = max(least, plan.least_units(group))
        if units == channels:
            return least
        blocks = {name for name, _ in group.members}
        grouped = (t.groups > 1 and not t.whole_groups for t in plan.tensors if t.name in blocks)
        return min(units, 2) if any(grouped) else least

    def _scope(self, number: int) -> tuple[str, nn.Module | None]:
        """What the plan's group ``number`` is ranked with, and the layer whose own ratio it has, if any."""
        needs_layers = self.isomorphic or self._layer_to_scope
        if not needs_layers and self.global_pruning:
            return "DEFAULT_SCOPE", None
        key = (self.engine.lowered, self.engine.plan.groups[number].root)
        if key not in self._scopes:
            deps = self.DG.maker.structure(number).deps if needs_layers else ()
            self._scopes[key] = self._scope_of(deps, key[1])
        return self._scopes[key]

    def _scope_of(self, deps: Sequence[Any], root: str) -> tuple[str, nn.Module | None]:
        is_out = self.DG.is_out_channel_pruning_fn
        for dep in deps:
            for module, operation in ((dep.source.module, dep.trigger), (dep.target.module, dep.handler)):
                if module in self._layer_to_scope and is_out(operation):
                    return self._layer_to_scope[module][0], module
        if self.isomorphic:
            sides = ("out" if is_out(dep.handler) else "in" for dep in deps)
            return "Isomorphic_" + "".join(
                f"{type(dep.source.module)}_{side}_{type(dep.target.module)}_{side}"
                for dep, side in zip(deps, sides, strict=True)
            ), None
        return ("DEFAULT_SCOPE" if self.global_pruning else f"layer {root}"), None

    def _loose(self) -> list[tuple[Row, Scores, int, nn.Module | None, Any, int]]:
        """For what is pruned layer by layer its row of a field, scores, cap, whose ratio it has, group and blocks."""
        if not layerwise.any_foreign(self.DG):
            return []
        ignored = {id(m) for m in self.ignored_layers}
        found = []
        for group in layerwise.all_groups(self.DG, ignored, (), self.root_module_types):
            lost = layerwise.broken(self.DG, group)
            if lost is not None:
                root = self.DG.name_of(group[0].dep.target.module)
                warnings.warn(
                    f"{root}: it stays as it is: Torch-Pruning's graph loses channels between it and {lost}, which has "
                    "a pruner of its own",
                    stacklevel=5,
                )
                continue
            scores = self.estimate_importance(group)
            if scores is None:
                continue
            root = "layerwise " + self.DG.name_of(group[0].dep.target.module)
            blocks = self._get_channel_groups(group)
            units = of_channels(group, scores, len(group[0].idxs)).view(blocks, -1).mean(0).numpy()
            scope, module = self._scope_of([dep for dep, _ in group], root)
            first = np.array([self._units_at_first.setdefault(root, len(units))])
            cap = int(caps(first, np.array([len(units)]), self.max_pruning_ratio)[0])
            found.append(((root, scope, len(units), len(scores), 1, 1), units, cap, module, group, blocks))
        return found

    def _choose_heads(self, stand: Standings, values: Scores) -> dict[int, BoolArray]:
        """The heads that go, by the numbers of their groups."""
        chosen = [s for s in stand.every if (a := s.attention) is not None and self._head_ratio(a) > 0]
        scores = [head_scores(s, values[s.own]) for s in chosen]
        counts = []
        if self.global_pruning and chosen:
            ratio = self.per_step_head_pruning_ratio[self.current_step]
            counts = head_counts(scores, int(self.initial_total_heads * (1 - ratio)))
        else:
            for s, own in zip(chosen, scores, strict=True):
                assert s.attention is not None
                first = self._heads_at_first.setdefault(s.root, len(own))
                counts.append(len(own) - (first - math.ceil(self._head_ratio(s.attention) * first)))
        return {s.number: mask for s, mask in zip(chosen, choose_heads(scores, counts), strict=True)}

    def _head_ratio(self, attention: Attention) -> float:
        return self.get_target_head_pruning_ratio(self.model.get_submodule(attention.projections[0]))


def of_channels(group: Any, scores: Any, n: int) -> Tensor:
    """Scores of a group's ``n`` channels from those of the root's indices: means, where several are of a channel.

    Raises:
        ConfigError: the user's importance has given something else.
    """
    places = group[0].root_idxs
    if not isinstance(scores, Tensor) or scores.ndim != 1 or len(scores) not in (n, len(places)):
        got = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ConfigError(
            f"importance: expected a tensor of {len(places)} scores for the group of {group[0].dep.target.name} (one "
            f"for each channel), or None, got {got}"
        )
    scores = scores.detach().cpu()
    if len(scores) == n:
        return scores
    channels = torch.tensor(places)
    return scores.new_zeros(n).index_add_(0, channels, scores) / torch.bincount(channels, minlength=n)


def _of_units(stand: Standings, values: Scores) -> Scores:
    """Scores of all units ``[U]`` from those of the plan's channels ``[N]``."""
    if stand.single:
        return values[stand.channels]
    own = ((s.unit, values[s.own][: s.width]) for s in stand.every)
    return np.concatenate([scores if unit is None else unit_means(scores, unit) for unit, scores in own])
