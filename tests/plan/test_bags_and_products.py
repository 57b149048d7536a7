"""Tables whose rows are summed up by the bag, and products of two inputs and a weight of three dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.dry_run import dry_run
from pat_fast.plan import bind, build_plan
from pat_fast.plan.verify import verify
from pat_fast.rehearsal import rehearse
from pat_fast.surgery import prune
from tests.helpers import canonical, masked_copy, random_keep
from tests.plan.test_verify import LIES, change, spots


class Bags(nn.Module):
    """``mode`` of each bag, whose rows count as much as a parameter says if ``weighed``."""

    def __init__(self, mode: str, rows: int = 23, weighed: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(rows, 8, mode=mode, include_last_offset=weighed)
        self.counts = nn.Parameter(torch.rand(rows)) if weighed else None
        self.inner, self.out = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        if self.counts is None:
            x = self.bag(ids)
        else:
            ends = torch.arange(len(ids) + 1) * ids.shape[1]
            x = self.bag(ids.flatten(), ends, per_sample_weights=self.counts[ids.flatten()])
        return self.out(self.inner(x).relu())


class Products(nn.Module):
    """A bilinear layer of two inputs, or of one with itself if ``same``."""

    def __init__(self, out: int = 7, same: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(5, 6)
        self.two = None if same else nn.Linear(5, 9)
        self.product, self.out = nn.Bilinear(6, 6 if same else 9, out, bias=bias), nn.Linear(out, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x).relu()
        return self.out(self.product(one, one if self.two is None else self.two(x).relu()))


class Score(Products):
    """One number for each pair."""

    def __init__(self) -> None:
        super().__init__(1)
        self.out = nn.Identity()


def tokens() -> Tensor:
    return torch.randint(0, 23, (4, 5), generator=torch.Generator().manual_seed(0))


def vectors() -> Tensor:
    return torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


CASES = {
    "mean": (lambda: Bags("mean"), tokens, {"bag": 8, "inner": 6}),
    "sum": (lambda: Bags("sum"), tokens, {"bag": 8, "inner": 6}),
    "max": (lambda: Bags("max"), tokens, {"bag": 8, "inner": 6}),
    "large": (lambda: Bags("mean", rows=9000), tokens, {"bag": 8, "inner": 6}),
    "weighed": (lambda: Bags("sum", weighed=True), tokens, {"bag": 8, "inner": 6}),
    "product": (Products, vectors, {"one": 6, "product": 7}),
    "plain product": (lambda: Products(bias=False), vectors, {"one": 6, "product": 7}),
    "score": (Score, vectors, {"one": 6, "two": 9}),
    "square": (lambda: Products(same=True), vectors, {"one": 6}),
}


@pytest.fixture(params=CASES)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, dict[str, int]]:
    make, inputs, groups = CASES[request.param]
    torch.manual_seed(0)
    return make().double(), inputs(), groups


def test_they_are_pruned_and_compute_what_is_masked(network: tuple[nn.Module, Tensor, dict[str, int]]) -> None:
    model, x, groups = network
    plan = build_plan(model, x)
    assert {g.root: g.channels for g in plan.groups} == groups, plan.describe()
    assert all(g.statistic is None for g in plan.groups)
    proof = verify(plan, model, x)
    assert proof.wrong == ()
    assert dry_run(plan, model, x, proof.shapes) == {}
    assert rehearse(plan, model, x)
    keep = random_keep(plan, 0)
    expected = masked_copy(model, plan, keep)(x)
    smaller = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert canonical(build_plan(model, x)) == canonical(smaller.plan)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.EmbeddingBag):
            assert (module.num_embeddings, module.embedding_dim) == tuple(weight.shape)
        elif isinstance(module, nn.Bilinear):
            assert (module.out_features, module.in1_features, module.in2_features) == tuple(weight.shape)


@pytest.mark.parametrize("lie", LIES)
def test_no_lie_about_them_passes(network: tuple[nn.Module, Tensor, dict[str, int]], lie: Any) -> None:
    model, x, _ = network
    plan = build_plan(model, x)
    assert spots(plan)
    for i, j in spots(plan):
        lying = change(plan, i, j, lie(plan.tensors[i].axes[j].channels))
        assert not rehearse(lying, model, x), (plan.tensors[i].name, j)


def test_of_three_dimensions_those_go_that_can_go_together() -> None:
    reasons = {f.layer: f.reason for f in build_plan(Products().double(), vectors()).frozen}
    assert "product.weight has more than two prunable dimensions" in reasons["two"]
    reasons = {f.layer: f.reason for f in build_plan(Products(same=True).double(), vectors()).frozen}
    assert "product.weight has more than two prunable dimensions" in reasons["product"]


def test_multiply_accumulates_of_a_product() -> None:
    plan = build_plan(Products().double(), vectors())
    assert plan.macs() == 2 * (5 * 6 + 5 * 9 + 7 * 6 * 9 + 7 * 3)
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    keep[[g.start for g in plan.groups]] = False
    assert plan.macs(keep) == 2 * (5 * 5 + 5 * 9 + 6 * 5 * 9 + 6 * 3)


@pytest.mark.parametrize("name", ["mean", "product"])
def test_they_train_through_prunes_and_are_saved(name: str, tmp_path: Path) -> None:
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model, x = make(), inputs()
    x = x.float() if x.is_floating_point() else x
    optimizer = torch.optim.Adam(model.parameters())
    pruner = pat.Pruner(model, 0.4, example_inputs=x, optimizer=optimizer, end_epoch=2)
    for _ in range(3):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        pruner.step()
    assert pruner.plan.n_channels < build_plan(make(), x).n_channels
    pat.save(model, tmp_path / "model")
    loaded = pat.load(tmp_path / "model", make())
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))
