"""Whatever fails during a prune, and wherever: model, optimizer and pruner are as before, and training goes on."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import pat_fast as pat
from pat_fast.criteria import make_criterion
from pat_fast.surgery import journal, prune
from pat_fast.surgery.record import records
from tests.helpers import Small, small_inputs
from tests.training import Twin, adamw, check_alive, masked_equals_pruned, same, weights

PACKAGE = str(Path(pat.__file__).parent)
PARTS = ("surgery", "pruner.py", "modes.py", "stability.py", "criteria", "regularizers", "ops", "plan/bind.py")
FILES = [f"{PACKAGE}/{part}" for part in PARTS]


@pytest.fixture(autouse=True, params=[False, True], ids=["one batch", "many batches"])
def _room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room beside the model, or with, as the drop-in has it; small tensors are cut while others are copied."""
    monkeypatch.setattr(journal, "MUCH", 0)
    if not request.param:
        monkeypatch.setattr(
            sys.modules[prune.__module__], "batches", lambda *given: journal.batches(*given[:2], journal.ROOM)
        )


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "LBFGS": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3),
}


def make(optimizer: str = "AdamW") -> Twin:
    """A training with everything that a prune touches: history, growing strengths, an average, gradients in flight."""
    torch.manual_seed(0)
    model = Small().train()
    average = AveragedModel(model)
    pruner = pat.Pruner(
        model, 0.5, "linear", example_inputs=small_inputs(), importance="taylor", regularizer="growing", end_epoch=4,
        verify=False, averaged=average,
    )  # fmt: skip
    twin = Twin(model, [OPTIMIZERS[optimizer](model)], pruner, average)
    for step in range(2):
        twin.train(small_inputs(), step)
        pruner.step()
        average.update_parameters(model)
    twin.train(small_inputs(), 2)
    model(small_inputs()).square().mean().backward()
    return twin


