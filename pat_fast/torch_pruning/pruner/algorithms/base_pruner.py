"""Torch-Pruning's pruner over pat_fast's plan: one pass for the scores, one ranking, one surgery for a step."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_pruning import ops
from torch_pruning.pruner.algorithms.base_pruner import *  # noqa: F403
from torch_pruning.pruner.algorithms.base_pruner import BasePruner as _Original
from torch_pruning.pruner.algorithms.scheduler import linear_scheduler

from ....errors import ConfigError, PlanError, check
from ....plan.types import BoolArray
from ....selection import protected_units, unit_scores
from ...engine import arguments, layerwise
from ...engine.arguments import deprecated
from ...engine.deciding import Deciding, of_channels
from ...engine.graph import History, LiveGraph, Noted
from ...engine.groups import PlanGroup
from ...engine.planned import Decision, unit_means
from ...engine.shaping import Spec
from ...engine.state import Engine

ROOTS = (ops.TORCH_CONV, ops.TORCH_LINEAR, ops.TORCH_LSTM)
# The parts of Torch-Pruning's loop over groups; a class that has one of its own is given that loop.
LOOP = (
    "_prune",
    "_check_pruning_ratio",
    "_is_atten_group",
    "_get_channel_groups",
    "_downstream_node_as_root_if_attention",
    "_round_to",
)


class BasePruner(Deciding, _Original):
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
        kinds = "a list of types of layers"
        check("root_module_types", root_module_types, lambda v: all(isinstance(kind, type) for kind in v), kinds)
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
        self._begin()
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
        self._counted = self._counts()
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
        # 0 for the operations between layers, which each trace makes anew
        self.layer_init_out_ch: dict[nn.Module, int | None] = defaultdict(int)
        self.layer_init_in_ch: dict[nn.Module, int | None] = defaultdict(int)
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
        for number in self._open_groups():
            group = plan.groups[number]
            attention = self.engine.attentions.get(group.root)
            self._units_at_first[group.root] = int(plan.group_units[number])
            if attention is not None:
                self._heads_at_first[group.root] = attention.heads
            if attention is not None and not attention.whole:
                self._units_at_first[group.root] = group.channels // attention.heads - attention.extras
        self._heads = dict(self._heads_at_first)
        self.initial_total_channels = sum(self._units_at_first.values())
        self.initial_total_heads = sum(self._heads_at_first.values())
        self._check_heads()

    def _check_heads(self) -> None:
        """Say of which attentions in ``num_heads`` nothing will go, and why."""
        known = {name: a for a in self.engine.attentions.values() for name in a.projections}
        reasons = {frozen.layer: frozen.reason for frozen in self.engine.plan.frozen}
        heads_go = self.prune_num_heads and (self.head_pruning_ratio > 0 or bool(self.head_pruning_ratio_dict))
        for layer in self.num_heads:
            name = self.DG.name_of(layer)
            if name in known and not heads_go and known[name].whole and self.prune_head_dims and self.pruning_ratio > 0:
                what = "its heads go whole or not at all (a rotary embedding, say): prune_num_heads=True prunes them"
            elif name in reasons and (heads_go or self.prune_head_dims):
                what = f"its heads stay as they are: {reasons[name]}"
            else:
                continue
            warnings.warn(f"num_heads: {name}: {what}", stacklevel=4)

    def _prepare(self) -> None:
        """What does not change with the weights is worked out before the first step."""
        for group in self.engine.plan.groups:
            self.DG.maker.root(group)
        if not self.isomorphic and not self._layer_to_scope:  # these scopes need Torch-Pruning's graph
            self._standing().prepare()
        if callable(getattr(self.importance, "prepare", None)):
            self.importance.prepare(self.engine.binding)
        _ = self.engine.axes, self.engine.references(), layerwise.any_foreign(self.DG)

    # Steps

    def step(self, interactive: bool = False) -> Any:
        """Prune to the next ratio of the schedule; with ``interactive``, yield the groups to prune instead.

        Raises:
            ConfigError: heads or groups of a layer are others than when the pruner was made.
            SurgeryError: the prune was refused; model and optimizers are as they were, the step is not counted.
        """
        changed = self._has_own_loop()
        if not changed:
            self._check_counts()
        self.current_step += 1
        if interactive:
            return self._prune() if changed else self._yield_groups()
        try:
            if changed:
                for group in self._prune():
                    group.prune()
            else:
                self._prune_all()
        except BaseException:
            self.current_step -= 1
            raise
        return None

    def _counts(self) -> dict[str, dict[nn.Module, int]]:
        """Heads and groups of layers, as they are now."""
        return {name: dict(getattr(self, name)) for name in ("num_heads", "out_channel_groups", "in_channel_groups")}

    def _check_counts(self) -> None:
        """The plan was made with them."""
        for name, before in self._counted.items():
            now = getattr(self, name)
            if now == before:
                continue
            layer = next(m for m in {**now, **before} if now.get(m) != before.get(m))
            raise ConfigError(
                f"{name}: expected what it was when the pruner was made ({before.get(layer)} for "
                f"{self.DG.name_of(layer) or type(layer).__name__}), got {now.get(layer)}; pass it to a new pruner"
            )

    def _has_own_loop(self) -> bool:
        """Whether the user's class (or object) has changed a part of Torch-Pruning's loop over groups."""
        return any(getattr(getattr(self, part), "__func__", None) is not getattr(BasePruner, part) for part in LOOP)

    def _downstream_node_as_root_if_attention(self, group: Any) -> Any:
        """See Torch-Pruning; an attention's group starts at its reader already."""
        starts_there = isinstance(group, PlanGroup) and not group.root.out and self._is_atten_group(group)[0]
        return group if starts_there else super()._downstream_node_as_root_if_attention(group)

    def _exceeded(self) -> bool:
        if self.current_step > self.iterative_steps:
            warnings.warn("Pruning exceed the maximum iterative steps, no pruning will be performed.", stacklevel=3)
            return True
        return False

    @torch.no_grad()
    def _prune_all(self) -> None:
        if self._exceeded():
            return
        engine = self.engine
        values, ahead = self._read()
        decision, loose = self._decide(values)
        lost = decision.lost()
        # Torch-Pruning's own OBDC keeps its sums by layer; what this package's gathers shrinks with the parameters.
        adjusts = hasattr(self.importance, "adjust_fisher") and not hasattr(self.importance, "accumulators")
        for stands in decision.of.in_order if adjusts else ():
            if lost[stands.own].any():
                gone = np.flatnonzero(lost[stands.own]).tolist()
                self.importance.adjust_fisher(self.DG.maker.whole(stands.number), gone)
        if lost.any():
            try:
                engine.prune(~lost, ahead)
            except PlanError:  # an axis that several groups share in part would be left empty
                engine.prune(~lost | self._spared(decision, lost), ahead)
        self.DG.note(Noted(decision.of, lost))
        for group in loose:
            group.prune()
        self._count_heads(decision)

    def _spared(self, decision: Decision, lost: BoolArray) -> BoolArray:
        """The best of every axis of what would be ``lost``: bool ``[N]``."""
        plan = self.engine.plan
        known = np.zeros(plan.n_channels)
        for stands in decision.of.every:
            if lost[stands.own].any():
                known[stands.own] = np.nan_to_num(decision.scores[stands.own].astype(np.float64))
        return protected_units(plan, unit_scores(plan, known), 1)[plan.unit]

    def _yield_groups(self) -> Iterator[Any]:
        if self._exceeded():
            return
        self.engine.current()
        with torch.no_grad():
            decision, loose = self._decide(self._scores())
        maker, engine = self.DG.maker, self.engine
        lost, born = decision.lost(), engine.born
        going = [s for s in decision.of.in_order if lost[s.own].any()]
        for stands in going:
            maker.structure(stands.number)  # while the graph is that of the model as it is
        lowered = engine.lowered
        for stands in going:
            engine.current()
            number = next((i for i, g in enumerate(engine.plan.groups) if g.root == stands.root), None)
            if engine.lowered == lowered:
                channels = engine.now(born[stands.own][lost[stands.own]])
            elif number is not None and engine.plan.groups[number].channels == stands.group.channels:
                # Another group was pruned by hand, layer by layer: this one is as it was, in a new plan.
                channels = engine.plan.groups[number].start + np.flatnonzero(lost[stands.own])
            else:
                raise PlanError("the model was changed by other means during an interactive step; call step() again")
            if number is None or not len(channels):
                continue
            self._count_heads(decision, stands.number)
            yield maker.part(number, channels)
        yield from loose

    def _count_heads(self, decision: Decision, only: int | None = None) -> None:
        """Note how many heads are left, of all attentions or of one group."""
        for stands in decision.of.every if decision.heads else ():
            heads = decision.heads.get(stands.number)
            if heads is None or stands.attention is None or only not in (None, stands.number):
                continue
            before = len(heads)
            left = before - int(heads.sum())
            self._heads[stands.root] = left
            for name in stands.attention.projections:
                layer = self.model.get_submodule(name)
                self.num_heads[layer] = self.num_heads[layer] * left // before
                self.out_channel_groups[layer] = self.num_heads[layer]
        if decision.heads:
            self._counted = self._counts()

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
        n = len(group.born if isinstance(group, PlanGroup) else group[0].idxs)
        scores, unit = of_channels(group, scores, n), np.arange(n)
        if isinstance(group, PlanGroup):
            unit = np.unique(self.engine.plan.unit[self.engine.now(group.born)], return_inverse=True)[1]
        means = unit_means(scores.numpy(), unit)
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
