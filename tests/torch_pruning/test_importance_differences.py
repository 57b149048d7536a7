"""Where Torch-Pruning's importances are wrong: its result, and ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from pat_fast import ConfigError, PatError
from pat_fast.plan import bind, build_plan
from pat_fast.torch_pruning import importance as ours
from pat_fast.torch_pruning.engine.scoring import scores_plans
from tests.helpers import Small, small_inputs
from tests.torch_pruning.groups import IMAGE, chain, groups_of, members, norm_chain, one_group, randomize_grads_


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


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
