"""Where Torch-Pruning's importances are wrong: its result, and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from pat_fast import ConfigError, PatError, PlanError
from pat_fast.plan import bind, build_plan
from pat_fast.surgery import prune
from pat_fast.torch_pruning import importance as ours
from pat_fast.torch_pruning.engine.scoring import scores_plans
from tests.helpers import Small, random_keep, small_inputs
from tests.torch_pruning.groups import groups_of, randomize_grads_


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def chain(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def norm_chain() -> nn.Sequential:
    return chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))


def one_group(model: nn.Module, inputs: Any, root: nn.Module) -> Any:
    return next(g for g in groups_of(model, inputs) if g[0].dep.target.module is root)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def members(importance: Any, group: Any) -> Tensor:
    """Scores of each member: ``[members, channels]``."""
    importance.group_reduction, importance.normalizer = None, None
    return importance(group)


def test_taylor_counts_batch_norms() -> None:
    model = norm_chain()
    nn.init.normal_(model[1].weight)
    randomize_grads_(model)
    group = one_group(model, IMAGE, model[0])
    expected = (model[1].weight * model[1].weight.grad).abs()
    theirs, mine = members(tp.importance.TaylorImportance(), group), members(ours.TaylorImportance(), group)
    assert len(theirs) == 2  # the two convolutions
    assert len(mine) == 3
    torch.testing.assert_close(mine[1], expected.detach())
    torch.testing.assert_close(mine[[0, 2]], theirs)


def test_depthwise_convolutions_are_scored() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 3))
    group = next(g for g in groups_of(model, IMAGE) if len(g) > 2)
    expected = model[1].weight.detach().square().flatten(1).sum(1)
    theirs = tp.importance.MagnitudeImportance(group_reduction="sum", normalizer=None)(group)
    mine = ours.MagnitudeImportance(group_reduction="sum", normalizer=None)(group)
    torch.testing.assert_close(mine - theirs, expected)


@pytest.mark.parametrize("reduction", ["max", "prod", "first", "gate"])
def test_reductions_where_a_flatten_repeats_channels(reduction: str) -> None:
    """A linear layer behind a flatten is a convolution whose kernel covers the map: both score alike."""
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    group = one_group(model, IMAGE, model[0])
    model[3].weight.data *= 3
    outputs = model[0].weight.detach().square().flatten(1).sum(1)
    inputs = model[3].weight.detach().view(4, 6, 36).square().sum((0, 2))
    expected = {"max": torch.maximum(outputs, inputs), "prod": outputs * inputs, "first": outputs, "gate": inputs}
    how = {"group_reduction": reduction, "normalizer": None}
    torch.testing.assert_close(ours.MagnitudeImportance(**how)(group), expected[reduction])
    if reduction != "first":
        theirs = tp.importance.MagnitudeImportance(**how)(group)
        assert not torch.allclose(theirs, expected[reduction], rtol=0.1)
    plan = build_plan(model, IMAGE)
    score = ours.MagnitudeImportance(**how).score(bind(plan, model))
    torch.testing.assert_close(score[plan.groups[0].start : plan.groups[0].stop], expected[reduction])


@pytest.mark.parametrize("name", ["TaylorImportance", "HessianImportance"])
def test_indices_are_not_sorted_away_from_their_channels(name: str) -> None:
    """Torch-Pruning sorts a group's indices, in place, and not the channels that they belong to."""
    model = norm_chain()
    randomize_grads_(model)
    types = [nn.Conv2d]
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    shuffled = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [3, 1, 5, 0, 4, 2])
    whole = one_group(model, IMAGE, model[0])
    expected = getattr(ours, name)(target_types=types)(whole)
    found = getattr(ours, name)(target_types=types)(shuffled)
    torch.testing.assert_close(found, expected)
    assert list(shuffled[0][1]) == [3, 1, 5, 0, 4, 2]
    theirs = getattr(tp.importance, name)(target_types=types)(shuffled)
    assert list(shuffled[0][1]) == [0, 1, 2, 3, 4, 5]
    assert not torch.allclose(theirs, expected)


def test_a_few_channels_have_as_many_scores() -> None:
    """As Torch-Pruning's docstring says; it fails with an index out of bounds."""
    model = norm_chain()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    some = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [1, 2, 5])
    with pytest.raises(RuntimeError):
        tp.importance.MagnitudeImportance(normalizer=None)(some)
    whole = ours.MagnitudeImportance(normalizer=None)(one_group(model, IMAGE, model[0]))
    torch.testing.assert_close(ours.MagnitudeImportance(normalizer=None)(some), whole[[1, 2, 5]])


