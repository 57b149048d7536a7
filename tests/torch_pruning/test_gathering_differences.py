"""Where Torch-Pruning's importances that gather gradients are wrong (Hessian, OBDC): its result, and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import pat_fast.torch_pruning as dropin
from pat_fast import PlanError
from pat_fast.plan import bind, build_plan
from pat_fast.surgery import prune
from pat_fast.torch_pruning import importance as ours
from tests.helpers import Small, random_keep, small_inputs
from tests.torch_pruning.groups import IMAGE, members, norm_chain, one_group, randomize_grads_


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Hessian


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> dict[nn.Parameter, Tensor]:
    """Mean over samples of the squared gradients."""
    total = {p: torch.zeros_like(p) for p in model.parameters()}
    for xs, ys in zip(x, y, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(xs[None]), ys[None]).backward()
        for p in total:
            total[p] += p.grad.square() / len(x)
    return total


def accumulate(importance: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    for xs, ys in zip(x, y, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(xs[None]), ys[None]).backward()
        importance.accumulate_grad(model)


def test_hessian_accumulates() -> None:
    """Torch-Pruning looks for names among parameters: the last sample is all that it keeps."""
    model, x, y = Small().eval(), small_inputs(4), torch.arange(4)
    group = one_group(model, x, model.inner)
    squares = by_hand(model, x, y)
    w = model.inner.weight
    expected = (w.detach().square() * squares[w]).flatten(1).sum(1)
    found = []
    for kind in (ours.HessianImportance, tp.importance.HessianImportance):
        importance = kind(group_reduction="first", normalizer=None, target_types=[nn.Conv2d])
        accumulate(importance, model, x, y)
        found.append(importance(group))
    torch.testing.assert_close(found[0], expected)
    assert not torch.allclose(found[1], expected, rtol=0.1)


def test_hessian_leaves_gradients_alone() -> None:
    model, x, y = Small().eval(), small_inputs(3), torch.arange(3)
    group = one_group(model, x, model.inner)
    mine, theirs = ours.HessianImportance(), tp.importance.HessianImportance()
    accumulate(mine, model, x, y)
    accumulate(theirs, model, x, y)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    first = mine(group)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    torch.testing.assert_close(mine(group), first)  # and what was accumulated stays
    theirs(group)
    assert not all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(mine(group), first)
    other = tp.importance.HessianImportance()
    accumulate(other, model, x, y)
    model.zero_grad(set_to_none=True)
    with pytest.raises(AttributeError):
        other(group)


def test_hessian_counts_biases_of_batch_norms() -> None:
    model = norm_chain()
    randomize_grads_(model)
    nn.init.normal_(model[1].bias)
    group = one_group(model, IMAGE, model[0])
    types = [nn.BatchNorm2d]
    mine = members(ours.HessianImportance(bias=True, target_types=types), group)
    torch.testing.assert_close(mine[1], (model[1].bias.square() * model[1].bias.grad).detach())
    theirs = members(tp.importance.HessianImportance(bias=True, target_types=types), group)
    assert len(theirs) == 1
    model[1].bias.grad = None
    with pytest.raises(AttributeError):
        members(tp.importance.HessianImportance(bias=True, target_types=types), group)
    assert len(members(ours.HessianImportance(bias=True, target_types=types), group)) == 1


def test_what_was_accumulated_survives_a_prune() -> None:
    model, x, y = Small().eval(), small_inputs(3), torch.arange(3)
    importance = ours.HessianImportance(normalizer=None)
    accumulate(importance, model, x, y)
    binding = bind(build_plan(model, x), model)
    before = importance.score(binding)
    keep = random_keep(binding.plan, seed=1)
    # What a channel's own output holds does not depend on the other channels of its group.
    smaller = prune(binding, keep, importance.accumulators)
    for p, entry in importance.accumulators[0].state.items():
        assert entry["sum"].shape == p.shape
    after = importance.score(smaller)
    assert after.isfinite().all()
    assert len(after) == int(keep.sum()) < len(before)
    other = ours.HessianImportance()
    accumulate(other, model, x, y)
    prune(smaller, random_keep(smaller.plan, seed=2))
    with pytest.raises(PlanError, match="pruned without it"):
        other.score(bind(build_plan(model, x), model))


# OBDC


class Watched(nn.Module):
    """Convolutions without biases and a classifier: what Torch-Pruning's Fisher matrix can do."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 6, 3, padding=1, stride=2, bias=bias)
        self.two = nn.Conv2d(6, 8, 3, bias=bias)
        self.three = nn.Linear(8, 7, bias=bias)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x).relu()).relu().mean((2, 3))
        return self.head(self.three(x).relu())


def watch(importance: Any, model: Any, x: Tensor, steps: int = 2) -> Any:
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance, ignored_layers=[model.head], in_channel_groups={}, out_channel_groups={}, num_heads={}
    )
    if isinstance(importance, tp.importance.OBDCImportance):
        with pytest.raises(TypeError):  # of groups without attention this method makes None
            importance._prepare_model(model, pruner)
        pruner._downstream_node_as_root_if_attention = lambda group: group
    importance._prepare_model(model, pruner)
    for seed in range(steps):
        torch.manual_seed(seed)
        y = torch.randint(0, 5, (len(x),))
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        importance.step()
    importance._rm_hooks(model)
    return pruner


