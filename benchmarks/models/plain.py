"""Chains, concatenations and mobile networks: VGG, DenseNet, GoogLeNet, MobileNetV2, ShuffleNetV2, U-Net.

Channel counts follow Simonyan and Zisserman 2015 (arXiv:1409.1556), Huang et al. 2017 (arXiv:1608.06993),
Szegedy et al. 2015 (arXiv:1409.4842), Sandler et al. 2018 (arXiv:1801.04381), Ma et al. 2018
(arXiv:1807.11164) and Ronneberger et al. 2015 (arXiv:1505.04597).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.residual import conv_norm

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """VGG with BatchNorm for [B, 3, H, W] images; the last map (`pool` x `pool`) is flattened into a Linear.

    `vgg16_bn` at full size: 138.37 M parameters.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = VGG16,
        hidden: tuple[int, int] = (4096, 4096),
        pool: int = 7,
        dropout: float = 0.5,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in stages:
            for width in stage:
                conv = nn.Conv2d(channels, width, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(pool)
        self.classifier = nn.Sequential(
            nn.Linear(channels * pool * pool, hidden[0]),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden[1], num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class DenseLayer(nn.Module):
    """Concatenates all earlier outputs, then norm-ReLU-1x1-norm-ReLU-3x3 to `growth` channels."""

    def __init__(self, c_in: int, growth: int, inner: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(torch.relu(self.norm2(y)))


class DenseBlock(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """DenseNet-BC for [B, 3, H, W] images; the default, DenseNet-121, has 7.98 M parameters."""

    def __init__(
        self,
        depths: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        stem: int = 64,
        bottleneck: int = 4,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        self.norm0 = nn.BatchNorm2d(stem)
        stages: list[nn.Module] = []
        channels = stem
        for i, depth in enumerate(depths):
            layers = [DenseLayer(channels + j * growth, growth, bottleneck * growth) for j in range(depth)]
            stages.append(DenseBlock(layers))
            channels += depth * growth
            if i + 1 < len(depths):
                stages.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels),
                        nn.ReLU(inplace=True),
                        nn.Conv2d(channels, channels // 2, 1, bias=False),
                        nn.AvgPool2d(2),
                    )
                )
                channels //= 2
        self.stages = nn.Sequential(*stages)
        self.norm5 = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm0(self.conv0(x))), 3, 2, 1)
        x = torch.relu(self.norm5(self.stages(x)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Inception(nn.Module):
    """Four branches side by side, concatenated: 1x1; 1x1-3x3; 1x1-3x3 (5x5 in the paper); pool-1x1."""

    def __init__(self, c_in: int, b1: int, b2: tuple[int, int], b3: tuple[int, int], b4: int) -> None:
        super().__init__()
        self.branch1 = conv_norm(c_in, b1, 1)
        self.branch2 = nn.Sequential(conv_norm(c_in, b2[0], 1), conv_norm(b2[0], b2[1], 3))
        self.branch3 = nn.Sequential(conv_norm(c_in, b3[0], 1), conv_norm(b3[0], b3[1], 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(c_in, b4, 1))
        self.out_channels = b1 + b2[1] + b3[1] + b4

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


InceptionSpec = tuple[int, tuple[int, int], tuple[int, int], int]
GOOGLENET: tuple[tuple[InceptionSpec, ...], ...] = (
    ((64, (96, 128), (16, 32), 32), (128, (128, 192), (32, 96), 64)),
    (
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    ((256, (160, 320), (32, 128), 128), (384, (192, 384), (48, 128), 128)),
)


class GoogLeNet(nn.Module):
    """GoogLeNet with BatchNorm and without auxiliary heads for [B, 3, H, W] images: 6.62 M parameters.

    As in most published code, the third branch's kernel is 3x3 rather than the paper's 5x5.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[InceptionSpec]] = GOOGLENET,
        stem: tuple[int, int, int] = (64, 64, 192),
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm(3, stem[0], 7, 2)
        self.conv2 = conv_norm(stem[0], stem[1], 1)
        self.conv3 = conv_norm(stem[1], stem[2], 3)
        channels = stem[2]
        built: list[nn.Module] = []
        for stage in stages:
            built.append(nn.MaxPool2d(3, 2, 1))
            for spec in stage:
                block = Inception(channels, *spec)
                built.append(block)
                channels = block.out_channels
        self.stages = nn.Sequential(*built)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 3, 2, 1)
        x = self.stages(self.conv3(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; a shortcut where shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = c_in * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [
                nn.Conv2d(c_in, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU6(inplace=True),
            ]
        layers += [
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        ]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2 for [B, 3, H, W] images: 3.50 M parameters.

    `settings` rows are (expansion, channels, blocks, first stride).
    """

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]] = MOBILENET_V2,
        stem: int = 32,
        head: int = 1280,
        dropout: float = 0.2,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, stem, 3, 2, 1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU6(inplace=True),
        ]
        channels = stem
        for expand, width, depth, stride in settings:
            for j in range(depth):
                layers.append(InvertedResidual(channels, width, stride if j == 0 else 1, expand))
                channels = width
        layers += [
            nn.Conv2d(channels, head, 1, bias=False),
            nn.BatchNorm2d(head),
            nn.ReLU6(inplace=True),
        ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass by, the other half is transformed, then concatenated."""

    def __init__(self, c_in: int, c_out: int, stride: int, shuffle: bool) -> None:
        super().__init__()
        half = c_out // 2
        inner_in = c_in if stride > 1 else half
        self.stride, self.shuffle = stride, shuffle
        self.branch1: nn.Module = nn.Identity()
        if stride > 1:
            self.branch1 = nn.Sequential(
                conv_norm(c_in, c_in, 3, stride, groups=c_in, act=False),
                conv_norm(c_in, half, 1),
            )
        self.branch2 = nn.Sequential(
            conv_norm(inner_in, half, 1),
            conv_norm(half, half, 3, stride, groups=half, act=False),
            conv_norm(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            y = torch.cat([self.branch1(x), self.branch2(x)], 1)
        else:
            passed, worked = x.chunk(2, dim=1)
            y = torch.cat([passed, self.branch2(worked)], 1)
        if not self.shuffle:
            return y
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2 for [B, 3, H, W] images: 2.28 M parameters.

    With `shuffle=False` the units keep their chunk and concat but do not interleave the channels.
    """

    def __init__(
        self,
        widths: Sequence[int] = (116, 232, 464),
        depths: Sequence[int] = (4, 8, 4),
        stem: int = 24,
        head: int = 1024,
        shuffle: bool = True,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = conv_norm(3, stem, 3, 2)
        stages, channels = [], stem
        for width, depth in zip(widths, depths, strict=True):
            for j in range(depth):
                stages.append(ShuffleUnit(channels, width, 2 if j == 0 else 1, shuffle))
                channels = width
        self.stages = nn.Sequential(*stages)
        self.head = conv_norm(channels, head, 1)
        self.fc = nn.Linear(head, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.fc(self.head(x).mean((2, 3)))


class UNet(nn.Module):
    """U-Net for [B, c_in, H, W] images, H and W multiples of 2 ** (len(widths) - 1): 31.04 M parameters.

    The skip connection comes first in the concatenation; returns [B, num_classes, H, W].
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        c_in: int = 3,
        num_classes: int = 1,
    ) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self.merge = nn.ModuleList()
        channels = c_in
        for width in widths:
            self.down.append(nn.Sequential(conv_norm(channels, width, 3), conv_norm(width, width, 3)))
            channels = width
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(channels, width, 2, 2))
            self.merge.append(nn.Sequential(conv_norm(2 * width, width, 3), conv_norm(width, width, 3)))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)
