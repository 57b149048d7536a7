"""The drop-in's importances: on groups against Torch-Pruning's, on plans against those on groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.cases import Subject
from benchmarks.zoo import ZOO
from pat_fast.backends import shortcut
from pat_fast.criteria import NORMALIZERS, REDUCTIONS
from pat_fast.ops.grouped import channel_totals
from pat_fast.plan import bind, build_plan
from pat_fast.torch_pruning import _magnitude
from pat_fast.torch_pruning import importance as ours
from pat_fast.torch_pruning._groups import is_depthwise
from tests.helpers import Case
from tests.torch_pruning.groups import close, plan_of, randomize_grads_
from tests.torch_pruning.nets import Net, X

NORMALIZERS_ = [*(n for n in NORMALIZERS if n != "sentinel"), "sentinel_0.3", None]
# Torch-Pruning cannot trace the channel shuffle (ZeroDivisionError), and takes a row of an LSTM for a hidden unit, of
# which each has four.
MODELS = [name for name in ZOO if name not in ("shufflenet_v2", "tagger")]
# Groups of Torch-Pruning that no group of ours equals. The channels of attention: it couples q, k, v and the
# projection index by index, the plan knows heads. A split: it couples both halves. A depth multiplier: it has no
# notion of it, and indexes out of range.
UNMATCHED = {
    "vit_s16": {"blocks.0.attn.v", "blocks.1.attn.v"},
    "vit_s16_fused": {"blocks.0.attn.qkv", "blocks.1.attn.qkv"},
    "shuffle_plain": {"stages.1.branch2.2.0", "stages.2.branch2.2.0", "stages.4.branch2.2.0"},
    "depth_multiplier": {"features.0", "features.3", "features.6", "features.9", "features.12", "features.15"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@cache
def subject(name: str) -> Subject:
    found = Subject(name, small=True)
    found.model.double()
    randomize_grads_(found.model)
    return found


def doubled(values: Tensor) -> Tensor:
    return 2 * values


def spread(rows: Tensor) -> Tensor:
    return rows.amax(0) - rows[0] + rows[-1]


def configurations() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"group_reduction": r, "normalizer": n} for r in REDUCTIONS for n in NORMALIZERS_]
    found += [{"group_reduction": spread, "normalizer": n} for n in ("mean", doubled)]
    return [*found, {"group_reduction": "mean", "normalizer": doubled}]


KINDS: dict[str, Callable[..., Any]] = {
    "magnitude": ours.MagnitudeImportance,
    "magnitude_p1_bias": lambda **kw: ours.GroupMagnitudeImportance(p=1, bias=True, **kw),
    "bn_scale": ours.BNScaleImportance,
    "fpgm": ours.FPGMImportance,
    "taylor": ours.TaylorImportance,
    "taylor_multivariable_bias": lambda **kw: ours.GroupTaylorImportance(multivariable=True, bias=True, **kw),
    "hessian_bias": lambda **kw: ours.GroupHessianImportance(bias=True, **kw),
}


def chosen(kind: str) -> list[dict[str, Any]]:
    """Every reduction with every normaliser for one kind; each once for the plain one; a few for the others."""
    if kind == "magnitude_p1_bias":
        return configurations()
    reductions = REDUCTIONS if kind == "magnitude" else ("mean", "max", "first")
    normalizers = NORMALIZERS_ if kind == "magnitude" else ("lamp", None)
    found = [{"group_reduction": r, "normalizer": "mean"} for r in reductions]
    return found + [{"group_reduction": "mean", "normalizer": n} for n in normalizers]


@pytest.mark.parametrize("name", MODELS)
def test_only_named_groups_are_not_compared(name: str) -> None:
    assert set(subject(name).unmatched) == UNMATCHED.get(name, set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_scores_as_its_groups_do(name: str, kind: str) -> None:
    both = subject(name)
    order = ours.member_order(both.binding, both.tp_groups)
    for how in chosen(kind):
        importance = KINDS[kind](**how)
        scores = importance.score(both.binding, order)
        for match in both.matches:
            mine, single = scores[match.start : match.stop], importance(match.group)
            if single is None:
                assert mine.isnan().all()
            else:
                close(mine, single[match.order], f"{kind} {how} {match.root}", 1e-7, 1e-9)


# Of a depth multiplier, Torch-Pruning puts one index into two groups.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in MODELS if n != "depth_multiplier"])
def test_every_group_of_torch_pruning_as_a_plan(name: str, kind: str) -> None:
    """The same without exceptions: a plan that is made of Torch-Pruning's groups, attention and all."""
    both = subject(name)
    binding = bind(plan_of(both.tp_groups, both.model), both.model)
    order = {i: list(group.members) for i, group in enumerate(binding.plan.groups)}
    for how in chosen(kind):
        importance = KINDS[kind](**how)
        scores = importance.score(binding, order)
        for group, theirs in zip(binding.plan.groups, both.tp_groups, strict=True):
            mine, single = scores[group.start : group.stop], importance(theirs)
            if single is None:
                assert mine.isnan().all()
            else:
                close(mine, single, f"{kind} {how} {group.root}", 1e-7, 1e-9)


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "magnitude": (ours.MagnitudeImportance, tp.importance.MagnitudeImportance),
    "magnitude_p1_bias": (
        lambda **kw: ours.GroupMagnitudeImportance(p=1, bias=True, **kw),
        lambda **kw: tp.importance.GroupMagnitudeImportance(p=1, bias=True, **kw),
    ),
    "bn_scale": (ours.BNScaleImportance, tp.importance.BNScaleImportance),
    "fpgm": (ours.FPGMImportance, tp.importance.FPGMImportance),
    "taylor": (
        lambda **kw: ours.TaylorImportance(target_types=WITHOUT_BATCH_NORM, **kw),
        lambda **kw: tp.importance.TaylorImportance(target_types=WITHOUT_BATCH_NORM, **kw),
    ),
    "taylor_multivariable_bias": (
        lambda **kw: ours.TaylorImportance(multivariable=True, bias=True, target_types=WITHOUT_BATCH_NORM, **kw),
        lambda **kw: tp.importance.TaylorImportance(
            multivariable=True, bias=True, target_types=WITHOUT_BATCH_NORM, **kw
        ),
    ),
    "hessian": (ours.HessianImportance, tp.importance.HessianImportance),
}
WITHOUT_BATCH_NORM = [nn.modules.conv._ConvNd, nn.Linear, nn.LayerNorm]


