"""One cell of the table, in a process of its own."""

from __future__ import annotations

import resource
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, on the clock
from torch.nn import functional as F

from pat_fast.measure import count_macs, count_params, evaluating

from .recipes import start
from .tasks import TASKS


@dataclass(frozen=True)
class Cell:
    """What is to be trained, and where. `ratio`: how many times fewer MACs (1 for the dense network)."""

    task: str
    method: str
    ratio: float
    seed: int
    epochs: int
    device: str = "cpu"

    @property
    def key(self) -> str:
        """What tells finished cells apart."""
        return "/".join(str(value) for value in asdict(self).values()).removesuffix("/cpu")


def run(cell: Cell) -> dict[str, Any]:
    """Train, and return the cell with what came out.

    `seconds` and `cpu_seconds` are of the training with its pruning, tracing included, imports and evaluation not;
    `peak_mb` is the largest resident set of the process.
    """
    torch.set_num_threads(1)
    task = TASKS[cell.task]
    dense = task.build().to(cell.device)
    example = task.data().to(cell.device).train[0][:2]
    macs, params = count_macs(dense, example), count_params(dense)
    wall, cpu = time.perf_counter(), time.process_time()
    training, finish = start(task, cell.method, cell.ratio, cell.seed, cell.epochs, cell.device)
    training.train()
    finish()
    if cell.device != "cpu":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    images, labels = training.data.test
    with evaluating(training.model):
        logits = training.model(images)
    return asdict(cell) | {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "loss": float(F.cross_entropy(logits, labels)),
        "macs": count_macs(training.model, example),
        "params": count_params(training.model),
        "dense_macs": macs,
        "dense_params": params,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def tell(cell: Cell, pipe: Connection) -> None:
    """:func:`run`, from another process: sends what came out, or the cell with the `error`."""
    try:
        record = run(cell)
    except Exception as error:
        record = asdict(cell) | {"error": f"{type(error).__name__}: {error}"}
    pipe.send(record)
    pipe.close()
