"""Where values become integers for onnxruntime: a PT2E quantizer whose pairs of quantize and dequantize it can fuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer, SharedQuantizationSpec

ATEN = torch.ops.aten
NOTE = "quantization_annotation"  # where PT2E looks
CONVOLUTIONS = (
    *(ATEN.conv1d.default, ATEN.conv2d.default, ATEN.conv3d.default),
    *(ATEN.conv1d.padding, ATEN.conv2d.padding, ATEN.conv3d.padding),
)
SUMS = (ATEN.add.Tensor, ATEN.add_.Tensor, ATEN.mul.Tensor, ATEN.mul_.Tensor)
MEANS = (ATEN.mean.dim, ATEN.avg_pool2d.default, ATEN.adaptive_avg_pool2d.default, ATEN.adaptive_avg_pool1d.default)
SAME_VALUES = (ATEN.max_pool2d.default, ATEN.flatten.using_ints, ATEN.view.default, ATEN.reshape.default)
RELUS = (ATEN.relu.default, ATEN.relu_.default, ATEN.relu6.default, ATEN.relu6_.default)
CLAMPS = (ATEN.hardtanh.default, ATEN.hardtanh_.default, ATEN.clamp.default, ATEN.clamp_.default)
SOURCES: dict[Any, Any] = {
    **dict.fromkeys(CONVOLUTIONS[1::3], torch.nn.Conv2d),
    **dict.fromkeys(RELUS[:2], torch.nn.ReLU),
    **dict.fromkeys(RELUS[2:], torch.nn.ReLU6),
    **dict.fromkeys(CLAMPS[:2], torch.nn.Hardtanh),
    **dict.fromkeys((ATEN.silu.default, ATEN.silu_.default), torch.nn.SiLU),
    **dict.fromkeys((ATEN.hardswish.default, ATEN.hardswish_.default), torch.nn.Hardswish),
    **dict.fromkeys(SUMS[:2], torch.add),
    ATEN.batch_norm.default: torch.nn.BatchNorm2d,
    ATEN.linear.default: torch.nn.Linear,
}


class OnnxRuntimeQuantizer(Quantizer):
    """Quantizes what onnxruntime has integer kernels for, where it looks for them.

    Convolutions and linear layers take integers. A convolution's result becomes integers once: behind its batch norm
    and ReLU, which fold into it. Sums, products, pools and concatenations of such results stay integers, too. A linear
    layer's result is left as it is: onnxruntime's kernels for it put out float32, which attention, layer norms and a
    last layer's logits need.
    """

    def __init__(self, activation: Any, weight: Any) -> None:
        super().__init__()
        self.activation, self.weight = activation, weight

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            inputs = [a for a in node.args if isinstance(a, Node)]
            if node.target in (*CONVOLUTIONS, ATEN.linear.default):
                _note(node, {inputs[0]: self.activation, inputs[1]: self.weight})
                if node.target is not ATEN.linear.default:
                    self._put_out(_last(node))
            elif node.target in SUMS and _are_maps(node.args) and any(map(_is_integer, inputs)):
                _note(node, dict.fromkeys(inputs, self.activation))
                self._put_out(_last(node))
            elif node.target is ATEN.cat.default and all(map(_is_integer, node.args[0])):
                _note(node, dict.fromkeys(node.args[0], self.activation))
                self._put_out(node)
            elif node.target in MEANS and _is_integer(inputs[0]):
                _note(node, {inputs[0]: self.activation})
                self._put_out(node)
            elif node.target in SAME_VALUES and _is_integer(inputs[0]):
                _note(node, {inputs[0]: self.activation})
                node.meta[NOTE].output_qspec = SharedQuantizationSpec((inputs[0], node))
        return model

    def _put_out(self, node: Node) -> None:
        if NOTE not in node.meta:
            _note(node, {})
        node.meta[NOTE].output_qspec = self.activation

    def validate(self, model: GraphModule) -> None:
        """Nothing that this quantizer writes can be wrong for a model."""


def name_sources(model: GraphModule) -> None:
    """Say which module each op comes from: torchao's quantizers look for that, and ``torch.export`` no longer says."""
    for node in model.graph.nodes:
        if node.target in SOURCES:
            node.meta["source_fn_stack"] = [(node.name, SOURCES[node.target])]


def _note(node: Node, inputs: dict[Node, Any]) -> None:
    node.meta[NOTE] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)


def _last(node: Node) -> Node:
    """The last node of batch norm (of a convolution) and ReLU behind ``node`` that fold into it."""
    users = list(node.users)
    if node.target in CONVOLUTIONS and len(users) == 1 and users[0].target is ATEN.batch_norm.default:
        node, users = users[0], list(users[0].users)
    return users[0] if len(users) == 1 and _clips_at_zero(users[0]) else node


def _clips_at_zero(node: Node) -> bool:
    """Whether integers from zero up say all that is left of its input: then it is no op of its own."""
    return node.target in RELUS or (node.target in CLAMPS and list(node.args[1:2]) == [0])


def _is_integer(node: Node) -> bool:
    return NOTE in node.meta and node.meta[NOTE].output_qspec is not None


def _are_maps(values: Sequence[Any]) -> bool:
    """Whether these are two different tensors of floats, no scalars."""
    found = [v.meta.get("val") for v in values if isinstance(v, Node)]
    tensors = [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point() and t.ndim]
    return len(tensors) == 2 and values[0] is not values[1]
