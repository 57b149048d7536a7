"""The table of reach: what it calls pruned was pruned, and a plan that is wrong is found out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from benchmarks.reach.__main__ import main
from benchmarks.reach.models import KINDS, Family, build, families, out_of_scope
from benchmarks.reach.probe import FAILED, PRUNED, UNBUILT, Row, general, probe
from benchmarks.reach.report import closing, reasons_table, table
from benchmarks.reach.runner import run
from pat_fast.plan import Plan

BY_NAME = {family.name: family for family in families()}


def quiet(step: str) -> None:
    """Nobody wants to know the step."""


def test_every_mapping_contributes_and_classes_are_not_repeated() -> None:
    kinds = {family.kind for family in BY_NAME.values()}
    assert kinds == {kind for names in KINDS.values() for kind in names}
    assert len({f.architecture for f in BY_NAME.values()}) == len(BY_NAME)
    assert {"resnet", "bert", "llama", "t5", "gpt2"} <= set(BY_NAME)  # not under the names of look-alikes
    assert all(out_of_scope(BY_NAME[name]) is None for name in ("resnet", "bert", "llama", "t5"))


@pytest.mark.slow
def test_the_runner_prunes_three_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main(["--only", "resnet", "bert", "llama", "--json", str(path)]) == 0
    rows = {row["family"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["resnet", "bert", "llama"]
    for row in rows.values():
        assert row["status"] == PRUNED, row
        assert row["afresh"] == "="
        assert float(row["equal"]) < 1e-5
        assert 0.25 < 1 - row["weights_left"] / row["weights"] < 0.6  # 30 % of rows and of columns
        assert 0.8 < row["free"] / row["channels"] <= 1
    assert "3 of 3 families pruned (100.0%)" in capsys.readouterr().out


def test_a_plan_with_a_shifted_map_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import pat_fast

    honest = pat_fast.build_plan

    def shifted(model: Any, inputs: Any) -> Plan:
        plan = honest(model, inputs)
        tensors = list(plan.tensors)
        i = next(i for i, t in enumerate(tensors) if t.name.endswith("intermediate.dense.bias"))
        axis = replace(tensors[i].axes[0], channels=np.roll(tensors[i].axes[0].channels, 1))
        tensors[i] = tensors[i]._replace(axes=(axis,))
        return replace(plan, tensors=tuple(tensors))

    monkeypatch.setattr(pat_fast, "build_plan", shifted)
    row = probe(BY_NAME["bert"], 0.3, quiet)
    assert row.status == FAILED
    assert "masked against pruned: Mismatch: differ by" in row.detail


def test_what_cannot_be_built_is_not_counted() -> None:
    row = probe(Family("missing", "encoder", "NoSuchModel"), 0.3, quiet)
    assert row.status == UNBUILT
    assert "NoSuchModel" in row.detail
    assert closing([row], 0.3).endswith("at least 10% of the weights of its layers went")
    assert "0 of 0 families" in closing([row], 0.3)


def test_time_runs_out() -> None:
    (row,) = run([BY_NAME["bert"]], 0.3, timeout=0.01, jobs=1)
    assert row.status == UNBUILT
    assert row.detail.endswith(": not done after 0.01 s")  # how far it came is for the machine to say


def test_models_are_the_same_every_time() -> None:
    one, two = (build(BY_NAME["bert"]) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one[0].parameters(), two[0].parameters(), strict=True))
    assert (one[1]["input_ids"] == two[1]["input_ids"]).all()


def test_reasons_are_counted_over_families() -> None:
    assert general("no rule for this op (aten::topk in model.layers.3.mlp)") == "no rule for this op (aten::topk)"
    assert general("a.b.weight is multiplied in a Odd, a layer of unknown kind").startswith("weight is multiplied")
    frozen = [("no rule", "a", 4), ("no rule", "b", 5), ("other", "c", 1)]
    rows = [Row("x", "image", PRUNED, frozen=frozen), Row("y", "image", PRUNED, frozen=frozen[:1])]
    lines = reasons_table(rows).splitlines()
    assert lines[1].split() == ["2", "3", "13", "no", "rule", "x,", "y"]
    assert "2 x no rule; 1 x other" in table(rows)
