"""What a network costs, counted and timed on the network itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_params(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one forward of ``images`` ``[B, ...]``, per image.

    Convolutions, matrix products and attention count, as in ``torch.utils.flop_counter``; two floating
    point operations are one multiply-accumulate.
    """
    # The counter does not know the fused attention of the CPU.
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops()) // (2 * len(images))


def measure_latency(
    models: Mapping[str, nn.Module], images: Tensor, *, seconds: float = 2.0, rounds: int = 200
) -> dict[str, float]:
    """Milliseconds that one forward of ``images`` ``[B, ...]`` takes in eval mode: the median of many.

    The models take turns, so that a machine that slows down slows them all. Measuring ends after
    ``rounds`` turns or ``seconds``, but not before 10 turns.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        with evaluating(model):
            for _ in range(3):
                _timed(lambda model=model: model(images), images.device)  # type: ignore[misc]
    deadline = time.perf_counter() + seconds
    for turn in range(rounds):
        if turn >= 10 and time.perf_counter() > deadline:
            break
        for name, model in models.items():
            with evaluating(model):
                times[name].append(_timed(lambda model=model: model(images), images.device))  # type: ignore[misc]
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