def test_scores_are_as_many_as_the_root_has_channels() -> None:
    """Where the first layer that is scored repeats the channels, Torch-Pruning gives a score to every repeat."""
    model = chain(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    group = one_group(model, IMAGE, model[0])
    how: dict[str, Any] = {"target_types": [nn.Linear], "normalizer": None}
    assert len(tp.importance.MagnitudeImportance(**how)(group)) == 6 * 36
    assert len(ours.MagnitudeImportance(**how)(group)) == 6


@pytest.mark.parametrize("normalizer", ["mean", "sum", "max", "lamp"])
def test_a_group_of_zeros_scores_zero(normalizer: str) -> None:
    model = norm_chain()
    for p in model.parameters():
        nn.init.zeros_(p)
    group = one_group(model, IMAGE, model[0])
    assert tp.importance.MagnitudeImportance(normalizer=normalizer)(group).isnan().any()
    assert (ours.MagnitudeImportance(normalizer=normalizer)(group) == 0).all()
    assert (ours.MagnitudeImportance(normalizer=normalizer).score(bind(build_plan(model, IMAGE), model)) == 0).all()


def test_inputs_of_grouped_convolutions_have_a_geometric_median() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, groups=2), nn.Conv2d(8, 4, 3))
    group = next(g for g in groups_of(model, IMAGE) if any(i.dep.target.module is model[0] for i in g))
    with pytest.raises(RuntimeError):
        tp.importance.FPGMImportance()(group)
    scores = ours.FPGMImportance(group_reduction="gate", normalizer=None)(group)
    assert scores.isfinite().all()
    assert (scores > 0).all()


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


# Activations


def test_activations_are_torch_prunings() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    groups = groups_of(model, small_inputs(), [model.head])
    found = []
    for importance in (ours.ActivationImportance(), tp.importance.ActivationImportance()):
        with importance.compute_importance(model):
            model(small_inputs())
        found.append([importance(group) for group in groups])
    torch.testing.assert_close(found[0], found[1])
    plan = build_plan(model, small_inputs())
    scores = ours.ActivationImportance().score(bind(plan, model))
    for group, expected in zip(groups, found[0], strict=True):
        name = next(n for n, m in model.named_modules() if m is group[0].dep.target.module)
        own = next(g for g in plan.groups if name in g.layers)
        torch.testing.assert_close(scores[own.start : own.stop], expected)


def test_activations_of_depthwise_convolutions_and_of_one_dimension() -> None:
    model = chain(nn.Conv1d(2, 6, 3), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 3))
    x = torch.randn(2, 2, 16)
    importance = ours.ActivationImportance(group_reduction="sum", normalizer=None)
    with importance.compute_importance(model):
        model(x)
    middle = model[0](x)
    expected = (middle.abs().mean((0, 2)) + model[1](middle).abs().mean((0, 2))).detach()
    group = next(g for g in groups_of(model, x) if len(g) > 2)
    torch.testing.assert_close(importance(group), expected)
    plan = build_plan(model, x)
    own = next(g for g in plan.groups if g.channels == 6)
    torch.testing.assert_close(importance.score(bind(plan, model))[own.start : own.stop], expected)


@pytest.mark.parametrize(("kind", "left"), [(ours.ActivationImportance, 0), (tp.importance.ActivationImportance, 1)])
def test_activation_hooks_go_even_if_a_forward_fails(kind: Any, left: int) -> None:
    model = norm_chain()
    with pytest.raises(RuntimeError), kind().compute_importance(model):
        model(torch.randn(2, 5, 8, 8))
    assert len(model[0]._forward_hooks) == left


# What is refused


def test_errors() -> None:
    model = norm_chain()
    group, binding = one_group(model, IMAGE, model[0]), bind(build_plan(model, IMAGE), model)
    for importance in (ours.TaylorImportance(), ours.OBDCImportance(), ours.ActivationImportance()):
        with pytest.raises(PatError, match=r"backward|activations"):
            importance.score(binding)
    with pytest.raises(PatError, match="this importance needs gradients"):
        ours.TaylorImportance()(group)
    with pytest.raises(PatError, match="nothing was gathered"):
        ours.OBDCImportance()(group)
    with pytest.raises(PatError, match="step\\(\\) found no gradients"):
        ours.OBDCImportance().step()
    with pytest.warns(UserWarning, match="has no _importance"):
        assert ours.ActivationImportance()(group) is None
    with pytest.raises(ConfigError, match="group_reduction=None keeps one score for each member"):
        ours.MagnitudeImportance(group_reduction=None).score(binding)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ours.MagnitudeImportance(p=0), "p: expected a positive number"),
        (lambda: ours.MagnitudeImportance(group_reduction="men"), "did you mean 'mean'"),
        (lambda: ours.MagnitudeImportance(normalizer="gausian"), "did you mean 'gaussian'"),
        (lambda: ours.MagnitudeImportance(normalizer="sentinel_1.5"), r"q in \[0, 1\)"),
        (lambda: ours.MagnitudeImportance(normalizer="sentinel"), r"q in \[0, 1\)"),
        (lambda: ours.MagnitudeImportance(target_types=["conv"]), "target_types: expected layer types"),
        (lambda: ours.LAMPImportance(normalizer="mean"), "normalizer: expected 'lamp'"),
        (lambda: ours.OBDCImportance(num_classes=-1), "num_classes"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_frozen_layers_do_not_count_for_taylor() -> None:
    model = norm_chain()
    model[0].weight.requires_grad_(False)
    model(IMAGE).square().sum().backward()
    group = one_group(model, IMAGE, model[0])
    with pytest.raises(AttributeError):
        tp.importance.TaylorImportance()(group)
    found = ours.TaylorImportance(group_reduction="sum", normalizer=None)(group)
    expected = (model[1].weight * model[1].weight.grad).abs()
    expected = expected + (model[3].weight * model[3].weight.grad).abs().sum((0, 2, 3))
    torch.testing.assert_close(found, expected.detach())
    plan = build_plan(model, IMAGE)
    score = ours.TaylorImportance(group_reduction="sum", normalizer=None).score(bind(plan, model))
    torch.testing.assert_close(score, expected.detach())


def test_groups_without_target_layers() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 2, 3))
    plan = build_plan(model, IMAGE)
    scores = ours.BNScaleImportance().score(bind(plan, model))
    for group in plan.groups:
        assert scores[group.start : group.stop].isnan().all() == (group.root != "0")
    assert ours.BNScaleImportance()(one_group(model, IMAGE, model[2])) is None


