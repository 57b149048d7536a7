"""Quantization-aware training of pruned models: torchao's PT2E flow, with weights that no processor saturates.

One schedule: prune, ``prepare_qat``, train on, ``convert_qat``, ``export_onnx``. What PT2E prepares is a graph whose
shapes are fixed; :func:`fake_quantize_linear` trains linear layers under the same rounding while they are pruned.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ExportError, check, check_model
from .export import Case, quietly
from .layers import register_layer
from .masks import masked_channels
from .optional import require

QUANTIZERS = {
    "onnxruntime": "",
    "x86": "X86InductorQuantizer",
    "arm": "ArmInductorQuantizer",
    "xpu": "XPUInductorQuantizer",
}
"""Names, and torchao's classes."""
SAFE_BITS = 7
"""Without VNNI, x86 adds two products of an unsigned and a signed byte in 16 signed bits: 2 * 255 * 127 does not fit,
2 * 255 * 64 does."""


def prepare_qat(
    model: nn.Module, example_inputs: Any, *, quantizer: str | Any = "onnxruntime", weight_bits: int = SAFE_BITS
) -> torch.fx.GraphModule:
    """Make of a pruned model one that trains under fake quantization of convolutions and linear layers.

    The model is exported (``torch.export``) and annotated by torchao's PT2E. The result is a module of its own with
    copies of the weights: make a new optimizer for its parameters. ``train()`` and ``eval()`` work; batch norms are
    folded when it is converted.

    Args:
        example_inputs: a tensor, a tuple of tensors or a dict of them, batch first.
        quantizer: ``"onnxruntime"``, for :func:`pat_fast.export_onnx`: whole chains of integer kernels there;
            ``"x86"``, ``"arm"``, ``"xpu"``, for ``torch.compile``; or a PT2E quantizer with a configuration of its own.
        weight_bits: 7 keeps weights within -64 .. 63 of their scale, so that the sums of pairs which x86 without VNNI
            makes in 16 bits cannot overflow; results are the same on every machine. 8 where it is known to have VNNI.
    Raises:
        MissingPackage: torchao is not installed.
        ExportError: the model cannot be exported or prepared; a pruner still holds channels of it at zero, which
            would come to life again; or its linear layers still round their weights (:func:`fake_quantize_linear`).
        ConfigError: there is no such quantizer.
    """
    check_model(model)
    if masked := masked_channels(model):
        raise ExportError(
            f"prepare_qat: expected a model that is pruned, got one of which {masked} channels are only masked; call "
            "pruner.finalize() first"
        )
    if any(type(m) is FakeQuantizedLinear for m in model.modules()):
        raise ExportError(
            "prepare_qat: expected linear layers with weights of their own, got some that round them already; call "
            "end_fake_quantization(model) first"
        )
    require("torchao.quantization.pt2e", "qat", "prepare_qat")
    check("weight_bits", weight_bits, lambda v: type(v) is int and 2 <= v <= 8, "an integer in 2 .. 8")
    with quietly():
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

        from .integer import name_sources

        chosen = _quantizer(quantizer, weight_bits) if isinstance(quantizer, str) else quantizer
        # What is exported shares its weights with the model.
        exported = Case(copy.deepcopy(model), example_inputs).program(training=True).module(check_guards=False)
        name_sources(exported)
        try:
            prepared = prepare_qat_pt2e(exported, chosen)
        except Exception as error:
            raise ExportError(f"prepare_qat failed: {type(error).__name__}: {error}") from error
        allow_exported_model_train_eval(prepared)
    prepared.train()
    return prepared


