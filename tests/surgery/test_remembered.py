"""What forwards leave in modules has the channels that there were: a prune forgets it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.plan import bind, build_plan
from pat_fast.surgery import prune
from tests.helpers import masked_copy


class Remembers(nn.Module):
    """Attention with a table of biases for every head, which is looked up once in eval mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 16), nn.Linear(16, 3)
        self.biases = nn.Parameter(torch.randn(4, 5))
        self.tables: dict[str, Tensor] = {}
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        if self.training or "cpu" not in self.tables:
            places = torch.arange(5)
            table = self.biases[:, (places[:, None] - places).abs()]
            if not self.training:
                self.tables["cpu"] = table
        else:
            table = self.tables["cpu"]
        if not self.seen:
            self.seen.append(x.mean())
        return self.out(((q @ k.mT + table).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def model() -> Remembers:
    torch.manual_seed(0)
    return Remembers().double().eval()


def inputs() -> Tensor:
    return torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_tables_of_channels_are_forgotten_and_nothing_else(model: Remembers) -> None:
    x = inputs()
    plan = pat.build_plan(model, x)
    assert plan.remembered == (("", "tables"),)
    assert (model.tables, model.seen) == ({}, [])
    keep = plan.unit != plan.unit[0]
    expected = masked_copy(model, plan, keep)(x)
    model(x)  # as a validation between two prunes does
    smaller = prune(bind(plan, model), keep).plan
    assert model.tables == {}
    assert len(model.seen) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert model.tables["cpu"].shape == (3, 5, 5)
    prune(bind(smaller, model), smaller.unit != smaller.unit[0])
    assert model(x).shape == (2, 5, 3)
    assert model.tables["cpu"].shape == (2, 5, 5)


def test_a_prune_that_fails_leaves_them(model: Remembers) -> None:
    x = inputs()
    plan = build_plan(model, x)
    model(x)
    tables = model.tables

    def then(smaller: object) -> None:
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError, match="not now"):
        prune(bind(plan, model), np.asarray(plan.unit != plan.unit[0]), then=then)
    assert model.tables is tables
    assert tables["cpu"].shape == (4, 5, 5)
