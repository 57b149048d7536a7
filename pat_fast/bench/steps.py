"""The three operations of a pruning step, done by pat_fast and by Torch-Pruning on the same model.

Torch-Pruning is asked only where a subject knows groups of it; else ours runs alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..criteria import GroupNorm, is_scored
from ..plan import bind
from ..plan.bind import Binding
from ..regularizers import GroupNormRegularizer, is_regularized
from ..selection import Limits, select
from ..surgery import prune
from .clock import Clock, Prepare, Timed
from .results import Mismatch
from .subject import Subject

RATIO = 0.5
STRENGTH, ALPHA = 1e-4, 16
SCORE_RTOL = {torch.float32: 1e-5, torch.float64: 1e-10}
# gamma = alpha ** ((max - s) / (max - min)): a narrow range of scores s magnifies their rounding errors.
GRAD_RTOL = 1e-4
BATCH = {"cpu": 32, "cuda": 256}
"""Examples of the training step that the regulariser is held against."""


@dataclass(frozen=True)
class Step:
    """One operation on one model.

    Attributes:
        traffic: which bandwidth bounds it: "read", "copy" or "axpy".
        ours: prepares a run of pat_fast.
        moved: bytes that any implementation of what pat_fast does must move, by kind of traffic.
        theirs: prepares a run of Torch-Pruning.
        check: compares results; raises :class:`Mismatch`.
        groups: what is compared, e.g. "35/36": groups that both know, of Torch-Pruning's.
        unmatchable: why Torch-Pruning cannot be compared with at all, or "".
        slow: prepared anew for every run, at some cost: measure fewer rounds.
    """

    op: str
    traffic: str
    ours: Prepare
    moved: Callable[[], dict[str, int]]
    theirs: Prepare
    check: Callable[[], None]
    groups: str = ""
    unmatchable: str = ""
    slow: bool = False


def ready(run: Timed) -> Prepare:
    """A preparation that has nothing to prepare."""
    return lambda: run


def compare(pairs: Iterable[tuple[str, Tensor, Tensor]], rtol: float, atol: float = 0.0) -> None:
    """Raise `Mismatch` unless ours and theirs agree in all entries of every (name, ours, theirs)."""
    worst, where, bad, total = 0.0, "", 0, 0
    for name, ours, theirs in pairs:
        total += 1
        if ours.shape != theirs.shape:
            raise Mismatch(f"{name}: shape {tuple(ours.shape)}, Torch-Pruning has {tuple(theirs.shape)}")
        if not torch.allclose(ours, theirs, rtol=rtol, atol=atol):
            bad += 1
            found = float(((ours - theirs).abs() / theirs.abs().clamp_min(1e-30)).max())
            if not found <= worst:  # NaN, too
                worst, where = found, name
    if bad:
        of = f"; {bad} of {total} differ" if total > 1 else ""
        raise Mismatch(f"{where} differs from Torch-Pruning by {worst:.1e} relative, allowed {rtol:.0e}{of}")


def matched(subject: Subject) -> tuple[str, str]:
    """``groups`` and ``unmatchable`` of a subject's operations."""
    return (subject.groups if subject.matches else "", subject.unmatchable)


def read_bytes(binding: Binding, key: str, wanted: Callable[..., bool]) -> int:
    """Bytes of the plan's tensors for which ``wanted`` holds, each once."""
    return sum(t.numel() * t.element_size() for tiles in binding.tiles(key, wanted) for t in tiles.tensors)


def importance(subject: Subject) -> Step:
    """Score every channel of every group: ours in one call, Torch-Pruning's group by group."""
    criterion = GroupNorm(p=2)
    groups = [match.group for match in subject.matches]

    def theirs() -> list[Tensor]:
        return [subject.importance(group) for group in groups]

    def ours() -> Tensor:
        return criterion.score(subject.binding)

    def check() -> None:
        scores = ours().cpu()
        pairs = zip(subject.matches, theirs(), strict=True)
        compare(
            ((m.root, scores[m.start : m.stop], expected.cpu()[m.order]) for m, expected in pairs),
            SCORE_RTOL[scores.dtype],
        )

    def moved() -> dict[str, int]:
        return {"read": read_bytes(subject.binding, "scored", is_scored)}

    return Step("importance", "read", ready(ours), moved, ready(theirs), check, *matched(subject))


def regularize(subject: Subject) -> Step:
    """Add the group-norm penalty's gradient: norms of all groups, then `grad += strength * gamma * weight`.

    Torch-Pruning skips LayerNorm here; parameters that it leaves alone are not compared.
    """
    groups = [match.group for match in subject.matches]
    regularizer = GroupNormRegularizer(strength=STRENGTH, alpha=ALPHA)
    zero_gradients(subject.model)

    @cache
    def pruner() -> Any:
        made = subject.pruner(_torch_pruning().pruner.GroupNormPruner, subject.model, reg=STRENGTH)
        made._groups = groups
        return made

    def theirs() -> None:
        pruner().regularize(subject.model, alpha=ALPHA)

    def ours() -> None:
        regularizer.apply(subject.binding)

    def grads(run: Timed) -> dict[str, Tensor]:
        """What `run` adds: starting from zero, so that the small penalty is not rounded into a gradient."""
        zero_gradients(subject.model)
        run()
        return {name: p.grad.clone() for name, p in subject.model.named_parameters() if p.grad is not None}

    def check() -> None:
        expected, got = grads(theirs), grads(ours)
        skipped = only_ours(subject)
        compared = [name for name, g in expected.items() if g.any() and name not in skipped]
        if not compared:
            raise Mismatch("no parameter in common")
        compare(((name, got[name], expected[name]) for name in compared), GRAD_RTOL, atol=1e-12)

    def moved() -> dict[str, int]:
        pushed = read_bytes(subject.binding, "regularized", is_regularized)
        return {"read": read_bytes(subject.binding, "scored", is_scored), "axpy": 3 * pushed}

    return Step("regularize", "axpy", ready(ours), moved, ready(theirs), check, *matched(subject))


