"""What a forward hangs into the backward is seen: methods that are made in another way, for one thread, for a while."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pat_fast.plan import build_plan
from pat_fast.plan.backward import Method
from pat_fast.plan.running import Still


class Subject:
    def work(self) -> None:
        """Nothing."""


def test_calls_of_other_threads_go_on_and_the_last_one_puts_all_back() -> None:
    before, method = Subject.work, Method(Subject, "work")
    seen: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def noting(name: str) -> Any:
        def way(run: Any, *args: Any) -> Any:
            seen.append(name)
            return run(*args)

        return way

    def other() -> None:
        with method.made_by(noting("other")):
            inside.set()
            leave.wait()
            Subject().work()

    thread = threading.Thread(target=other)
    with method.made_by(noting("outer")), method.made_by(noting("inner")):
        thread.start()
        inside.wait()
        Subject().work()
    Subject().work()  # as it was, though another thread is not done
    leave.set()
    thread.join()
    assert seen == ["inner", "other"]
    assert Subject.work is before


def test_a_method_is_put_back_when_it_fails() -> None:
    before, method = Subject.work, Method(Subject, "work")
    with pytest.raises(ZeroDivisionError), method.made_by(lambda run, *args: 1 / 0):
        Subject().work()
    assert Subject.work is before


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Stepping(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "function":
            x = Own.apply(x)
        elif self.how == "hook":
            x.register_hook(lambda grad: grad)
        return self.b(x)


@pytest.mark.parametrize("how", ["function", "hook", "plain"])
def test_a_trace_sees_whether_the_backward_is_pytorchs(how: str) -> None:
    model = Stepping(how)
    still = Still(model)
    build_plan(model, torch.randn(2, 3), still)
    assert still.plain_backward == (how == "plain")
