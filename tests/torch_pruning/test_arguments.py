"""Bad input is refused by name before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import nn

import pat_fast.torch_pruning as tp
from pat_fast import ConfigError, PatError, PlanError
from tests.helpers import Small, small_inputs
from tests.torch_pruning import nets

STRANGER = nn.Linear(3, 3)

REGULARISERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "strength of slimming": ("BNScalePruner", {"reg": -1.0}, "strength"),
    "strength of the group norm": ("GroupNormPruner", {"reg": -1.0}, "strength"),
    "alpha": ("GroupNormPruner", {"alpha": -1.0}, "alpha"),
    "growth": ("GrowingRegPruner", {"delta_reg": -1.0}, "delta"),
}

BAD: dict[str, tuple[Callable[[Small], dict[str, Any]], str]] = {
    "ratio": (lambda m: {"pruning_ratio": 1.5}, "pruning_ratio: expected a number from 0 to 1, got 1.5"),
    "max ratio": (lambda m: {"max_pruning_ratio": -0.1}, "max_pruning_ratio"),
    "head ratio": (lambda m: {"head_pruning_ratio": "a"}, "head_pruning_ratio"),
    "ratio of a layer": (lambda m: {"pruning_ratio_dict": {m.inner: 2}}, r"pruning_ratio_dict\[inner\]: expected"),
    "ratio of a stranger": (
        lambda m: {"pruning_ratio_dict": {STRANGER: 0.5}},
        "pruning_ratio_dict: expected modules of",
    ),
    "ratio of a tuple": (lambda m: {"pruning_ratio_dict": {(m.stem, STRANGER): 0.5}}, "Linear that is not a part"),
    "ignored stranger": (lambda m: {"ignored_layers": [STRANGER]}, "ignored_layers: expected modules of the model"),
    "ignored name": (lambda m: {"ignored_layers": ["head"]}, "ignored_layers.*'head'"),
    "ignored, not a list": (lambda m: {"ignored_layers": m.head}, "put it in brackets"),
    "ignored parameter": (lambda m: {"ignored_layers": [STRANGER.weight]}, "not one of the model's"),
    "heads": (lambda m: {"num_heads": {m.head: 0}}, r"num_heads\[head\]: expected a whole number, at least 1"),
    "heads of a stranger": (lambda m: {"num_heads": {STRANGER: 2}}, "num_heads: expected modules"),
    "groups": (lambda m: {"out_channel_groups": {m.stem: 1.5}}, "out_channel_groups"),
    "steps": (lambda m: {"iterative_steps": 0}, "iterative_steps: expected a whole number, at least 1"),
    "round": (lambda m: {"round_to": -2}, "round_to"),
    "schedule": (lambda m: {"iterative_pruning_ratio_scheduler": lambda r, n: [r]}, "expected 2 ratios"),
    "importance": (lambda m: {"importance": 3}, "importance: expected one of tp.importance's classes"),
    "customised, methods": (
        lambda m: {"customized_pruners": {nn.Linear: object()}},
        r"\[Linear\]: object lacks prune_out",
    ),
    "customised, methods for one layer": (
        lambda m: {"customized_pruners": {m.inner: object()}},
        r"customized_pruners\[inner\]: object lacks prune_out.*derive it from tp\.BasePruningFunc",
    ),
    "customised, one method": (lambda m: {"customized_pruners": {nn.Linear: Lacking()}}, "lacks get_in_channels"),
    "customised, class": (lambda m: {"customized_pruners": {nn.Linear: Lacking}}, "pass an instance"),
    "customised stranger": (
        lambda m: {"customized_pruners": {STRANGER: Lacking()}},
        "customized_pruners: expected modules",
    ),
    "unwrapped": (lambda m: {"unwrapped_parameters": [(STRANGER.weight, 0)]}, "parameter of the model"),
    "unwrapped, a number": (lambda m: {"unwrapped_parameters": 3}, "expected .parameter, dimension. pairs, got 3"),
    "heads, a number": (lambda m: {"num_heads": 3}, "num_heads: expected a dict whose keys are modules"),
    "ratios, a list": (lambda m: {"pruning_ratio_dict": [m.inner]}, "pruning_ratio_dict: expected a dict whose keys"),
    "roots by name": (lambda m: {"root_module_types": ["Conv2d"]}, "root_module_types: expected a list of types"),
    "roots, a number": (lambda m: {"root_module_types": 3}, "root_module_types: expected a list of types"),
    "unwrapped dimension": (lambda m: {"unwrapped_parameters": {m.stem.weight: 7}}, "no dimension 7"),
}


class Lacking:
    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return 1


def make(model: nn.Module, **arguments: Any) -> Any:
    importance = arguments.pop("importance", tp.importance.MagnitudeImportance())
    return tp.pruner.BasePruner(model, small_inputs(), importance, **arguments)


@pytest.mark.parametrize("what", BAD)
def test_refused(what: str) -> None:
    arguments, message = BAD[what]
    model = Small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        make(model, **arguments(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("what", REGULARISERS)
def test_regularisers_refused(what: str) -> None:
    kind, arguments, message = REGULARISERS[what]
    with pytest.raises(ConfigError, match=f"{message}: expected a number, at least"):
        getattr(tp.pruner, kind)(Small(), small_inputs(), tp.importance.MagnitudeImportance(), **arguments)


@pytest.mark.parametrize(
    ("layer", "operation", "idxs", "error", "message"),
    [
        ("inner", tp.prune_conv_out_channels, [16], ConfigError, r"inner: expected indices from 0 to 15, got \[16\]"),
        ("inner", tp.prune_conv_out_channels, [-1], ConfigError, "inner: expected indices"),
        ("inner", tp.prune_conv_out_channels, [], ConfigError, "inner: expected indices"),
        ("inner", tp.prune_conv_out_channels, [1.5], ConfigError, "inner: expected indices"),
        (
            "inner",
            tp.prune_linear_out_channels,
            [0],
            ConfigError,
            "inner is a Conv2d, which prune_out_channels of Linear",
        ),
        ("stem", tp.prune_conv_in_channels, [0], PlanError, "stem: .* cannot be pruned"),
        ("inner", tp.prune_conv_out_channels, list(range(16)), PatError, "."),
    ],
)
def test_groups_of_bad_indices(layer: str, operation: Any, idxs: Any, error: type[Exception], message: str) -> None:
    model = Small()
    pruner = make(model, ignored_layers=[model.head])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        pruner.DG.get_pruning_group(model.get_submodule(layer), operation, idxs).prune()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert pruner.pruning_history() == []


def test_a_layer_of_another_model() -> None:
    model = Small()
    with pytest.raises(ConfigError, match="Linear is not a layer of this model"):
        make(model).DG.get_pruning_group(STRANGER, tp.prune_linear_out_channels, [0])


def test_a_layer_that_the_forward_does_not_use() -> None:
    model = Small()
    model.spare = nn.Conv2d(3, 6, 1)
    pruner = make(model, ignored_layers=[model.head])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="spare: its channels cannot be pruned: no layer that can shrink makes them"):
        pruner.DG.get_pruning_group(model.spare, tp.prune_conv_out_channels, [0])
    with pytest.raises(PlanError, match=r"spare: .*cannot be pruned"):
        pruner.manual_prune_width(model.spare, tp.prune_conv_out_channels, [0])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("ratio", [-0.5, 1.5])
def test_manual_ratio_out_of_range(ratio: float) -> None:
    model = Small()
    with pytest.raises(ConfigError, match="pruning_ratios_or_idxs: expected a number from 0 to 1"):
        make(model).manual_prune_width(model.inner, tp.prune_conv_out_channels, ratio)
    assert model.inner.out_channels == 16


def test_a_history_of_another_model() -> None:
    model = Small()
    with pytest.raises(ConfigError, match="no layer 'somewhere'"):
        make(model).load_pruning_history([["somewhere", True, [0]]])


def test_a_group_of_an_earlier_model() -> None:
    model = Small()
    pruner = make(model, ignored_layers=[model.head])
    group = pruner.DG.get_pruning_group(model.inner, tp.prune_conv_out_channels, [0])
    group.prune()
    with pytest.raises(PatError, match="inner: the channels of this group are gone already"):
        group.prune()


def test_a_model_that_others_prune_between_steps() -> None:
    """What a step leaves is bound when the next one asks for it: it sees what happened since."""
    model = Small()
    pruner = make(model, iterative_steps=2, ignored_layers=[model.head])
    pruner.step()
    graph = original.DependencyGraph().build_dependency(model, small_inputs())
    graph.get_pruning_group(model.inner, original.prune_conv_out_channels, [0]).prune()
    assert model.inner.out_channels == 11
    pruner.step()
    assert model.inner.out_channels == 8
    assert model(small_inputs()).isfinite().all()


def test_deprecated_arguments() -> None:
    model = Small()
    with pytest.warns(UserWarning, match="ch_sparsity is deprecated"):
        pruner = make(model, ch_sparsity=0.25, ignored_layers=[model.head])
    pruner.step()
    assert model.inner.out_channels == 12


def test_steps_after_the_last_do_nothing() -> None:
    model = Small()
    pruner = make(model, ignored_layers=[model.head])
    pruner.step()
    with pytest.warns(UserWarning, match="exceed the maximum iterative steps"):
        pruner.step()
    assert model.inner.out_channels == 8


class Halving(tp.importance.MagnitudeImportance):
    """Gives the first layer other weights before it scores: what a prune cuts is what stands there then."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def score(self, binding: Any, order: Any = None) -> Any:
        self.layer.weight.data = self.layer.weight.data / 2
        return super().score(binding, order)


def test_an_importance_of_the_users_own_may_change_the_model_while_it_scores() -> None:
    changed, model = nets.Net(), nets.Net()
    model.load_state_dict(changed.state_dict())
    with torch.no_grad():
        model.conv1.weight /= 2
    nets.make(tp, changed, importance=Halving(changed.conv1)).step()
    nets.make(tp, model).step()
    assert changed.conv1.out_channels == 8
    assert torch.equal(changed.conv1.weight, model.conv1.weight)
