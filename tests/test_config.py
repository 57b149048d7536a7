from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pat_fast.config import PruneConfig, TrainConfig, load_config, parse_overrides
from pat_fast.errors import ConfigError

AS_IT_STANDS = {
    "start_epoch": 5,
    "end_epoch": 50,
    "interval": 5,
    "global_sparsity": 0.5,
    "mac_target": 0.7,
    "layers_to_prune": ["conv1", "layer2", "layer3"],
}
EXAMPLES = Path(__file__).parent.parent / "examples"
TRAIN = {"model": {"factory": "pat_fast.models:resnet20"}, "epochs": 3}


def problem(data: Any, cls: Any = PruneConfig, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(data, cls, **kwargs)
    return str(caught.value)


def test_the_json_of_the_design_is_accepted_as_it_stands() -> None:
    config = load_config(AS_IT_STANDS, PruneConfig)
    assert config.pruner_kwargs() | {"target_sparsity": 0.5, "mac_target": 0.7} == config.pruner_kwargs()
    assert (config.start_epoch, config.end_epoch, config.interval) == (5, 50, 5)
    assert config.layers_to_prune == ["conv1", "layer2", "layer3"]
    assert "version" not in config.pruner_kwargs()
    assert load_config(EXAMPLES / "prune_config.json", PruneConfig) == config


def test_the_example_of_a_run_is_valid() -> None:
    config = load_config(EXAMPLES / "digits.json", TrainConfig)
    assert config.pruning is not None
    assert config.pruning.mac_target == 0.5
    assert config.dense_twin


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"start_epch": 1}, ["start_epch: unknown key, got 1", "did you mean 'start_epoch'"]),
        ({"global_sparsty": 0.1}, ["did you mean 'global_sparsity'"]),
        ({"qqq": 1}, ["qqq: unknown key", "known keys are", "reg_strength"]),
        ({"target_sparsity": 1.0}, ["target_sparsity: expected a number in [0, 1)", "got 1.0"]),
        ({"global_sparsity": 1.5}, ["global_sparsity: expected a number in [0, 1)", "got 1.5"]),
        ({"target_sparsity": -0.1}, ["in [0, 1)", "got -0.1"]),
        ({"target_sparsity": "0.5"}, ["in [0, 1)", 'got "0.5"']),
        ({"target_sparsity": float("nan")}, ["in [0, 1)", "got NaN"]),
        ({"target_sparsity": 0.2, "global_sparsity": 0.3}, ["only one of", "0.2 and 0.3"]),
        (
            {"start_epoch": 5, "end_epoch": 4},
            ["end_epoch: expected an integer >= start_epoch, which is 5; got 4"],
        ),
        ({"start_epoch": -1}, ["start_epoch: expected an integer >= 0", "got -1"]),
        ({"interval": 0}, ["interval: expected an integer >= 1", "got 0"]),
        ({"interval": True}, ["got true"]),
        ({"interval": 1.5}, ["got 1.5"]),
        ({"target": {"flops": 0.5}}, ["target: expected one of channels, params, macs, ", "got 'flops'"]),
        ({"target": {}}, ["target: expected one of channels, params, macs, ", "as {'macs': 0.5}, got {}"]),
        ({"target": {"macs": -1}}, ["target: macs: expected a fraction of the dense model in (0, 1]"]),
        ({"target": {"macs": 0.5}, "target_sparsity": 0.3}, ["target: expected none beside target_sparsity (0.3)"]),
        ({"target": {"macs": 0.5}, "mac_target": 0.3}, ["mac_target: expected None beside a target in MACs"]),
        ({"mac_target": 0}, ["mac_target: expected a number in (0, 1]", "got 0"]),
        ({"mac_target": 1.01}, ["got 1.01"]),
        ({"schedule": "liner"}, ["expected one of linear, cubic", "got 'liner'", "did you mean 'linear'"]),
        ({"schedule": {"name": "cosine", "power": 2}}, ["schedule: 'cosine' has no option 'power'; it has none"]),
        ({"schedule": {"name": "polynomial", "power": 0}}, ["schedule: power: expected a number above 0, got 0"]),
        ({"schedule": "one_shot", "start_epoch": 3, "end_epoch": 9}, ["end_epoch: expected null with 'one_shot'"]),
        ({"unit": "batch"}, ["unit: expected 'epoch' or 'step'"]),
        ({"mode": "masks"}, ["did you mean 'mask'"]),
        ({"ranking": 3}, ["ranking: expected 'global'", "got 3"]),
        ({"round_to": 0}, ["round_to: expected a whole number, at least 1, got 0"]),
        ({"round_to": "fast"}, ["round_to: expected an integer >= 1", "'auto'", 'got "fast"']),
        ({"round_to": 1.5}, ["round_to: expected an integer >= 1", "got 1.5"]),
        ({"round_to": {"Conv2d": 0}}, ["round_to: Conv2d: expected a whole number, at least 1, got 0"]),
        ({"ranking": [["a"], 3]}, ["ranking: expected 'global'", 'got [["a"], 3]']),
        ({"layer_ratios": {"a": 1}}, ["layer_ratios: a: expected a number in [0, 1), got 1"]),
        ({"layer_ratios": {"a": 0.5}, "target": {"params": 0.5}}, ["layer_ratios: expected none beside a target"]),
        ({"max_ratio": 2}, ["max_ratio: expected a number in [0, 1]", "got 2"]),
        ({"max_ratio": "half"}, ["max_ratio: expected a number in [0, 1]", 'got "half"']),
        ({"target": {"latency_ms": 0}}, ["target: latency_ms: expected milliseconds above 0, got 0"]),
        ({"target": {"latency": 1.5}}, ["target: latency: expected a fraction of the dense model's latency in (0, 1]"]),
        ({"target": {"macs": 0.5, "batch": 2}}, ["target: expected a batch beside a latency alone"]),
        ({"min_channels": 0}, ["min_channels: expected an integer >= 1"]),
        ({"layers_to_prune": "conv1"}, ["layers_to_prune: expected a list", 'got "conv1"']),
        ({"layers_to_prune": []}, ["one or more layer names", "got []"]),
        ({"ignored_layers": ["a", 3]}, ["ignored_layers[1]: expected a list of layer names", "got 3"]),
        ({"p": 0}, ["p: expected a number > 0", "got 0"]),
        ({"importance": "taylor", "p": 1}, ["p: expected None with the importance 'taylor', which has no exponent"]),
        ({"importance": "tailor"}, ["importance: expected one of group_norm, ", "got 'tailor'; did you mean 'taylor'"]),
        ({"importance": {"name": "taylor", "decy": 1}}, ["importance: 'taylor' has no option 'decy'", "'decay'"]),
        ({"importance": {"name": "taylor", "decay": 2}}, ["importance: decay: expected a number in [0, 1], got 2"]),
        ({"importance": {"decay": 1}}, ["importance: expected one of", "got None"]),
        ({"regularizer": "l1"}, ["regularizer: expected one of group_norm, bn_scale, growing, ", "got 'l1'"]),
        ({"regularizer": {"name": "growing", "dleta": 1}}, ["regularizer: 'growing' has no option 'dleta'", "'delta'"]),
        ({"regularizer": {"name": "growing", "delta": -1}}, ["regularizer: delta: expected a number, at least 0"]),
        ({"reg_strength": -1e-4}, ["reg_strength: expected a number >= 0"]),
        ({"version": 2}, ["version: expected the configuration version 1, got 2"]),
    ],
)
def test_bad_pruning_sections_say_what_was_expected_and_what_came(data: dict[str, Any], parts: list[str]) -> None:
    message = problem(data)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model": None}, ["model: expected an object with 'factory'", "got null"]),
        ({"model.factory": "resnet20"}, ["model.factory: expected 'package.module:callable'", "'resnet20'"]),
        ({"epochs": 0}, ["epochs: expected an integer >= 1, got 0"]),
        ({"epoch": 3}, ["epoch: unknown key", "did you mean 'epochs'"]),
        ({"data.name": "digit"}, ["data.name: expected 'digits', 'image_folder'", "did you mean 'digits'"]),
        ({"data.name": "image_folder"}, ["data.root: expected a folder"]),
        ({"data.root": "x"}, ["data.root: expected no such key with the data 'digits'"]),
        (
            {"data.val_fraction": 0.9},
            ["data.val_fraction: expected test_fraction + val_fraction below 1", "0.25 + 0.9"],
        ),
        ({"data.augment.shft": 1}, ["data.augment.shft: unknown key", "did you mean 'shift'"]),
        (
            {"data.name": "image_folder", "data.root": "x", "data.mean": [0.5]},
            ["data.mean: expected 3 numbers"],
        ),
        (
            {"data.name": "image_folder", "data.root": "x", "data.std": [1, 0, 1]},
            ["data.std: expected numbers above 0"],
        ),
        ({"optimizer.name": "adamm"}, ["did you mean 'adam' or 'adamw'"]),
        ({"optimizer.name": "adam", "optimizer.momentum": 0.5}, ["optimizer.momentum: expected no such key"]),
        ({"optimizer.lr": 0}, ["optimizer.lr: expected a number > 0"]),
        (
            {"optimizer.name": "adam", "optimizer.betas": [0.9]},
            ["optimizer.betas: expected a list of two numbers"],
        ),
        (
            {"optimizer.momentum": 0, "optimizer.nesterov": True},
            ["optimizer.nesterov: expected a momentum above 0"],
        ),
        ({"scheduler.name": "step"}, ["scheduler.milestones: expected one or more epochs"]),
        ({"device": "gpu"}, ["device: expected 'auto', 'cpu' or 'cuda'"]),
        ({"pruning.end_epoch": -1}, ["pruning.end_epoch: expected an integer >= start_epoch"]),
        (
            {"pruning.start_epoch": 3, "pruning.end_epoch": 1},
            ["pruning.end_epoch: expected", "which is 3; got 1"],
        ),
        ({"name": "a/b"}, ["name: expected a name of letters"]),
    ],
)
def test_bad_training_configurations_name_the_key_by_its_path(change: dict[str, Any], parts: list[str]) -> None:
    message = problem(TRAIN, TrainConfig, overrides=change)
    for part in parts:
        assert part in message


