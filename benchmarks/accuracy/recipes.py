"""How a network is trained and pruned: dense, by Torch-Pruning, by pat_fast. All see the same batches, equally often.

Pruned networks lose channels from a fifth to two thirds of the epochs, MACs falling fast at first (cubic); the rest is
fine-tuning.
One-shot Torch-Pruning trains half of the epochs, prunes, and fine-tunes for the other half, each with a whole learning
rate curve of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pat_fast as pat
from pat_fast.bench.subject import classifier, differentiable, num_heads
from pat_fast.config import AugmentConfig
from pat_fast.data import augment, epoch_generator
from pat_fast.measure import count_macs
from pat_fast.schedules import make_curve

from .tasks import Data, Task

BATCH = 50
WEIGHT_DECAY = 0.05
TP_STEPS = 200  # of Torch-Pruning's own staircase, climbed until the MACs are met

PAT: dict[str, dict[str, Any]] = {
    "pat": {},
    "pat mask": {"mode": "mask"},
    "pat soft": {"mode": "soft"},
    "pat hybrid": {"mode": "hybrid"},
    "pat taylor": {"importance": "taylor"},
    "pat lamp": {"importance": "lamp"},
    "pat local": {"ranking": "local"},
    "pat linear": {"schedule": "linear"},
    "pat growing": {"regularizer": "growing"},
    "pat no-reg": {"regularizer": None},
}
TORCH_PRUNING: dict[str, dict[str, Any]] = {
    "tp one-shot": {"one_shot": True},
    "tp one-shot local": {"one_shot": True, "global_pruning": False},
    "tp iterative": {},
    "tp iterative linear": {"curve": "linear"},
}
METHODS = ("dense", *TORCH_PRUNING, *PAT)


@dataclass
class Run:
    """A training in progress; `curve` maps progress 0 .. 1 to a factor on the learning rate."""

    task: Task
    data: Data
    model: nn.Module
    seed: int
    epochs: int
    curve: Callable[[float], float]
    optimizer: torch.optim.Optimizer
    after_backward: Callable[[], None] | None = None
    after_epoch: Callable[[int], None] | None = None

    @property
    def example(self) -> Tensor:
        """The first two training images."""
        return self.data.train[0][:2]

    def fresh_optimizer(self) -> None:
        """A new optimizer, for a model whose parameters are new."""
        self.optimizer = adamw(self.task, self.model)

    def train(self) -> None:
        """All epochs."""
        images, labels = self.data.train
        batches = len(images) // BATCH
        for epoch in range(self.epochs):
            generator = epoch_generator(self.seed, epoch)
            order = torch.randperm(len(images), generator=generator)
            self.model.train()
            for batch in range(batches):
                which = order[batch * BATCH : (batch + 1) * BATCH]
                progress = (epoch + batch / batches) / self.epochs
                for group in self.optimizer.param_groups:
                    group["lr"] = self.task.lr * self.curve(progress)
                shifted = augment(images[which], AugmentConfig(shift=1), generator)
                loss = F.cross_entropy(self.model(shifted), labels[which])
                self.optimizer.zero_grad()
                loss.backward()
                if self.after_backward is not None:
                    self.after_backward()
                self.optimizer.step()
            if self.after_epoch is not None:
                self.after_epoch(epoch + 1)


def adamw(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """What trains all networks; fused, since its loop over tensors would take a tenth of the time."""
    return torch.optim.AdamW(model.parameters(), lr=task.lr, weight_decay=WEIGHT_DECAY, fused=True)


def cosine(progress: float) -> float:
    """A linear warm-up over a twentieth, then half a cosine wave."""
    if progress < 0.05:
        return (progress + 1e-3) / 0.05
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def twice(progress: float) -> float:
    """:func:`cosine`, once for each half."""
    return cosine(2 * progress if progress < 0.5 else 2 * progress - 1)


def window(epochs: int) -> tuple[int, int]:
    """The epochs between which channels leave."""
    return max(1, epochs // 5), max(2, 2 * epochs // 3)


def start(
    task: Task, method: str, ratio: float, seed: int, epochs: int, device: str = "cpu"
) -> tuple[Run, Callable[[], None]]:
    """A training by `method` that has not begun, and what is to be called when it has ended."""
    torch.manual_seed(seed)
    model = task.build().to(device)
    data = task.data().to(device)
    run = Run(task, data, model, seed, epochs, cosine, adamw(task, model))
    if method in PAT:
        return run, with_pat(run, PAT[method], ratio)
    if method in TORCH_PRUNING:
        with_torch_pruning(run, ratio, **TORCH_PRUNING[method])
    return run, lambda: None


def with_pat(run: Run, options: Mapping[str, Any], ratio: float) -> Callable[[], None]:
    """Let pat_fast prune to `1 / ratio` of the MACs."""
    begin, end = window(run.epochs)
    pruner = pat.Pruner(
        run.model,
        target={"macs": 1 / ratio},
        start_epoch=begin,
        end_epoch=end,
        optimizer=run.optimizer,
        example_inputs=run.example,
        **options,
    )

    def after_epoch(epoch: int) -> None:
        pruner.step()

    def finish() -> None:
        pruner.finalize()

    run.after_epoch = after_epoch
    return finish


def with_torch_pruning(
    run: Run, ratio: float, one_shot: bool = False, global_pruning: bool = True, curve: str = "cubic"
) -> None:
    """Let Torch-Pruning prune to `1 / ratio` of the MACs, once or in the steps that pat_fast takes."""
    import torch_pruning as tp

    warnings.filterwarnings("ignore", message="Unwrapped parameters")
    kind = tp.pruner.BasePruner if one_shot else tp.pruner.GroupNormPruner
    pruner = kind(
        run.model,
        run.example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=global_pruning,
        pruning_ratio=1.0,
        iterative_steps=TP_STEPS,
        ignored_layers=[classifier(run.model)],
        num_heads=num_heads(run.model),
        in_channel_groups={},
        out_channel_groups={},
        output_transform=differentiable,
    )
    dense, fraction = count_macs(run.model, run.example), make_curve(curve)
    begin, end = (run.epochs // 2 - 1, run.epochs // 2) if one_shot else window(run.epochs)

    def after_epoch(epoch: int) -> None:
        if not begin < epoch <= end:
            return
        due = 1.0 if one_shot else fraction((epoch - begin) / (end - begin))
        limit = dense * (1 - (1 - 1 / ratio) * due)
        while count_macs(run.model, run.example) > limit and pruner.current_step < TP_STEPS:
            pruner.step()
            for module in run.model.modules():
                if hasattr(module, "head_dim"):  # a size that the code keeps, and Torch-Pruning does not know
                    module.head_dim = module.q.out_features // module.num_heads
        if not one_shot:
            pruner.update_regularizer()
        run.fresh_optimizer()  # Torch-Pruning makes new parameters, which the old one does not train

    run.after_epoch = after_epoch
    if one_shot:
        run.curve = twice
    else:

        def after_backward() -> None:
            pruner.regularize(run.model)

        run.after_backward = after_backward
