"""A prune in many batches is the prune in one; and undone, wherever it fails, to the bit and the stride."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pat_fast.errors import SurgeryError
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.plan.running import call
from pat_fast.surgery import journal, prune, prune_checked
from tests.helpers import Case, Small, random_keep, small_inputs

Optimizers = list[torch.optim.Optimizer]


class Fails(Exception):
    pass


def fails(*_: Any) -> None:
    raise Fails("no")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[journal.Batch]:
    """The batches that are cut."""
    cut: list[journal.Batch] = []
    real = journal.Batch.cut

    def noting(batch: journal.Batch, *given: Any) -> None:
        cut.append(batch)
        real(batch, *given)

    monkeypatch.setattr(journal.Batch, "cut", noting)
    return cut


def training(model: nn.Module, inputs: Any, make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam) -> Any:
    """An optimizer with state, and gradients in flight."""
    optimizer = make(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        out = call(model, inputs)
        sum(t.float().square().mean() for t in (out if isinstance(out, (list, tuple)) else [out])).backward()
        optimizer.step()
    return optimizer


def everything(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """All tensors of a training, by name."""
    found: dict[str, Any] = {}
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        found[name] = p
        found[f"{name}.grad"] = p.grad
        for i, optimizer in enumerate(optimizers):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, (list, tuple)):
                    found.update({f"{name}.{i}.{key}.{j}": v for j, v in enumerate(value)})
                else:
                    found[f"{name}.{i}.{key}"] = value
    return found


def copied(things: dict[str, Any]) -> dict[str, Any]:
    return {k: (t.detach().clone(), t.stride()) if isinstance(t, Tensor) else t for k, t in things.items()}


def check_same(now: dict[str, Any], then: dict[str, Any]) -> None:
    """To the bit: not a number is equal to itself."""
    assert now.keys() == then.keys()
    for name, value in now.items():
        if isinstance(value, Tensor):
            old, stride = then[name]
            assert value.shape == old.shape, name
            assert value.stride() == stride, name
            bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (value, old)]
            assert torch.equal(*bits), name
        else:
            assert value == then[name], name


def test_many_batches_do_what_one_does(case: Case, batches: list[journal.Batch]) -> None:
    plan = build_plan(case.model, case.inputs)
    keep = random_keep(plan, 0, ratio=0.5)
    other = copy.deepcopy(case.model)
    results = []
    for model, room in ((case.model, 0), (other, 2**40)):
        optimizer = training(model, case.inputs)
        prune_checked(bind(plan, model), plan.check_keep(keep), [optimizer], then=lambda smaller: smaller(), room=room)
        results.append(copied(everything(model, [optimizer])))
        if room == 0:
            assert len(batches) > 2
            assert sum(batch._lets_go for batch in batches) == len(batches) - 1
            batches.clear()
    assert len(batches) == 1
    for name, value in results[0].items():
        assert (value is None) == (results[1][name] is None)
        if value is not None:
            assert torch.equal(value[0], results[1][name][0]), name


def test_what_is_undone_is_what_was(case: Case, batches: list[journal.Batch]) -> None:
    plan = build_plan(case.model, case.inputs)
    optimizer = training(case.model, case.inputs)
    parameters = list(case.model.parameters())
    before = copied(everything(case.model, [optimizer]))
    sizes = repr(case.model)
    for seed in range(2):
        with pytest.raises(SurgeryError, match=r"Fails: no\) and was undone"):
            prune(bind(plan, case.model), random_keep(plan, seed, ratio=0.5), [optimizer], then=fails)
        check_same(everything(case.model, [optimizer]), before)
        assert all(a is b for a, b in zip(case.model.parameters(), parameters, strict=True))
        assert repr(case.model) == sizes
    assert len(batches) > 2


def some_training(
    make: Callable[..., torch.optim.Optimizer] = torch.optim.Adam, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, torch.optim.Optimizer, Binding]:
    model = Small(24).to(dtype)
    x = small_inputs(dtype=dtype)
    optimizer = training(model, x, make)
    with torch.no_grad():
        model.inner.weight[3, 2] = float("nan")
    return model, optimizer, bind(build_plan(model, x), model)


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_any_batch_may_fail(
    at: int, error: type[BaseException], batches: list[journal.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, binding = some_training()
    before = copied(everything(model, [optimizer]))
    real, calls = journal.Copy.run, 0

    def failing(copy: journal.Copy, lets_go: bool, *given: Any) -> None:
        nonlocal calls
        calls += 1
        real(copy, lets_go, *given)
        if calls == at:
            raise error("no")

    monkeypatch.setattr(journal.Copy, "run", failing)
    with pytest.raises(SurgeryError if error is MemoryError else KeyboardInterrupt):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer])
    assert len(batches) >= at
    check_same(everything(model, [optimizer]), before)


def test_small_tensors_are_let_go_of_while_others_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing comes after the prune that may fail; what fails before is undone."""
    monkeypatch.setattr(journal, "MUCH", 0)
    real, gone = journal.Batch.let_go, []

    def noting(batch: journal.Batch) -> None:
        olds = [weakref.ref(old) for old in batch._moves.olds if old is not None]
        real(batch)
        gone.append(sum(old() is None for old in olds))

    monkeypatch.setattr(journal.Batch, "let_go", noting)
    model, optimizer, binding = some_training()
    before = copied(everything(model, [optimizer]))
    kept = binding.plan.check_keep(random_keep(binding.plan, 0, ratio=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[prune.__module__], "note_prune", fails)
        with pytest.raises(SurgeryError, match="was undone"):
            prune_checked(binding, kept, [optimizer], room=journal.ROOM)
    check_same(everything(model, [optimizer]), before)
    assert not gone
    prune_checked(binding, kept, [optimizer], room=journal.ROOM)
    assert gone[0] > 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_memory_formats_come_back(dtype: torch.dtype, batches: list[journal.Batch]) -> None:
    model, optimizer, binding = some_training(dtype=dtype)
    model.to(memory_format=torch.channels_last)
    before = copied(everything(model, [optimizer]))
    with pytest.raises(SurgeryError):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], then=fails)
    assert len(batches) > 2
    check_same(everything(model, [optimizer]), before)


