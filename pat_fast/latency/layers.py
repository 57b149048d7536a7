"""The layers of a model whose time is measured: what they are beside their widths, and one of any width to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plan.running import call, undisturbed

Widths = tuple[int, ...]
Spec = tuple[tuple[str, Any], ...]  # plain numbers and strings, so that it can be a key on disk
CONVOLUTIONS = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
BY_NAME: dict[str, Any] = {kind.__name__: function for kind, function in CONVOLUTIONS.items()}


@dataclass(frozen=True)
class Layer:
    """One call of a layer in a forward.

    Args:
        weight: name of its weight in the model.
        shape: of this weight.
        spec: what its time depends on beside its widths.
    """

    weight: str
    shape: tuple[int, ...]
    spec: Spec

    @property
    def kind(self) -> str:
        return str(dict(self.spec)["kind"])

    def widths(self, shape: tuple[int, ...]) -> Widths:
        """What can shrink, when the weight has ``shape``: channels in and out, or channels alone."""
        spec = dict(self.spec)
        if "Norm" in self.kind:
            return (shape[0],)
        if self.kind == "Linear":
            return shape[1], shape[0]
        groups = spec["groups"]
        if groups == "depthwise":
            return (shape[0],)
        return (shape[0], shape[1] * groups) if "Transpose" in self.kind else (shape[1] * groups, shape[0])

    def grains(self) -> Widths:
        """Of which each width must be a multiple."""
        groups = dict(self.spec).get("groups", 1)
        if groups == "depthwise":
            return (int(dict(self.spec)["multiplier"]),)
        return (1,) * len(self.widths(self.shape)) if groups == 1 else (groups, groups)


def layers_of(model: nn.Module, example_inputs: Any) -> list[Layer]:
    """The convolutions, linear layers and norms that a forward of ``example_inputs`` calls, as often as it does."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: list[Layer] = []

    def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
        weight = getattr(module, "weight", None)
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or not isinstance(weight, Tensor) or id(weight) not in names:
            return
        spec = _spec(module, x, weight)
        if spec is not None:
            found.append(Layer(names[id(weight)], tuple(weight.shape), spec))

    with undisturbed(model), torch.no_grad():
        kinds = (*CONVOLUTIONS, nn.Linear, *NORMS)
        handles = [m.register_forward_pre_hook(seen) for m in model.modules() if type(m) in kinds]
        try:
            call(model, example_inputs)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _spec(module: nn.Module, x: Tensor, weight: Tensor) -> Spec | None:
    spec: dict[str, Any] = {"kind": type(module).__name__, "dtype": str(weight.dtype).removeprefix("torch.")}
    if type(module) in CONVOLUTIONS:
        dims = weight.dim() - 2
        if x.dim() != dims + 2:  # without a batch
            return None
        assert isinstance(module, (nn.modules.conv._ConvNd,))
        spec |= {"batch": x.shape[0], "size": tuple(x.shape[2:]), "kernel": tuple(weight.shape[2:])}
        spec |= {"stride": tuple(module.stride), "dilation": tuple(module.dilation), "bias": module.bias is not None}
        padding = module.padding
        spec["padding"] = padding if isinstance(padding, str) else tuple(padding)
        if "Transpose" in spec["kind"]:
            spec["output_padding"] = tuple(module.output_padding)
        depthwise = module.groups > 1 and module.groups == module.in_channels and "Transpose" not in spec["kind"]
        spec["groups"] = "depthwise" if depthwise else module.groups
        spec["multiplier"] = module.out_channels // module.groups if depthwise else 1
        spec["channels_last"] = dims == 2 and weight.is_contiguous(memory_format=torch.channels_last) and (
            not weight.is_contiguous()
        )
    elif isinstance(module, nn.Linear):
        spec |= {"rows": tuple(x.shape[:-1]), "bias": module.bias is not None}
    elif isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return None
        spec |= {"rows": tuple(x.shape[:-1]), "bias": module.bias is not None}
    else:
        spec |= {"batch": x.shape[0], "size": tuple(x.shape[2:])}
        spec["channels_last"] = x.dim() == 4 and not x.is_contiguous()
    return tuple(spec.items())


def runnable(spec: Spec | Mapping[str, Any], widths: Widths, device: torch.device) -> Callable[[], Tensor]:
    """A call of such a layer with these widths, on random numbers."""
    s = dict(spec)
    dtype = getattr(torch, s["dtype"])

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, device=device).to(dtype)
        return made.to(memory_format=torch.channels_last) if s.get("channels_last") and len(shape) == 4 else made

    kind = s["kind"]
    bias = random(widths[-1]) if s.get("bias") else None
    if kind == "Linear":
        x, weight = random(*s["rows"], widths[0]), random(widths[1], widths[0])
        return lambda: F.linear(x, weight, bias)
    if kind == "LayerNorm":
        x, weight = random(*s["rows"], widths[0]), random(widths[0])
        return lambda: F.layer_norm(x, widths, weight, bias)
    x = random(s["batch"], widths[0] // s["multiplier"] if s.get("groups") == "depthwise" else widths[0], *s["size"])
    if kind.startswith("BatchNorm"):
        mean, var = (torch.full(widths, value, device=device, dtype=dtype) for value in (0.0, 1.0))
        return lambda: F.batch_norm(x, mean, var, var, mean)
    groups = x.shape[1] if s["groups"] == "depthwise" else s["groups"]
    if "Transpose" in kind:
        weight = random(x.shape[1], widths[-1] // groups, *s["kernel"])
        extra = {"output_padding": s["output_padding"]}
    else:
        weight = random(widths[-1], x.shape[1] // groups, *s["kernel"])
        extra = {}
    extra |= {"stride": s["stride"], "padding": s["padding"], "dilation": s["dilation"], "groups": groups}
    return lambda: BY_NAME[kind](x, weight, bias, **extra)