def wrong_in_torch_pruning(group: Any, how: dict[str, Any], kind: str) -> str | None:
    """Why Torch-Pruning's score of this group is not right; each reason has a test of its own below."""
    layers = [item.dep.target.module for item in group]
    repeated = any(
        len(set(item.root_idxs)) < len(item.idxs) for item in group if hasattr(item.dep.target.module, "weight")
    )
    grouped = any(isinstance(m, nn.modules.conv._ConvNd) and m.groups > 1 for m in layers)
    if kind != "bn_scale" and any(is_depthwise(m) for m in layers):
        return "depthwise"
    if repeated and how["group_reduction"] in ("max", "prod", "first", "gate", None):
        return "repeats"
    if how["group_reduction"] is None and str(how["normalizer"]).startswith("sentinel"):
        return "sentinel of several members at once"
    if grouped and kind == "fpgm":
        return "fpgm of grouped convolutions"
    if grouped and how["normalizer"] == "lamp" and how["group_reduction"] in ("max", "gate", None):
        return "ties are ranked at random"
    if how["group_reduction"] is None and how["normalizer"] == "lamp":
        return "lamp of several members at once fails in float64"
    sizes = {len(item.idxs) for item in group if hasattr(item.dep.target.module, "weight")}
    if how["group_reduction"] is None and len(sizes) > 1:
        return "members of unequal length are stacked"
    return None


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", MODELS)
def test_groups_score_as_torch_prunings(name: str, kind: str) -> None:
    both = subject(name)
    ours_, theirs = PAIRS[kind]
    compared = 0
    hows = [{"group_reduction": r, "normalizer": n} for r in (*REDUCTIONS, None) for n in NORMALIZERS_]
    for how in hows if kind == "magnitude_p1_bias" else [*chosen(kind), {"group_reduction": None, "normalizer": None}]:
        mine, other = ours_(**how), theirs(**how)
        for group in both.tp_groups:
            if wrong_in_torch_pruning(group, how, kind) is None:
                expected, found = other(group), mine(group)
                assert (found is None) == (expected is None)
                if found is not None:
                    # Torch-Pruning subtracts in float32 whatever the model's dtype is.
                    atol = 3e-5 if how["normalizer"] in ("gaussian", "standarization") else 0
                    close(found, expected, f"{kind} {how} {group[0].dep.target.name}", 1e-5, atol)
                    compared += 1
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in both.model.modules())
    assert compared or name == "depth_multiplier" or (kind == "bn_scale" and not norms)