def test_every_problem_is_listed_in_one_error() -> None:
    message = problem({"epochs": 0, "pruning": {"start_epch": 1}, "seed": "x"}, TrainConfig)
    head, *rest = message.splitlines()
    assert head == "4 problems in the configuration:"
    assert {line.split(":")[0].strip() for line in rest} == {"epochs", "pruning.start_epch", "seed", "model"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "digits.json"
    path.write_text(json.dumps(TRAIN))
    assert load_config(path, TrainConfig).epochs == 3
    assert load_config(str(path), TrainConfig).epochs == 3
    assert "no such file; did you mean 'digits.json'?" in problem(tmp_path / "digit.json", TrainConfig)
    assert "got a folder" in problem(tmp_path, TrainConfig)
    path.write_text('{"epochs": 3,\n  "seed": }')
    assert "line 2, column 11: expected JSON" in problem(path, TrainConfig)
    path.write_text('{"epochs": 3, "epochs": 4}')
    assert "expected each key once, got 'epochs' twice" in problem(path, TrainConfig)
    path.write_text("[1]")
    assert "expected a JSON object {...}, got [1]" in problem(path, TrainConfig)
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problem(path, TrainConfig)
    assert "expected a path or a dict, got list" in problem([1], PruneConfig)  # type: ignore[arg-type]
    path.write_text("[" * 100_000)
    assert "expected" in problem(path, TrainConfig)


def test_a_written_configuration_reads_back_as_itself() -> None:
    configs: list[dict[str, Any]] = [
        TRAIN | {"pruning": AS_IT_STANDS},
        TRAIN | {"data": {"name": "image_folder", "root": "x"}, "optimizer": {"name": "adamw", "lr": 1e-3}},
        TRAIN | {"data": {"name": "a.b:c", "args": {"n": 3}}},
    ]
    for data in configs:
        config = load_config(data, TrainConfig)
        assert load_config(json.loads(config.model_dump_json()), TrainConfig) == config


def test_overrides_replace_and_the_source_is_not_changed() -> None:
    data: dict[str, Any] = TRAIN | {"pruning": dict(AS_IT_STANDS)}
    before = json.dumps(data)
    overrides = parse_overrides(["pruning.target_sparsity=0.25", "optimizer.lr=0.5", "name=x", "seed=3"])
    config = load_config(data, TrainConfig, overrides=overrides)
    assert config.pruning is not None
    assert config.pruning.target_sparsity == 0.25
    assert (config.optimizer.lr, config.name, config.seed) == (0.5, "x", 3)
    assert json.dumps(data) == before
    assert load_config(data, TrainConfig, overrides={"pruning": None}).pruning is None


@pytest.mark.parametrize("item", ["epochs", "=3", "a..b=1"])
def test_malformed_overrides(item: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides([item])


def test_an_override_below_a_plain_value_is_refused() -> None:
    assert "expected 'epochs' to be an object" in problem(TRAIN, TrainConfig, overrides={"epochs.a": 1})


def test_importing_the_package_does_not_import_pydantic() -> None:
    code = "import sys, pat_fast; sys.exit('pydantic' in sys.modules or 'typer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
