"""Pruning in a loop of Accelerate, on any number of processes; it can be killed and goes on where it was.

    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py --folder runs/accelerate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pat_fast as pat


def digits() -> TensorDataset:
    """Images ``[n, 1, 8, 8]`` of ten kinds of stripes with noise, and their kind."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(512) % 10
    angle = kind[:, None, None] * torch.pi / 10
    x, y = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    images = torch.sin(1.5 * (x * torch.cos(angle) + y * torch.sin(angle)))
    return TensorDataset((images + 0.3 * torch.randn(images.shape, generator=generator))[:, None], kind)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def main(folder: Path, epochs: int, cpu: bool) -> None:
    accelerator = Accelerator(cpu=cpu)
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = DataLoader(digits(), batch_size=32, shuffle=True)

    pruner = pat.Pruner(model, 0.5, end_epoch=epochs - 2)
    parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
    file, first = folder / "training.pt", 0
    if file.exists():
        first = pat.load_training(file, **parts)["epoch"]  # before prepare(): it wraps a model of the right shape

    wrapped, prepared, data = accelerator.prepare(model, optimizer, data)
    for epoch in range(first, epochs):
        wrapped.train()
        for images, target in data:
            prepared.zero_grad()
            loss = nn.functional.cross_entropy(wrapped(images), target)
            accelerator.backward(loss)
            prepared.step()
        report = pruner.step()  # on all processes: they agree on what goes
        accelerator.print(f"loss {loss.item():.3f}; {report}")
        if accelerator.is_main_process:
            pat.save_training(file, **parts, extra={"epoch": epoch + 1})
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        pat.save(model, folder / "pruned.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    main(options.folder, options.epochs, options.cpu)
