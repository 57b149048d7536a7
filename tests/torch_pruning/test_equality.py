"""Ten steps of the drop-in and of Torch-Pruning: the same channels go, and the weights that stay are bitwise equal.

Each has its own importance: the drop-in scores its whole plan at once. A choice may differ where Torch-Pruning's scores
are nearer to one another than 1e-6 (relative); such choices are counted and printed.

Torch-Pruning does not score depthwise convolutions, and the importances of the drop-in do. In models that have them
(``DEPTHWISE``) Torch-Pruning's pruner is given our importance, which scores its groups one by one: what is compared
there is everything but the score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import nn

import pat_fast.torch_pruning as tp
from benchmarks import zoo
from benchmarks.models.residual import resnext50
from pat_fast.criteria import GroupNorm
from tests.torch_pruning.against import Arguments, build, compare, quiet

MODELS = [
    "resnet18", "resnet50", "se_resnet18", "regnet_y_400mf", "vgg16_bn", "densenet121", "googlenet", "mobilenet_v2",
    "unet", "convnext_tiny", "vit_s16", "vit_s16_fused", "text",
]  # fmt: skip


def bert() -> tuple[nn.Module, Any, Arguments]:
    """transformers' BERT with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=72,
        max_position_embeddings=24, num_labels=5,
    )  # fmt: skip
    model = zoo.randomize_(transformers.BertForSequenceClassification(config), 0).eval()

    def arguments(m: Any) -> dict[str, Any]:
        layers = [layer.attention.self for layer in m.bert.encoder.layer]
        heads = {p: 3 for a in layers for p in (a.query, a.key, a.value)}
        return {"num_heads": heads, "output_transform": lambda out: out.logits.sum(), "ignored_layers": [m.classifier]}

    return model, {"input_ids": torch.randint(0, 60, (2, 9))}, arguments


