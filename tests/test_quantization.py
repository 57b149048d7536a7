"""Pruned models train under fake quantization, become integer ones, and saturate on no processor."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pat_fast as pat
from pat_fast.export import runner
from pat_fast.quantization import SAFE_BITS, end_fake_quantization, fake_quantize_linear, fake_quantized
from tests.helpers import Small, small_inputs
from tests.test_checkpoint import pruned

pytest.importorskip("torchao")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """A residual sum with batch norms, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner, self.second = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.hidden, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.second(self.inner(x))).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())


def task(batch: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, 8, 8)
    return x, x.mean((2, 3)).argmax(1)


def train(model: nn.Module, steps: int, lr: float = 1e-2, pruner: pat.Pruner | None = None) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for step in range(steps):
        x, y = task()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if pruner is not None and step % 10 == 9:
            pruner.step()


def accuracy(model: nn.Module) -> float:
    torch.manual_seed(99)
    x, y = task(500)
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [SAFE_BITS, 8])
def test_one_schedule_from_pruning_to_integers(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    pruner = pat.Pruner(model, 0.4, end_epoch=4, example_inputs=small_inputs(2))
    train(model, 80, pruner=pruner)
    model.eval()
    reached = accuracy(model)
    assert reached > 0.8
    weights = [p.detach().clone() for p in model.parameters()]
    prepared = pat.prepare_qat(model, small_inputs(2), weight_bits=bits)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert not model.training
    before = [p.detach().clone() for p in prepared.parameters()]
    train(prepared, 30, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))  # the model's own stay
    assert any(not torch.equal(a, b) for a, b in zip(before, prepared.parameters(), strict=True))
    converted = pat.convert_qat(prepared)
    assert accuracy(converted) > reached - 0.05
    report = pat.export_onnx(converted, small_inputs(2), tmp_path / "int8.onnx")
    assert "quantized" in report.format
    assert report.relative_error < 0.2
    file = onnx.load(tmp_path / "int8.onnx")
    sizes = [onnx.numpy_helper.to_array(t) for t in file.graph.initializer]
    kernels = [w for w in sizes if w.dtype == np.int8 and w.ndim >= 2]
    assert len(kernels) == 4
    assert sum(w.size for w in kernels) == sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    half = 2 ** (bits - 1)
    assert all(-half <= w.min() and w.max() < half for w in kernels)
    assert max(abs(int(w.min())) for w in kernels) > half - 4  # the range is used
    # The optimised integer kernels decide alike.
    x, _ = task(200)
    found = runner(str(tmp_path / "int8.onnx"))([x])[0].argmax(1)
    assert float((found == converted(x).argmax(1)).float().mean()) > 0.95


def integers(model: nn.Module, x: Tensor, **options: Any) -> torch.fx.GraphModule:
    """``model`` with ranges of a few random batches, converted."""
    prepared = pat.prepare_qat(model, x, **options)
    with torch.no_grad():
        for _ in range(3):
            prepared(torch.randn_like(x))
    return pat.convert_qat(prepared)


def optimized(path: Path) -> Counter[str]:
    """The ops that onnxruntime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


class Maps(nn.Module):
    """What lies between convolutions: ReLUs of both spellings, a clamp, pools, a sum, a product, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool, self.clip = nn.MaxPool2d(2), nn.ReLU6(inplace=True)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.gate, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        y = F.relu(x + self.two(self.clip(self.one(x))))
        z = self.three(y) * self.gate(y)
        return self.head(self.last(torch.cat([y, z], 1)).relu().mean((2, 3)))


def test_a_chain_of_integer_kernels(tmp_path: Path) -> None:
    """ReLUs and batch norms fold into integer convolutions; between two of them nothing is made a float."""
    torch.manual_seed(0)
    pat.export_onnx(integers(Maps().eval(), torch.randn(4, 3, 8, 8)), torch.randn(4, 3, 8, 8), tmp_path / "a.onnx")
    found = optimized(tmp_path / "a.onnx")
    assert found["QLinearConv"] == 6
    assert (found["QLinearAdd"], found["QLinearMul"], found["QLinearConcat"]) == (1, 1, 1)
    assert not {"Conv", "FusedConv", "Relu", "Clip", "Add", "Mul", "Concat"} & set(found)
    assert found["QuantizeLinear"] <= 2  # the input, and what the head's mean gives


