"""Families in processes of their own, forked from one that has imported what all need; each has a time limit."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection

from benchmarks.reach.models import Family, out_of_scope
from benchmarks.reach.probe import FAILED, OUTSIDE, UNBUILT, Row, probe

MEMORY = 12 << 30  # bytes of address space of one process
PRELOAD = ["benchmarks.reach.probe", "torch_pruning", "transformers.generation", "transformers.modeling_utils"]


def run(families: Sequence[Family], ratio: float, timeout: float, jobs: int) -> Iterator[Row]:
    """A row for each family, as they are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ThreadPoolExecutor(max_workers=max(jobs, 1)) as pool:
        waiting = [pool.submit(_run_one, context, family, ratio, timeout) for family in families]
        for done in as_completed(waiting):
            yield done.result()


def _run_one(context: multiprocessing.context.ForkServerContext, family: Family, ratio: float, timeout: float) -> Row:
    reason = out_of_scope(family)
    if reason is not None:
        return Row(family.name, family.kind, OUTSIDE, reason)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(family, ratio, sender), daemon=True)
    process.start()
    sender.close()
    try:
        return _receive(receiver, family, timeout)
    finally:
        process.kill()
        process.join()


def _receive(receiver: Connection, family: Family, timeout: float) -> Row:
    """The row that the process sends; what it was at when it died or ran out of time, else."""
    end = time.monotonic() + timeout
    step = "start"
    while receiver.poll(max(end - time.monotonic(), 0)):
        try:
            message = receiver.recv()
        except EOFError:
            return Row(family.name, family.kind, _status(step), f"{step}: the process died")
        if isinstance(message, Row):
            return message
        step = message
    return Row(family.name, family.kind, _status(step), f"{step}: not done after {timeout:g} s")


def _status(step: str) -> str:
    return UNBUILT if step in ("start", "build", "dense forward") else FAILED


def _work(family: Family, ratio: float, sender: Connection) -> None:
    import warnings

    import torch
    import transformers

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sender.send(probe(family, ratio, sender.send))
    sender.close()
