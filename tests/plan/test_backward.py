"""What a forward hangs into the backward is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pat_fast.plan import build_plan
from pat_fast.plan.running import Still


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
