"""Exported models run elsewhere, at any batch size, and compute what PyTorch does; if not, nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.export import runner
from tests.helpers import Case, Small, small_inputs
from tests.test_checkpoint import pruned
from tests.test_checkpoint_models import bert

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str) -> tuple[nn.Module, Any]:
    """A pruned model and inputs for it."""
    if name == "bert":
        ids = torch.arange(10).reshape(2, 5)
        return pruned(bert(), ids), {"input_ids": ids, "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    case = Case.build(name, torch.float32)
    return pruned(case.model, case.inputs), case.inputs


MODELS = ("resnet50", "mobilenet_v2", "vit_s16", "bert")
BOTH = [(name, "torchscript") for name in MODELS] + [
    pytest.param(name, "dynamo", marks=pytest.mark.slow) for name in MODELS
]


@pytest.mark.parametrize(("name", "exporter"), BOTH)
def test_pruned_models_in_onnx(name: str, exporter: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = build(name)
    path = tmp_path / "model.onnx"
    report = pat.export_onnx(model, inputs, path, exporter=exporter, config={"name": name})
    assert "✅" not in capfd.readouterr().out
    assert report.max_error < 1e-5
    assert report.batches == (2, 1, 5)
    assert report.bytes == path.stat().st_size
    assert f"{report.max_error:.2e}" in str(report)
    # Of a batch size that the exporter did not see.
    given = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    rows = [torch.cat([x, x, x, x]) for x in given]
    expected = model(**dict(zip(inputs, rows, strict=True))) if isinstance(inputs, dict) else model(*rows)
    expected = expected[0] if name == "bert" else expected
    torch.testing.assert_close(runner(str(path))(rows)[0], expected.detach(), rtol=1e-4, atol=1e-5)
    # And by the structure that the file carries, the weights are those of the pruned model.
    written = onnx.load(path)
    structure = json.loads(next(p.value for p in written.metadata_props if p.key == "pat_fast"))
    assert structure["config"] == {"name": name}
    assert structure["provenance"]["prunes"] == 1
    dims = [d.dim_param for d in written.graph.input[0].type.tensor_type.shape.dim]
    assert dims[0]
    assert not any(dims[1:])


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_programs_of_torch_export(name: str, tmp_path: Path) -> None:
    model, inputs = build(name)
    report = pat.export_program(model, inputs, tmp_path / "model.pt2")
    assert report.max_error < 1e-6
    assert report.batches == (2, 1, 5)


@pytest.mark.slow
def test_a_program_runs_without_the_models_code(tmp_path: Path) -> None:
    model = pruned(Small(), small_inputs())
    pat.export_program(model, small_inputs(), tmp_path / "model.pt2")
    torch.save(small_inputs(3), tmp_path / "x")
    code = (
        "import sys, json, torch\n"
        "extra = {'pat_fast.json': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=extra).module()\n"
        "assert json.loads(extra['pat_fast.json'])['format'] == 2\n"
        "torch.save(program(torch.load('x')), 'y')\n"
        "assert not [m for m in sys.modules if m.startswith(('pat_fast', 'tests'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "y"), model(small_inputs(3)))


@pytest.mark.slow
def test_a_package_of_aot_inductor(tmp_path: Path) -> None:
    model = pruned(Small(), small_inputs())
    report = pat.export_program(model, small_inputs(), tmp_path / "model.pt2", format="aot_inductor")
    assert report.max_error < 1e-5
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    torch.testing.assert_close(loaded(small_inputs(7)), model(small_inputs(7)))


def test_the_models_mode_stays(tmp_path: Path) -> None:
    model = Small().train()
    model.norm.eval()
    pat.export_onnx(model, small_inputs(1), tmp_path / "a.onnx", exporter="torchscript", simplify=False)
    assert model.training
    assert not model.norm.training


class Changing(nn.Module):
    """A forward that computes something else when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (0.01 if torch.jit.is_tracing() or torch.compiler.is_exporting() else 0.0)


class Fixed(nn.Module):
    """A forward that only works for the batch size it was traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 4).sum(1)


def test_what_computes_something_else_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(pat.ExportError, match=r"output: expected PyTorch.* within 0.0001 .* nothing was written"):
        pat.export_onnx(Changing(), torch.randn(2, 4), tmp_path / "a.onnx", exporter="torchscript")
    with pytest.raises(pat.ExportError, match=r"got a difference of 0\.01"):
        pat.export_program(Changing(), torch.randn(2, 4), tmp_path / "a.pt2")
    assert not list(tmp_path.iterdir())
    loose = pat.export_onnx(Changing(), torch.randn(2, 4), tmp_path / "a.onnx", exporter="torchscript", tolerance=0.1)
    assert loose.max_error == pytest.approx(0.01, rel=1e-3)


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(pat.ConfigError, match="exporter"):
        pat.export_onnx(Small(), small_inputs(), tmp_path / "a.onnx", exporter="other")
    with pytest.raises(pat.ExportError, match="a tensor, or a tuple or dict of tensors"):
        pat.export_onnx(Small(), [3], tmp_path / "a.onnx")
    with pytest.raises(pat.ExportError, match=r"cannot be run on inputs of shapes \[\(2, 9\)\]"):
        pat.export_onnx(Small(), torch.ones(2, 9), tmp_path / "a.onnx")
    with pytest.raises(pat.ExportError, match=r"ends in \.pt2"):
        pat.export_program(Small(), small_inputs(), tmp_path / "a.bin")
    with pytest.raises(pat.ExportError, match="example_inputs must have the batch first"):
        pat.export_onnx(Fixed(), torch.randn(2, 4), tmp_path / "a.onnx")
    with pytest.raises(pat.ExportError, match="a tensor, or a tuple or dict of tensors"):
        pat.export_onnx(Small(), None, tmp_path / "a.onnx")
    with pytest.raises(pat.ConfigError, match=r"expected a torch\.nn\.Module, got int"):
        pat.export_onnx(3, small_inputs(), tmp_path / "a.onnx")  # type: ignore[arg-type]
    with pytest.raises(pat.ConfigError, match="tolerance: expected a number, at least 0, got -1"):
        pat.export_program(Small(), small_inputs(), tmp_path / "a.pt2", tolerance=-1)
    with pytest.raises(pat.ExportError, match="in onnxruntime failed"):
        pat.export_onnx(Small().bfloat16(), small_inputs(dtype=torch.bfloat16), tmp_path / "a.onnx", simplify=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(pat.ExportError, match=r"cannot write .*file/a\.onnx"):
        pat.export_onnx(Small(), small_inputs(), tmp_path / "file" / "a.onnx", exporter="torchscript", simplify=False)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(pat.PatError, match=r"expected onnxruntime to be installed.*pip install 'pat-fast\[onnx\]'"):
        pat.export_onnx(Small(), small_inputs(), tmp_path / "a.onnx")
