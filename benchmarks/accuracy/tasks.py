"""What is learned: real images that come with Python packages, and a small network for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models.attention import ViT
from benchmarks.models.plain import MobileNetV2
from pat_fast.config import DataConfig
from pat_fast.data import load_splits
from pat_fast.models import resnet20

PATCH = 16


@dataclass(frozen=True)
class Data:
    """Images `[B, C, H, W]` float32 and labels `[B]` int64."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def to(self, device: str) -> Data:
        """The same on a device."""
        images, labels = zip(self.train, self.test, strict=True)
        train, test = ((x.to(device), y.to(device)) for x, y in zip(images, labels, strict=True))
        return Data(train, test)


@dataclass(frozen=True)
class Task:
    """A network and what it is trained on.

    Attributes:
        lr: of AdamW; the same for all methods.
    """

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[], Data]
    lr: float


@lru_cache
def digits(size: int, channels: int) -> Data:
    """Handwritten digits of scikit-learn, enlarged from 8 x 8 where `size` is more."""
    splits = load_splits(DataConfig(name="digits", size=size, test_fraction=0.25))
    parts = []
    for part in (splits.train, splits.test):
        images, labels = zip(*(part[i] for i in range(len(part))), strict=True)  # type: ignore[arg-type]
        stacked = torch.stack(list(images)).expand(-1, channels, -1, -1).contiguous()
        parts.append((stacked, torch.as_tensor(labels)))
    return Data(*parts)


@lru_cache
def photographs() -> Data:
    """Grey 16 x 16 patches of scikit-learn's two photographs: which of the two, and which horizontal third of it.

    Patches do not overlap, each has mean 0 and deviation 1, and of every third column of patches all are tested on.
    """
    from sklearn.datasets import load_sample_images

    found: dict[bool, list[tuple[Tensor, int]]] = {True: [], False: []}
    for number, image in enumerate(load_sample_images().images):
        grey = torch.from_numpy(np.asarray(image, dtype=np.float32).mean(2))
        patches = grey.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
        for row in range(patches.shape[0]):
            for column in range(patches.shape[1]):
                patch = patches[row, column]
                patch = (patch - patch.mean()) / (patch.std() + 1e-3)
                label = 3 * number + 3 * row // patches.shape[0]
                found[column % 3 == 1].append((patch[None], label))
    train, test = (
        (torch.stack([p for p, _ in part]), torch.tensor([n for _, n in part])) for part in (found[False], found[True])
    )
    return Data(train, test)


def mobilenet() -> nn.Module:
    """A MobileNetV2 of a sixth of the widths, for 16 x 16."""
    settings = ((1, 8, 1, 1), (4, 16, 2, 2), (4, 24, 2, 1), (4, 32, 2, 2))
    return MobileNetV2(settings=settings, stem=16, head=128, dropout=0.0, num_classes=10)


def vit() -> nn.Module:
    """A ViT with 16 patches of 2 x 2."""
    return ViT(image=8, patch=2, dim=64, depth=4, num_heads=4, head_dim=16, hidden=128, num_classes=10)


TASKS: dict[str, Task] = {
    "resnet20-digits8": Task("ResNet-20, digits 8x8", partial(resnet20, width=16), partial(digits, 8, 1), 3e-3),
    "vit-digits8": Task("ViT, digits 8x8", vit, partial(digits, 8, 3), 2e-3),
    "mobilenet-digits16": Task("MobileNetV2, digits 16x16", mobilenet, partial(digits, 16, 3), 3e-3),
    "resnet20-digits16": Task("ResNet-20, digits 16x16", partial(resnet20, width=16), partial(digits, 16, 1), 3e-3),
    "resnet20-photos": Task(
        "ResNet-20, patches of photographs", partial(resnet20, num_classes=6, width=16), photographs, 3e-3
    ),
}

