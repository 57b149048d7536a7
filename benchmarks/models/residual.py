"""Residual networks: ResNet, ResNeXt, SE-ResNet and RegNetY.

Channel counts follow He et al. 2016 (arXiv:1512.03385), Xie et al. 2017 (arXiv:1611.05431), Hu et al. 2018
(arXiv:1709.01507) and Radosavovic et al. 2020 (arXiv:2003.13678).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def conv_norm(
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
    act: bool = True,
) -> nn.Sequential:
    """Convolution, BatchNorm and (unless `act` is false) ReLU; [B, c_in, H, W] -> [B, c_out, H', W']."""
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    if act:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class LinearGate(nn.Module):
    """Squeeze-and-excitation with Linear layers and a view, as in the paper."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, squeezed)
        self.fc2 = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class ConvGate(nn.Module):
    """Squeeze-and-excitation with 1x1 convolutions, as in RegNetY and the MobileNets."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(self.pool(x)))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; optional squeeze-and-excitation before the sum."""

    expansion = 1

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        groups: int,
        width_per_group: float,
        se_ratio: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se: nn.Module = LinearGate(width, max(1, int(width * se_ratio))) if se_ratio else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != width:
            self.downsample = conv_norm(c_in, width, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.se(self.bn2(self.conv2(y)))
        return torch.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1; the stride sits on the 3x3."""

    expansion = 4

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        groups: int,
        width_per_group: float,
        se_ratio: float,
    ) -> None:
        super().__init__()
        inner, c_out = int(width * width_per_group) * groups, width * self.expansion
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.se: nn.Module = LinearGate(c_out, max(1, int(c_out * se_ratio))) if se_ratio else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = conv_norm(c_in, c_out, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.se(self.bn3(self.conv3(y)))
        return torch.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet for [B, 3, H, W] images.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks per stage.
        stem: channels of the first convolution.
        widths: width per stage, before the block's expansion.
        groups: conv groups of the bottleneck's 3x3.
        width_per_group: channels per conv group as a fraction of the stage's width (1.0 without groups).
        se_ratio: squeeze ratio, 0 for none.
        num_classes: outputs.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        stem: int = 64,
        widths: Sequence[int] = (64, 128, 256, 512),
        groups: int = 1,
        width_per_group: float = 1.0,
        se_ratio: float = 0.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = stem
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, stride, groups, width_per_group, se_ratio))
                channels = width * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.n_stages = len(depths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for i in range(self.n_stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    stem: int = 64,
    num_classes: int = 1000,
) -> ResNet:
    """ResNet-18: 11.69 M parameters."""
    return ResNet(BasicBlock, depths, stem, widths, num_classes=num_classes)


def resnet50(
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    num_classes: int = 1000,
) -> ResNet:
    """ResNet-50: 25.56 M parameters."""
    return ResNet(Bottleneck, depths, stem, widths, num_classes=num_classes)


def resnext50(
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    stem: int = 64,
    groups: int = 32,
    width_per_group: float = 4 / 64,
    num_classes: int = 1000,
) -> ResNet:
    """ResNeXt-50 32x4d: 25.03 M parameters."""
    return ResNet(
        Bottleneck,
        depths,
        stem,
        widths,
        groups,
        width_per_group,
        num_classes=num_classes,
    )


def se_resnet18(
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    stem: int = 64,
    se_ratio: float = 1 / 16,
    num_classes: int = 1000,
) -> ResNet:
    """SE-ResNet-18: 11.78 M parameters."""
    return ResNet(BasicBlock, depths, stem, widths, se_ratio=se_ratio, num_classes=num_classes)


class RegNetBlock(nn.Module):
    """1x1, grouped 3x3, squeeze-and-excitation (sized by the block's input), 1x1."""

    def __init__(self, c_in: int, c_out: int, stride: int, group_width: int, se_ratio: float) -> None:
        super().__init__()
        self.a = conv_norm(c_in, c_out, 1)
        self.b = conv_norm(c_out, c_out, 3, stride, groups=c_out // group_width)
        self.se = ConvGate(c_out, max(1, round(se_ratio * c_in)))
        self.c = conv_norm(c_out, c_out, 1, act=False)
        self.proj: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.proj = conv_norm(c_in, c_out, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.c(self.se(self.b(self.a(x)))) + self.proj(x))


class RegNetY(nn.Module):
    """RegNetY for [B, 3, H, W] images; every stage's width is a multiple of `group_width`."""

    def __init__(
        self,
        widths: Sequence[int] = (48, 104, 208, 440),
        depths: Sequence[int] = (1, 3, 6, 6),
        stem: int = 32,
        group_width: int = 8,
        se_ratio: float = 0.25,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem, 3, 2)
        stages, channels = [], stem
        for depth, width in zip(depths, widths, strict=True):
            blocks = []
            for j in range(depth):
                blocks.append(RegNetBlock(channels, width, 2 if j == 0 else 1, group_width, se_ratio))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.stages(self.stem(x))).flatten(1))
