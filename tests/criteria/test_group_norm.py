"""Group magnitude against Torch-Pruning where that is right, and against float64 loops everywhere."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as unstructured

from benchmarks.cases import Subject
from pat_fast import ConfigError
from pat_fast.criteria import SCORED, GroupNorm
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.plan.types import is_grouped
from tests.helpers import Case, Small, is_weight, small_inputs

# Torch-Pruning gives a depthwise weight no score, and sums a grouped one's inputs over all groups.
RIGHT_IN_TORCH_PRUNING = (
    "resnet18", "resnet50", "se_resnet18", "vgg16_bn", "densenet121", "googlenet", "unet", "vit_s16",
    "vit_s16_fused", "text", "conv1d", "conv3d",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@cache
def subject(name: str) -> Subject:
    return Subject(name, small=True)


class Products(nn.Module):
    """A linear layer whose weight a module of one's own multiplies with, as GPT-2's does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


WEIGHTS: dict[str, Any] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": nn.utils.weight_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
    "a mask": lambda layer: unstructured.random_unstructured(layer, "weight", 0.2),
    "of no layer": lambda layer: Products(layer.in_features, layer.out_features),
}


@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weights_that_are_made_of_others_count(how: str) -> None:
    """Once their groups scored zero: they went first, in channel order, whatever they held."""
    torch.manual_seed(0)
    model = nn.Sequential(*(WEIGHTS[how](nn.Linear(a, b)) for a, b in ((6, 16), (16, 24), (24, 5))))
    model = nn.Sequential(model[0], nn.ReLU(), model[1], nn.ReLU(), model[2])
    with torch.no_grad():
        for parameter in model[2].parameters():  # the last outputs matter least
            dim = parameter.ndim - 1 if how == "of no layer" else 0
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            if parameter.shape[dim] == 24:
                parameter.mul_(torch.linspace(1.5, 0.1, 24).view(shape))
    binding = bind(build_plan(model, torch.randn(3, 6)), model)
    assert binding.plan.n_channels == 40
    scores = GroupNorm().score(binding)
    assert (scores > 0).all()
    group = next(g for g in binding.plan.groups if g.channels == 24)
    own = scores[group.start : group.stop]
    assert own[:8].mean() > 2 * own[-8:].mean()


def test_groups_in_which_nothing_counts_stay() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(7, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    model = Scaled()
    model.out.weight.requires_grad_(False)
    binding = bind(build_plan(model, torch.arange(6).view(2, 3)), model)
    assert GroupNorm().score(binding).isfinite().all()
    model.out = unscored(model.out)
    binding = bind(build_plan(model, torch.arange(6).view(2, 3)), model)
    assert GroupNorm().score(binding).isposinf().all()


def unscored(layer: nn.Linear) -> nn.Module:
    """``layer`` with a parametrization that no criterion knows."""

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    return nn.utils.parametrize.register_parametrization(layer, "weight", Double())


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", RIGHT_IN_TORCH_PRUNING)
def test_scores_are_torch_prunings(name: str, p: int) -> None:
    both = subject(name)
    # Torch-Pruning groups the channels of attention by its own settings, not by what the code does.
    assert {m.root for m in both.matches} == {g.root for g in both.plan.groups if "attn" not in g.root}
    scores = GroupNorm(p).score(both.binding)
    importance = tp.importance.GroupMagnitudeImportance(p=p)
    for match in both.matches:
        theirs = importance(match.group)[match.order]
        torch.testing.assert_close(scores[match.start : match.stop], theirs, rtol=1e-5, atol=0, msg=match.root)


def slow_scores(binding: Binding, p: float) -> Tensor:
    """The same, index by index in float64."""
    plan = binding.plan
    total = torch.zeros(plan.n_channels, dtype=torch.float64)
    members = torch.zeros(len(plan.groups), dtype=torch.float64)
    for tensor_map in plan.tensors:
        module, local = binding.owner(tensor_map.name)
        if not is_weight(local) or not isinstance(module, SCORED):
            continue
        weight = binding.tensors[tensor_map.name].detach().double()
        for axis in tensor_map.axes:
            for group in {int(plan.group_of[c]) for c in axis.channels if c >= 0}:
                members[group] += 1
            if is_grouped(tensor_map, axis):  # [groups, rows of a group, inputs, ...] -> [groups * inputs, ...]
                parts = weight.unflatten(0, (tensor_map.groups, -1)).movedim(1, -1).flatten(0, 1)
            else:
                parts = weight.movedim(axis.dim, 0)
            for channel, part in zip(axis.channels.tolist(), parts, strict=True):
                if channel >= 0:
                    total[channel] += part.abs().pow(p).sum()
    for number, group in enumerate(plan.groups):
        own = total[group.start : group.stop]
        own /= members[number].clamp_min(1)
        own /= own.mean() if own.mean() > 0 else 1
    return total


@pytest.mark.parametrize("p", [1, 2])
def test_scores_are_those_of_loops(case: Case, p: int) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    scores = GroupNorm(p).score(binding)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, slow_scores(binding, p), rtol=1e-10, atol=0)
    for group in binding.plan.groups:
        assert scores[group.start : group.stop].mean().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    model, x = Small().to(dtype), small_inputs(dtype=dtype)
    plan = build_plan(model, x)
    scores = GroupNorm(1).score(bind(plan, model))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), slow_scores(bind(plan, model), 1), rtol=1e-5, atol=0)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(GroupNorm(1).score(bind(plan, last)), scores, rtol=1e-5, atol=0)