def convert_qat(prepared: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Make of what :func:`prepare_qat` returned, trained, a model with integer weights; the prepared one stays.

    Batch norms are folded, weights are int8, activations are quantized and dequantized explicitly:
    :func:`pat_fast.export_onnx` writes it with QuantizeLinear and DequantizeLinear, and ``torch.compile`` fuses it to
    integer kernels.

    Raises:
        MissingPackage: torchao is not installed.
        ExportError: ``prepared`` is not what :func:`prepare_qat` returned.
    """
    require("torchao.quantization.pt2e", "qat", "convert_qat")
    with quietly():
        from torchao.quantization.pt2e import FakeQuantizeBase, allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        if not isinstance(prepared, torch.fx.GraphModule) or not any(
            isinstance(m, FakeQuantizeBase) for m in prepared.modules()
        ):
            raise ExportError(f"convert_qat: expected what prepare_qat returned, got {type(prepared).__name__}")
        own = copy.deepcopy(prepared)
        allow_exported_model_train_eval(own)
        own.eval()
        try:
            converted = convert_pt2e(own)
        except Exception as error:
            raise ExportError(f"convert_qat failed: {type(error).__name__}: {error}") from error
        allow_exported_model_train_eval(converted)
        converted.eval()
    return converted


def _quantizer(name: str, bits: int) -> Any:
    """The quantizer of that name, with weights of ``bits`` bits per output channel."""
    check("quantizer", name, lambda v: v in QUANTIZERS, f"one of {', '.join(QUANTIZERS)}")
    family = {"onnxruntime": "x86", "xpu": "x86"}.get(name, name)
    default = getattr(_torchao(family), f"get_default_{family}_inductor_quantization_config")
    config = default(is_qat=True)
    half = 2 ** (bits - 1)
    config = dataclasses.replace(config, weight=_ranged(config.weight, -half, half - 1))
    if name == "onnxruntime":
        from .integer import OnnxRuntimeQuantizer

        return OnnxRuntimeQuantizer(config.input_activation, config.weight)
    if name == "xpu":  # torchao has no ranges for training there: its own signed activations, learned as on x86
        signed = _ranged(config.input_activation, -128, 127, dtype=torch.int8)
        config = dataclasses.replace(config, input_activation=signed, output_activation=signed)
    return getattr(_torchao(name), QUANTIZERS[name])().set_global(config)


def _torchao(name: str) -> Any:
    return importlib.import_module(f"torchao.quantization.pt2e.quantizer.{name}_inductor_quantizer")


def _ranged(spec: Any, low: int, high: int, **changes: Any) -> Any:
    return dataclasses.replace(spec, quant_min=low, quant_max=high, **changes)


# Under pruning


def fake_quantized(weight: Tensor, levels: float) -> Tensor:
    """``weight [out, ...]`` rounded to ``-levels .. levels`` steps, symmetrically per output channel.

    The gradient passes straight through: Bengio et al., "Estimating or Propagating Gradients Through Stochastic
    Neurons", 2013, https://arxiv.org/abs/1308.3432. The steps are those of the weight as it is.
    """
    own = weight.detach()
    step = (own.abs().amax(1, keepdim=True) / levels).clamp_min(torch.finfo(own.dtype).tiny)
    return weight + ((own / step).round() * step - own)


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that computes with a rounded weight; see :func:`fake_quantize_linear`."""

    levels: float

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, fake_quantized(self.weight, self.levels), self.bias)


# Rounding moves no channel, and removed columns were never the largest of a row that they are not in.
register_layer(FakeQuantizedLinear, forward=nn.Linear.forward)


def fake_quantize_linear(model: nn.Module, *, bits: int = SAFE_BITS) -> int:
    """Let the linear layers of ``model`` compute with weights rounded to ``bits`` bits while it trains and is pruned.

    Parameters stay the objects that they are: the optimizer, the pruner and its criteria go on with the unrounded
    values. Take it back with :func:`end_fake_quantization` before :func:`prepare_qat`.

    Returns:
        How many layers.
    """
    check("bits", bits, lambda v: type(v) is int and 2 <= v <= 8, "an integer in 2 .. 8")
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    for layer in layers:
        layer.__class__ = FakeQuantizedLinear
        layer.__dict__["levels"] = 2.0 ** (bits - 1) - 1
    return len(layers)


def end_fake_quantization(model: nn.Module) -> None:
    """Take back :func:`fake_quantize_linear`; the weights keep their unrounded values."""
    layers: list[nn.Module] = [m for m in model.modules() if type(m) is FakeQuantizedLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
        del layer.__dict__["levels"]
