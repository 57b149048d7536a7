"""A script for Torch-Pruning with one import changed: train, prune in steps, go on training with the same optimizer.

Run it with ``python examples/torch_pruning_dropin.py``; it takes a few seconds.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pat_fast.torch_pruning as tp  # was: import torch_pruning as tp

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
train, test = torch.randperm(len(labels)).split([1347, 450])


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


body = nn.Sequential(block(1, 32), block(32, 32), nn.MaxPool2d(2), block(32, 64))
model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
example_inputs = images[:1]


def run_epoch(pruner: tp.pruner.GroupNormPruner | None = None) -> None:
    model.train()
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        if pruner is not None:
            pruner.regularize(model)
        optimizer.step()


@torch.no_grad()
def accuracy() -> float:
    model.eval()
    return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


pruner = tp.pruner.GroupNormPruner(
    model,
    example_inputs,
    importance=tp.importance.GroupMagnitudeImportance(p=2),
    global_pruning=True,
    pruning_ratio=0.5,
    iterative_steps=4,
    ignored_layers=[model[-1]],
)
macs, params = tp.utils.count_ops_and_params(model, example_inputs)
for step in range(4):
    run_epoch(pruner)
    pruner.step()
    pruner.update_regularizer()
    run_epoch()
    now = tp.utils.count_ops_and_params(model, example_inputs)
    print(f"step {step + 1}: MACs {now[0] / macs:.0%}, parameters {now[1] / params:.0%}, accuracy {accuracy():.1%}")
