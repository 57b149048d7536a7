"""What ``pat-fast train`` left in a folder, read back: the model, its data, and files made of it to run elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import load, read_structure
from .config import TrainConfig, load_config
from .data import Splits, augment, batches, epoch_generator, load_splits
from .errors import ConfigError
from .export import ExportReport, export_onnx, export_program, runner
from .factory import build_model
from .measure import evaluating
from .structure import Structure

WEIGHTS, CONFIG = "model.safetensors", "config.json"
QAT_LR = 1e-4


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    config: TrainConfig
    model: nn.Module
    structure: Structure


@dataclass(frozen=True)
class Exported:
    """A file that was made of a run, and its accuracy on the run's test images (0..1)."""

    report: ExportReport
    accuracy: float


def read_run(folder: Path) -> tuple[TrainConfig, Structure]:
    """What a run's folder says of itself; none of the code that its configuration names is run.

    Raises:
        ConfigError: it is not the folder of a finished run.
        CheckpointError: its model file is damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"RUN: expected the folder of a finished pat-fast train, got {folder}: it has no {name}")
    return load_config(folder / CONFIG, TrainConfig), read_structure(folder / WEIGHTS)


def open_run(folder: Path) -> Run:
    """Read the model of a run, on the CPU. The model's factory is the one that the run's configuration names.

    Raises:
        ConfigError: it is not the folder of a finished run.
        CheckpointError: its model file is damaged, or belongs to another definition of the model.
    """
    config, structure = read_run(folder)
    model = load(folder / WEIGHTS, build_model(config.model.factory, config.model.args)).eval()
    return Run(folder, config, model, structure)


def is_known(factory: str) -> bool:
    """Whether a factory makes networks and nothing else, whoever named it."""
    return re.fullmatch(r"(pat_fast\.models|transformers):[a-z0-9_-]+", factory) is not None


def export_run(
    run: Run, formats: tuple[str, ...], out: Path, qat_epochs: int = 3, tell: Callable[[str], None] = lambda line: None
) -> list[Exported]:
    """Write the run's model as ``"onnx"``, ``"torch-export"`` and ``"int8"`` files to the folder ``out``.

    For int8 the model trains ``qat_epochs`` epochs under fake quantization on the run's own training images.

    Raises:
        PatError: the data is gone, a package is missing, or a file would compute something else.
    """
    splits = load_splits(run.config.data)
    images, labels = _all(splits, run.config)
    metrics = run.structure.metrics
    config = run.config.model.model_dump()
    found = []
    for kind in formats:
        tell(f"{kind} ...")
        if kind == "torch-export":
            report = export_program(run.model, images[:2], out / "model.pt2")
            with torch.no_grad():
                logits = torch.export.load(str(report.path)).module()(images)
        else:
            model = run.model if kind == "onnx" else _quantized(run, splits, qat_epochs)
            name = "model.onnx" if kind == "onnx" else "model.int8.onnx"
            report = export_onnx(model, images[:2], out / name, config=config, metrics=metrics)
            logits = runner(str(report.path))([images])[0]
        found.append(Exported(report, float((logits.argmax(1) == labels).float().mean())))
    return found


def accuracy(run: Run) -> float:
    """The accuracy of the run's model in PyTorch on the run's test images."""
    images, labels = _all(load_splits(run.config.data), run.config)
    with evaluating(run.model):
        return float((run.model(images).argmax(1) == labels).float().mean())


def _all(splits: Splits, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The test images ``[N, ...]`` and labels ``[N]``."""
    parts = list(batches(splits.test, config.data))
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _quantized(run: Run, splits: Splits, epochs: int) -> nn.Module:
    """The run's model, trained on under fake quantization."""
    from .quantization import convert_qat, prepare_qat

    config = run.config
    data = batches(splits.train, config.data, shuffle_seed=config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        prepared = prepare_qat(run.model, next(iter(data))[0][:2])
        optimizer = torch.optim.Adam(prepared.parameters(), QAT_LR)
        for epoch in range(epochs):
            generator = epoch_generator(config.seed, config.epochs + epoch)
            for images, labels in data:
                optimizer.zero_grad()
                F.cross_entropy(prepared(augment(images, config.data.augment, generator)), labels).backward()
                optimizer.step()
    return convert_qat(prepared)
