"""Compiled models stay compiled, however often they shrink."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import pat_fast as pat
from pat_fast.surgery.compiled import forget_compiled
from tests.helpers import Small, small_inputs
from tests.training import Twin, adamw, masked_equals_pruned, sgd

X = small_inputs(dtype=torch.float64)
PRUNES = 10  # more than the versions that are compiled of one function


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "pruned",
    [
        "the compiled model",
        pytest.param("the model", marks=pytest.mark.slow),
        pytest.param("a model compiled in place", marks=pytest.mark.slow),
    ],
)
def test_every_version_of_a_compiled_model_is_compiled(pruned: str) -> None:
    """Each prune costs one frame; after eight versions PyTorch would go on in eager mode."""
    assert torch._dynamo.config.recompile_limit < PRUNES
    backend = CompileCounterWithBackend("eager")
    model = Small(width=24).double()
    run: Any = model
    if pruned == "a model compiled in place":
        model.compile(backend=backend)
    else:
        run = torch.compile(model, backend=backend)
    optimizer = sgd(model)
    pruner = pat.Pruner(
        run if pruned == "the compiled model" else model,
        0.8,
        "linear",
        end_epoch=PRUNES,
        example_inputs=X,
        verify=False,
    )
    for _ in range(PRUNES):
        before = backend.frame_count
        for _ in range(2):
            optimizer.zero_grad()
            run(X).square().mean().backward()
            optimizer.step()
        assert backend.frame_count == before + 1
        report = pruner.step()
        assert report.channels[0] > report.channels[1]
    assert not counters["recompile_limit"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.slow
def test_inductor_and_a_compiled_optimizer_step_train_as_eager_ones_do() -> None:
    def make(mode: str) -> Twin:
        model = Small().double()
        optimizer = adamw(model)
        pruner = pat.Pruner(model, 0.5, example_inputs=X, mode=mode, end_epoch=2, reg_strength=1e-3, verify=False)
        return Twin(model, [optimizer], pruner, (torch.compile(model), torch.compile(optimizer.step)))

    def train(twin: Twin, step: int) -> Tensor:
        run, update = twin.extra if twin.pruner.mode == "prune" else (twin.model, twin.optimizers[0].step)
        loss = nn.functional.cross_entropy(run(X), torch.arange(4))
        twin.optimizers[0].zero_grad()
        loss.backward()
        update()
        return loss.detach()

    # A compiled AdamW rounds to single precision in places, pruned or not.
    twins = masked_equals_pruned(make, train, steps=6, prune_after=(1, 3), tolerance=1e-4)
    assert not any("regularised" in note for twin in twins for note in twin.pruner.step().notes)


def test_nothing_is_reset_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append(1))
    forget_compiled()
    assert not calls
    torch.compile(lambda x: x + 1, backend="eager")(X)
    forget_compiled()
    assert calls == [1]


def test_casts_that_autocast_keeps_are_dropped() -> None:
    """Pruning inside an autocast context: the next forward must not see the weights from before."""
    model = Small()
    x = small_inputs()
    pruner = pat.Pruner(model, 0.5, end_epoch=1, example_inputs=x, verify=False)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        pruner.step()
        out = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(out, model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_are_recorded_anew(mode: str) -> None:
    """Graphs replay fixed addresses: what was recorded before a prune must not be replayed after it."""
    model = Small(width=24).cuda()
    x = small_inputs().cuda()
    run: Any = torch.compile(model, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    pruner = pat.Pruner(model, 0.8, end_epoch=PRUNES, example_inputs=x)
    for _ in range(PRUNES):
        for _ in range(4):
            optimizer.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            out = run(x)
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)
            out.square().mean().backward()
            optimizer.step()
        pruner.step()
    assert not counters["recompile_limit"]
