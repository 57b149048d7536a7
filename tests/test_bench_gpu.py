"""The GPU benchmark runs, on the CPU here, and gives a wrong result no number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu
from pat_fast.backends import Backend, reference

QUICK = ["--device", "cpu", "--models", "tiny", "--dtypes", "float32", "--rounds", "1", "--only-ops"]


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.Clock, "copy_gbps", lambda clock: 10.0)


def rows(tmp_path: Path) -> tuple[int, list[dict[str, Any]]]:
    status = gpu.main([*QUICK, "--json", str(tmp_path / "new" / "result.json")])
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["machine"]["torch"] == torch.__version__
    return status, result["rows"]


def test_every_op_of_every_backend_gets_a_row(tmp_path: Path) -> None:
    status, found = rows(tmp_path)
    assert status == 0
    assert {row["op"] for row in found if row["backend"] == "reference"} == set(found_ops())
    for row in found:
        assert row["ms"] > 0
        assert row["share"] == pytest.approx(row["gbps"] / 10.0)


def found_ops() -> list[str]:
    return ["channel_reduce", "channel_reduce mul", "channel_axpy_", "channel_scale_", "channel_compact"]


@pytest.mark.parametrize("op", ["channel_reduce", "channel_scale_", "channel_compact"])
def test_a_wrong_result_gets_no_number(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.OPS[op]

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        (result if result is not None else arguments[0][0]).view(-1)[3:4].add_(1)
        return result

    broken = {**reference.OPS, op: wrong}
    monkeypatch.setitem(sys.modules, "broken_backend", SimpleNamespace(OPS=broken))
    monkeypatch.setattr(gpu, "BACKENDS", (Backend("broken", "broken_backend", ("cpu",), lambda device: None),))
    status, found = rows(tmp_path)
    assert status == 1
    bad = [row for row in found if row["op"].startswith(op)]
    assert bad
    for row in bad:
        assert "differs from the reference" in row["problem"]
        assert row["ms"] is None
        assert row["gbps"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--models", "tiny"]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


def test_the_shapes_are_those_of_the_models() -> None:
    millions = {name: sum(torch.Size(s).numel() for s in shapes()) / 1e6 for name, shapes in gpu.MODELS.items()}
    assert 25 < millions["resnet50"] < 26
    assert 303 < millions["vit_l"] < 305
    assert 1235 < millions["llama_1b"] < 1237