def digest(twin: Twin) -> str:
    """A hash of all that the training is made of: values, layouts, identities, attributes, where the pruner stands."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add((tuple(value.shape), value.stride(), str(value.dtype), value.requires_grad))
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key, entry in value.items():
                add((repr(key), entry))
        elif isinstance(value, (list, tuple)):
            found.update(f"{type(value).__name__} {len(value)}".encode())
            for entry in value:
                add(entry)
        elif isinstance(value, np.ndarray):
            add(value.tolist())
        else:
            found.update(pickle.dumps(value))

    for module in (twin.model, twin.extra):
        for tensor in (*module.parameters(), *module.buffers()):
            add([id(tensor), tensor, tensor.grad])
        add(repr(module))
        for m in module.modules():
            sizes = {k: v for k, v in vars(m).items() if isinstance(v, (int, tuple)) and not k.startswith("_")}
            add([sizes, dict(records(m)).get("")])
    add([twin.optimizers[0].state_dict(), getattr(twin.optimizers[0], "_numel_cache", None)])
    add([id(p) for g in twin.optimizers[0].param_groups for p in g["params"]])
    add(twin.pruner.state_dict())
    add([twin.pruner.epoch, twin.pruner.done, twin.pruner._eligible, id(twin.pruner.binding)])
    return found.hexdigest()


@contextmanager
def at_call(number: int, act: Callable[[], None], files: list[str] = FILES) -> Any:
    """Do something when the package's ``number``-th function of a prune is called; tells how many there were."""
    calls: list[str] = []

    def watch(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        generator = code.co_flags & inspect.CO_GENERATOR  # called when it is thrown away, too
        if event == "call" and not generator and code.co_filename.startswith(tuple(files)):
            calls.append(code.co_name)
            if len(calls) == number:
                act()

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        sys.setprofile(None)
        raise error

    return act


def all_calls() -> list[str]:
    twin = make()
    with at_call(-1, lambda: None) as calls:
        twin.pruner.step()
    return calls


def goes_on(twin: Twin) -> None:
    """The step that failed can be taken again, and the training goes on."""
    assert twin.train(small_inputs(), 3).isfinite()
    twin.pruner.step()
    twin.extra.update_parameters(twin.model)
    check_alive(twin)
    assert [p.shape for p in twin.extra.module.parameters()] == [p.shape for p in twin.model.parameters()]
    assert twin.train(small_inputs(), 4).isfinite()


class Injected(Exception):
    pass


ERRORS: dict[str, Callable[[], BaseException]] = {
    "out of memory": lambda: torch.OutOfMemoryError("injected"),
    "no memory": lambda: MemoryError("injected"),
    "error": lambda: Injected("injected"),
    "interrupt": lambda: KeyboardInterrupt("injected"),
}


def inject(name: str, every: int, optimizer: str = "AdamW") -> None:
    """An error at every so many-th call of a prune, until one comes when the prune is done."""
    twin = make(optimizer)
    before = digest(twin)
    expected = KeyboardInterrupt if name == "interrupt" else Exception
    tried = 0
    for number in count(1, every):
        with at_call(number, raising(ERRORS[name]())) as seen, pytest.raises(expected, match="injected"):
            twin.pruner.step()
        if "follow" in seen and "after" in seen[seen.index("follow") :]:
            break  # the prune is done and counted
        tried += 1
        assert digest(twin) == before, f"{name} in call {number}: {seen[-3:]}"
    assert tried * every > 300  # how many calls there are depends on the version of Python
    goes_on(twin)


def test_errors_at_some_calls_of_a_prune() -> None:
    for name in ("error", "interrupt"):
        inject(name, 23)
    inject("error", 17, "LBFGS")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizer"), [*((name, "AdamW") for name in ERRORS), ("error", "LBFGS")])
def test_errors_at_every_call_of_a_prune(name: str, optimizer: str) -> None:
    inject(name, 1, optimizer)


class NoMemory(TorchDispatchMode):
    """PyTorch runs out of memory at one of its ops."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise torch.OutOfMemoryError(f"injected in {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_memory_that_ends_at_any_allocation_of_a_prune(optimizer: str) -> None:
    """Inside of PyTorch, not only where a function of the package is called."""
    twin = make(optimizer)
    before, epoch = digest(twin), twin.pruner.epoch
    for number in count(1):
        with NoMemory(number), pytest.raises((torch.OutOfMemoryError, pat.SurgeryError), match="injected"):
            twin.pruner.step()
        if twin.pruner.epoch > epoch:
            break  # the prune is done and counted; this came after it
        assert digest(twin) == before, number
    assert number > 50
    goes_on(twin)


@pytest.mark.parametrize("by_shortcut", [True, False])
def test_what_a_copy_made_before_it_failed_is_gone_when_others_are_undone(
    by_shortcut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To undo a batch is to make its tensors again, on a device that has just run out of memory."""
    monkeypatch.setattr(journal, "ROOM", 1)
    if not by_shortcut:  # the way of a GPU
        monkeypatch.setattr(journal, "shortcut", lambda *_: None)
    made: list[list[weakref.ref[Tensor]]] = []  # by each copy
    alive: list[int] = []
    run, back, fresh = journal.Copy.run, journal.Copy.back, journal.fresh

    def watched_run(copy: journal.Copy, *arguments: Any) -> None:
        made.append([])
        run(copy, *arguments)

    def watched_back(copy: journal.Copy) -> None:
        if any(copy._moves.olds[place] is None for place in copy._places):  # it will make them again
            alive.append(sum(ref() is not None for ref in made[-1]))
        back(copy)

    def watched_fresh(xs: Any, shapes: Any, strides: Any, outs: list[Tensor], *, watched: bool) -> Iterator[Any]:
        for part in fresh(xs, shapes, strides, outs, watched=watched):
            made[-1] += map(weakref.ref, part[0])
            yield part
            del part  # the traceback would keep it
        if len(made) == fails:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(journal.Copy, "run", watched_run)
    monkeypatch.setattr(journal.Copy, "back", watched_back)
    monkeypatch.setattr(journal, "fresh", watched_fresh)
    fails = 0
    other, twin = make(), make()
    made.clear()
    other.pruner.step()
    last = len(made)
    made.clear()
    before = digest(twin)
    fails = last
    with pytest.raises(pat.SurgeryError, match="injected"):
        twin.pruner.step()
    assert digest(twin) == before
    assert len(made) == fails
    assert made[-1]
    assert alive == [0] * len(alive)
    assert alive or len(made) <= 3, "none of several batches was undone"
    goes_on(twin)


@pytest.fixture
def _keyboard() -> Iterator[None]:
    """Python's own handler: it is not there in what a shell puts behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_keyboard")
def test_an_interrupt_from_the_keyboard_comes_before_or_after_the_change() -> None:
    """A real signal: where it comes while the model changes, the prune is finished first."""
    calls = all_calls()
    cut = calls.index("_cut") + 1
    for number, changed in ((1, False), (calls.index("batches") + 1, False), (cut, True), (cut + 50, True)):
        twin = make()
        before = digest(twin)
        channels = twin.pruner.plan.n_channels  # type: ignore[union-attr]
        with at_call(number, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            twin.pruner.step()
        assert (digest(twin) != before) == changed
        assert (twin.pruner.plan.n_channels < channels) == changed  # type: ignore[union-attr]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        goes_on(twin)


class Stubborn(nn.Conv2d):
    """A layer that refuses another size."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "out_channels" and getattr(self, "armed", False):
            raise Injected("this layer keeps its size")
        super().__setattr__(name, value)


def test_what_the_user_brought_raises() -> None:
    twin = make()
    before = digest(twin)
    taylor: Any = twin.pruner.criterion
    score, shrink = taylor.score, taylor.shrink

    def refuses(*_: Any) -> Any:
        raise Injected("no")

    for name, error in (("score", Injected), ("shrink", pat.SurgeryError)):
        setattr(taylor, name, refuses)
        with pytest.raises(error):
            twin.pruner.step()
        taylor.score, taylor.shrink = score, shrink
        assert digest(twin) == before, name
    twin.model.outer.__class__ = Stubborn
    twin.model.outer.armed = True
    before = digest(twin)
    with pytest.raises(pat.SurgeryError, match=r"Injected: this layer keeps its size\) and was undone"):
        twin.pruner.step()
    assert digest(twin) == before
    twin.model.outer.armed = False
    goes_on(twin)


MEMORY: dict[str, Callable[[Twin], Tensor]] = {
    "a buffer": lambda twin: next(b for b in twin.model.buffers() if b.dim()),
    "a bias": lambda twin: next(p for n, p in twin.model.named_parameters() if n.endswith("bias")),
    "a gradient": lambda twin: next(p.grad for p in twin.model.parameters() if p.grad is not None),
    "a moment": lambda twin: twin.optimizers[0].state[twin.model.outer.weight]["exp_avg"],
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("which", MEMORY)
def test_what_has_no_memory_is_not_copied(which: str, watched: bool) -> None:
    """As FSDP's is between uses: to read it would end the process."""
    twin = make()
    before = digest(twin)
    tensor = MEMORY[which](twin)
    kept, gone = tensor.data, tensor.detach().clone()
    gone.untyped_storage().resize_(0)
    tensor.data = gone
    with torch.profiler.profile() if watched else nullcontext(), pytest.raises(pat.PatError, match="to have memory"):
        twin.pruner.step()
    tensor.data = kept
    assert digest(twin) == before
    goes_on(twin)


def test_a_training_with_failed_prunes_is_the_training_without_them() -> None:
    """Masked equals pruned, though every other prune fails in the middle first."""
    x = small_inputs(dtype=torch.float64)

    def one(mode: str) -> Twin:
        model = Small().double()
        pruner = pat.Pruner(model, 0.5, example_inputs=x, mode=mode, end_epoch=2, reg_strength=1e-3, verify=False)
        return Twin(model, [adamw(model)], pruner)

    def train(twin: Twin, step: int) -> Tensor:
        if twin.pruner.mode == "prune" and step in (1, 4):
            before = weights(twin.model)
            with at_call(1, raising(Injected("no")), [f"{PACKAGE}/surgery/record.py"]), pytest.raises(pat.SurgeryError):
                twin.pruner.step()
            assert same(weights(twin.model), before)
        return twin.train(x, step)

    masked_equals_pruned(one, train)


def test_the_criterion_of_the_tests_gathers() -> None:
    assert make_criterion("taylor", None).histories  # type: ignore[attr-defined]
