"""Every criterion by name: made, refused, used by the pruner in training, saved and taken up again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.config import PruneConfig, load_config
from pat_fast.criteria import CRITERIA, Function, GroupNorm, MACAware, Magnitude, Taylor, make_criterion
from pat_fast.plan import Binding
from tests.helpers import Small, small_inputs
from tests.training import adamw, same, train_one_epoch, weights

SPECS: list[str | dict[str, Any]] = [
    *CRITERIA,
    {"name": "magnitude", "p": 1, "reduction": "max", "normalizer": "gaussian", "bias": True},
    {"name": "taylor", "how": "signed", "window": 3, "decay": 1.0},
    {"name": "taylor", "how": "joint", "normalizer": "lamp"},
    {"name": "activation", "statistic": "apoz"},
    {"name": "activation", "statistic": "std", "normalizer": "standarization"},
    {"name": "hessian", "decay": 0.9, "reduction": "sum"},
    {"name": "mac_aware", "criterion": {"name": "movement"}, "how": "sum", "weight": 0.3},
    {"name": "random", "seed": 3},
]


@pytest.mark.parametrize("mode", ["prune", "mask"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_criterion_prunes_in_training(spec: Any, mode: str) -> None:
    config = load_config({"importance": spec, "mode": mode, "end_epoch": 3}, PruneConfig)
    model = Small(width=12)
    optimizer = adamw(model)
    pruner = pat.Pruner.from_config(model, config.model_dump())
    for _ in range(4):
        train_one_epoch(model, optimizer)
        report = pruner.step()
    stays = 16 if spec == "bn_scale" else 0  # a group without a norm
    assert report.channels[1] == max(14, stays + 1)
    pruner.finalize()
    assert model.stem.out_channels + model.inner.out_channels == report.channels[1]
    train_one_epoch(model, optimizer)


@pytest.mark.parametrize("mode", ["prune", "mask"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(spec: Any, mode: str) -> None:
    options = {"importance": spec, "mode": mode, "end_epoch": 4, "example_inputs": small_inputs()}
    model = Small()
    optimizer = adamw(model)
    pruner = pat.Pruner(model, 0.6, optimizer=optimizer, **options)
    for _ in range(2):
        train_one_epoch(model, optimizer)
        pruner.step()
    buffer = io.BytesIO()
    torch.save(pruner.state_dict(), buffer)
    buffer.seek(0)

    twin = copy.deepcopy(model)  # a model of the same shapes, its own optimizer
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    other = adamw(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = pat.Pruner(twin, 0.6, optimizer=other, **options)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.stage == pruner.stage
    generator = torch.get_rng_state()
    for m, o, p in ((model, optimizer, pruner), (twin, other, resumed)):
        torch.set_rng_state(generator)
        for _ in range(3):
            train_one_epoch(m, o)
            report = p.step()
        assert report.dense_channels == 28
    assert same(weights(model), weights(twin))
    assert resumed.done


def test_a_state_of_another_model_or_mode_is_refused() -> None:
    larger = pat.Pruner(Small(16), 0.5, end_epoch=2, example_inputs=small_inputs()).state_dict()
    with pytest.raises(pat.CheckpointError, match=r"the state: .* cannot be a pruned"):
        pat.Pruner(Small(), 0.5, end_epoch=2, example_inputs=small_inputs()).load_state_dict(larger)
    pruner = pat.Pruner(Small(), 0.5, end_epoch=2, example_inputs=small_inputs())
    state = pruner.state_dict()
    with pytest.raises(pat.ConfigError, match="mode: the state was saved with 'prune', expected 'mask'"):
        pat.Pruner(Small(), 0.5, end_epoch=2, example_inputs=small_inputs(), mode="mask").load_state_dict(state)
    with pytest.raises(pat.ConfigError, match="expected version 2, got 7"):
        pruner.load_state_dict({**state, "version": 7})


def test_a_function_is_a_criterion() -> None:
    def last_first(binding: Binding) -> Tensor:
        return -torch.arange(binding.plan.n_channels, dtype=torch.float32)

    model = Small()
    first = model.stem.weight.detach().clone()
    pat.Pruner(
        model, 0.5, "constant", importance=last_first, ranking="local", end_epoch=1, example_inputs=small_inputs()
    ).step()
    assert torch.equal(model.stem.weight, first[:6])
    with pytest.raises(pat.PlanError, match=r"expected scores \[14\] from the function, got shape \(1,\)"):
        Function(lambda binding: torch.ones(1)).score(pat.plan.bind(pat.build_plan(model, small_inputs()), model))


def test_names_make_what_they_say() -> None:
    assert isinstance(make_criterion("group_norm"), GroupNorm)
    made = make_criterion("magnitude", p=3)
    assert isinstance(made, Magnitude)
    assert made.p == 3
    mixed = make_criterion({"name": "mac_aware", "weight": 2})
    assert isinstance(mixed, MACAware)
    assert isinstance(mixed.criterion, GroupNorm)
    own = Taylor()
    assert make_criterion(own) is own


@pytest.mark.parametrize(
    ("given", "p", "message"),
    [
        ("tailor", None, r"importance: expected one of .* got 'tailor'; did you mean 'taylor'"),
        ({"how": "abs"}, None, r"importance: expected one of .* got None"),
        ({"name": ["taylor"]}, None, r"importance: expected one of .* got \['taylor'\]"),
        ({"name": "taylor", "hwo": "abs"}, None, r"'taylor' has no option 'hwo'; did you mean 'how'"),
        ({"name": "taylor", "how": "none"}, None, r"how: expected one of abs, joint, signed, got 'none'"),
        ("taylor", 2, r"p: expected None with the importance 'taylor', which has no exponent, got 2"),
        ({"name": "lamp", "p": 1}, 2, r"p: expected one exponent, got 2 and 1 in importance"),
        (Taylor(), 2, r"p: expected None beside an importance that is made already, got 2"),
        (Taylor, None, r"importance: expected one of .* got <class"),
        (nn.Linear, None, r"importance: expected one of .* got <class"),
        (None, None, r"importance: expected one of .* got None"),
    ],
)
def test_what_makes_no_sense_is_refused(given: Any, p: float | None, message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        make_criterion(given, p)
