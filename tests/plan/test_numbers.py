"""Sizes that modules keep as numbers follow what is pruned, or hold it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pat_fast import build_plan
from pat_fast.plan import Plan, bind
from pat_fast.plan.running import Still
from pat_fast.plan.trace import Tracer
from pat_fast.rehearsal import rehearse
from pat_fast.surgery import prune
from tests.helpers import canonical, masked_copy, random_keep


class FusedAttention(nn.Module):
    """Queries and fewer keys and values from one bare weight; every size is an attribute of another kind."""

    def __init__(self, width: int = 24, heads: int = 6, kv_heads: int = 3, head_dim: int = 5) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.parts = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv = nn.Parameter(torch.randn(sum(self.parts), width) / 5)
        self.out = nn.Parameter(torch.randn(width, heads * head_dim) / 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        q, k, v = F.linear(x, self.qkv).split(self.parts, dim=-1)
        q = q.view(batch, time, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
        return F.linear(mixed.reshape(batch, time, self.num_heads * self.head_dim), self.out)


class Block(nn.Module):
    """``between`` two layers: ``first`` makes 8 channels, ``last`` takes what comes out."""

    def __init__(self, between: Any, after: int = 8, **attributes: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(after, 3)
        self.between = between
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def halved(model: nn.Module, inputs: Any) -> Plan:
    """The plan of ``model`` after a random prune; it still runs, and equals the masked model."""
    model = model.double()
    plan = build_plan(model, inputs)
    keep = random_keep(plan, 3, ratio=0.6)
    twin = masked_copy(model, plan, keep)
    smaller = prune(bind(plan, model), keep).plan
    if not any(g.statistic for g in plan.groups):
        with torch.no_grad():
            torch.testing.assert_close(model(inputs), twin(inputs), rtol=1e-9, atol=1e-9)
    assert canonical(build_plan(model, inputs)) == canonical(smaller)
    return smaller


def test_a_fused_attention_block_with_grouped_queries_loses_whole_heads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 24), FusedAttention(), nn.Linear(24, 3))
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    plan = build_plan(model.double(), x)
    assert not [f for f in plan.frozen if f.layer != "2"]
    (heads,) = [g for g in plan.groups if ("1.qkv", 0) in g.members]
    assert len(np.unique(plan.unit[heads.start : heads.stop])) == 3  # a unit is a key-value head with its queries
    keep = plan.unit != plan.unit[heads.start]
    twin = masked_copy(model, plan, keep)
    prune(bind(plan, model), keep)
    attention = model[1]
    assert (attention.num_heads, attention.kv_heads, attention.head_dim) == (4, 2, 5)
    assert attention.parts == [20, 10, 10]
    assert type(attention.num_heads) is int
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("between", "after", "attributes", "left"),
    [
        (lambda m, x: x.view(-1, m.width), 8, {"width": 8}, {"width"}),
        (lambda m, x: x.reshape(x.shape[0], m.sizes[0]), 8, {"sizes": (8,)}, {"sizes"}),
        (lambda m, x: F.layer_norm(x, (m.width,)), 8, {"width": 8}, {"width"}),
        (lambda m, x: F.rms_norm(x, (m.width,)), 8, {"width": 8}, {"width"}),
        (lambda m, x: x[:, : m.half] * x[:, m.half :], 4, {"half": 4}, {"half"}),
        (lambda m, x: torch.cat(x.split(m.half, dim=1), 1), 8, {"half": 4}, {"half"}),
        (lambda m, x: x + torch.zeros(m.width), 8, {"width": 8}, {"width"}),
        (lambda m, x: x.view(-1, m.config.heads * m.dim), 8, {"config": None, "dim": 2}, {"config.heads"}),
    ],
    ids=["view", "tuple", "layer_norm", "rms_norm", "slice", "split", "zeros", "config"],
)  # fmt: skip
def test_an_attribute_that_sizes_channels_follows_them(between, after, attributes, left) -> None:
    torch.manual_seed(0)
    if "config" in attributes:
        attributes = {**attributes, "config": type("TinyConfig", (SimpleNamespace,), {})(heads=4)}
        after, inner = 8, between
        between = lambda m, x: inner(m, x.view(-1, m.config.heads, m.dim).tanh())  # noqa: E731
    model = Block(between, after, **attributes)
    smaller = halved(model, torch.randn(5, 4, dtype=torch.float64))
    assert {w.attribute for w in smaller.widths} == left
    assert smaller.n_channels < 8


@pytest.mark.parametrize(
    ("between", "attributes", "reason"),
    [
        (lambda m, x: x.view(-1, m.width) / m.width**0.5, {"width": 8}, "takes part in a value"),
        (lambda m, x: x.view(-1, m.width) * m.width, {"width": 8}, "is an argument of mul"),
        (lambda m, x: x.view(-1, m.width) + torch.arange(m.width).sum(), {"width": 8}, "is an argument of arange"),
        (lambda m, x: x.view(-1, m.width) + m.table[: m.width].sum(), {"width": 8}, "__getitem__"),
    ],
    ids=["power", "factor", "arange", "index"],
)  # fmt: skip
def test_a_number_that_does_more_than_size_channels_holds_them(between, attributes, reason: str) -> None:
    model = Block(between, **attributes)
    model.register_buffer("table", torch.arange(9.0))
    plan = build_plan(model, torch.randn(5, 4))
    assert plan.n_channels == 0
    assert any(f.layer == "first" and "its size is width" in f.reason for f in plan.frozen), plan.frozen


def test_what_one_number_sizes_twice_shrinks_alike() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.one, self.two, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x).view(-1, self.width)
            return self.last(self.two(x).view(-1, self.width))

    plan = build_plan(Two(), torch.randn(5, 4))
    assert (plan.n_channels, plan.n_units) == (16, 8)
    model = Two()
    halved(model, torch.randn(5, 4, dtype=torch.float64))
    assert model.one.out_features == model.two.out_features == model.width < 8


@pytest.mark.parametrize("affine", [True, False])
def test_an_rms_norm_of_pytorchs_follows_its_channels(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.RMSNorm(8, eps=1e-6, elementwise_affine=affine)
    model = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = build_plan(model, torch.randn(5, 5))
    assert [(g.root, bool(g.statistic)) for g in plan.groups] == [("2", False), ("0", True)]
    assert rehearse(plan, model, torch.randn(5, 5))
    halved(model, torch.randn(5, 5, dtype=torch.float64))
    assert norm.normalized_shape == (model[0].out_features,)
    assert model[0].out_features < 8


def test_channels_that_a_layer_unflattens_go_with_all_of_their_places() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 32), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.Upsample(scale_factor=2),
        nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 3, 1),
    )  # fmt: skip
    plan = build_plan(model, torch.randn(5, 5))
    assert {g.root: len(np.unique(plan.unit[g.start : g.stop])) for g in plan.groups} == {"0": 8, "4": 6}
    halved(model, torch.randn(5, 5, dtype=torch.float64))
    assert model[1].unflattened_size == (model[4].in_channels, 2, 2)
    assert model[4].in_channels < 8


def test_the_model_has_its_plain_numbers_back() -> None:
    model = Block(lambda m, x: x.view(-1, m.width), width=8, sizes=[8, 3], shape=(2, 8))
    build_plan(model, torch.randn(5, 4))
    assert [type(n) for n in (model.width, *model.sizes, *model.shape)] == [int] * 5
    assert (type(model.sizes), type(model.shape)) == (list, tuple)
    model.between = lambda m, x: 1 / 0
    with pytest.raises(Exception, match="ZeroDivisionError"):
        build_plan(model, torch.randn(5, 4))
    assert type(model.width) is int


class Checks(nn.Module):
    """Refuses inputs of another width than it was made for."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 3)
        self.width, self.differs = 10, differs

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if (self.width != x.shape[1]) if self.differs else not (x.size(-1) == self.width):
            raise ValueError(f"expected {self.width} channels")
        return self.second(x)


@pytest.mark.parametrize("differs", [False, True])
def test_an_attribute_that_a_size_is_checked_against_follows_it(differs: bool) -> None:
    torch.manual_seed(0)
    model, x = Checks(differs), torch.randn(3, 4)
    plan = build_plan(model, x)
    assert [(w.module, w.attribute) for w in plan.widths] == [("", "width")]
    prune(bind(plan, model), random_keep(plan, 0))
    assert model.width == model.first.out_features < 10
    model(x)
    assert build_plan(model, x).n_channels == model.width


def test_a_number_is_reckoned_with_on_either_side() -> None:
    class Reckons(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.width, self.heads, self.more, self.rest = 8, 2, 3, 5

        def forward(self, x: Tensor) -> Tensor:
            assert (self.width // self.heads, 7 % self.more, 9 - self.rest) == (4, 1, 4)
            return self.layer(x)

    model, x = Reckons(), torch.randn(2, 3)
    tracer = Tracer(Still(model))
    with tracer.numbers.planted([("", model)]), tracer.numbers:
        model(x)
    assert tracer.numbers.read == {"width", "heads", "more", "rest"}