@pytest.mark.parametrize("name", ["vit_s16", "vit_s16_fused"])
def test_heads_score_as_torch_prunings(name: str) -> None:
    """The plan has q and k, and v and the projection, as channels of their own; the mean over a head is the same."""
    both = subject(name)
    binding = both.binding
    for how in ({"group_reduction": "mean"}, {"group_reduction": "sum"}):
        scores = ours.MagnitudeImportance(**how).score(binding)
        theirs = tp.importance.MagnitudeImportance(**how)
        for group in both.tp_groups:
            root = group[0].dep.target.name.split(" ")[0]
            if root in UNMATCHED[name]:
                own = next(g for g in binding.plan.groups if g.root == root)
                unit = torch.from_numpy(binding.plan.unit[own.start : own.stop].astype("int64"))
                unit = unit - unit.min()
                heads = torch.zeros(3, dtype=scores.dtype).index_add_(0, unit, scores[own.start : own.stop])
                close(heads / unit.bincount(), head_means(theirs(group), group), f"{name} {root} {how}", 1e-5)


def test_a_class_may_override_reduce_with_torch_prunings_signature() -> None:
    model = Net()
    graph = tp.DependencyGraph().build_dependency(model, X)
    group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, list(range(16)))
    scores = []
    for base in (tp.importance.GroupMagnitudeImportance, ours.GroupMagnitudeImportance):

        class Squared(base):  # type: ignore[misc, valid-type]
            def _reduce(self, group_imp: Any, group_idxs: Any) -> Tensor:
                return super()._reduce(group_imp, group_idxs).square()

        scores.append(Squared()(group))
    torch.testing.assert_close(*scores)


def head_means(scores: Tensor, group: Any) -> Tensor:
    """The mean of each of three heads; of a fused projection the thirds are those of q, k and v."""
    thirds = scores.view(3, 3, -1) if len(scores) == 3 * group_width(group) else scores.view(1, 3, -1)
    return thirds.mean((0, 2))


def group_width(group: Any) -> int:
    """Inputs of the projection."""
    return min(len(item.idxs) for item in group if isinstance(item.dep.target.module, nn.Linear))


@pytest.mark.skipif(shortcut("channel_totals", "cpu") is None, reason="the C++ kernels are not in use")
@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit_s16", "vgg16_bn", "resnext50", "googlenet"])
def test_scores_in_one_call_are_those_of_many(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where members share no index among blocks of a grouped convolution; there they are added up index by index."""
    case = Case.build(name, torch.float32)
    binding = bind(build_plan(case.model, case.inputs), case.model)
    seen: list[str] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return channel_totals(*args, **kwargs)

    monkeypatch.setattr(_magnitude, "channel_totals", counting)
    for importance in (ours.GroupMagnitudeImportance(p=1), ours.GroupMagnitudeImportance(group_reduction="sum")):
        got = importance.score(binding)
        with monkeypatch.context() as patch:
            patch.setattr(type(binding), "grouping", lambda self, key: None)
            torch.testing.assert_close(got, importance.score(binding), rtol=1e-6, atol=0)
    assert len(seen) == (0 if name == "resnext50" else 2)
