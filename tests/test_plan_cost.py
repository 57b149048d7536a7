"""The measurement of what plans cost runs, and says what there is no time for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plan_cost


def test_every_column_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    assert plan_cost.main(["conv1d", "convnext_tiny", "--small", "--rounds", "1", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == ["| model", "|" + 10 * "---|", *(
        "| conv1d", "| convnext_tiny"
    )]
    for found in json.loads(path.read_text())["models"]:
        assert set(found["ms"]) == set(plan_cost.COLUMNS)
        assert all(taken > 0 for taken in found["ms"].values()), found


def test_torch_pruning_that_fails_is_said_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("at last")

    monkeypatch.setattr(plan_cost, "torch_prunings", fails)
    assert plan_cost.main(["conv1d", "--small", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| none | none | none |" in out
    assert "conv1d: Torch-Pruning: ZeroDivisionError: at last" in out


def test_unknown_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan_cost.main(["resnet17"])
    assert "no such model: resnet17" in capsys.readouterr().err
