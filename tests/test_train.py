from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from rich.console import Console
from torch import Tensor, nn

import pat_fast
from pat_fast import train as training
from pat_fast.config import SchedulerConfig, TrainConfig, load_config
from pat_fast.data import batches, load_splits
from pat_fast.errors import ConfigError, PatError
from pat_fast.measure import count_macs, count_params, evaluating, measure_latency
from pat_fast.models import resnet20
from pat_fast.plotting import plot_run
from pat_fast.runlog import Record, RunLog, human, run_directory

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"factory": "pat_fast.models:resnet20", "args": {"width": 4}},
    "data": {
        "name": "digits",
        "size": 8,
        "batch_size": 128,
        "test_fraction": 0.4,
        "val_fraction": 0.1,
        "augment": {"shift": 1},
    },
    "optimizer": {"name": "sgd", "lr": 0.05, "nesterov": True, "weight_decay": 1e-4},
    "scheduler": {"name": "cosine", "warmup_epochs": 0.5},
    "epochs": 3,
    "device": "cpu",
    "threads": 1,
    "pruning": {"start_epoch": 1, "end_epoch": 2, "target_sparsity": 0.3, "reg_strength": 1e-3},
}
SIDE = {"accuracy", "params", "macs", "latency_ms"}


class Breakable(nn.Module):
    """A network of one linear layer with settings that break a run in one way each."""

    def __init__(self, classes: int = 10, train: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 16).requires_grad_(train)
        self.head = nn.Linear(16, classes).requires_grad_(train)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)) * self.scale)


def not_a_module() -> int:
    return 3


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_latency", partial(measure_latency, rounds=10, seconds=0.1))
        yield