def swin() -> tuple[nn.Module, Any, Arguments]:
    """transformers' Swin with random weights: its MLPs.

    Torch-Pruning skips its attention, and makes a model that does not run of its residual stream: see
    test_pruner_differences.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    model = zoo.randomize_(transformers.SwinForImageClassification(config), 0).eval()

    def arguments(m: Any) -> dict[str, Any]:
        held = ("fc1", "intermediate.dense")  # as versions of transformers call it
        layers = [(n, layer) for n, layer in m.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        return {
            "num_heads": {},
            "output_transform": lambda out: out.logits.sum(),
            "ignored_layers": [layer for name, layer in layers if not name.endswith(held)],
        }

    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}, arguments


WAYS: dict[str, dict[str, Any]] = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "local, round_to": {"round_to": 2},
    "cubic": {"iterative_pruning_ratio_scheduler": lambda r, n: [r * (1 - (1 - i / n) ** 3) for i in range(n + 1)]},
}


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Any, Arguments]]] = {"bert": bert, "swin": swin}


def small(name: str) -> tuple[nn.Module, Any]:
    entry = zoo.ZOO[name]
    torch.manual_seed(0)
    return zoo.randomize_(entry.small(), 0).eval(), entry.example(True)


DEPTHWISE = ("mobilenet_v2", "convnext_tiny")
QUICK = [
    ("resnet18", "global"), ("resnet50", "global"), ("vgg16_bn", "local"), ("densenet121", "local"),
    ("mobilenet_v2", "global"), ("regnet_y_400mf", "local, round_to"), ("convnext_tiny", "isomorphic"),
    ("vit_s16", "global"), ("swin", "global"), ("bert", "local"),
]  # fmt: skip


def every_way() -> Iterator[Any]:
    for name in [*MODELS, *TRANSFORMERS]:
        for way in WAYS:
            yield pytest.param(name, way, marks=() if (name, way) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "way"), list(every_way()))
def test_ten_steps(name: str, way: str) -> None:
    arguments = dict(WAYS[way])
    if (name, way) == ("regnet_y_400mf", "isomorphic"):
        arguments["pruning_ratio"] = 0.3  # beyond that Torch-Pruning makes it depthwise: test_pruner_differences
    theirs = {"importance": tp.importance.GroupMagnitudeImportance()} if name in DEPTHWISE else {}
    if name in TRANSFORMERS:
        model, inputs, more = TRANSFORMERS[name]()
        outcome = compare(model, inputs, 10, lambda m: {**more(m), **arguments})
    else:
        model, inputs = small(name)
        outcome = compare(model, inputs, 10, lambda _: arguments, theirs)
    assert outcome.steps == 10


@pytest.mark.parametrize("kind", ["local", "global"])
def test_ratios_of_single_layers(kind: str) -> None:
    model, inputs = small("resnet18")

    def arguments(m: Any) -> dict[str, Any]:
        own = {m.stem[0] if hasattr(m, "stem") else next(c for c in m.modules() if isinstance(c, nn.Conv2d)): 0.25}
        convs = [c for c in m.modules() if isinstance(c, nn.Conv2d)]
        own[(convs[5], convs[8])] = 0.7
        own[convs[3]] = 0.0
        return {"pruning_ratio_dict": own, "global_pruning": kind == "global", "max_pruning_ratio": 0.9}

    assert compare(model, inputs, 10, arguments).steps == 10


@pytest.mark.parametrize("kind", ["local", "global"])
def test_grouped_convolutions(kind: str) -> None:
    torch.manual_seed(0)
    model = resnext50(widths=(32, 48), depths=(2, 1), stem=20, groups=4, width_per_group=0.5, num_classes=10)
    model = zoo.randomize_(model, 0).eval()
    inputs = (torch.randn(2, 3, 32, 32),)
    assert compare(model, inputs, 10, lambda _: {"global_pruning": kind == "global"}).steps == 10


HEADS: dict[str, dict[str, Any]] = {
    "heads": {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5},
    "heads and dimensions": {"prune_num_heads": True, "head_pruning_ratio": 0.3},
    "heads, globally": {
        "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5, "global_pruning": True
    },
    "neither": {"prune_head_dims": False},
}  # fmt: skip


@pytest.mark.parametrize("way", HEADS)
@pytest.mark.parametrize("name", ["vit_s16", "vit_s16_fused"])
def test_attention_heads(name: str, way: str) -> None:
    model, inputs = small(name)
    steps = (
        3 if "global" in way else 1
    )  # Torch-Pruning's local head ratios add up over steps: see test_pruner_differences
    outcome = compare(model, inputs, steps, lambda _: HEADS[way])
    assert outcome.steps == steps


IMPORTANCES: dict[str, Callable[[Any], Any]] = {
    "first": lambda lib: lib.importance.GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None),
    "max": lambda lib: lib.importance.GroupMagnitudeImportance(p=1, group_reduction="max", normalizer="max"),
    "gate": lambda lib: lib.importance.GroupMagnitudeImportance(group_reduction="gate"),
    "prod": lambda lib: lib.importance.GroupMagnitudeImportance(group_reduction="prod", normalizer="gaussian"),
    "batch norm": lambda lib: lib.importance.BNScaleImportance(),
    "LAMP": lambda lib: lib.importance.LAMPImportance(),
    "FPGM": lambda lib: lib.importance.FPGMImportance(),
    "Torch-Pruning's own": lambda _: original.importance.GroupMagnitudeImportance(),
    "a function": lambda _: lambda group: original.importance.GroupMagnitudeImportance()(group) + 1.0,
}


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_other_importances(kind: str) -> None:
    model, inputs = small("resnet18")
    make = IMPORTANCES[kind]
    ours = {"importance": make(tp), "global_pruning": True}
    outcome = compare(model, inputs, 5, lambda _: ours, {"importance": make(original)})
    assert outcome.steps == 5


@pytest.mark.parametrize("name", ["densenet121", "resnet18"])
def test_interactive_groups_are_those_of_torch_pruning(name: str) -> None:
    model, inputs = small(name)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    mine, its = build(tp, ours, inputs, {}), build(original, theirs, inputs, {})
    for got, expected in zip(mine.step(interactive=True), its.step(interactive=True), strict=True):
        assert isinstance(got, original.dependency.Group)
        names = [(mine.DG.name_of(d.target.module), d.handler.__name__) for d, _ in got if _is_layer(d)]
        assert names == [
            (its.DG._module2name[d.target.module], d.handler.__name__) for d, _ in expected if _is_layer(d)
        ]
        idxs = [sorted(i) for d, i in got if _is_layer(d)]
        assert idxs == [sorted(i) for d, i in expected if _is_layer(d)]
        assert got[0].root_idxs == expected[0].root_idxs
        got.prune()
        expected.prune()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def _is_layer(dep: Any) -> bool:
    return isinstance(dep.target.module, nn.Conv2d | nn.Linear | nn.BatchNorm2d)


def test_some_of_the_groups_pruned_interactively() -> None:
    model, inputs = small("densenet121")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    mine, its = build(tp, ours, inputs, {}), build(original, theirs, inputs, {})
    for number, (got, expected) in enumerate(zip(mine.step(interactive=True), its.step(interactive=True), strict=True)):
        if number % 3 == 0:
            got.prune()
            expected.prune()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_history_made_by_torch_pruning_is_redone() -> None:
    model, inputs = small("densenet121")
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    its = build(original, theirs, inputs, {"iterative_steps": 3, "global_pruning": True})
    with quiet():
        for _ in range(3):
            its.step()
    mine = build(tp, ours, inputs, {})
    mine.load_pruning_history([entry for entry in its.pruning_history() if entry[2]])
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["densenet121", "vit_s16"])
def test_a_history_is_redone(name: str) -> None:
    model, inputs = small(name)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    pruner = build(tp, first, inputs, {"iterative_steps": 3, "global_pruning": True})
    for _ in range(3):
        pruner.step()
    again = build(tp, second, inputs, {})
    again.load_pruning_history(pruner.pruning_history())
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert again.pruning_history() == pruner.pruning_history()


def test_manual_width_by_indices() -> None:
    model, inputs = small("resnet18")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    for library, m in ((tp, ours), (original, theirs)):
        conv = next(c for c in m.modules() if isinstance(c, nn.Conv2d))
        pruner = build(library, m, inputs, {})
        pruner.manual_prune_width(conv, library.prune_conv_out_channels, [1, 4, 5])
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


class Scorer:
    """An importance that scores whole plans; ``order`` is what it was given."""

    group_reduction: Any = "mean"
    order: Any = None

    def score(self, binding: Any, order: Any = None) -> torch.Tensor:
        self.order = order
        return GroupNorm(2.0).score(binding)

    def __call__(self, group: Any) -> torch.Tensor:
        raise AssertionError("a plan can be scored at once")


def test_plans_are_scored_at_once() -> None:
    model, inputs = small("resnet18")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    mine = build(tp, ours, inputs, {"importance": Scorer(), "global_pruning": True})
    its = build(original, theirs, inputs, {"global_pruning": True})
    with quiet():
        its.step()
    mine.step()
    assert mine.pruning_history() == [entry for entry in its.pruning_history() if entry[2]]
    assert mine.importance.order is None


def test_the_order_of_members_is_given_where_it_matters() -> None:
    model, inputs = small("resnet18")
    importance = Scorer()
    importance.group_reduction = "first"
    pruner = build(tp, model, inputs, {"importance": importance})
    pruner.step()
    names = {i: [member for member in order if member[0].endswith("weight")] for i, order in importance.order.items()}
    assert all(len(members) == len(set(members)) > 1 for members in names.values())
    assert all(members[0][1] == 0 for members in names.values())


def test_a_class_that_overrides_the_scores_of_groups_is_asked_for_groups() -> None:
    class Mine(Scorer):
        def __call__(self, group: Any) -> torch.Tensor:
            return original.importance.GroupMagnitudeImportance()(group)

        order = "not asked"

    model, inputs = small("resnet18")
    pruner = build(tp, model, inputs, {"importance": Mine()})
    pruner.step()
    assert pruner.importance.order == "not asked"
    assert pruner.pruning_history()


@pytest.mark.parametrize("kind", ["local", "global"])
def test_chance_chooses_alike_from_the_same_seed(kind: str) -> None:
    """Groups of layers that are ignored take no numbers from the generator."""
    kept = []
    for library in (original, tp):
        model, inputs = small("resnet18")
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
        pruner = library.pruner.MagnitudePruner(
            model, inputs, importance=library.importance.RandomImportance(), pruning_ratio=0.5, iterative_steps=2,
            global_pruning=kind == "global", ignored_layers=last,
        )  # fmt: skip
        torch.manual_seed(3)
        for _ in range(2):
            pruner.step()
        kept.append(dict(model.named_parameters()))
    assert all(torch.equal(kept[0][name], parameter) for name, parameter in kept[1].items())
