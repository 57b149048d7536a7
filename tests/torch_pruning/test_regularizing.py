"""The regularising pruners: equal to Torch-Pruning's where these are right, and what they get wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn

import pat_fast.torch_pruning as tp
from tests.torch_pruning.against import quiet
from tests.torch_pruning.nets import Net, X, make

RAW = original.importance.MagnitudeImportance(p=2, normalizer=None)


def with_gradients(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


def pushed(library: Any, kind: str, model: nn.Module, inputs: Any = X, **arguments: Any) -> dict[str, Tensor]:
    """What ``regularize`` adds to the gradients."""
    own = with_gradients(copy.deepcopy(model))
    pruner = make(
        library,
        own,
        inputs,
        kind,
        **{"importance": RAW, "in_channel_groups": {}, "out_channel_groups": {}, **arguments},
    )
    with quiet():
        pruner.regularize(own)
    return {name: p.grad for name, p in own.named_parameters()}


@pytest.mark.parametrize(("kind", "arguments"), [
    ("BNScalePruner", {"reg": 0.1}),
    ("GroupNormPruner", {"reg": 0.1}),
    ("GroupNormPruner", {"reg": 0.1, "ignored_layers": []}),
])  # fmt: skip
def test_equal_to_torch_pruning(kind: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm1.weight)
    nn.init.uniform_(model.norm2.weight)
    expected, got = (pushed(library, kind, model, **arguments) for library in (original, tp))
    for name, value in expected.items():
        if "fc" in name and "ignored_layers" not in arguments:
            continue  # ignored, and yet pushed by Torch-Pruning: see below
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_group_lasso_of_batch_norms() -> None:
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm1.weight)
    nn.init.uniform_(model.norm2.weight)
    expected, got = (pushed(library, "BNScalePruner", model, reg=0.1, group_lasso=True) for library in (original, tp))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert got["norm1.weight"].any()


def test_group_lasso_of_a_group_without_batch_norm() -> None:
    model = Net(norm=lambda _: nn.Identity())
    with pytest.raises(TypeError, match="NoneType"):
        pushed(original, "BNScalePruner", model, group_lasso=True)
    assert not any(g.any() for g in pushed(tp, "BNScalePruner", model, group_lasso=True).values())


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu()
        return self.fc(self.norm2(self.conv2(x)).mean((2, 3)))


def test_group_lasso_behind_a_concatenation() -> None:
    model = Concatenated()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    with pytest.raises(RuntimeError):
        pushed(original, "BNScalePruner", model, group_lasso=True, reg=0.1)
    got = pushed(tp, "BNScalePruner", model, group_lasso=True, reg=0.1)["norm.weight"]
    torch.testing.assert_close(got, 0.1 * model.norm.weight.detach().sign())  # one norm in each group


def test_equal_scores_give_no_nan() -> None:
    model = Net()
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    theirs, ours = (pushed(library, "GroupNormPruner", model, reg=0.1) for library in (original, tp))
    assert theirs["conv1.weight"].isnan().any()
    torch.testing.assert_close(ours["conv1.weight"], 0.1 * model.conv1.weight.detach())


def test_alpha_of_the_constructor() -> None:
    model = Net()
    theirs, ours = (
        [pushed(library, "GroupNormPruner", model, reg=0.1, alpha=a) for a in (1, 4)] for library in (original, tp)
    )
    assert torch.equal(theirs[0]["conv1.weight"], theirs[1]["conv1.weight"])
    ratio = ours[1]["conv1.weight"].abs().sum() / ours[0]["conv1.weight"].abs().sum()
    assert ratio > 1.5


@pytest.mark.parametrize("model", [
    Net(groups=4),
    nn.Sequential(nn.Conv2d(3, 12, 1), nn.ConvTranspose2d(12, 8, 1), nn.Flatten(), nn.Linear(2048, 5)),
    Net(norm=lambda n: nn.BatchNorm2d(n, affine=False)),
], ids=["grouped", "transposed", "without weights"])  # fmt: skip
def test_layers_that_stop_the_group_norm(model: nn.Module) -> None:
    with pytest.raises((IndexError, RuntimeError, AttributeError)):
        pushed(original, "GroupNormPruner", model)
    got = pushed(tp, "GroupNormPruner", model)
    weights = [name for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 2]
    assert all(got[name].any() and got[name].isfinite().all() for name in weights)


def test_inputs_behind_a_flatten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))
    expected, got = (pushed(library, "GroupNormPruner", model, reg=0.1) for library in (original, tp))
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)
    assert got["2.weight"].any()


@pytest.mark.parametrize("kind", ["GroupNormPruner", "GrowingRegPruner"])
def test_ignored_layers_are_not_pushed(kind: str) -> None:
    theirs, ours = (pushed(library, kind, Net(), reg=0.1) for library in (original, tp))
    assert theirs["fc.weight"].any()
    assert not ours["fc.weight"].any()
    assert ours["conv2.weight"].any()


def test_growing_reaches_batch_norms() -> None:
    model = Net()
    theirs, ours = (pushed(library, "GrowingRegPruner", model, reg=0.1) for library in (original, tp))
    assert not theirs["norm1.weight"].any()
    torch.testing.assert_close(ours["norm1.weight"], torch.full((16,), 0.1))
    torch.testing.assert_close(ours["conv1.weight"], theirs["conv1.weight"])


def test_growing_goes_on_after_a_prune() -> None:
    grown = {}
    for name, library in (("theirs", original), ("ours", tp)):
        torch.manual_seed(0)
        model = with_gradients(Net())
        pruner = make(library, model, X, "GrowingRegPruner", reg=1e-3, delta_reg=1.0, importance=RAW,
                      in_channel_groups={}, out_channel_groups={})  # fmt: skip
        pruner.update_reg()
        with quiet():
            pruner.step()
        pruner.update_regularizer()
        with_gradients(model)
        pruner.regularize(model)
        grown[name] = float((model.conv1.weight.grad / model.conv1.weight.detach()).max())
    assert grown["theirs"] == pytest.approx(1e-3, rel=1e-3)
    assert grown["ours"] > 0.1


@pytest.mark.parametrize("kind", ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner"])
def test_training_with_steps_between(kind: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = make(tp, model, X, kind, iterative_steps=3, global_pruning=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        pruner.regularize(model)
        optimizer.step()
        if kind == "GrowingRegPruner":
            pruner.update_reg()
        pruner.step()
        pruner.update_regularizer()
    assert model.conv1.out_channels + model.conv2.out_channels == 16
    assert all(p.isfinite().all() for p in model.parameters())