def train(out: Path, **overrides: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run TINY with changes; its log and its summary."""
    config = load_config(TINY, TrainConfig, overrides=overrides)
    with (out.parent / f"{out.name}.txt").open("w") as text:
        assert training.run(config, out=out, log=RunLog(Console(file=text))) == out
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((out / "summary.json").read_text())


def timeless(records: list[dict[str, Any]], twin: str | None = None) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in records
        if twin in (None, record["twin"])
    ]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "first"
    train(out)
    return out


def test_the_folder_of_a_run(first: Path) -> None:
    names = {path.name for path in first.iterdir()}
    assert names == {"config.json", "log.jsonl", "model.safetensors", "plot.png", "summary.json"}
    assert (first / "plot.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["twin"]) for r in records] == [(e, t) for e in (1, 2, 3) for t in ("pruned", "dense")]
    pruned = [r for r in records if r["twin"] == "pruned"]
    assert pruned[0]["stage"] == "regularize"
    assert pruned[-1]["macs"] < pruned[0]["macs"]
    assert pruned[-1]["params"] < pruned[0]["params"]
    assert all(r["split"] == "val" and 0 <= r["accuracy"] <= 1 for r in records)


def test_the_summary_has_exactly_the_promised_keys(first: Path) -> None:
    summary = json.loads((first / "summary.json").read_text())
    assert set(summary) == {"dense", "pruned", "seconds"}
    assert set(summary["dense"]) == SIDE
    assert set(summary["pruned"]) == SIDE
    last = {r["twin"]: r for r in map(json.loads, (first / "log.jsonl").read_text().splitlines())}
    for twin in ("dense", "pruned"):
        assert summary[twin]["macs"] == last[twin]["macs"]
        assert summary[twin]["params"] == last[twin]["params"]
        assert summary[twin]["latency_ms"] > 0
        assert 0 < summary[twin]["accuracy"] <= 1
    assert summary["pruned"]["macs"] < summary["dense"]["macs"]
    assert summary["seconds"] > 0


def test_what_was_shown_has_no_control_codes(first: Path) -> None:
    shown = (first.parent / "first.txt").read_text()
    assert "\x1b" not in shown
    for part in (
        "1/3",
        "3/3",
        "regularize",
        "test accuracy",
        "MACs per image",
        "latency, batch 128",
        str(first),
    ):
        assert part in shown


def test_the_same_seed_gives_the_same_log_and_leaves_the_generators_alone(first: Path, tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    # The resolved configuration of a run is a configuration that repeats it.
    config = load_config(first / "config.json", TrainConfig)
    training.run(config, out=tmp_path / "again", log=RunLog(Console(quiet=True)))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    logs = [
        timeless([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        for out in (first, tmp_path / "again")
    ]
    assert logs[0] == logs[1]
    other, _ = train(tmp_path / "other", seed=1, epochs=1)
    assert timeless(other)[0]["train_loss"] != logs[0][0]["train_loss"]


def test_the_dense_twin_trains_as_if_alone(first: Path, tmp_path: Path) -> None:
    beside = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    alone, summary = train(tmp_path / "alone", pruning=None)
    assert [r | {"channels": None} for r in timeless(beside, "dense")] == timeless(alone)
    assert summary["pruned"] is None
    assert set(summary["dense"]) == SIDE


def test_until_the_first_prune_both_twins_are_the_same(tmp_path: Path) -> None:
    pruning = {"start_epoch": 1, "end_epoch": 2, "regularizer": None}
    records, _ = train(tmp_path / "run", pruning=pruning)
    # The prune comes after the second epoch's training and before its evaluation.
    for epoch, keys in ((1, ["train_loss", "train_accuracy", "loss", "accuracy", "lr"]), (2, ["train_loss"])):
        pruned, dense = (r for r in timeless(records) if r["epoch"] == epoch)
        assert [pruned[key] for key in keys] == [dense[key] for key in keys]


def test_the_saved_network_is_the_pruned_one(first: Path) -> None:
    summary = json.loads((first / "summary.json").read_text())
    model = pat_fast.load(first / "model.safetensors", resnet20(width=4))
    assert count_macs(model, torch.zeros(1, 1, 8, 8)) == summary["pruned"]["macs"]
    config = load_config(TINY, TrainConfig)
    test = batches(load_splits(config.data).test, config.data)
    assert training.evaluate(model, test, torch.device("cpu"))[1] == summary["pruned"]["accuracy"]


def test_without_a_dense_twin_there_is_still_its_cost(tmp_path: Path) -> None:
    records, summary = train(tmp_path / "run", dense_twin=False, epochs=2)
    assert {r["twin"] for r in records} == {"pruned"}
    assert summary["dense"]["accuracy"] is None
    assert summary["dense"]["macs"] > summary["pruned"]["macs"]
    assert (tmp_path / "run" / "plot.png").exists()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_mask_mode_and_other_optimizers(tmp_path: Path, name: str) -> None:
    overrides = {"optimizer": {"name": name, "lr": 2e-3}, "pruning.mode": "mask", "scheduler.name": "none"}
    records, summary = train(tmp_path / "run", **overrides)
    assert summary["pruned"]["macs"] < summary["dense"]["macs"]
    last = [r for r in records if r["twin"] == "pruned"][-1]
    assert last["macs"] == summary["pruned"]["macs"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.factory": "pat_fast.models:resnet2O"}, "did you mean 'resnet20'"),
        ({"model.factory": "no_such_module:f"}, "expected a module 'no_such_module'"),
        ({"model.args": {"wdith": 4}}, r"resnet20\(wdith=4\) to succeed, got TypeError"),
        ({"model": {"factory": f"{__name__}:not_a_module"}}, r"torch\.nn\.Module, got int"),
        ({"model.args": {"in_channels": 3}}, r"to take images of shape \(1, 1, 8, 8\), got RuntimeError"),
        ({"model.args": {"num_classes": 9}}, r"logits of shape \[1, 10\].*got \[1, 9\]"),
        ({"model": {"factory": f"{__name__}:Breakable", "args": {"train": False}}}, "parameters to train"),
        ({"pruning.layers_to_prune": ["layer4"]}, "layer4"),
        ({"data": {"name": "image_folder", "root": "nowhere"}}, r"data\.root: expected a folder"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PatError, match=message):
        train(tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: expected a GPU"):
        training.resolve(load_config(TINY, TrainConfig, overrides={"device": "cuda"}))
    assert training.resolve(load_config(TINY, TrainConfig, overrides={"device": "auto"})).device == "cpu"


def test_pruning_without_an_end_leaves_a_third_to_recover() -> None:
    config = load_config(TINY, TrainConfig, overrides={"epochs": 30, "pruning": {"target_sparsity": 0.3}})
    resolved = training.resolve(config)
    assert resolved.pruning is not None
    assert resolved.pruning.end_epoch == 20


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    config = load_config(TINY, TrainConfig)
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="expected a new or an empty folder, got a folder with files in it"):
        run_directory(config, tmp_path)
    with pytest.raises(ConfigError, match="got a file"):
        run_directory(config, tmp_path / "log.jsonl")
    one = run_directory(config.model_copy(update={"output_dir": str(tmp_path)}), None)
    assert one.name.startswith("tiny-")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_log(tmp_path: Path) -> None:
    model = {"factory": f"{__name__}:Breakable", "args": {"scale": 1e38}}
    with pytest.raises(PatError, match=r"expected a finite loss.*lower optimizer\.lr"):
        train(tmp_path / "run", model=model, pruning=None)
    assert (tmp_path / "run" / "log.jsonl").exists()


def test_an_interrupted_run_keeps_the_epochs_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = RunLog.epoch_line

    def interrupt(self: RunLog, records: list[Record]) -> None:
        line(self, records)
        if records[0].epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "epoch_line", interrupt)
    config = load_config(TINY, TrainConfig)
    with pytest.raises(KeyboardInterrupt):
        training.run(config, out=tmp_path / "run", log=RunLog(Console(quiet=True)))
    records = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(records) == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_processes_that_load_data_change_nothing(tmp_path: Path) -> None:
    # The parent has used the kernels' thread pool by the time the second epoch's batches are asked for.
    alone, _ = train(tmp_path / "alone", epochs=2)
    helped, _ = train(tmp_path / "helped", epochs=2, **{"data.workers": 1})
    assert timeless(alone) == timeless(helped)


def test_learning_rate_factors() -> None:
    cosine = SchedulerConfig(name="cosine", warmup_epochs=2, final_factor=0.1)
    factors = [training.lr_factor(cosine, epoch, 10) for epoch in (0, 1, 2, 6, 10, 11)]
    assert factors == pytest.approx([0, 0.5, 1, 0.55, 0.1, 0.1], abs=1e-6)
    steps = SchedulerConfig(name="step", milestones=[3, 6], gamma=0.5)
    assert [training.lr_factor(steps, epoch, 10) for epoch in (0, 2.9, 3, 6)] == [1, 1, 0.5, 0.25]
    assert training.lr_factor(SchedulerConfig(name="none"), 5, 10) == 1


def test_counts_of_a_known_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5)).train()
    model[0].eval()
    assert count_macs(model, torch.zeros(2, 3, 4, 4)) == 3 * 8 * 9 * 16 + 8 * 16 * 5
    assert count_params(model) == 3 * 8 * 9 + 8 + 8 * 16 * 5 + 5
    assert (model.training, model[0].training, model[2].training) == (True, False, True)
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    latency = measure_latency({"a": model, "b": model}, torch.zeros(2, 3, 4, 4), rounds=10)
    assert set(latency) == {"a", "b"}
    assert min(latency.values()) > 0


def test_resnet20_is_the_network_of_the_paper() -> None:
    model = resnet20(num_classes=10, in_channels=3)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    shortcuts = sum(p.numel() for name, p in model.named_parameters() if "shortcut" in name)
    # Without the projections of option B: the 0.27 M parameters of table 6.
    assert count_params(model) - shortcuts == 269_722
    layers = [
        m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in name
    ]
    assert len(layers) == 20


@pytest.mark.parametrize("twins", [("dense",), ("pruned",), ("pruned", "dense")])
def test_plots_of_short_and_of_half_runs(tmp_path: Path, twins: tuple[str, ...]) -> None:
    record = {
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "loss": 1.0,
        "accuracy": 0.5,
        "lr": 0.1,
        "seconds": 1.0,
    }
    records = [
        Record(epoch=1, twin=twin, stage="prune", split="test", channels=3, params=10, macs=100, **record)
        for twin in twins
    ]
    plot_run(records, tmp_path / "plot.png", title="short", subtitle="run")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_counts_for_people() -> None:
    assert [human(n) for n in (0, 999, 1000, 4960, 272_186, 10_130_048, 4.1e9, 2.5e15)] == [
        "0", "999", "1.00k", "4.96k", "272k", "10.1M", "4.10G", "2500T",
    ]  # fmt: skip
