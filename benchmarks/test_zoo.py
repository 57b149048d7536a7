"""The zoo is what it says: published parameter counts, small versions that run, repeatable weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo import ZOO, randomize_

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnext50": 25_028_904,
    "se_resnet18": 11_778_592,
    "regnet_y_400mf": 4_344_144,
    "vgg16_bn": 138_365_992,
    "densenet121": 7_978_856,
    "googlenet": 6_624_904,
    "mobilenet_v2": 3_504_872,
    "shufflenet_v2": 2_278_604,
    "convnext_tiny": 28_589_128,
    "vit_s16": 22_050_664,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_has_the_published_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = ZOO[name].build()
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ZOO)
def test_small_runs_and_every_parameter_gets_a_gradient(name: str) -> None:
    model = randomize_(ZOO[name].small(), seed=1).train()
    model(*ZOO[name].example(True)).square().sum().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ZOO)
def test_randomize_repeats_and_leaves_nothing_trivial(name: str) -> None:
    first, second = (randomize_(ZOO[name].small(), seed=3).state_dict() for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert value.numel() == 1 or len(value.unique()) > 1, key
        assert not key.endswith("running_var") or (value > 0).all(), key