def test_factored_state_comes_back(batches: list[journal.Batch]) -> None:
    model, optimizer, binding = some_training(torch.optim.Adafactor)
    before = copied(everything(model, [optimizer]))
    with pytest.raises(SurgeryError):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], then=fails)
    check_same(everything(model, [optimizer]), before)
    prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer])
    assert len(batches) > 2


def test_averages_come_back(batches: list[journal.Batch]) -> None:
    model, optimizer, binding = some_training()
    average = AveragedModel(model)
    before = copied(everything(average.module, []))
    with pytest.raises(SurgeryError):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], [average.module], then=fails)
    check_same(everything(average.module, []), before)


def test_what_others_hold_is_not_copied_twice(batches: list[journal.Batch]) -> None:
    """Its memory stays anyway; and what is undone is in that memory again."""
    model, optimizer, binding = some_training()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view_as(p)
        at += p.numel()
    before = copied(everything(model, [optimizer]))
    with pytest.raises(SurgeryError):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], then=fails)
    check_same(everything(model, [optimizer]), before)
    assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in model.parameters())
    held = [state["exp_avg"].detach() for state in optimizer.state.values()]
    with pytest.raises(SurgeryError):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], then=fails)
    assert [state["exp_avg"].data_ptr() for state in optimizer.state.values()] == [t.data_ptr() for t in held]
    assert any(batch._lets_go for batch in batches)


def test_an_undo_that_fails_says_so(batches: list[journal.Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be undone is."""
    model, optimizer, binding = some_training()
    before = copied(everything(model, [optimizer]))
    real, calls = journal.Copy.back, 0

    def failing(copy: journal.Copy) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError("no room")
        real(copy)

    monkeypatch.setattr(journal.Copy, "back", failing)
    with pytest.raises(SurgeryError, match=r"Fails: no\) and could not be undone \(MemoryError: no room\)"):
        prune(binding, random_keep(binding.plan, 0, ratio=0.5), [optimizer], then=fails)
    now = everything(model, [optimizer])
    lost = [k for k, v in now.items() if isinstance(v, Tensor) and v.shape != before[k][0].shape]
    assert len(lost) == 1