def test_linear_layers_between_other_ops(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    x = torch.randn(4, 7, 16)
    pat.export_onnx(integers(Mlp().eval(), x), x, tmp_path / "a.onnx")
    found = optimized(tmp_path / "a.onnx")
    assert found["MatMulIntegerToFloat"] == 2
    assert not {"MatMul", "DequantizeLinear"} & set(found)


def observed(prepared: nn.Module) -> Counter[str]:
    """The ops whose results go through fake quantization."""
    nodes = [n.args[0] for n in prepared.graph.nodes if n.op == "call_module"]
    return Counter(str(n.target) for n in nodes if n.op == "call_function")


def test_the_quantizer_of_inductor_finds_its_patterns() -> None:
    """No fake quantization lies between a convolution, its batch norm, a sum and a ReLU."""
    found = observed(pat.prepare_qat(Net().eval(), small_inputs(2), quantizer="x86"))
    assert found["aten.batch_norm.default"] == found["aten.add.Tensor"] == 0
    assert found["aten.relu.default"] == 3


@pytest.mark.parametrize(("name", "dtype"), [("arm", torch.int8), ("xpu", torch.int8), ("x86", torch.uint8)])
def test_quantizers_of_other_machines(name: str, dtype: torch.dtype) -> None:
    """The numbers are those of any machine; the kernels there were never run."""
    torch.manual_seed(0)
    model = Net().eval()
    prepared = pat.prepare_qat(model, small_inputs(2), quantizer=name)
    F.cross_entropy(prepared(task()[0]), task()[1]).backward()
    converted = pat.convert_qat(prepared)
    calls = [n for n in converted.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert {n.args[-1] for n in calls} == {dtype}
    assert accuracy(converted) == pytest.approx(accuracy(model), abs=0.2)


def pairs(path: Path) -> list[tuple[int, int]]:
    """For each integer weight the least and the largest sum of two products that x86 without VNNI may add up."""
    file = onnx.load(path)
    found = []
    for tensor in file.graph.initializer:
        weight = onnx.numpy_helper.to_array(tensor)
        if weight.dtype == np.int8 and weight.ndim >= 2:
            rows = np.sort(weight.reshape(len(weight), -1).astype(int), 1)
            # Of an unsigned byte, 0 .. 255, with any two weights of an output, whatever their order in memory.
            found.append((int(255 * rows[:, :2].sum(1).min()), int(255 * rows[:, -2:].sum(1).max())))
    return found


@pytest.mark.parametrize(
    ("quantizer", "bits", "overflows"),
    [
        ("onnxruntime", 7, False),
        pytest.param("onnxruntime", 8, True, marks=pytest.mark.slow),
        pytest.param("x86", 7, False, marks=pytest.mark.slow),
    ],
)
def test_what_fits_into_sixteen_bits(quantizer: str, bits: int, overflows: bool, tmp_path: Path) -> None:
    """x86 without VNNI adds pairs of products of an unsigned and a signed byte in 16 signed bits (``vpmaddubsw``)."""
    torch.manual_seed(0)
    model = integers(Net().eval(), small_inputs(2), quantizer=quantizer, weight_bits=bits)
    report = pat.export_onnx(model, small_inputs(2), tmp_path / "a.onnx")
    found = pairs(tmp_path / "a.onnx")
    assert len(found) == 4
    assert any(low < -(2**15) or high >= 2**15 for low, high in found) == overflows
    assert report.needs_vnni == overflows
    assert ("without VNNI" in str(report)) == overflows


def test_a_masked_model_is_refused(tmp_path: Path) -> None:
    """Its masked channels would learn again, and be carried along for nothing."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = pat.Pruner(
        model, 0.4, mode="mask", schedule="one_shot", end_epoch=1, example_inputs=small_inputs(2), optimizer=optimizer
    )
    pat.prepare_qat(model, small_inputs(2))  # nothing is masked yet
    pruner.step()
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(pat.ExportError, match=r"channels are only masked; call pruner.finalize\(\) first"):
            pat.prepare_qat(whole, small_inputs(2))
    pruner.finalize()
    prepared = pat.prepare_qat(model, small_inputs(2))
    assert sum(p.numel() for p in prepared.parameters()) < sum(p.numel() for p in Net().parameters())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(pat.PatError, match=r"expected torchao to be installed.*pip install 'pat-fast\[qat\]'"):
        pat.prepare_qat(Net(), small_inputs(2))


def test_weights_rounded_while_they_are_pruned(tmp_path: Path) -> None:
    """Linear layers under fake quantization: the same parameters, the gradients of the rounded weights, pruned on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    own = [model[i].weight for i in (0, 2, 4)]
    assert fake_quantize_linear(model, bits=4) == 3
    assert all(model[i].weight is w for i, w in zip((0, 2, 4), own, strict=True))
    assert max(len(row.unique()) for row in fake_quantized(model[0].weight, 7.0)) <= 15
    x = torch.randn(200, 6)
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = pat.Pruner(model, 0.5, end_epoch=4, example_inputs=x[:2], optimizer=optimizer)
    for _ in range(8):
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        pruner.step()
    assert model[0].out_features + model[2].out_features == 35
    assert all(model[i].weight is w for i, w in zip((0, 2, 4), own, strict=True))
    rounded = model(x)
    assert float((rounded.argmax(1) == y).float().mean()) > 0.9
    pat.save(model, tmp_path / "a")
    fresh = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))
    fake_quantize_linear(fresh, bits=4)
    assert torch.equal(pat.load(tmp_path / "a", fresh)(x), rounded)
    with pytest.raises(pat.ExportError, match=r"round them already; call end_fake_quantization\(model\) first"):
        pat.prepare_qat(model, x)
    end_fake_quantization(model)
    exact = model(x)
    assert not torch.equal(exact, rounded)
    for i in (0, 2, 4):
        model[i].weight.data = fake_quantized(model[i].weight.data, 7.0)
    torch.testing.assert_close(model(x), rounded)


def test_gradients_pass_through_rounding() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    out = fake_quantized(weight, 3.0)
    scale = weight.detach().abs().amax(1, keepdim=True) / 3
    torch.testing.assert_close(out, (weight.detach() / scale).round() * scale)
    out.backward(torch.full((3, 5), 2.0))
    assert torch.equal(weight.grad, torch.full((3, 5), 2.0))
    assert torch.equal(fake_quantized(torch.zeros(2, 2), 3.0), torch.zeros(2, 2))


def test_bad_input_is_told(tmp_path: Path) -> None:
    model = pruned(Small(), small_inputs())
    with pytest.raises(pat.ConfigError, match=r"quantizer: expected .*x86"):
        pat.prepare_qat(model, small_inputs(), quantizer="other")
    with pytest.raises(pat.ConfigError, match=r"weight_bits: expected an integer in 2 \.\. 8, got 9"):
        pat.prepare_qat(model, small_inputs(), weight_bits=9)
    with pytest.raises(pat.ExportError, match="expected what prepare_qat returned, got Small"):
        pat.convert_qat(model)  # type: ignore[arg-type]