def zero_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


def only_ours(subject: Subject) -> set[str]:
    """Parameters that also belong to a group of ours which is not compared."""
    compared = {match.root for match in subject.matches}
    return {name for group in subject.plan.groups if group.root not in compared for name, _ in group.members}


def eligible_channels(subject: Subject) -> NDArray[np.bool_]:
    """Channels to prune: [N]: all, or those of the compared groups; the others stay on both sides."""
    eligible = np.full(subject.plan.n_channels, not subject.matches)
    for match in subject.matches:
        eligible[match.start : match.stop] = True
    return eligible


def step(subject: Subject) -> Step:
    """Score, rank globally and remove half of the channels, from a dense model."""
    criterion = GroupNorm(p=2)
    eligible = eligible_channels(subject)
    total = int(eligible.sum())
    budget = total - int(total * (1 - RATIO))

    def theirs(model: nn.Module) -> Timed:
        kind = _torch_pruning().pruner.BasePruner
        return subject.pruner(kind, model, global_pruning=True, pruning_ratio=RATIO).step

    def ours(model: nn.Module) -> Timed:
        binding = bind(subject.plan, model)

        def run() -> None:
            scores = criterion.score(binding).double().cpu().numpy()
            keep = select(subject.plan, scores, eligible, lambda _: budget, Limits(ranking="global"))
            prune(binding, keep, optimizers=())

        return run

    def check() -> None:
        left, right = subject.fresh(), subject.fresh()
        theirs(left)()
        ours(right)()
        got, expected = right.state_dict(), left.state_dict()
        for name, value in expected.items():
            if got[name].shape != value.shape:
                shapes = f"{tuple(got[name].shape)}, Torch-Pruning's {tuple(value.shape)}"
                raise Mismatch(f"{name} differs after the step: shape {shapes}")
            if not torch.equal(got[name], value):
                share = float((got[name] != value).double().mean())
                raise Mismatch(f"{name} differs after the step in {share:.0%} of its entries")
        with torch.no_grad():
            outputs = [[t for t in tree_leaves(m(*subject.inputs)) if isinstance(t, Tensor)] for m in (right, left)]
        pairs = zip(*outputs, strict=True)
        compare((("the output after the step", a, b) for a, b in pairs), 1e-3, atol=1e-5)

    def moved() -> dict[str, int]:
        model = subject.fresh()
        before = {name: t.shape for name, t in model.state_dict().items()}
        ours(model)()
        shrunk = [t for name, t in model.state_dict().items() if t.shape != before[name]]
        if not shrunk:
            raise Mismatch("nothing was pruned")
        scored = read_bytes(subject.binding, "scored", is_scored)
        return {"read": scored, "copy": sum(2 * t.numel() * t.element_size() for t in shrunk)}

    def prepare(run: Callable[[nn.Module], Timed]) -> Timed:
        return run(subject.fresh())

    sides = partial(prepare, ours), moved, partial(prepare, theirs)
    return Step("step", "copy", *sides, check, *matched(subject), slow=True)


def _torch_pruning() -> Any:
    return importlib.import_module("torch_pruning")


def training_step_ms(subject: Subject, clock: Clock, batch: int | None = None) -> tuple[float, float, int]:
    """Time a training step of SGD with momentum on the subject's inputs: without and with the regulariser; the batch.

    On a GPU the model is channels_last and runs in bf16 autocast.
    """
    batch = batch or BATCH.get(clock.device.type, 32)
    model = subject.fresh().train()
    inputs = [x[:1].expand(batch, *x.shape[1:]).contiguous() for x in subject.inputs]
    if clock.is_cuda:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    regularizer, binding = GroupNormRegularizer(strength=STRENGTH, alpha=ALPHA), bind(subject.plan, model)

    def run(regularized: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast(clock.device.type, torch.bfloat16, enabled=clock.is_cuda):
            outputs = [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            loss = sum(t.float().square().mean() for t in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()
        if regularized:
            regularizer.apply(binding)
        optimizer.step()

    sides = {name: ready(partial(run, name == "with")) for name in ("without", "with")}
    found = clock.compare(sides, clock.rounds if clock.is_cuda else max(3, clock.rounds // 3))
    return found["without"].ms, found["with"].ms, batch


STEPS: dict[str, Callable[[Subject], Step]] = {"importance": importance, "regularize": regularize, "step": step}
