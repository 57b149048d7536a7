"""What each rank does in the tests of DDP: ``python -m tests.distributed.worker CASE FOLDER``."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import pat_fast as pat
from pat_fast.criteria import Activation
from tests.helpers import Small, small_inputs

SECONDS = 8  # that a rank waits for another in the tests of failures


def batches(seed: int, count: int = 2, batch: int = 12) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Joint batches, and the part of them that is this rank's."""
    generator = torch.Generator().manual_seed(seed)
    own = batch // dist.get_world_size()
    mine = slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)
    for _ in range(count):
        x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 5, (batch,), generator=generator)
        device = torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")
        yield x.to(device), y.to(device), mine


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def train(ddp: nn.Module, optimizer: torch.optim.Optimizer, seed: int, count: int = 2) -> None:
    ddp.train()
    for x, y, mine in batches(seed, count):
        optimizer.zero_grad()
        loss_of(ddp, x[mine], y[mine]).backward()
        optimizer.step()


def gradient_error(ddp: nn.Module, seed: int = 99, count: int = 3) -> float:
    """How far this rank's gradients are from those of one process on the joint batch, of the largest of them.

    In eval mode: a batch norm's statistics are each rank's own.
    """
    worst = 0.0
    ddp.eval()
    for buffer in ddp.buffers():  # each rank's own, until the next forward
        dist.broadcast(buffer, 0)
    for x, y, mine in batches(seed, count):  # several, since the reducer forms other buckets after the first
        alone = copy.deepcopy(ddp.module)
        alone.zero_grad()
        loss_of(alone, x, y).backward()
        ddp.zero_grad()
        loss_of(ddp, x[mine], y[mine]).backward()
        largest = max(p.grad.abs().max() for p in alone.parameters())
        pairs = zip(ddp.module.parameters(), alone.parameters(), strict=True)
        worst = max(worst, *(float((a.grad - b.grad).abs().max() / largest) for a, b in pairs))
    ddp.zero_grad()
    return worst


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> float:
    """One number of all parameters and of the optimizer's state (buffers are each rank's own between forwards)."""
    found = list(model.parameters())
    if optimizer is not None:
        found += [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return sum(float((t.detach().double() * (i + 1)).abs().sum()) for i, t in enumerate(found))


def is_same_everywhere(value: Any) -> bool:
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, value)
    return all(v == told[0] for v in told)


