"""Methods that are made in another way: for one thread, and for a while."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from pat_fast.plan.running import CALLS, Still


def test_calls_of_other_threads_go_on_and_the_last_one_puts_all_back() -> None:
    before = nn.Module.__call__
    seen: list[str] = []
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    inside, leave = threading.Event(), threading.Event()

    def noting(name: str):  # type: ignore[no-untyped-def]
        def way(run, *args):  # type: ignore[no-untyped-def]
            seen.append(name)
            return run(*args)

        return way

    def other() -> None:
        with CALLS.made_by(noting("other")):
            inside.set()
            leave.wait()
            model(x)

    thread = threading.Thread(target=other)
    with CALLS.made_by(noting("outer")), CALLS.made_by(noting("inner")):
        thread.start()
        inside.wait()
        model(x)
    model(x)  # as it was, though another thread is not done
    leave.set()
    thread.join()
    assert seen == ["inner", "other"]
    assert nn.Module.__call__ is before


def test_a_method_is_put_back_when_a_forward_fails() -> None:
    before = nn.Module.__call__
    with pytest.raises(ZeroDivisionError), CALLS.made_by(lambda run, *args: 1 / 0):
        nn.Linear(2, 2)(torch.ones(1, 2))
    assert nn.Module.__call__ is before


def test_a_model_runs_twice_from_what_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.register_buffer("sum", torch.zeros(1))

        def forward(self) -> int:
            self.seen += 1
            self.sum += 1
            return self.seen

    model = Counting()
    still = Still(model)
    for _ in range(2):
        with still.running():
            assert model() == 1
            assert (model.sum.item(), model.training) == (1, False)
        assert (model.seen, model.sum.item(), model.training) == (0, 0, True)
