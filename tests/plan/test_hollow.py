"""Plans from forwards without their heavy arithmetic are those of forwards with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pat_fast import PlanError
from pat_fast.plan import build_plan, hollow
from tests.helpers import Case, canonical


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every product counts as large; the names of those that were not computed."""
    seen: list[str] = []
    run = hollow.Hollow.run

    def noting(self: hollow.Hollow, func: Any, args: Any, kwargs: Any) -> Any:
        out = run(self, func, args, kwargs)
        if out is not None:
            seen.append(func._schema.name)
            for found, expected in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        return out

    monkeypatch.setattr(hollow, "LEAST", 0)
    monkeypatch.setattr(hollow.Hollow, "run", noting)
    return seen


def test_the_plan_is_the_same(case: Case, products: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = build_plan(case.model, case.inputs)
    assert products
    monkeypatch.setattr(hollow.Hollow, "run", lambda *_: None)
    assert canonical(found) == canonical(build_plan(case.model, case.inputs))


class Deciding(nn.Module):
    """Goes one way or another, as its values are."""

    def __init__(self, looks: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.looks = looks
        self.enter, self.one, self.two, self.fc = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x) + 1.0
        try:
            yes = self.looks(x)
        except ValueError:
            yes = False
        return self.fc((self.one if yes else self.two)(x))


LOOKS: dict[str, Callable[[Tensor], bool]] = {
    "a comparison": lambda x: bool((x != 1).any()),
    "item": lambda x: x.sum().item() != x.numel(),
    "nonzero": lambda x: len((x != 1).nonzero()) > 0,
    "a mask": lambda x: len(x[x != 1]) > 0,
    "unique": lambda x: len(x.unique()) > 1,
    "equal": lambda x: not torch.equal(x, torch.ones_like(x)),
    "tolist": lambda x: x.detach().tolist()[0][0] != 1,
    "numpy": lambda x: bool((x.detach().numpy() != 1).any()),
}


@pytest.mark.parametrize("how", LOOKS)
def test_who_looks_at_values_gets_them(how: str, products: list[str]) -> None:
    torch.manual_seed(0)
    plan = build_plan(Deciding(LOOKS[how]), torch.randn(4, 8))
    assert products
    assert "one" in {g.root for g in plan.groups} | {f.layer for f in plan.frozen}
    assert "two.weight" not in {t.name for t in plan.tensors}


def test_an_exception_that_the_forward_catches_does_not_hide_it(products: list[str]) -> None:
    def looks(x: Tensor) -> bool:
        try:
            return bool((x != 1).any())
        except Exception:
            return False

    plan = build_plan(Deciding(looks), torch.randn(4, 8))
    assert "two.weight" not in {t.name for t in plan.tensors}


def test_values_that_come_from_elsewhere_may_be_read(products: list[str]) -> None:
    class Checking(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            assert bool((x != 0).any())
            return self.fc(self.enter(x))

    build_plan(Checking(lambda _: True).eval(), torch.randn(4, 8))
    assert len(products) == 2  # in one attempt


def test_a_failing_forward_is_told_as_it_fails_with_its_values(products: list[str]) -> None:
    class Failing(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError("at last" if bool((self.enter(x) != 0).any()) else "hollow")

    with pytest.raises(PlanError, match="ZeroDivisionError: at last"):
        build_plan(Failing(lambda _: True), torch.randn(4, 8))


def test_what_does_not_fit_is_left_to_pytorch(products: list[str]) -> None:
    with pytest.raises(PlanError, match="shapes"):
        build_plan(nn.Sequential(nn.Linear(8, 4), nn.Linear(5, 3)), torch.randn(4, 8))


class Pointwise(nn.Module):
    """A large product, and element-wise ops on what comes of it."""

    def __init__(self, op: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.enter, self.norm, self.leave = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.LazyConv2d(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.op(self.enter(x), self))


OPS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "batch norm": lambda x, m: m.norm(x),
    "relu": lambda x, m: x.relu(),
    "in place": lambda x, m: x.relu_().add_(x),
    "gelu": lambda x, m: nn.functional.gelu(x),
    "sum": lambda x, m: x + x.sigmoid(),
    "with a number": lambda x, m: x + 1.0,
    "layer norm": lambda x, m: nn.functional.layer_norm(x, x.shape[2:]),
    "pool": lambda x, m: nn.functional.max_pool2d(x, 3, 1, 1),
    "pool with strides": lambda x, m: nn.functional.max_pool2d(x, (2, 1)),
    "softmax": lambda x, m: x.softmax(-1),
    "mean": lambda x, m: x + x.mean((2, 3), keepdim=True),
    "mean of one dimension": lambda x, m: x.mean(-1)[..., None] * x.mean((-1,), True),
    "mean of all": lambda x, m: x - x.mean(()),
    "of two shapes": lambda x, m: x[:, :, :1] * x.transpose(2, 3),
    "of two types": lambda x, m: (x + x.double()).float(),
    "cat": lambda x, m: torch.cat([x, x.tanh()], 1),
    "cat of positions": lambda x, m: torch.cat([x, x], -1),
    "transposed": lambda x, m: x.transpose(2, 3).relu(),
}


@pytest.mark.parametrize("name", OPS)
def test_elementwise_ops_on_what_was_not_computed_are_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Pointwise(OPS[name]), torch.randn(2, 3, 4, 4)
    model(x)
    skipped: list[str] = []
    skip = hollow.Hollow.skip

    def noting(self: hollow.Hollow, func: Any, args: Any, kwargs: Any) -> Any:
        out = skip(self, func, args, kwargs)
        if out is not None:
            skipped.append(func._schema.name)
            alike = [t.clone() if isinstance(t, Tensor) else t for t in args]
            for found, real in zip(tree_leaves(out), tree_leaves(func(*alike)), strict=True):
                assert (found.shape, found.dtype) == (real.shape, real.dtype)
                assert found.stride() == real.stride()
        return out

    with monkeypatch.context() as patch:
        patch.setattr(hollow, "LEAST", 0)
        patch.setattr(hollow, "LEAST_SKIPPED", 0)
        patch.setattr(hollow.Hollow, "skip", noting)
        found = build_plan(model, x)
    assert bool(skipped) == (name not in ("of two shapes", "of two types", "transposed"))
    monkeypatch.setattr(hollow.Hollow, "skip", lambda *_: None)
    assert canonical(found) == canonical(build_plan(model, x))
