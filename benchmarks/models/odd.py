"""Networks with layers that the classics do not use: 1-d and 3-d convolutions, depthwise multipliers, recurrence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Conv1dNet(nn.Module):
    """Conv1d, InstanceNorm1d (affine, running statistics), PReLU per channel.

    [B, c_in, L] -> [B, num_classes].
    """

    def __init__(
        self,
        widths: Sequence[int] = (64, 128, 256),
        c_in: int = 2,
        kernel: int = 5,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = c_in
        for width in widths:
            layers += [
                nn.Conv1d(channels, width, kernel, 2, kernel // 2),
                nn.InstanceNorm1d(width, affine=True, track_running_stats=True),
                nn.PReLU(width),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(2))


class Conv3dNet(nn.Module):
    """Residual Conv3d blocks with GroupNorm; [B, c_in, D, H, W] -> [B, num_classes].

    Every width is a multiple of `norm_groups`.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        norm_groups: int = 8,
        c_in: int = 1,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.enter = nn.ModuleList()
        self.inner = nn.ModuleList()
        self.norm1 = nn.ModuleList()
        self.norm2 = nn.ModuleList()
        channels = c_in
        for width in widths:
            self.enter.append(nn.Conv3d(channels, width, 3, 2, 1))
            self.norm1.append(nn.GroupNorm(norm_groups, width))
            self.inner.append(nn.Conv3d(width, width, 3, 1, 1, bias=False))
            self.norm2.append(nn.GroupNorm(norm_groups, width))
            channels = width
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for enter, norm1, inner, norm2 in zip(self.enter, self.norm1, self.inner, self.norm2, strict=True):
            x = torch.relu(norm1(enter(x)))
            x = torch.relu(x + norm2(inner(x)))
        return self.head(x.mean((2, 3, 4)))


class DepthMultiplierNet(nn.Module):
    """Depthwise convolutions with `multiplier` outputs per input, each followed by a 1x1.

    [B, 3, H, W] -> [B, num_classes].
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        multiplier: int = 2,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, widths[0], 3, 1, 1),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        channels = widths[0]
        for width in widths:
            inner = channels * multiplier
            layers += [
                nn.Conv2d(channels, inner, 3, 2, 1, groups=channels),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, width, 1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Tagger(nn.Module):
    """Embedding, two layers of LSTM in both directions, a GRU; [B, L] tokens -> [B, L, num_classes]."""

    def __init__(
        self, vocab: int = 30522, dim: int = 256, hidden: int = 512, top: int = 256, num_classes: int = 17
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * hidden, top, batch_first=True)
        self.head = nn.Linear(top, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.embed(tokens))[0])[0])
