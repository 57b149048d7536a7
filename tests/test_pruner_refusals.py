"""What the pruner refuses: arguments, models and inputs; nothing is changed then."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.arguments import REGULARIZERS
from pat_fast.criteria.registry import CRITERIA
from pat_fast.modes import MODES
from pat_fast.schedules import CURVES
from tests.helpers import Small, small_inputs
from tests.training import no_hooks_left, sgd, train_one_epoch, untouched


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with no_hooks_left():
        yield


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"target_sparsity": 1.0}, r"target_sparsity: expected a number in \[0, 1\), got 1.0"),
    ({"target_sparsity": -0.1}, r"target_sparsity: expected a number in \[0, 1\), got -0.1"),
    ({"target_sparsity": float("nan")}, r"target_sparsity: .* got nan"),
    ({"target_sparsity": "half"}, r"target_sparsity: .* got 'half'"),
    ({"mac_target": 0.0}, r"mac_target: expected a number in \(0, 1\], or None, got 0.0"),
    ({"mac_target": 1.5}, r"mac_target: .* got 1.5"),
    ({"start_epoch": 5, "end_epoch": 4}, r"end_epoch: expected at least start_epoch \(5\), got 4"),
    ({"start_epoch": -1}, r"start_epoch: expected a whole number, at least 0, got -1"),
    ({"start_epoch": "5"}, r"start_epoch: expected a whole number, at least 0, got '5'"),
    ({"interval": 0}, r"interval: expected a whole number, at least 1, got 0"),
    ({"round_to": 0}, r"round_to: expected a whole number, at least 1, got 0"),
    ({"round_to": 2.5}, r"round_to: .* got 2.5"),
    ({"min_channels": 0}, r"min_channels: expected a whole number, at least 1, got 0"),
    ({"schedule": "liner"}, r"schedule: expected one of linear, .* got 'liner'; did you mean 'linear'"),
    ({"unit": "batch"}, r"unit: expected one of epoch, step, got 'batch'"),
    ({"unit": "step", "auto": False}, r"unit: expected 'epoch' with auto=False, got 'step'"),
    ({"mode": "masked"}, r"mode: expected one of prune, mask, soft, hybrid, got 'masked'; did you mean 'mask'\?"),
    ({"ranking": "locale"}, r"ranking: expected one of global, local, .*, got 'locale'; did you mean 'local'"),
    ({"ranking": None}, r"ranking: expected one of global, local, .*, got None"),
    ({"importance": "groupnorm"}, r"importance: expected one of group_norm, .*, got 'groupnorm'; did you mean"),
    ({"importance": 3}, r"importance: expected one of 'group_norm', .* or an object with score\(binding\), got 3"),
    ({"regularizer": "group"}, r"regularizer: expected one of group_norm, .* got 'group'; did you mean 'group_norm'"),
    ({"regularizer": 3}, r"regularizer: expected 'group_norm', .* None or an object with apply\(\), got 3"),
    ({"reg_strength": -1e-4}, r"strength: expected a number, at least 0, got -0.0001"),
    ({"reg_strength": 1e-3, "regularizer": pat.regularizers.GroupNormRegularizer()}, r"reg_strength: .* a GroupNorm"),
    ({"reg_strength": 1e-3, "regularizer": None}, r"reg_strength: expected no strength without a regulariser, got"),
    ({"reg_strength": 1e-3, "regularizer": {"name": "growing", "strength": 2e-3}}, r"got 0.001 and 0.002"),
    ({"schedule": lambda t: 2 * t}, r"schedule: the curve must return a fraction in 0 .. 1, got 1.2 at epoch 6"),
    ({"schedule": lambda t: "all"}, r"schedule: the curve must return a fraction in 0 .. 1, got 'all' at epoch 1"),
    ({"schedule": lambda t: 0.9 - t / 2}, r"schedule: the curve must not fall, got 0.8 at epoch 2 after 0.85"),
    ({"verify": "no"}, r"verify: expected true or false, got 'no'"),
    ({"auto": 0}, r"auto: expected true or false, got 0"),
    ({"p": 0}, r"p: expected a positive number"),
    ({"p": float("nan")}, r"p: expected a positive number \(1 or 2, say\), got nan"),
    ({"reg_strength": float("nan")}, r"strength: expected a number, at least 0, got nan"),
    ({"regularizer": {"name": "group_norm", "bias": "yes"}}, r"bias: expected true or false, got 'yes'"),
    ({"regularizer": {"name": "growing", "bias": 1}}, r"bias: expected true or false, got 1"),
    ({"regularizer": {"name": "bn_scale", "group_lasso": "no"}}, r"group_lasso: expected true or false, got 'no'"),
    ({"importance": {"name": "random", "seed": 2**64}}, r"seed: expected a whole number of 64 bits, or None, got 1844"),
    ({"schedule": "one_shot", "end_epoch": 5}, r"end_epoch: expected None with 'one_shot', which prunes at .*, got 5"),
    ({"schedule": {"name": "milestones", "at": 3}}, r"at: expected rising numbers in \(0, 1\], got 3"),
    ({"schedule": {"name": "milestones", "fractions": 1}}, r"fractions: expected 4 rising numbers .* got 1"),
    ({"layers_to_prune": ["iner"]}, r"layers_to_prune: 'iner' matches no layer .* did you mean 'inner'"),
    ({"layers_to_prune": []}, r"layers_to_prune: expected at least one name, got an empty list"),
    ({"layers_to_prune": "inner"}, r"layers_to_prune: expected a list of layers, got 'inner'"),
    ({"ignored_layers": ["haed"]}, r"ignored_layers: 'haed' matches no layer .* did you mean 'head'\?"),
    ({"ignored_layers": [nn.Linear(1, 1)]}, r"ignored_layers: Linear is not a part of the model"),
    ({"optimizer": "sgd"}, r"optimizer: expected a torch.optim.Optimizer, got str"),
    ({"optimizer": []}, r"optimizer: 9 of the model's 9 trained parameters are not in it \(such as stem.weight\)"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
@pytest.mark.parametrize("inputs", [None, small_inputs()])
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str, inputs: Tensor | None) -> None:
    model = Small()
    optimizer = sgd(model)
    train_one_epoch(model, optimizer)
    untouched(model, optimizer, pat.ConfigError, message, lambda: pat.Pruner(model, example_inputs=inputs, **arguments))


@pytest.mark.parametrize("thing", [None, 3, "model", nn.Linear, [nn.Linear(1, 1)]])
def test_not_a_module(thing: Any) -> None:
    with pytest.raises(pat.ConfigError, match=r"model: expected a torch.nn.Module, got \w+"):
        pat.Pruner(thing)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 5, 8, 8), r"forward fails on the example inputs \(\(2, 5, 8, 8\)\): RuntimeError"),
        ((small_inputs(), small_inputs()), r"forward fails on the example inputs \(\(4, 3, 8, 8\), \(4, 3, 8, 8\)\):"),
        ({"y": small_inputs()}, r"unexpected keyword argument 'y'"),
        (3, r"forward fails on the example inputs \(int\)"),
    ],
)
def test_inputs_that_do_not_fit(inputs: Any, message: str) -> None:
    model = Small()
    optimizer = sgd(model)
    untouched(model, optimizer, pat.PlanError, message, lambda: pat.Pruner(model, example_inputs=inputs))


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Sequential(nn.ReLU()), torch.randn(2, 3), r"nothing of this model can be pruned; it has no layers"),
        (nn.Sequential(nn.Linear(3, 2)), torch.randn(2, 3), r"can be pruned; 0: is an output of the model"),
    ],
)
def test_a_model_without_prunable_layers(model: nn.Module, inputs: Tensor, message: str) -> None:
    optimizer = torch.optim.SGD([*model.parameters(), torch.zeros(1)], lr=0.1)
    untouched(model, optimizer, pat.PlanError, message, lambda: pat.Pruner(model, example_inputs=inputs))


def test_layers_that_hold_nothing_to_prune() -> None:
    with pytest.raises(pat.PlanError, match=r"nothing of this model can be pruned; head: is an output .*outer: not"):
        pat.Pruner(Small(), example_inputs=small_inputs(), layers_to_prune=["head"])


def test_a_step_before_any_forward() -> None:
    model = Small()
    optimizer = sgd(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    for act in (pruner.step, pruner.finalize, pruner.regularize, lambda: pruner.DG):
        untouched(model, optimizer, pat.PlanError, r"no forward of the model was seen yet.*run one batch first", act)
    train_one_epoch(model, optimizer)
    assert pruner.step().channels == (28, 14)


class Constant:
    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = torch.tensor(scores)

    def score(self, binding: Any) -> Tensor:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0] * 3, r"one score per channel \(28\).*got shape \(3,\)"),
        ([float("nan")] * 28, r"with 28 NaN; did the training diverge"),
    ],
)
def test_scores_that_make_no_sense(scores: list[float], message: str) -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, example_inputs=small_inputs(), importance=Constant(scores), regularizer=None)
    untouched(model, sgd(model), pat.PlanError, message, pruner.step)
    assert pruner.epoch == 0


def test_a_model_that_another_pruner_changed_is_refused_by_name() -> None:
    model = Small()
    one, other = (pat.Pruner(model, 0.5, end_epoch=3, example_inputs=small_inputs()) for _ in range(2))
    one.step()
    with pytest.raises(pat.PlanError, match=r"was changed .*by another pruner"):
        other.step()


def test_a_schedule_that_comes_to_fall_is_refused_at_its_step() -> None:
    """A function that goes by the training may be flat when the pruner is made."""
    model, due = Small(), [0.5]
    pruner = pat.Pruner(model, 0.8, schedule=lambda _: due[0], example_inputs=small_inputs(), end_epoch=5)
    pruner.step()
    due[0] = 0.25
    untouched(model, sgd(model), pat.ConfigError, r"must not fall, got 0.25 at epoch 2 after 0.5", pruner.step)
    assert pruner.epoch == 1
    due[0] = 0.75
    before = pruner.plan.n_channels  # type: ignore[union-attr]
    pruner.step()
    assert pruner.plan.n_channels < before  # type: ignore[union-attr]


NUMBERS = {"int", "float", "int | None", "float | None"}
CHOICES: dict[str, Any] = {"importance": CRITERIA, "regularizer": REGULARIZERS, "schedule": CURVES, "mode": MODES}


def numbers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every option of a pruner and of its parts that is a number, with True for its value, and its name."""
    for name, parameter in inspect.signature(pat.Pruner).parameters.items():
        if parameter.annotation in NUMBERS:
            yield name, {name: True}
    for argument, known in CHOICES.items():
        for name, cls in known.items():
            for option, parameter in inspect.signature(cls).parameters.items():
                if parameter.annotation in NUMBERS:
                    yield option, {argument: {"name": name, option: True}}
    yield from ((f.name, {"stability": {f.name: True}}) for f in fields(pat.Stability) if f.type in NUMBERS)
    yield from (("macs", {"target": {"macs": True}}), ("batch", {"target": {"latency_ms": 4.0, "batch": True}}))
    yield from (("max_ratio", {"max_ratio": True}), ("head", {"layer_ratios": {"head": False}}))


@pytest.mark.parametrize(("name", "arguments"), [pytest.param(*pair, id=str(pair[1])) for pair in numbers()])
def test_true_and_false_are_no_numbers(name: str, arguments: dict[str, Any]) -> None:
    for value in (True, False):
        given = {k: {**v, name: value} if isinstance(v, dict) else value for k, v in arguments.items()}
        with pytest.raises(pat.ConfigError, match=rf"{'strength' if name == 'reg_strength' else name}: .*got {value}"):
            pat.Pruner(Small(), **given)


def test_enough_numbers_are_tried() -> None:
    assert len(list(numbers())) > 30