def test_a_binding_follows_weights_that_are_laid_out_otherwise() -> None:
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    scores = [GroupNorm().score(binding) for _ in range(3)]
    model.to(memory_format=torch.channels_last)
    assert not model.inner.weight.is_contiguous()
    for _ in range(3):
        torch.testing.assert_close(GroupNorm().score(binding), scores[0], rtol=1e-5, atol=0)


def test_a_group_of_zeros_scores_zero_and_not_nan() -> None:
    model = Small()
    with torch.no_grad():
        model.inner.weight.zero_()
        model.outer.weight.zero_()
    plan = build_plan(model, small_inputs())
    scores = GroupNorm().score(bind(plan, model))
    inner = next(g for g in plan.groups if g.root == "inner")
    assert (scores[inner.start : inner.stop] == 0).all()
    assert scores.isfinite().all()


def test_a_group_without_scored_weights() -> None:
    """An embedding makes the channels and another reads none: nothing to go by, so all are equal."""
    model = nn.Sequential(nn.Embedding(7, 6), nn.GELU(), nn.Linear(6, 5), nn.Linear(5, 2))
    plan = build_plan(model, torch.arange(7))
    assert [g.root for g in plan.groups] == ["2", "0"] or [g.root for g in plan.groups] == ["0", "2"]
    scores = GroupNorm().score(bind(plan, model))
    torch.testing.assert_close(scores.double(), slow_scores(bind(plan, model), 2), rtol=1e-5, atol=0)


def test_scores_follow_the_weights_in_place() -> None:
    """The tile tables are made once, the weights are read at every call."""
    model = Small()
    binding = bind(build_plan(model, small_inputs()), model)
    before = GroupNorm().score(binding)
    with torch.no_grad():
        model.stem.weight[3] *= 10
        model.stem.weight.data = model.stem.weight.data.clone()  # other memory, the same layout
    after = GroupNorm().score(binding)
    outer = next(g for g in binding.plan.groups if g.root == "outer")
    assert after[outer.start + 3] > 2 * before[outer.start + 3]
    torch.testing.assert_close(after.double(), slow_scores(binding, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [0, -1, float("nan"), float("inf"), "2", None])
def test_exponents_that_make_no_sense(p: Any) -> None:
    with pytest.raises(ConfigError, match=rf"p: expected a positive number \(1 or 2, say\), got {p!r}"):
        GroupNorm(p)


def test_a_weight_of_a_subclass_counts_as_that_of_the_layer() -> None:
    """fully_shard makes a subclass of every layer; embeddings, which do not count, once did as such."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 3))
    x = torch.zeros(1, 4, dtype=torch.int64)
    expected = GroupNorm().score(bind(build_plan(model, x), model))
    model[0].__class__ = type("Own", (nn.Embedding,), {})
    assert torch.equal(GroupNorm().score(bind(build_plan(model, x), model)), expected)
