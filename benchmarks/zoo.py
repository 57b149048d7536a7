"""The model zoo: plain PyTorch networks at the size of the originals, and small ones for tests.

    from benchmarks.zoo import ZOO, randomize_
    model = randomize_(ZOO["resnet50"].small(), seed=0)
    model(*ZOO["resnet50"].example(True))

`build()` makes the network at full size (keyword arguments set widths, depths, ...), `small()` one of the
same topology that runs in milliseconds and whose widths differ from each other, so that mixed-up channels
show. Initial weights follow `torch.manual_seed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.attention import ConvNeXt, TextClassifier, ViT
from benchmarks.models.odd import Conv1dNet, Conv3dNet, DepthMultiplierNet, Tagger
from benchmarks.models.plain import (
    VGG,
    DenseNet,
    GoogLeNet,
    MobileNetV2,
    ShuffleNetV2,
    UNet,
)
from benchmarks.models.residual import (
    RegNetY,
    resnet18,
    resnet50,
    resnext50,
    se_resnet18,
)

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        build: makes the network at full size; keyword arguments change widths, depths and so on.
        small: makes the small one.
        example: `example(True)` gives inputs for `small()` (batch 2), `example(False)` for `build()` (1).
    """

    build: Callable[..., nn.Module]
    small: Callable[[], nn.Module]
    example: Callable[[bool], Inputs]


def _image(size: int, full: int = 224) -> Callable[[bool], Inputs]:
    def example(small: bool) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        shape = (2, 3, size, size) if small else (1, 3, full, full)
        return (torch.randn(shape, generator=generator),)

    return example


def _signal(small: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn((2, 2, 64) if small else (1, 2, 1024), generator=generator),)


def _volume(small: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn((2, 1, 8, 16, 16) if small else (1, 1, 32, 64, 64), generator=generator),)


def _tokens(small: bool) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    high, shape = (50, (2, 9)) if small else (30522, (1, 128))
    return (torch.randint(0, high, shape, generator=generator),)


_resnet: dict[str, Any] = {
    "widths": (12, 20, 24, 28),
    "depths": (1, 2, 1, 1),
    "stem": 12,
    "num_classes": 10,
}
_bottleneck: dict[str, Any] = {
    "widths": (6, 10, 8, 14),
    "depths": (2, 1, 1, 1),
    "stem": 20,
    "num_classes": 10,
}
_vit: dict[str, Any] = {
    "image": 32,
    "patch": 8,
    "dim": 36,
    "depth": 2,
    "num_heads": 3,
    "head_dim": 8,
    "hidden": 52,
    "num_classes": 10,
}
_shuffle: dict[str, Any] = {
    "widths": (20, 28),
    "depths": (2, 3),
    "stem": 12,
    "head": 44,
    "num_classes": 10,
}

