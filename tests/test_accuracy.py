"""The accuracy benchmark: every kind of recipe ends at its MACs, runs resume, the table says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import cell as cells
from benchmarks.accuracy import recipes, table
from benchmarks.accuracy.cell import Cell
from benchmarks.accuracy.tasks import TASKS, Data, Task, digits
from pat_fast.models import ResNet


def tiny_data() -> Data:
    whole = digits(8, 1)
    images, labels = whole.train
    return Data((images[:100], labels[:100]), (images[100:150], labels[100:150]))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    def build() -> nn.Module:
        return ResNet(1, 10, 1, 8)

    monkeypatch.setitem(TASKS, "tiny", Task("tiny", build, tiny_data, 3e-3))
    return "tiny"


def test_every_kind_of_recipe_ends_at_its_macs(tiny: str) -> None:
    torch.set_num_threads(1)
    for method in ("dense", "tp one-shot", "tp iterative", "pat", "pat soft"):
        ratio = 1 if method == "dense" else 2
        record = cells.run(Cell(tiny, method, ratio, 0, 4))
        assert 0 <= record["accuracy"] <= 1
        assert 0.8 / ratio <= record["macs"] / record["dense_macs"] <= 1 / ratio, method
        assert record["peak_mb"] > 50
    again = cells.run(Cell(tiny, "pat soft", 2, 0, 4))
    assert (again["accuracy"], again["loss"]) == (record["accuracy"], record["loss"])


def test_curves_and_windows() -> None:
    assert recipes.cosine(0.05) == 1
    assert recipes.cosine(1.0) == pytest.approx(0)
    assert recipes.twice(0.525) == pytest.approx(1)
    assert recipes.window(30) == (6, 20)


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells are not trained: their accuracy is made up, and one method fails the first time."""
    seen: list[Cell] = []

    def run_one(cell: Cell) -> dict[str, Any]:
        seen.append(cell)
        record = vars(cell) | {"accuracy": 0.9 + 0.01 * cell.seed - (0.02 if cell.method == "pat" else 0)}
        record |= {"macs": 50, "dense_macs": 100, "params": 1, "dense_params": 4, "seconds": 2.0, "peak_mb": 300}
        record |= {"cpu_seconds": 1.0 if cell.method == "pat" else 3.0, "loss": 0.1}
        failed = cell.method == "tp iterative" and seen.count(cell) == 1 and cell.seed == 0
        return vars(cell) | {"error": "ValueError: no"} if failed else record

    monkeypatch.setattr(command, "run_one", run_one)
    return seen


def test_a_run_resumes_and_tries_again_what_failed(
    faked: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--tasks", "vit-digits8", "--ratios", "2", "--jobs", "1"]
    assert command.main([*arguments, "--seeds", "0"]) == 1
    assert len(faked) == 4
    with (tmp_path / "cells.jsonl").open("a") as file:
        file.write('{"task": "vit-dig')  # cut off
    assert command.main([*arguments, "--seeds", "0", "1"]) == 0
    assert len(faked) == 4 + 4 + 1
    assert command.main([*arguments, "--seeds", "0", "1"]) == 0
    assert len(faked) == 9
    text = capsys.readouterr().out
    assert "failed: ValueError: no" in text
    assert "| ViT, digits 8x8 | 2x fewer | pat | 88.50% ± 0.71 | 50.0% | 25.0% | 2.0 | 1.0 | 300 | 2 |" in text
    found = json.loads((tmp_path / "table.json").read_text())
    assert len(found["rows"]) == 4
    verdict = found["verdicts"][0]
    assert verdict["difference"] == pytest.approx(-0.02)
    assert not verdict["holds"]
    assert table.times_faster([verdict]) == "3.00x"
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert (tmp_path / "table.md").read_text().count("**worse**") == 1


def test_a_cell_has_a_process_of_its_own_which_may_fail() -> None:
    record = command.run_one(Cell("no such task", "pat", 2, 0, 1))
    assert record["error"] == "KeyError: 'no such task'"
    assert record["method"] == "pat"


def test_quick_says_that_it_is_a_subset_of_the_full_run(faked: list[Cell], tmp_path: Path) -> None:
    command.main(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text().startswith("Quick: a subset of the cells")
    everything = {(c.task, c.method, c.ratio, c.seed) for c in command.full()}
    assert {(c.task, c.method, c.ratio, c.seed) for c in faked} < everything
    assert {c.method for c in command.full()} < set(recipes.METHODS)


def test_differences_within_the_spread_hold() -> None:
    def row(method: str, accuracy: float, spread: float) -> dict[str, Any]:
        shared = {"task": "vit-digits8", "ratio": 2, "seeds": 3, "cpu_seconds": 1.0}
        return shared | {"method": method, "accuracy": accuracy, "spread": spread}

    rows = [row("pat", 0.90, 0.003), row("tp one-shot", 0.904, 0.004), row("tp iterative", 0.8, 0.1)]
    assert [(v["best_tp"], v["holds"]) for v in table.verdicts(rows)] == [("tp one-shot", True)]
    rows[0]["accuracy"] = 0.899
    assert [v["holds"] for v in table.verdicts(rows)] == [False]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_tasks_are_real_and_can_be_pruned(name: str) -> None:
    data = TASKS[name].data()
    images, labels = data.train
    assert images.dtype == torch.float32
    assert len(images) == len(labels) > len(data.test[0]) > 100
    assert labels.unique().numel() == TASKS[name].build()(images[:2]).shape[1]
    record = cells.run(Cell(name, "pat", 8, 0, 3))
    assert record["macs"] <= record["dense_macs"] / 8
