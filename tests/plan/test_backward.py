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


@pytest.mark.parametrize("used", [False, True])
def test_what_no_output_depends_on_stays(used: bool) -> None:
    """Of inputs shorter than a window nothing is made of the keys: what longer ones do with them is not seen."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.keys, self.leave = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(6, 3)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x).relu()
            keys = self.keys(x)
            if used:
                return self.leave(x) * (keys @ keys.mT).sum(2, keepdim=True)
            keys = keys[:, : x.shape[1] // 16]
            return torch.cat([self.leave(x), self.norm(keys)[..., :3]], 1) if keys.numel() else self.leave(x)

    plan = build_plan(Windows(), torch.randn(2, 7, 5))
    roots = {g.root for g in plan.groups}
    assert roots == {"enter", "keys"} if used else roots == {"enter"}
    assert used or {f.layer: f.reason for f in plan.frozen}["keys"] == "no output of this forward depends on it"


def test_without_gradients_nothing_is_said_of_what_outputs_depend_on() -> None:
    class Similar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 6), nn.Linear(5, 6)

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) @ self.two(x).mT

    assert [g.channels for g in build_plan(Similar(), torch.randn(2, 5)).groups] == [6]