ZOO: dict[str, Entry] = {
    "resnet18": Entry(resnet18, partial(resnet18, **_resnet), _image(48)),
    "resnet50": Entry(resnet50, partial(resnet50, **_bottleneck), _image(48)),
    "resnext50": Entry(
        resnext50,
        partial(
            resnext50,
            widths=(12, 20, 24),
            depths=(2, 1, 1),
            stem=20,
            groups=4,
            width_per_group=0.25,
            num_classes=10,
        ),
        _image(48),
    ),
    "se_resnet18": Entry(se_resnet18, partial(se_resnet18, **_resnet, se_ratio=0.25), _image(48)),
    "regnet_y_400mf": Entry(
        RegNetY,
        partial(
            RegNetY,
            widths=(12, 20, 28),
            depths=(1, 2, 1),
            stem=10,
            group_width=4,
            se_ratio=0.5,
            num_classes=10,
        ),
        _image(32),
    ),
    "vgg16_bn": Entry(
        VGG,
        partial(
            VGG,
            stages=((12,), (20, 24), (28, 18)),
            hidden=(44, 36),
            pool=2,
            dropout=0.0,
            num_classes=10,
        ),
        _image(32),
    ),
    "densenet121": Entry(
        DenseNet,
        partial(DenseNet, depths=(2, 3, 2), growth=6, stem=14, bottleneck=3, num_classes=10),
        _image(48),
    ),
    "googlenet": Entry(
        GoogLeNet,
        partial(
            GoogLeNet,
            stages=(
                ((8, (6, 12), (5, 7), 9), (10, (11, 13), (4, 6), 5)),
                ((12, (9, 16), (6, 10), 8),),
            ),
            stem=(12, 14, 20),
            num_classes=10,
        ),
        _image(32),
    ),
    "mobilenet_v2": Entry(
        MobileNetV2,
        partial(
            MobileNetV2,
            settings=((1, 10, 1, 1), (3, 14, 2, 2), (2, 18, 2, 2), (3, 22, 1, 1)),
            stem=12,
            head=44,
            dropout=0.0,
            num_classes=10,
        ),
        _image(32),
    ),
    "shuffle_plain": Entry(
        partial(ShuffleNetV2, shuffle=False),
        partial(ShuffleNetV2, shuffle=False, **_shuffle),
        _image(48),
    ),
    "shufflenet_v2": Entry(ShuffleNetV2, partial(ShuffleNetV2, **_shuffle), _image(48)),
    "depth_multiplier": Entry(
        DepthMultiplierNet,
        partial(DepthMultiplierNet, widths=(12, 20, 14)),
        _image(24, full=64),
    ),
    "unet": Entry(UNet, partial(UNet, widths=(8, 12, 20), num_classes=2), _image(16)),
    "convnext_tiny": Entry(
        ConvNeXt,
        partial(
            ConvNeXt,
            widths=(12, 20, 24),
            depths=(1, 2, 1),
            expansion=3,
            layer_scale=0.5,
            num_classes=10,
        ),
        _image(32),
    ),
    "vit_s16": Entry(ViT, partial(ViT, **_vit), _image(32)),
    "vit_s16_fused": Entry(partial(ViT, fused_qkv=True), partial(ViT, **_vit, fused_qkv=True), _image(32)),
    "text": Entry(TextClassifier, partial(TextClassifier, vocab=50, dim=20, hidden=28), _tokens),
    "tagger": Entry(Tagger, partial(Tagger, vocab=50, dim=12, hidden=10, top=14), _tokens),
    "conv1d": Entry(Conv1dNet, partial(Conv1dNet, widths=(12, 20, 14)), _signal),
    "conv3d": Entry(Conv3dNet, partial(Conv3dNet, widths=(12, 20, 24), norm_groups=4), _volume),
}


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter and floating-point buffer of `model` with random values, in place; returns it.

    Fresh norms (weight 1, bias 0, mean 0, variance 1) and a layer scale of 1e-6 hide a channel that went
    missing or changed places. Here every entry differs, outputs stay of order one, and running variances lie
    in [0.5, 1.5]. Values do not depend on device or global random state; shared tensors are filled once.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor, mean: float, std: float) -> None:
        t.copy_(mean + std * torch.randn(t.shape, generator=generator, dtype=torch.float64))

    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if p.ndim >= 2 and name == "weight" and not isinstance(module, nn.Embedding):
                normal(p, 0.0, (p.numel() / p.shape[0]) ** -0.5)
            elif name == "weight" and p.ndim == 1:
                normal(p, 1.0, 0.3)
            else:
                normal(p, 0.0, 0.5)
        for name, b in module.named_buffers(recurse=False):
            if name == "num_batches_tracked":
                b.fill_(int(torch.randint(1, 100, (), generator=generator)))
            elif name == "running_var":
                b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
            elif b.is_floating_point() and id(b) not in seen:
                normal(b, 0.0, 0.5)
                seen.add(id(b))
    return model