@pytest.mark.filterwarnings("ignore")
def test_obdc_is_torch_prunings() -> None:
    found = []
    for kind in (ours.OBDCImportance, tp.importance.OBDCImportance):
        model = Watched()
        importance = kind(num_classes=5)
        pruner = watch(importance, model, IMAGE)
        groups = list(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers))
        found.append([importance(group) for group in groups])
        if kind is ours.OBDCImportance:
            fisher = {n: importance.Fisher[m] for n, m in model.named_modules() if m in importance.Fisher}
            plan = build_plan(model, IMAGE)
            scores = importance.score(bind(plan, model))
        else:
            for name, module in model.named_modules():
                if module in importance.modules:
                    torch.testing.assert_close(fisher[name], importance.Fisher[module])
    assert len(found[0]) == 3
    torch.testing.assert_close(found[0], found[1])
    for group, expected in zip(plan.groups, found[0], strict=True):
        torch.testing.assert_close(scores[group.start : group.stop], expected)


@pytest.mark.filterwarnings("ignore")
def test_obdc_with_biases() -> None:
    model = Watched(bias=True)
    importance = ours.OBDCImportance(bias=True, num_classes=5, normalizer=None)
    pruner = watch(importance, model, IMAGE, steps=1)
    torch.manual_seed(0)
    y = torch.randint(0, 5, (len(IMAGE),))
    squares = by_hand(model, IMAGE, y)
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
        layer = group[0].dep.target.module
        weight = (layer.weight.square() * squares[layer.weight]).flatten(1).sum(1) * len(IMAGE)
        bias = layer.bias.square() * squares[layer.bias] * len(IMAGE)
        torch.testing.assert_close(importance(group), ((weight + bias) / 2).detach(), rtol=1e-4, atol=1e-9)
    theirs = tp.importance.OBDCImportance(bias=True, num_classes=5)
    pruner = watch(theirs, Watched(bias=True), IMAGE, steps=1)
    with pytest.raises(RuntimeError):
        theirs(next(pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular", bias=False),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(4, 6, 3),
        nn.Conv3d(4, 6, 2),
        nn.Linear(4, 6),
    ],
)
def test_gradients_of_single_samples(layer: nn.Module) -> None:
    from pat_fast.torch_pruning._fisher import sample_gradients

    dims = {nn.Conv1d: (7,), nn.Conv3d: (4, 5, 3), nn.Linear: ()}.get(type(layer), (7, 6))
    x = torch.randn(3, *(4, *dims) if dims else (5, 4))
    seen: list[Tensor] = []
    out = layer(x)
    out.register_hook(seen.append)
    (out * torch.randn_like(out)).sum().backward()
    whole = [p.grad.clone() for p in layer.parameters()]
    parts = sample_gradients(layer, x, seen[0])
    for part, expected in zip(parts, whole, strict=True):
        assert part.shape == (3, *expected.shape)
        torch.testing.assert_close(part.sum(0), expected, rtol=1e-4, atol=1e-5)
    layer.zero_grad()
    out = layer(x[:1])
    out.backward(seen[0][:1])
    torch.testing.assert_close(parts[0][0], layer.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "left"), [(ours.OBDCImportance, 1), (tp.importance.OBDCImportance, 0)])
def test_obdc_removes_its_own_hooks(kind: Any, left: int) -> None:
    model, calls = Watched(), []
    model.one.register_forward_pre_hook(lambda *_: calls.append(1))
    watch(kind(num_classes=5), model, IMAGE, steps=1)
    calls.clear()
    model(IMAGE)
    assert len(calls) == left
    assert not model.two._forward_hooks
    assert not model.two._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
def test_obdc_after_torch_prunings_own_prune() -> None:
    model = Watched(bias=True)
    importance = ours.OBDCImportance(bias=True, num_classes=5, normalizer=None)
    pruner = watch(importance, model, IMAGE, steps=1)
    group = pruner.DG.get_pruning_group(model.one, tp.prune_conv_out_channels, list(range(6)))
    before = {m: f.clone() for m, f in importance.Fisher.items()}
    importance.adjust_fisher(group, [1, 4])
    pruner.DG.get_pruning_group(model.one, tp.prune_conv_out_channels, [1, 4]).prune()
    left = [0, 2, 3, 5]
    after = importance.Fisher
    torch.testing.assert_close(after[model.one], before[model.one][left])
    rows = before[model.two][:, :-1].view(8, 6, 9)[:, left].flatten(1)
    torch.testing.assert_close(after[model.two], torch.cat([rows, before[model.two][:, -1:]], 1))
    for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers):
        assert importance(group).isfinite().all()


# In a pruner of the drop-in


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("kind", ["HessianImportance", "OBDCImportance"])
def test_what_was_gathered_goes_along_with_the_steps_of_a_pruner(kind: str, interactive: bool) -> None:
    model = Watched()
    importance = getattr(ours, kind)(**({"num_classes": 5} if kind == "OBDCImportance" else {}))
    pruner = dropin.pruner.BasePruner(
        model, IMAGE, importance, ignored_layers=[model.head], iterative_steps=2, global_pruning=True
    )
    if kind == "OBDCImportance":
        importance._prepare_model(model, pruner)
    for _ in range(2):
        model.zero_grad()
        nn.functional.cross_entropy(model(IMAGE), torch.tensor([0, 3])).backward()
        importance.step() if kind == "OBDCImportance" else importance.accumulate_grad(model)
    weight, before = model.two.weight, importance.accumulators[0].state[model.two.weight]["sum"].clone()
    for _ in range(2):
        groups = pruner.step(interactive=interactive)
        for group in groups or ():
            group.prune()
    assert model.one.out_channels + model.two.out_channels + model.three.out_features == 10  # of 21
    state = importance.accumulators[0].state
    assert all(entry["sum"].shape == p.shape for p, entry in state.items())
    assert weight is model.two.weight
    left = state[weight]["sum"]
    assert len(left) < len(before)
    assert all(any(torch.isin(row, old).all() for old in before) for row in left)  # each is a part of one before
