"""The training job of ``pat-fast train``: a network that is pruned while it trains, beside its dense twin.

Both start from the same weights and see the same batches in the same order; they take turns, epoch by
epoch. The weights reported are those after the last epoch: none are chosen by their accuracy. With a
``val_fraction`` the epochs are followed on that part and the test part is looked at once, at the end.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from . import checkpoint
from .config import SchedulerConfig, TrainConfig
from .data import EpochSampler, Splits, augment, batches, epoch_generator, load_splits
from .errors import ConfigError, PatError
from .factory import build_model
from .measure import count_macs, count_params, evaluating, measure_latency
from .runlog import Record, RunLog, Summary, run_directory

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass
class Twin:
    """One of the two networks in training; ``cost`` is (channels or None, parameters, MACs per image)."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    pruner: Any
    cost: tuple[int | None, int, int]


@dataclass(frozen=True)
class Job:
    """What both twins share."""

    config: TrainConfig
    device: torch.device
    train: DataLoader[Any]
    follow: DataLoader[Any]
    test: DataLoader[Any]
    split: str
    example: Tensor
    dense: nn.Module


def run(config: TrainConfig, *, out: str | Path | None = None, log: RunLog | None = None) -> Path:
    """Train as ``config`` says and return the run's folder.

    The folder holds ``config.json`` (with every default filled in), ``log.jsonl`` (an object per epoch and
    twin, written as it happens), ``model.safetensors`` (the trained network, for :func:`pat_fast.load`),
    ``plot.png`` and ``summary.json``.

    Args:
        out: the folder to make, instead of ``<output_dir>/<name>-<time>``.
        log: where progress is shown; the terminal by default.

    Raises:
        ConfigError: the model, the data or the pruning section do not fit; nothing is written then.
        PatError: the loss stopped being a number.
    """
    started = time.perf_counter()
    log = log or RunLog()
    config = resolve(config)
    directory = run_directory(config, out)
    with _threads(config.threads), _seeded(config):
        job, twins = _prepare(config)
        log.open(directory, config, len(job.train) * len(twins))
        try:
            _warn(config, log)
            _train_all(job, twins, log)
            log.phase("measuring")
            summary = _summarise(job, twins)
        except KeyboardInterrupt:
            log.interrupted()
            raise
        finally:
            for twin in twins:
                if twin.pruner is not None:
                    twin.pruner.close()
            log.close()
        summary["seconds"] = time.perf_counter() - started
        metrics = summary[twins[0].name]
        checkpoint.save(
            twins[0].model, directory / "model.safetensors", config=config.model.model_dump(), metrics=metrics
        )
        log.finish(summary, config)
    return directory


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on the run: the device, the latency's batch and the end of pruning.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected a GPU that torch can use, got none; set device to 'auto' or 'cpu'")
    changes: dict[str, Any] = {
        "device": ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device,
        "latency_batch": config.latency_batch or config.data.batch_size,
    }
    pruning = config.pruning
    if pruning is not None and pruning.end_epoch is None:
        # The last third of the run is left to recover in.
        end = max(pruning.start_epoch, 2 * config.epochs // 3)
        changes["pruning"] = pruning.model_copy(update={"end_epoch": end})
    return config.model_copy(update=changes)


def lr_factor(config: SchedulerConfig, epoch: float, epochs: int) -> float:
    """The factor on the learning rate at ``epoch`` (in fractions) of ``epochs``.

    Cosine is that of SGDR (Loshchilov and Hutter 2016, equation 5) without restarts, after the warm-up.
    """
    if epoch < config.warmup_epochs:
        return (epoch + 1e-8) / config.warmup_epochs
    if config.name == "cosine":
        share = min(1.0, (epoch - config.warmup_epochs) / max(epochs - config.warmup_epochs, 1e-8))
        return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * share))
    if config.name == "step":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return 1.0


def _prepare(config: TrainConfig) -> tuple[Job, list[Twin]]:
    """Everything that can fail on bad input, in the order in which it is cheap to find out."""
    device = torch.device(config.device)
    model = build_model(config.model.factory, config.model.args).to(device)
    splits = load_splits(config.data)
    pin = device.type == "cuda"
    job = Job(
        config=config,
        device=device,
        train=batches(splits.train, config.data, shuffle_seed=config.seed, pin=pin),
        follow=batches(splits.val or splits.test, config.data, pin=pin),
        test=batches(splits.test, config.data, pin=pin),
        split="val" if splits.val else "test",
        example=_example(splits, device),
        dense=model,
    )
    _check_fit(model, job, splits)
    twins = []
    if config.pruning is not None:
        twins.append(_make_twin("pruned", copy.deepcopy(model), job))
    if config.dense_twin or config.pruning is None:
        twins.append(_make_twin("dense", model, job))
    return job, twins


def _make_twin(name: str, model: nn.Module, job: Job) -> Twin:
    from . import Pruner

    config = job.config
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError(f"model: expected parameters to train, got none in {config.model.factory}")
    optimizer = OPTIMIZERS[config.optimizer.name](trainable, **config.optimizer.kwargs())
    scheduler = LambdaLR(optimizer, lambda step: lr_factor(config.scheduler, step / len(job.train), config.epochs))
    pruner = None
    if name == "pruned" and config.pruning is not None:
        pruner = Pruner(model, **config.pruning.pruner_kwargs(), optimizer=optimizer, example_inputs=job.example)
    cost = (None, count_params(model), count_macs(model, job.example))
    return Twin(name, model, optimizer, scheduler, pruner, cost)


