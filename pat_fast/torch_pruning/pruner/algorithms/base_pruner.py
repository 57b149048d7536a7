"""Torch-Pruning's pruner over pat_fast's plan: one pass for the scores, one ranking, one surgery for a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.pruner.algorithms.base_pruner import *  # noqa: F403
from torch_pruning.pruner.algorithms.base_pruner import BasePruner as _Original
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from ....errors import PlanError, check
from ....plan import Plan
from ....plan.types import BoolArray
from ....selection import protected_units, unit_scores
from ..._groups import member_order
from ...engine import arguments, layerwise
from ...engine.arguments import deprecated
from ...engine.graph import History, LiveGraph, Noted
from ...engine.groups import PlanGroup
from ...engine.planned import Planned, Standing, unit_means
from ...engine.ranking import Candidate, choose, choose_heads, head_counts
from ...engine.scoring import depends_on_order, scores_plans
from ...engine.shaping import Attention, Spec
from ...engine.state import Engine

ROOTS = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_LSTM)


class BasePruner(_Original):
    """Structural pruning by groups, with the arguments and results of ``torch_pruning``'s ``BasePruner``.

    Parameters keep their identity; the state of their optimizers is pruned along. The arguments are
    Torch-Pruning's, which documents them, and ``optimizer``: the optimizer (or a list of them) that trains the
    model; it is found by itself by default. Where the results differ: ``docs/differences.md``.

    Raises:
        ConfigError: an argument is out of range, or names a layer that the model does not have.
        PlanError: the forward fails on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        global_pruning: bool = False,
        pruning_ratio: float = 0.5,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        max_pruning_ratio: float = 1.0,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: Callable[..., Any] = linear_scheduler,
        ignored_layers: Sequence[Any] | None = None,
        round_to: int | None = None,
        isomorphic: bool = False,
        in_channel_groups: Mapping[nn.Module, int] | None = None,
        out_channel_groups: Mapping[nn.Module, int] | None = None,
        num_heads: Mapping[nn.Module, int] | None = None,
        prune_num_heads: bool = False,
        prune_head_dims: bool = True,
        head_pruning_ratio: float = 0.0,
        head_pruning_ratio_dict: Mapping[nn.Module, float] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        unwrapped_parameters: Any = None,
        root_module_types: Sequence[type] = ROOTS,
        forward_fn: Callable[..., Any] | None = None,
        output_transform: Callable[..., Any] | None = None,
        channel_groups: Mapping[nn.Module, int] | None = None,
        ch_sparsity: float | None = None,
        ch_sparsity_dict: Mapping[Any, float] | None = None,
        optimizer: Any = None,
    ) -> None:
        arguments.check_model(model)
        arguments.check_importance(importance)
        pruning_ratio = deprecated("ch_sparsity", ch_sparsity, "pruning_ratio", pruning_ratio)
        pruning_ratio_dict = deprecated("ch_sparsity_dict", ch_sparsity_dict, "pruning_ratio_dict", pruning_ratio_dict)
        if channel_groups:
            deprecated("channel_groups", channel_groups, "in_channel_groups and out_channel_groups", None)
        arguments.check_ratio("pruning_ratio", pruning_ratio)
        arguments.check_ratio("max_pruning_ratio", max_pruning_ratio)
        arguments.check_ratio("head_pruning_ratio", head_pruning_ratio)
        arguments.check_count("iterative_steps", iterative_steps)
        check("round_to", round_to, lambda v: v is None or int(v) == v >= 0, "a whole number, or None")
        self.model = model
        self.importance = importance
        self.pruning_ratio, self.max_pruning_ratio = pruning_ratio, max_pruning_ratio
        self.global_pruning, self.isomorphic, self.round_to = global_pruning, isomorphic, round_to
        self.root_module_types = tuple(root_module_types)
        self.prune_num_heads, self.prune_head_dims = prune_num_heads, prune_head_dims
        self.head_pruning_ratio = head_pruning_ratio
        self.num_heads = arguments.checked_counts(model, "num_heads", num_heads)
        self.in_channel_groups = arguments.checked_counts(model, "in_channel_groups", in_channel_groups)
        self.out_channel_groups = arguments.checked_counts(model, "out_channel_groups", out_channel_groups)
        self.out_channel_groups.update(arguments.checked_counts(model, "channel_groups", channel_groups))
        self.ignored_layers, _, self.ignored_params = arguments.split_ignored(model, ignored_layers)

        spec = Spec(
            example_inputs, forward_fn, output_transform, dict(self.num_heads), dict(self.out_channel_groups),
            dict(self.in_channel_groups), tuple(self.ignored_params),
        )  # fmt: skip
        self.out_channel_groups.update(self.num_heads)
        self.iterative_steps = iterative_steps
        self.iterative_pruning_ratio_scheduler = iterative_pruning_ratio_scheduler
        self.current_step = 0
        self.per_step_pruning_ratio = self._schedule(pruning_ratio)
        self.per_step_head_pruning_ratio = self._schedule(head_pruning_ratio)
        unwrapped = arguments.check_unwrapped(model, unwrapped_parameters)
        self.DG = LiveGraph(model, spec, customized_pruners, unwrapped)
        self._layer_to_scope: dict[nn.Module, tuple[str, Sequence[nn.Module]]] = {}
        self.pruning_ratio_dict = self._user_scopes(
            arguments.checked_ratios(model, "pruning_ratio_dict", pruning_ratio_dict)
        )
        self.head_pruning_ratio_dict = {
            m: self._schedule(ratio)
            for key, ratio in arguments.checked_ratios(
                model, "head_pruning_ratio_dict", head_pruning_ratio_dict
            ).items()
            for m in key.modules()
            if self._is_prunable(m)
        }
        left_alone = layerwise.members(self.DG) if layerwise.any_foreign(self.DG) else ()
        self.engine = Engine(model, spec, optimizer, left_alone)
        self.engine.followers = lambda: getattr(self.importance, "accumulators", ())
        self.DG.engine = self.engine
        self._count()
        self._prepare()

    def _schedule(self, ratio: float) -> list[float]:
        return arguments.checked_schedule(self.iterative_pruning_ratio_scheduler, ratio, self.iterative_steps)

    def _is_prunable(self, module: nn.Module) -> bool:
        kinds = (ops.type2class(kind) for kind in self.DG.REGISTERED_PRUNERS)
        return isinstance(module, tuple(k for k in kinds if k is not ops._ElementWiseOp))

    def _user_scopes(self, ratios: Mapping[Any, float]) -> dict[nn.Module, list[float]]:
        """Ratios of single layers; layers that are named together are ranked together when pruning globally."""
        found: dict[nn.Module, list[float]] = {}
        for number, (key, ratio) in enumerate(ratios.items()):
            scope = key if isinstance(key, tuple) else [key]
            layers = [m for module in scope for m in module.modules() if self._is_prunable(m)]
            for place, layer in enumerate(layers):
                name = f"_User_Defined_Scope_{number}" + ("" if self.global_pruning else f"_{place}")
                self._layer_to_scope[layer] = (name, scope)
                found[layer] = self._schedule(ratio)
        return found

    def _count(self) -> None:
        """What the model has before the first step."""
        self._scope_initial_channels: dict[str, int] = {}
        self._units_at_first: dict[str, int] = {}
        self._heads_at_first: dict[str, int] = {}
        self._scopes: dict[tuple[int, str], tuple[str, nn.Module | None]] = {}
        self._open: tuple[int, dict[str, bool]] = (0, {})
        self._stands: tuple[Plan, list[Standing]] | None = None
        self.layer_init_out_ch: dict[nn.Module, int | None] = {}
        self.layer_init_in_ch: dict[nn.Module, int | None] = {}
        nothing = self.DG.REGISTERED_PRUNERS[ops.OPTYPE.ELEMENTWISE]
        for module in {id(m): m for m in self.engine.binding.modules.values()}.values():
            pruner = self.DG.get_pruner_of_module(module)
            if pruner is nothing:
                continue
            self.layer_init_out_ch[module] = pruner.get_out_channels(module)
            self.layer_init_in_ch[module] = pruner.get_in_channels(module)
            blocks = pruner.get_out_channel_groups(module) if hasattr(pruner, "get_out_channel_groups") else 1
            if blocks > 1 and not (isinstance(module, ops.TORCH_CONV) and module.groups == module.out_channels):
                self.out_channel_groups[module] = blocks
                self.in_channel_groups[module] = pruner.get_in_channel_groups(module)
        self.init_num_heads = dict(self.num_heads)
        plan = self.engine.plan
        for number, group in enumerate(plan.groups):
            if self._is_open(number):
                attention = self.engine.attentions.get(group.root)
                self._units_at_first[group.root] = int(plan.group_units[number])
                if attention is not None:
                    self._units_at_first[group.root] = group.channels // attention.heads - attention.extras
                    self._heads_at_first[group.root] = attention.heads
        self._heads = dict(self._heads_at_first)
        self.initial_total_channels = sum(self._units_at_first.values())
        self.initial_total_heads = sum(self._heads_at_first.values())

    def _prepare(self) -> None:
        """What does not change with the weights is worked out before the first step."""
        for group in self.engine.plan.groups:
            self.DG.maker.root(group)
        self._standing()
        if callable(getattr(self.importance, "prepare", None)):
            self.importance.prepare(self.engine.binding)
        _ = self.engine.axes, self.engine.references()

    def _is_open(self, number: int) -> bool:
        lowered, known = self._open
        if lowered != self.engine.lowered:
            known = {}
            self._open = (self.engine.lowered, known)
        root = self.engine.plan.groups[number].root
        if root not in known:
            ignored = {id(m) for m in self.ignored_layers}
            known[root] = self.DG.is_open(root, number, ignored, (), self.root_module_types)
        return known[root]

    # Steps

    def step(self, interactive: bool = False) -> Any:
        """Prune to the next ratio of the schedule; with ``interactive``, yield the groups to prune instead.

        Raises:
            SurgeryError: the prune was refused; model and optimizers are as they were, the step is not counted.
        """
        self.current_step += 1
        if interactive:
            return self._yield_groups()
        try:
            self._prune_all()
        except BaseException:
            self.current_step -= 1
            raise
        return None

    def _exceeded(self) -> bool:
        if self.current_step > self.iterative_steps:
            warnings.warn("Pruning exceed the maximum iterative steps, no pruning will be performed.", stacklevel=3)
            return True
        return False

    @torch.no_grad()
    def _prune_all(self) -> None:
        if self._exceeded():
            return
        planned, loose = self._decide()
        engine = self.engine
        plan = engine.plan
        keep = np.ones(plan.n_channels, dtype=np.bool_)
        masks = [each.gone(self.prune_head_dims) for each in planned]
        prunes = []
        for each, mask in zip(planned, masks, strict=True):
            group = each.standing.group
            keep[group.start : group.stop] = ~mask
            prunes.append((*each.standing.side, group.start, mask))
            self._adjust_fisher(each.standing.number, mask)
        if not keep.all():
            try:
                engine.prune(keep)
            except PlanError:  # an axis that several groups share in part would be left empty
                engine.prune(self._spared(keep, planned))
        self.DG.note(Noted(prunes, plan.n_channels))
        for group in loose:
            group.prune()
        self._count_heads(planned)

    def _spared(self, keep: BoolArray, planned: Sequence[Planned]) -> BoolArray:
        """``keep`` with the best of every axis kept as well."""
        plan = self.engine.plan
        known = np.zeros(plan.n_channels)
        for each in planned:
            known[self.engine.now(each.born)] = each.scores.double().nan_to_num().numpy()
        spared = protected_units(plan, unit_scores(plan, known), 1)
        return keep | spared[plan.unit]

    def _yield_groups(self) -> Iterator[Any]:
        if self._exceeded():
            return
        with torch.no_grad():
            planned, loose = self._decide()
        maker, engine = self.DG.maker, self.engine
        for each in planned:
            maker.structure(each.standing.number)  # while the graph is that of the model as it is
        lowered = engine.lowered
        for each in planned:
            engine.current()
            if engine.lowered != lowered:
                raise PlanError("the model was changed by other means during an interactive step; call step() again")
            channels = engine.now(each.born[each.gone(self.prune_head_dims)])
            number = next((i for i, g in enumerate(engine.plan.groups) if g.root == each.root), None)
            if number is None or not len(channels):
                continue
            self._count_heads([each])
            yield maker.part(number, channels)
        yield from loose

    def _adjust_fisher(self, number: int, mask: BoolArray) -> None:
        # Torch-Pruning's own OBDC keeps its sums by layer; what this package's gathers shrinks with the parameters.
        if hasattr(self.importance, "adjust_fisher") and not hasattr(self.importance, "accumulators"):
            self.importance.adjust_fisher(self.DG.maker.whole(number), np.flatnonzero(mask).tolist())

    def _count_heads(self, planned: Sequence[Planned]) -> None:
        for each in planned:
            if each.heads_gone is None or each.attention is None:
                continue
            before = len(each.heads_gone)
            left = before - int(each.heads_gone.sum())
            self._heads[each.root] = left
            for name in each.attention.projections:
                layer = self.model.get_submodule(name)
                self.num_heads[layer] = self.num_heads[layer] * left // before
                self.out_channel_groups[layer] = self.num_heads[layer]

    # Decisions

    def _decide(self) -> tuple[list[Planned], list[Any]]:
        """Groups of the plan with something to remove, and ready groups of layers that no plan expresses."""
        engine = self.engine
        engine.current()
        planned = self._planned()
        loose = self._loose()
        choose(
            [p.candidate for p in planned] + [c for c, _, _ in loose],
            self._scope_initial_channels,
            self.round_to or None,
        )
        self._choose_heads(planned)
        ready = []
        for candidate, group, blocks in loose:
            if candidate.gone.any():
                idxs = np.flatnonzero(np.tile(candidate.gone, blocks)).tolist()
                dep = group[0].dep
                ready.append(layerwise.group(self.DG, dep.target.module, dep.handler, idxs))
        order = list(dict.fromkeys(["DEFAULT_SCOPE", *(p.candidate.scope for p in planned)]))  # as Torch-Pruning goes
        planned = sorted(planned, key=lambda p: order.index(p.candidate.scope))
        return [p for p in planned if p.any_goes(self.prune_head_dims)], ready

    def _scores(self) -> Tensor:
        """Importance of every channel of the plan ``[N]`` on the CPU; NaN where there is none."""
        binding = self.engine.binding
        if type(self).estimate_importance is BasePruner.estimate_importance and scores_plans(self.importance):
            if depends_on_order(self.importance):
                groups = (self.DG.maker.whole(n) for n in range(len(binding.plan.groups)) if self._is_open(n))
                return self.importance.score(binding, member_order(binding, groups)).detach().cpu()
            return self.importance.score(binding).detach().cpu()
        found = torch.full((binding.plan.n_channels,), torch.nan)
        for number in range(len(binding.plan.groups)):
            if self._is_open(number):
                for group, channels in self.DG.maker.parts(number):
                    scores = self.estimate_importance(group)
                    if scores is not None:
                        found[torch.from_numpy(channels)] = scores.detach().cpu().to(found.dtype)
        return found

    def _planned(self) -> list[Planned]:
        engine = self.engine
        scores = self._scores()
        values, born = scores.numpy(), engine.born
        unknown = np.isnan(values)
        some = bool(unknown.any())
        step_ratio = self.per_step_pruning_ratio[self.current_step]
        found = []
        for s in self._standing():
            group = s.group
            if some and unknown[group.start : group.stop].all():
                continue
            own = scores[group.start : group.stop]
            units = values[group.start : group.stop] if s.unit is None else unit_means(own[: len(s.unit)], s.unit)
            scope, module = self._scope(s.number)
            ratio = step_ratio
            if module is not None:
                ratio = self.get_target_pruning_ratio(module, step=self.current_step)
            cap = self._cap(group.root, s.units)
            candidate = Candidate(group.root, scope, ratio, units, len(s.every), cap, s.least, group.multiple)
            names = born[group.start : group.stop]
            found.append(Planned(s, group.root, names, s.every, own, candidate, s.attention))
        return found

    def _standing(self) -> list[Standing]:
        """The groups that may be pruned."""
        plan = self.engine.plan
        if self._stands is None or self._stands[0] is not plan:
            all_single = plan.n_units == plan.n_channels
            single = plan.unit_size[plan.unit] == 1
            found = []
            for number, group in enumerate(plan.groups):
                if self._is_open(number):
                    own = slice(group.start, group.stop)
                    found.append(self._stand(number, all_single or bool(single[own].all())))
            self._stands = (plan, found)
        return self._stands[1]

    def _stand(self, number: int, single: bool) -> Standing:
        plan = self.engine.plan
        group = plan.groups[number]
        attention = self.engine.attentions.get(group.root)
        unit = None
        if attention is not None:
            heads = self._heads.setdefault(group.root, attention.heads)
            unit = np.tile(np.arange(group.channels // heads - attention.extras), heads)
        elif not single:
            unit = np.unique(plan.unit[group.start : group.stop], return_inverse=True)[1]
        units = group.channels if unit is None else int(unit.max()) + 1
        every = np.arange(group.channels) if unit is None else unit
        root = self.DG.maker.root(group)
        axis = self.engine.axes.of(root.module, root.out)
        assert axis is not None
        side = self.DG.name_of(root.module), root.out, axis
        return Standing(number, group, unit, every, units, self._least(number, units, group.channels), attention, side)

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

    def _cap(self, root: str, units: int) -> int:
        first = self._units_at_first.setdefault(root, units)
        return min(units, math.ceil(first * (1 - self.max_pruning_ratio) - 1e-9))

    def _scope(self, number: int) -> tuple[str, nn.Module | None]:
        """What the plan's group ``number`` is ranked with, and the layer whose own ratio it has, if any."""
        key = (self.engine.lowered, self.engine.plan.groups[number].root)
        if key not in self._scopes:
            needs_layers = self.isomorphic or self._layer_to_scope
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

    def _loose(self) -> list[tuple[Candidate, Any, int]]:
        """Candidates for what is pruned layer by layer, with their whole groups and blocks."""
        ignored = {id(m) for m in self.ignored_layers}
        found = []
        for group in layerwise.all_groups(self.DG, ignored, (), self.root_module_types):
            scores = self.estimate_importance(group)
            if scores is None:
                continue
            root = "layerwise " + self.DG.name_of(group[0].dep.target.module)
            blocks = self._get_channel_groups(group)
            units = scores.detach().cpu().view(blocks, -1).mean(0).numpy()
            scope, module = self._scope_of([dep for dep, _ in group], root)
            ratio = self.per_step_pruning_ratio[self.current_step]
            if module is not None:
                ratio = self.get_target_pruning_ratio(module, step=self.current_step)
            found.append(
                (Candidate(root, scope, ratio, units, len(scores), self._cap(root, len(units))), group, blocks)
            )
        return found

    def _choose_heads(self, planned: Sequence[Planned]) -> None:
        if not self.prune_num_heads:
            return
        chosen = [p for p in planned if p.attention is not None and self._head_ratio(p.attention) > 0]
        scores = [p.head_scores() for p in chosen]
        counts = []
        if self.global_pruning and chosen:
            ratio = self.per_step_head_pruning_ratio[self.current_step]
            counts = head_counts(scores, int(self.initial_total_heads * (1 - ratio)))
        else:
            for p, own in zip(chosen, scores, strict=True):
                assert p.attention is not None
                first = self._heads_at_first.setdefault(p.root, len(own))
                counts.append(len(own) - (first - math.ceil(self._head_ratio(p.attention) * first)))
        for p, mask in zip(chosen, choose_heads(scores, counts), strict=True):
            p.heads_gone = mask

    def _head_ratio(self, attention: Attention) -> float:
        return self.get_target_head_pruning_ratio(self.model.get_submodule(attention.projections[0]))

    # Other things to do with it

    @torch.no_grad()
    def manual_prune_width(
        self, layer: nn.Module, pruning_fn: Callable[..., Any], pruning_ratios_or_idxs: float | Sequence[int]
    ) -> None:
        """Prune a layer by a ratio (the fraction of its channels that goes) or by indices.

        Raises:
            ConfigError: the ratio or an index is out of range, or the layer is not one of the model's.
            PlanError: its channels cannot be pruned; the message says why.
        """
        if not isinstance(pruning_ratios_or_idxs, float):
            self.DG.get_pruning_group(layer, pruning_fn, pruning_ratios_or_idxs).prune()
            return
        arguments.check_ratio("pruning_ratios_or_idxs", pruning_ratios_or_idxs)
        group = self.DG.whole_layer(layer, pruning_fn)
        scores = self.estimate_importance(group)
        if scores is None:
            raise PlanError(
                f"{self.DG.name_of(layer)}: the importance gives no scores for its group; pass indices instead"
            )
        unit = np.arange(len(scores))
        if isinstance(group, PlanGroup):
            unit = np.unique(self.engine.plan.unit[self.engine.now(group.born)], return_inverse=True)[1]
        means = unit_means(scores.detach().cpu(), unit)
        going = np.argsort(means, kind="stable")[: int(len(means) * pruning_ratios_or_idxs)]
        if len(going):
            places = np.flatnonzero(np.isin(unit, going)).tolist()
            idxs = [group[0].idxs[i] for i in places]
            self.DG.get_pruning_group(layer, pruning_fn, idxs).prune()

    def pruning_history(self) -> History:
        """All prunes so far: ``[root layer, whether its outputs went, indices]`` each."""
        return self.DG.pruning_history()

    def load_pruning_history(self, pruning_history: History) -> None:
        """Redo a history on the unpruned model."""
        self.DG.load_pruning_history(pruning_history)
