"""The quick start: your own training loop, and one line of pruning per epoch.

Trains a small network on scikit-learn's handwritten digits and halves its channels on the way.
Run it with ``python examples/quickstart.py``; it takes a few seconds.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pat_fast as pat

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[:1347], order[1347:]
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)


def train_one_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


def block(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


body = nn.Sequential(block(1, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64))
model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

pruner = pat.Pruner(model, target_sparsity=0.5, schedule="linear")
for epoch in range(12):
    train_one_epoch(model, optimizer)
    report = pruner.step()
    print(f"epoch {epoch + 1:2}: accuracy {accuracy(model):.1%}\n{report}")
