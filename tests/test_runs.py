"""A finished run becomes files that run elsewhere; what is no run is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import pat_fast as pat
from pat_fast import train
from pat_fast.cli import app
from pat_fast.config import TrainConfig
from pat_fast.export import runner
from pat_fast.models import resnet20
from pat_fast.runs import is_known, open_run
from tests.helpers import Small, small_inputs
from tests.test_checkpoint import pruned
from tests.test_checkpoint_models import change

pytest.importorskip("onnxruntime")

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "model": {"factory": "pat_fast.models:resnet20", "args": {"width": 4}},
    "data": {"name": "digits", "size": 8, "batch_size": 200},
    "epochs": 3,
    "dense_twin": False,
    "pruning": {"end_epoch": 2, "target_sparsity": 0.3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training leaves, but for the training."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("runs")
    config = train.resolve(TrainConfig(**CONFIG))
    (made / "config.json").write_text(config.model_dump_json())
    model = pruned(resnet20(width=4), torch.randn(2, 1, 8, 8))
    pat.save(model, made / "model.safetensors", config=config.model.model_dump(), metrics={"accuracy": 0.5})
    return made


def cli(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_run_is_read_back(folder: Path) -> None:
    run = open_run(folder)
    assert run.structure.config == run.config.model.model_dump()
    assert run.structure.provenance["prunes"] >= 1
    assert sum(p.numel() for p in run.model.parameters()) < sum(p.numel() for p in resnet20(width=4).parameters())


def test_load_shows_what_it_is(folder: Path) -> None:
    result = cli("load", folder)
    assert result.exit_code == 0, result.output
    left = sum(p.numel() for p in open_run(folder).model.parameters())
    assert f"rebuilt: {left:,} parameters, every shape fits" in result.output
    assert 'metrics: {"accuracy": 0.5}' in result.output
    file = cli("load", folder / "model.safetensors", "--model", "pat_fast.models:resnet20", "--args", '{"width": 4}')
    assert "every shape fits" in file.output
    assert "rebuilt" not in cli("load", folder / "model.safetensors").output


def test_load_runs_no_code_that_a_folder_names(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"] = {"factory": "os:mkdir", "args": {"path": str(tmp_path / "made")}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = cli("load", tmp_path)
    assert result.exit_code == 0, result.output
    assert "names 'os:mkdir'; give --model os:mkdir to run that" in result.output
    assert not (tmp_path / "made").exists()
    assert "every shape fits" not in result.output
    result = cli("load", tmp_path, "--model", "pat_fast.models:resnet20", "--args", '{"width": 4}')
    assert "every shape fits" in result.output
    assert cli("load", tmp_path, "--model", "os:mkdir").exit_code == 2
    assert (tmp_path / "made").exists()  # it was said to


def test_what_may_be_built_without_being_asked_for() -> None:
    assert is_known("pat_fast.models:resnet20")
    assert is_known("transformers:vit")
    for name in ("pat_fast.models:torch.load", "os:system", "transformers:AutoModel.from_config", "pat_fast:load"):
        assert not is_known(name)


@pytest.mark.slow
def test_training_writes_what_its_model_file_needs_to_say(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    run = open_run(train.run(TrainConfig(**CONFIG), out=tmp_path / "tiny"))
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())["pruned"]
    assert run.structure.metrics == summary
    assert run.structure.config == run.config.model.model_dump()
    assert run.structure.provenance["prunes"] >= 1


@pytest.mark.slow
def test_export_writes_files_that_run(folder: Path, tmp_path: Path) -> None:
    result = cli("export", folder, "--onnx", "--torch-export", "--int8", "--qat-epochs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert result.output.count("test accuracy") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.int8.onnx", "model.onnx", "model.pt2"]
    x = torch.rand(3, 1, 8, 8)
    expected = open_run(folder).model(x)
    torch.testing.assert_close(runner(str(tmp_path / "model.onnx"))([x])[0], expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.export.load(str(tmp_path / "model.pt2")).module()(x), expected)


def test_bad_input_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    pat.save(pruned(Small(), small_inputs()), tmp_path / "small")
    (tmp_path / "text").write_text("no model")
    for arguments, message in [
        (("export", folder), "expected --onnx, --int8 or --torch-export, got none"),
        (("export", tmp_path, "--onnx"), "it has no config.json"),
        (("export", folder, "--int8", "--qat-epochs", "-1"), "--qat-epochs: expected an integer >= 0, got -1"),
        (("load", tmp_path / "nowhere"), "cannot read"),
        (("load", tmp_path / "text"), "cannot read"),
        (("load", tmp_path / "small", "--model", "pat_fast.models:resnet20"), "belongs to another definition"),
        (("load", tmp_path / "small", "--model", "pat_fast.models:nothing"), "expected 'nothing' in"),
        (("load", tmp_path / "small", "--args", '{"width": 8}'), "--args: expected --model beside it"),
        (("bench", "--deploy"), "MODEL: expected a model to deploy, got none"),
        (("bench", "resnet18", "--deploy", "--runtimes", "tpu"), "--runtimes"),
        (("bench", "resnet18", "--deploy", "--macs", "2"), "--macs: expected a number in (0, 1), got 2.0"),
        (("bench", "tiny", "--deploy"), "which is a list of shapes alone"),
    ]:
        result = cli(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.output, (arguments, result.output)
        assert len(result.output.strip().splitlines()) == 1, result.output


def test_what_a_file_says_cannot_command_the_terminal(tmp_path: Path) -> None:
    pat.save(Small(), tmp_path / "a")
    change(tmp_path / "a", lambda s: s.update(model="\x1b[2Jgone"))
    output = cli("load", tmp_path / "a").output
    assert "\x1b" not in output
    assert "?[2Jgone" in output
    change(tmp_path / "a", lambda s: s["provenance"].update(dense={"x": "y"}))
    assert "the provenance does not count" in cli("load", tmp_path / "a").output


@pytest.mark.slow
def test_deploy_measures_every_runtime(tmp_path: Path) -> None:
    result = cli("bench", "resnet18", "--deploy", "--small", "--quick", "--batch", "2", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert [(r["runtime"], r["batch"]) for r in found["rows"]] == [
        (runtime, batch) for runtime in ("eager", "channels_last", "compile", "onnxruntime", "int8") for batch in (1, 2)
    ]
    assert found["cost"]["resnet18"]["macs_left"] < 0.55
    for row in found["rows"]:
        assert set(row["ms"]) == set(row["cpu_ms"]) == set(row["peak_mib"]) == {"dense", "pruned"}
        assert min(row["ms"].values()) > 0