def wrapped(width: int = 12, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Ranks begin with other weights: wrapping hands round those of the first."""
    torch.manual_seed(dist.get_rank())
    ddp = DistributedDataParallel(Small(width).double(), **settings)
    return ddp, torch.optim.AdamW(ddp.parameters(), lr=1e-2)


def shapes(model: nn.Module) -> list[list[int]]:
    return [list(p.shape) for p in model.parameters()]


# Cases


def together() -> Any:
    """Each rank sees other activations, and yet all prune alike; the wrapper goes on working."""
    ddp, optimizer = wrapped()
    pruner = pat.Pruner(ddp, 0.5, "linear", importance=Activation(), end_epoch=3)
    own = []
    score = pruner.criterion.score
    pruner.criterion.score = lambda binding: own.append(score(binding)) or own[-1]  # type: ignore[method-assign]
    found = []
    for epoch in range(4):
        train(ddp, optimizer, epoch)
        report = pruner.step()
        same = is_same_everywhere((shapes(ddp), fingerprint(ddp, optimizer)))
        found.append([same, report.channels, gradient_error(ddp)])
    differ = [not is_same_everywhere(scores.tolist()) for scores in own]
    return {"epochs": found, "scores differ": differ, "hook": pruner.model is ddp.module}


def made_before_wrapping() -> Any:
    """The wrapper is found, steps are counted, masks agree; and what the last prune leaves trains."""
    torch.manual_seed(0)
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "steps": {"unit": "step", "start_epoch": 1, "end_epoch": 4},
        "masks": {"mode": "mask", "end_epoch": 2},
    }
    for name, options in kinds.items():
        model = Small().double()
        pruner = pat.Pruner(model, 0.5, importance=Activation(), **options)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        for epoch in range(3):
            train(ddp, optimizer, epoch)
            pruner.step()
        pruner.finalize()
        same = is_same_everywhere((shapes(model), fingerprint(model, optimizer)))
        found[name] = [same, pruner.plan.n_channels, gradient_error(ddp)]  # type: ignore[union-attr]
    return found


def powersgd(ddp: Any) -> None:
    state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=4, min_compression_rate=1)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "static graph": ({"static_graph": True}, None),
    "bucket views": ({"gradient_as_bucket_view": True}, None),
    "unused parameters": ({"find_unused_parameters": True, "gradient_as_bucket_view": True}, None),
    "small buckets": ({"bucket_cap_mb": 0.0005}, None),
    "hook": ({}, lambda ddp: ddp.register_comm_hook(None, default_hooks.allreduce_hook)),
    "built-in hook": ({}, lambda ddp: ddp._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)),
    "PowerSGD": ({}, powersgd),
}


TOLD = ("comm_hook", "static_graph", "find_unused_parameters", "bucket_cap_bytes", "broadcast_buffers",
        "gradient_as_bucket_view")  # fmt: skip


def settings() -> Any:
    """What a wrapper was told stays when it gets a new reducer."""
    found = {}
    for name, (options, register) in SETTINGS.items():
        ddp, optimizer = wrapped(**options)
        if register is not None:
            register(ddp)
        pruner = pat.Pruner(ddp, 0.5, end_epoch=2, verify=False)
        for epoch in range(2):
            train(ddp, optimizer, epoch, 8)
            before = ddp._get_ddp_logging_data()
            pruner.step()
            after = ddp._get_ddp_logging_data()
        told = [k for k in TOLD if before.get(k) != after.get(k)]
        error = gradient_error(ddp)
        train(ddp, optimizer, 7, 8)
        found[name] = [is_same_everywhere(fingerprint(ddp, optimizer)), told, error, after.get("comm_hook")]
    return found


@contextmanager
def failing(where: Any, name: str, rank: int = 1, error: BaseException | None = None, result: Any = None) -> Any:
    """``where.name`` fails on one rank, or answers something else."""
    if dist.get_rank() != rank:
        yield
        return
    effect = (lambda *a, **k: result(*a, **k)) if error is None else error
    with mock.patch.object(where, name, side_effect=effect):
        yield


def failures() -> Any:
    """One rank fails at each stage of a prune: all fail, with its reason, and are as they were; then all go on."""
    ddp, optimizer = wrapped()
    pruner = pat.Pruner(ddp, 0.5, end_epoch=20, verify=False)
    found = {}
    train(ddp, optimizer, 0)
    select, surgery = pruner.goal.select, sys.modules["pat_fast.surgery.prune"]

    def others(*args: Any) -> Any:
        keep = select(*args)
        keep[-2:] = ~keep[-2:]
        return keep

    from pat_fast.distributed import peers

    stages = {
        "scores": lambda: failing(pruner.criterion, "score", error=ValueError("no data left")),
        "selection": lambda: failing(pruner.goal, "select", error=MemoryError("no memory")),
        "other channels": lambda: failing(pruner.goal, "select", result=others),
        "other plan": lambda: failing(peers, "plan_digest", result=lambda plan: b"another"),
        "new tensors": lambda: failing(surgery, "_follow", error=MemoryError("no memory for tensors")),
        "swap": lambda: failing(surgery, "note_prune", error=MemoryError("no memory for notes")),
        "what was gathered": lambda: failing(pruner._state.mode, "attach", error=MemoryError("no memory to go on")),
        "interrupt": lambda: failing(pruner.criterion, "score", error=KeyboardInterrupt()),
        "first rank": lambda: failing(pruner.criterion, "score", rank=0, error=ValueError("first")),
        "wrapper": lambda: failing(peers, "check_rebuildable", error=pat.SurgeryError("cannot be rebuilt")),
    }
    for name, stage in stages.items():
        before = fingerprint(ddp, optimizer), shapes(ddp), pruner.epoch
        error = ""
        start = time.monotonic()
        try:
            with stage():
                pruner.step()
        except (pat.PatError, ValueError, MemoryError, KeyboardInterrupt) as caught:
            error = f"{type(caught).__name__}: {caught}"
        unchanged = before == (fingerprint(ddp, optimizer), shapes(ddp), pruner.epoch)
        found[name] = [error, unchanged, time.monotonic() - start < SECONDS, gradient_error(ddp)]
        train(ddp, optimizer, 1)
    pruner.step()
    pruned = is_same_everywhere(fingerprint(ddp, optimizer)) and pruner.epoch == 1
    return {"stages": found, "went on": pruned and gradient_error(ddp) < 1e-6}


def accumulated() -> Any:
    """Gradients that each rank keeps to itself (no_sync) while a prune comes in between."""
    found = []
    for settings in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        ddp, optimizer = wrapped(**settings)
        pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False)
        train(ddp, optimizer, 0)
        ddp.eval()
        for buffer in ddp.buffers():
            dist.broadcast(buffer, 0)
        alone = copy.deepcopy(ddp.module)
        follower = pat.Pruner(alone, 0.5, end_epoch=4, verify=False, example_inputs=small_inputs(dtype=torch.float64))
        ddp.zero_grad()
        alone.zero_grad()
        for x, y, mine in batches(5, 1):
            with ddp.no_sync():
                loss_of(ddp, x[mine], y[mine]).backward()
            loss_of(alone, x, y).backward()
        pruner.step()
        follower.step()
        for x, y, mine in batches(6, 1):
            loss_of(ddp, x[mine], y[mine]).backward()
            loss_of(alone, x, y).backward()
        pairs = list(zip(ddp.module.parameters(), alone.parameters(), strict=True))
        largest = max(q.grad.abs().max() for _, q in pairs)
        found.append(max(float((p.grad - q.grad).abs().max() / largest) for p, q in pairs))
    return found


def after_the_swap() -> Any:
    """A rank fails when all have been pruned: nobody waits for it, and all know."""
    from pat_fast.distributed import peers

    ddp, optimizer = wrapped()
    pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False)
    train(ddp, optimizer, 0)
    try:
        with failing(peers, "rebuild", error=MemoryError("no memory for buckets")):
            pruner.step()
    except (pat.PatError, MemoryError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def one_is_late() -> Any:
    """A rank that hangs is named by the others, within the time-out of the process group."""
    ddp, optimizer = wrapped()
    pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False)
    train(ddp, optimizer, 0)
    if dist.get_rank() == 1:
        time.sleep(SECONDS * 3)
        return "late"
    start = time.monotonic()
    try:
        pruner.step()
    except pat.SurgeryError as caught:
        return [str(caught), time.monotonic() - start]
    return ""


def one_dies() -> Any:
    """A rank that dies without a word, between two prunes."""
    ddp, optimizer = wrapped()
    pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False)
    train(ddp, optimizer, 0)
    pruner.step()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end this one, too
    if dist.get_rank() == 1:
        os._exit(1)
    start = time.monotonic()
    try:
        pruner.step()
    except pat.SurgeryError as caught:
        return [str(caught), time.monotonic() - start]
    return ""


def out_of_step() -> Any:
    """One rank counts an epoch more than the others."""
    ddp, _ = wrapped()
    pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False, example_inputs=small_inputs(dtype=torch.float64))
    if dist.get_rank() == 1:
        pruner.epoch += 1
    try:
        pruner.step()
    except pat.SurgeryError as caught:
        return str(caught)
    return ""


def shared_state() -> Any:
    """An optimizer whose state is shared out over the ranks trains as one that is whole on each."""
    found = []
    for kind in ("whole", "shared", "given", "buckets"):
        ddp, _ = wrapped()
        if kind == "whole":
            optimizer: Any = torch.optim.Adam(ddp.parameters(), 1e-2)
        else:
            views = kind == "buckets"
            optimizer = ZeroRedundancyOptimizer(
                ddp.parameters(), torch.optim.Adam, lr=1e-2, parameters_as_bucket_view=views
            )
        pruner = pat.Pruner(ddp, 0.5, "linear", end_epoch=3, optimizer=optimizer if kind == "given" else None)
        try:
            for epoch in range(4):
                train(ddp, optimizer, epoch)
                pruner.step()
        except pat.SurgeryError as caught:
            found.append(str(caught))
        else:
            found.append(fingerprint(ddp))
    return found


def joint_history() -> Any:
    """LBFGS keeps the same history on all ranks, that of one process on the joint batches; losses are summed for it."""
    return [found for search in (None, "strong_wolfe") for found in _histories(search)]


def _histories(search: str | None) -> Iterator[Any]:
    torch.manual_seed(0)
    alone: nn.Module = Small().double()
    alone.norm = nn.Identity()  # its statistics are each rank's own
    ddp = DistributedDataParallel(copy.deepcopy(alone))
    optimizers = [torch.optim.LBFGS(m.parameters(), 0.1, 3, line_search_fn=search) for m in (ddp, alone)]
    pruners = [
        pat.Pruner(m, 0.5, "linear", end_epoch=3, optimizer=o) for m, o in zip((ddp, alone), optimizers, strict=True)
    ]

    def joint(x: Tensor, y: Tensor) -> Tensor:
        ddp.zero_grad()
        (loss := loss_of(ddp, x, y)).backward()
        dist.all_reduce(total := loss.detach().clone())
        return total / dist.get_world_size()

    def whole(x: Tensor, y: Tensor) -> Tensor:
        alone.zero_grad()
        (loss := loss_of(alone, x, y)).backward()
        return loss.detach()

    for epoch in range(4):
        errors = []
        for x, y, mine in batches(epoch):
            closures: list[Any] = [partial(joint, x[mine], y[mine]), partial(whole, x, y)]
            losses = [o.step(closure) for o, closure in zip(optimizers, closures, strict=True)]
            errors.append(abs(float(losses[0] - losses[1])))
        reports = [pruner.step() for pruner in pruners]
        same = is_same_everywhere((shapes(ddp), fingerprint(ddp, optimizers[0])))
        yield same, reports[0].channels == reports[1].channels, max(errors)


def refused() -> Any:
    """What a wrapper does that cannot be taken up again is refused, by name, on all ranks."""
    found = {}
    for name, attribute, value in (("mixed", "mixed_precision", []), ("delayed", "_delay_all_reduce_params", [1])):
        ddp, _ = wrapped()
        pruner = pat.Pruner(ddp, 0.5, end_epoch=4, verify=False, example_inputs=small_inputs(dtype=torch.float64))
        setattr(ddp, attribute, value)
        before = shapes(ddp)
        try:
            pruner.step()
        except pat.SurgeryError as caught:
            found[name] = [str(caught), before == shapes(ddp)]
    return found


def on_gpus() -> Any:
    """The same over nccl, a GPU for each rank; a single rank has its wrapper rebuilt, too."""
    device = torch.device("cuda", dist.get_rank())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Small()).double().to(device)
    ddp = DistributedDataParallel(model, device_ids=[device.index])
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    pruner = pat.Pruner(ddp, 0.5, importance=Activation(), end_epoch=3)
    for epoch in range(3):
        train(ddp, optimizer, epoch)
        pruner.step()
    same = is_same_everywhere((shapes(ddp), fingerprint(ddp, optimizer)))
    return [same, pruner.plan.n_channels, gradient_error(ddp)]  # type: ignore[union-attr]


def main(case: Callable[[], Any], folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if case is on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if case is on_gpus else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=SECONDS if case in SHORT else 60))
    found = case()
    (folder / f"{case.__name__}-{dist.get_rank()}.json").write_text(json.dumps(found))
    if case not in SHORT:
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()  # waits for its threads: one that wants the GIL at exit aborts the process


SHORT = (one_is_late, one_dies)

if __name__ == "__main__":
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
