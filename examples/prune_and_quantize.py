"""Prune, quantize, export: ResNet-20 on handwritten digits, from dense fp32 to a pruned int8 file, all measured.

    python examples/prune_and_quantize.py [folder for the ONNX files]

One schedule: train and prune to half of the MACs, then train on under fake quantization, convert, export. Accuracy is
that of the exported file in onnxruntime on the 450 test images; latency is processor time of one thread, the least of
many runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import pat_fast as pat
from pat_fast.config import DataConfig
from pat_fast.data import load_splits
from pat_fast.export import Runner, runner
from pat_fast.models import resnet20

EPOCHS, QAT_EPOCHS, BATCH = 20, 6, 50


def train(model: nn.Module, data: DataLoader[Any], epochs: int, lr: float, pruner: pat.Pruner | None = None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(data), pct_start=0.1)
    for _ in range(epochs):
        model.train()
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
        if pruner is not None:
            pruner.step()
    model.eval()


def accuracy(run: Runner, images: Tensor, labels: Tensor) -> float:
    return float((run([images])[0].argmax(1) == labels).float().mean())


def latency_ms(run: Runner, images: Tensor, rounds: int = 100) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run([images])
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/prune_and_quantize")
    torch.set_num_threads(1)
    config = DataConfig(name="digits", size=16, batch_size=BATCH, test_fraction=0.25)
    splits = load_splits(config)
    torch.manual_seed(0)
    data = DataLoader(splits.train, batch_size=BATCH, shuffle=True, drop_last=True)
    images, labels = next(iter(DataLoader(splits.test, batch_size=10_000)))
    example = images[:2]

    dense = resnet20()
    pruned = resnet20()
    pruned.load_state_dict(dense.state_dict())
    train(dense, data, EPOCHS, 3e-3)
    pruner = pat.Pruner(
        pruned, target={"macs": 0.5}, start_epoch=4, end_epoch=13, round_to=8, reg_strength=1e-3, example_inputs=example
    )
    train(pruned, data, EPOCHS, 3e-3, pruner)
    prepared = pat.prepare_qat(pruned, example)
    train(prepared, data, QAT_EPOCHS, 5e-4)
    models = {"dense fp32": dense, "pruned fp32": pruned, "pruned int8": pat.convert_qat(prepared)}

    print("| ResNet-20 on digits | test accuracy | file | CPU ms, batch 1 | CPU ms, batch 50 | error against PyTorch |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        report = pat.export_onnx(model, example, path)
        run = runner(str(path), threads=1)
        times = [f"{latency_ms(run, images[:n]):.3f}" for n in (1, 50)]
        row = [name, f"{accuracy(run, images, labels):.2%}", f"{report.bytes / 1e3:.0f} kB", *times]
        print(f"| {' | '.join([*row, f'{report.max_error:.1e}'])} |", flush=True)


if __name__ == "__main__":
    main()
