"""Proximal group lasso: its formula, exact zeros, and a network that is the same without them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pat_fast as pat
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.regularizers import ProximalGroupLasso
from pat_fast.surgery import prune
from tests.helpers import Case, Small, small_inputs
from tests.training import adamw, train_one_epoch


def bound(model: nn.Module, dtype: torch.dtype = torch.float32) -> Binding:
    return bind(build_plan(model, small_inputs(dtype=dtype)), model)


def rates(model: nn.Module, lr: float = 0.1) -> dict[int, float]:
    return {id(p): lr for p in model.parameters()}


def blocks(model: Small) -> dict[str, list[torch.Tensor]]:
    """For each group, its parameters on the side that puts its channels out, channels first."""
    return {
        "outer": [model.stem.weight, model.norm.weight, model.norm.bias, model.outer.weight, model.outer.bias],
        "inner": [model.inner.weight, model.inner.bias],
    }


def test_each_channel_is_scaled_by_the_operator_of_group_lasso() -> None:
    model = Small().double()
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    binding = bound(model, torch.float64)
    regularizer = ProximalGroupLasso(0.05)
    before = {name: [p.detach().clone() for p in of] for name, of in blocks(model).items()}
    regularizer.apply(binding)
    regularizer.after_step(binding, rates(model))
    for group in binding.plan.groups:
        flat = torch.cat([p.flatten(1) if p.dim() > 1 else p[:, None] for p in before[group.root]], 1)
        norm = flat.norm(dim=1)
        torch.testing.assert_close(regularizer.norms(binding)[group.start : group.stop].double().clamp_min(0), (
            norm - 0.1 * 0.05 * flat.shape[1] ** 0.5).clamp_min(0), rtol=1e-5, atol=1e-8)
        factor = (1 - 0.1 * 0.05 * flat.shape[1] ** 0.5 / norm).clamp_min(0)
        for old, new in zip(before[group.root], blocks(model)[group.root], strict=True):
            shape = (-1, *[1] * (old.dim() - 1))
            torch.testing.assert_close(new.detach(), old * factor.view(shape), rtol=1e-6, atol=1e-9)


def test_it_minimises_what_it_is_the_operator_of() -> None:
    """``prox(v) = argmin_w |w - v|^2 / 2 + t |w|``: no other point nearby is better."""
    model = Small().double()
    binding = bound(model, torch.float64)
    group = next(g for g in binding.plan.groups if g.root == "inner")
    v = torch.cat([p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None] for p in blocks(model)["inner"]], 1)
    ProximalGroupLasso(0.1).after_step(binding, rates(model, 0.5))
    w = torch.cat([p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None] for p in blocks(model)["inner"]], 1)
    threshold = 0.5 * 0.1 * v.shape[1] ** 0.5

    def objective(w: torch.Tensor) -> torch.Tensor:
        return (w - v).square().sum(1) / 2 + threshold * w.norm(dim=1)

    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-2, 1e-1):
        other = w + size * torch.randn(w.shape, generator=generator, dtype=w.dtype)
        assert (objective(w) < objective(other)).all()
    assert group.channels == len(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weak_channels_become_exactly_zero_and_removing_them_changes_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for of in blocks(model).values():
            for p in of:
                p[::3] *= 1e-3
    model = model.to(dtype)
    binding = bound(model, dtype)
    ProximalGroupLasso(0.05).after_step(binding, rates(model))
    zero = (ProximalGroupLasso().norms(binding) == 0).numpy()
    assert zero.sum() == 4 + 6  # a third of each group
    for of in blocks(model).values():
        for p in of:
            assert (p[::3] == 0).all()
    model.eval()
    before = model(small_inputs(dtype=dtype))
    prune(binding, ~zero)
    torch.testing.assert_close(model(small_inputs(dtype=dtype)), before, rtol=0.02 if dtype == torch.bfloat16 else 1e-5,
                               atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_training_makes_zeros_and_the_pruner_takes_them_first() -> None:
    torch.manual_seed(0)
    model = Small(width=24)
    optimizer = adamw(model)
    pruner = pat.Pruner(
        model, 0.25, "one_shot", start_epoch=2, regularizer={"name": "proximal", "strength": 0.12}, verify=False,
        optimizer=optimizer, example_inputs=small_inputs(), unit="epoch",
    )
    for _ in range(2):
        train_one_epoch(model, optimizer, batches=25)
        if pruner.epoch == 1:
            assert pruner.binding is not None
            zero = (ProximalGroupLasso().norms(pruner.binding) == 0).numpy()
        pruner.step()
    assert zero.sum() >= 3
    train_one_epoch(model, optimizer)
    assert not any(float(p.detach().flatten(1).norm(dim=1).min()) == 0 for p in (model.inner.weight, model.stem.weight))


def test_only_some_channels_and_only_what_is_stepped() -> None:
    model = Small()
    binding = bound(model)
    where = torch.zeros(binding.plan.n_channels, dtype=torch.bool)
    group = next(g for g in binding.plan.groups if g.root == "inner")
    where[group.start] = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ProximalGroupLasso(10.0).after_step(binding, {id(model.inner.weight): 0.1}, where)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"inner.weight"}
    assert (model.inner.weight[0] == 0).all()
    assert torch.equal(model.inner.weight[1:], before["inner.weight"][1:])
    model.inner.bias.requires_grad_(False)
    frozen = model.inner.bias.detach().clone()
    ProximalGroupLasso(10.0).after_step(bound(model), rates(model))
    assert torch.equal(frozen, model.inner.bias)
    assert (model.inner.weight == 0).all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50", "densenet121", "vit_s16", "unet"])
def test_every_channel_of_the_zoo_has_a_block(name: str) -> None:
    case = Case.build(name, torch.float32)
    binding = bind(build_plan(case.model, case.inputs), case.model)
    norms = ProximalGroupLasso().norms(binding)
    assert norms.shape == (binding.plan.n_channels,)
    assert (norms > 0).all()
    ProximalGroupLasso(1e9).after_step(binding, rates(case.model))
    assert (ProximalGroupLasso().norms(binding) == 0).all()
    np.testing.assert_array_equal(
        [bool(torch.isfinite(p).all()) for p in case.model.parameters()], [True for _ in case.model.parameters()]
    )


def test_it_goes_by_name_and_rests_in_the_last_stage() -> None:
    model = Small()
    optimizer = adamw(model)
    options: dict[str, Any] = {"optimizer": optimizer, "example_inputs": small_inputs(), "verify": False}
    pruner = pat.Pruner(model, 0.2, "one_shot", regularizer="proximal", reg_strength=1e3, **options)
    assert isinstance(pruner.regularizer, ProximalGroupLasso)
    assert pruner.regularizer.strength == 1e3
    pruner.step()
    assert pruner.stage == "finetune"
    train_one_epoch(model, optimizer)
    assert (ProximalGroupLasso().norms(pruner.binding) > 0).all()  # type: ignore[arg-type]
    with pytest.raises(pat.ConfigError, match="'proximal' has no option 'decoupled'"):
        pat.Pruner(Small(), regularizer={"name": "proximal", "decoupled": True}, end_epoch=2)