def _example(splits: Splits, device: torch.device) -> Tensor:
    """The first training image as a batch of one, ``[1, ...]``."""
    image = torch.as_tensor(splits.train[0][0])
    return image.unsqueeze(0).to(device)


def _check_fit(model: nn.Module, job: Job, splits: Splits) -> None:
    """Raise ConfigError unless the model maps the data to one logit per class."""
    shape = tuple(job.example.shape)
    try:
        with evaluating(model):
            logits = _logits(model(job.example))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"model: expected {job.config.model.factory} to take images of shape {shape}, "
            f"got {type(error).__name__}: {error}"
        ) from error
    labels = next(iter(job.follow))[1]
    classes = max(len(splits.classes), int(labels.max()) + 1)
    if logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < classes:
        raise ConfigError(
            f"model: expected logits of shape [1, {classes}] (one per class of the data) for images of shape "
            f"{shape}, got {list(logits.shape)}; set the number of classes in model.args"
        )


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ConfigError(f"model: expected a tensor of logits or an object that has .logits, got {type(output)}")
    return found


def _train_all(job: Job, twins: list[Twin], log: RunLog) -> None:
    for epoch in range(job.config.epochs):
        records = []
        for twin in twins:
            log.phase(f"epoch {epoch + 1}/{job.config.epochs} {twin.name}")
            records.append(_train_twin(job, twin, epoch, log))
            log.record(records[-1])
        log.epoch_line(records)


def _train_twin(job: Job, twin: Twin, epoch: int, log: RunLog) -> Record:
    """One epoch of one twin, with the pruning that follows it. Evaluation is not in the seconds."""
    start = time.perf_counter()
    train_loss, train_accuracy = _train_epoch(job, twin, epoch, log.advance)
    stage = "train"
    if twin.pruner is not None:
        stage = str(twin.pruner.stage)
        report = twin.pruner.step()
        if epoch == job.config.epochs - 1:
            report = twin.pruner.finalize()
        twin.cost = (report.channels[1], report.params[1], report.macs[1])
        for note in report.notes:
            log.note(note)
    _synchronize(job.device)
    seconds = time.perf_counter() - start
    loss, accuracy = evaluate(twin.model, job.follow, job.device)
    channels, params, macs = twin.cost
    return Record(
        epoch=epoch + 1,
        twin=twin.name,
        stage=stage,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        split=job.split,
        loss=loss,
        accuracy=accuracy,
        channels=channels,
        params=params,
        macs=macs,
        lr=twin.optimizer.param_groups[0]["lr"],
        seconds=seconds,
    )


def _train_epoch(job: Job, twin: Twin, epoch: int, advance: Callable[[], None]) -> tuple[float, float]:
    """Train on every batch once; returns the mean loss and the accuracy over the epoch."""
    sampler = job.train.sampler
    assert isinstance(sampler, EpochSampler)
    sampler.epoch = epoch
    generator = epoch_generator(job.config.seed, epoch)
    # Both twins draw the same random numbers in dropout and the like.
    torch.manual_seed(job.config.seed * 1_000_003 + epoch)
    twin.model.train()
    totals = torch.zeros(3, device=job.device, dtype=torch.float64)
    for images, labels in job.train:
        images, labels = images.to(job.device, non_blocking=True), labels.to(job.device, non_blocking=True)
        logits = _logits(twin.model(augment(images, job.config.data.augment, generator)))
        loss = F.cross_entropy(logits, labels)
        twin.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        twin.optimizer.step()
        twin.scheduler.step()
        correct = (logits.argmax(1) == labels).sum()
        totals += torch.stack([loss.detach() * len(labels), correct, correct.new_tensor(len(labels))])
        advance()
    loss_sum, correct_sum, count = totals.tolist()
    if not math.isfinite(loss_sum):
        raise PatError(
            f"epoch {epoch + 1} of the {twin.name} network: expected a finite loss, got {loss_sum / count}; "
            "lower optimizer.lr or give scheduler.warmup_epochs"
        )
    return loss_sum / count, correct_sum / count


def evaluate(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) in eval mode; the model's modes are put back."""
    loss_sum = correct = count = 0.0
    with evaluating(model):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = _logits(model(images))
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            count += len(labels)
    return loss_sum / count, correct / count


def _summarise(job: Job, twins: list[Twin]) -> Summary:
    """``summary.json`` but for the seconds; both networks are counted and timed in the same way.

    A network that was not trained has no accuracy (null); without pruning there is no pruned network (null).
    """
    trained = {twin.name: twin.model for twin in twins}
    models = {"dense": job.dense} | trained
    assert job.config.latency_batch is not None
    batch = job.example.expand(job.config.latency_batch, *job.example.shape[1:]).contiguous()
    latency = measure_latency(models, batch)
    sides: dict[str, Any] = {"dense": None, "pruned": None}
    for name, model in models.items():
        sides[name] = {
            "accuracy": evaluate(model, job.test, job.device)[1] if name in trained else None,
            "params": count_params(model),
            "macs": count_macs(model, job.example),
            "latency_ms": latency[name],
        }
    return sides


def _warn(config: TrainConfig, log: RunLog) -> None:
    pruning = config.pruning
    if pruning is not None and pruning.end_epoch is not None and pruning.end_epoch > config.epochs:
        log.note(
            f"pruning ends at epoch {pruning.end_epoch} and the run has {config.epochs}: the target will not be reached"
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _seeded(config: TrainConfig) -> Iterator[None]:
    """Seed every generator that a model or a data set may draw from, and put their states back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if config.device == "cuda" else ()
    with torch.random.fork_rng(devices=devices):
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