def test_the_same_seed_draws_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = Small()
    plan = build_plan(model, small_inputs())
    groups = groups_of(model, small_inputs(), [model.head])
    assert [g.root for g in plan.groups] == [
        next(n for n, m in model.named_modules() if m is g[0].dep.target.module) for g in groups
    ]
    torch.manual_seed(3)
    scores = ours.RandomImportance().score(bind(plan, model))
    torch.manual_seed(3)
    expected = torch.cat([tp.importance.RandomImportance()(g) for g in groups])
    assert torch.equal(scores, expected)
    torch.manual_seed(3)
    assert torch.equal(ours.RandomImportance()(groups[0]), expected[: len(groups[0][0][1])])


def test_a_users_own_class_is_scored_group_by_group() -> None:
    class Mine(ours.MagnitudeImportance):
        def __call__(self, group: Any) -> Tensor:
            found = self._reduce([torch.tensor([1.0, 2.0, 4.0])], [[0, 1, 1]])
            return self._normalize(found, "max")

    class Renamed(ours.MagnitudeImportance):
        pass

    torch.testing.assert_close(Mine()(None), torch.tensor([1 / 6, 1.0]))
    assert not scores_plans(Mine())
    assert not scores_plans(tp.importance.MagnitudeImportance())
    assert not scores_plans(lambda group: None)
    kinds = (getattr(ours, name) for name in ours.__all__ if name.endswith("Importance") and name != "Importance")
    assert all(scores_plans(kind()) for kind in kinds)
    assert scores_plans(Renamed())


def test_every_class_of_torch_pruning_is_there() -> None:
    base = tp.importance.Importance
    theirs = {n for n, c in vars(tp.importance).items() if isinstance(c, type) and issubclass(c, base)}
    assert theirs == {name for name in ours.__all__ if name.endswith("Importance")}
    for name in theirs - {"Importance"}:
        assert issubclass(getattr(ours, name), tp.importance.Importance)


def test_a_shared_weight_counts_once() -> None:
    """Torch-Pruning scores it for each layer that has it (and its surgery would part them)."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
            self.right.weight = self.left.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            return self.left(x) - self.right(x.tanh())

    model = Tied()
    x = torch.randn(2, 4)
    group = one_group(model, x, model.first)
    how: dict[str, Any] = {"group_reduction": "sum", "normalizer": None}
    once = model.first.weight.detach().square().sum(1) + model.left.weight.detach().square().sum(0)
    torch.testing.assert_close(ours.MagnitudeImportance(**how)(group), once)
    torch.testing.assert_close(ours.MagnitudeImportance(**how).score(bind(build_plan(model, x), model)), once)
    assert (tp.importance.MagnitudeImportance(**how)(group) > once).all()


def test_any_norm_counts_if_it_is_named() -> None:
    model = chain(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 4, 3))
    nn.init.normal_(model[1].weight)
    nn.init.normal_(model[2].weight)
    group = one_group(model, IMAGE, model[0])
    types = [nn.GroupNorm, nn.InstanceNorm2d]
    how: dict[str, Any] = {"target_types": types, "normalizer": None, "group_reduction": "sum"}
    assert tp.importance.MagnitudeImportance(**how)(group) is None
    expected = (model[1].weight.square() + model[2].weight.square()).detach()
    torch.testing.assert_close(ours.MagnitudeImportance(**how)(group), expected)
    torch.testing.assert_close(ours.MagnitudeImportance(**how).score(bind(build_plan(model, IMAGE), model)), expected)
