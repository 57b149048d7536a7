"""Where Torch-Pruning's pruner is wrong: its result and ours. The list is ``docs/differences.md``."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn
from torch.nn import functional as F

import pat_fast.torch_pruning as tp
from benchmarks import zoo
from pat_fast.plan import bind
from tests.torch_pruning.against import build, quiet
from tests.torch_pruning.nets import Net, X, both, make


def test_default_dicts_are_not_shared() -> None:
    made: dict[str, bool] = {}
    for name, library in (("theirs", original), ("ours", tp)):
        first = make(library, Net(groups=4))
        made[name] = make(library, Net()).out_channel_groups is first.out_channel_groups
        first.out_channel_groups.clear()
        first.in_channel_groups.clear()
    assert made == {"theirs": True, "ours": False}


def test_types_in_ignored_layers() -> None:
    theirs, ours = both(Net(), ignored_layers=[nn.Linear])
    assert theirs.fc.out_features == 5
    assert ours.fc.out_features == 10
    assert ours.conv1.out_channels == 8


def test_manual_prune_width_takes_the_ratio_that_goes() -> None:
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = Net()
        pruner = make(library, model)
        pruner.manual_prune_width(model.conv1, library.prune_conv_out_channels, 0.25)
        left[name] = model.conv1.out_channels
    assert left == {"theirs": 4, "ours": 12}


@pytest.mark.parametrize("globally", [False, True])
def test_max_pruning_ratio(globally: bool) -> None:
    model = Net()
    with torch.no_grad():
        model.conv1.weight.mul_(torch.linspace(0.1, 1.0, 16).view(-1, 1, 1, 1))
    theirs, ours = both(model, pruning_ratio=0.9, max_pruning_ratio=0.5, global_pruning=globally)
    assert theirs.conv1.out_channels < 8
    assert ours.conv1.out_channels == ours.conv2.out_channels == 8


def test_tied_scores_are_pruned_as_far_as_asked_for() -> None:
    model = Net()
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    theirs, ours = both(model, global_pruning=True)
    assert (theirs.conv1.out_channels, theirs.conv2.out_channels) == (16, 16)
    assert (ours.conv1.out_channels, ours.conv2.out_channels) == (8, 8)


def test_round_to_leaves_one_multiple() -> None:
    theirs, ours = both(Net(width=12), pruning_ratio=0.5, round_to=8)
    assert theirs.conv1.out_channels == 12  # 6 rounds down to 0, and the group is skipped
    assert ours.conv1.out_channels == 8


def test_round_to_wider_than_the_layer_is_said() -> None:
    model = Net(width=6)
    pruner = make(tp, model, round_to=8)
    with pytest.warns(UserWarning, match="conv1: it has 6 channels, and cannot be pruned to a multiple of 8"):
        pruner.step()
    assert model.conv1.out_channels == 6


def test_round_to_counts_channels_of_all_blocks() -> None:
    theirs, ours = both(Net(width=32, groups=4), pruning_ratio=0.25, round_to=8)
    assert theirs.conv1.out_channels == 32  # 2 of 8 dimensions a block were rounded as if they were 2 of 32 channels
    assert ours.conv1.out_channels == ours.conv2.in_channels == 24
    assert ours(X).shape == (2, 10)


@pytest.mark.parametrize("globally", [False, True])
def test_kernels_that_need_a_multiple_get_it(globally: bool) -> None:
    """Torch-Pruning does not know of such kernels: the forward fails after its step."""
    model = Net(width=24)
    pruner = make(tp, model, pruning_ratio=0.6, global_pruning=globally)
    plan = pruner.engine.plan
    groups = tuple(replace(g, multiple=8) if g.root == "conv1" else g for g in plan.groups)
    pruner.engine._set(bind(replace(plan, groups=groups), model))
    pruner.step()
    assert model.conv1.out_channels == 8  # 10 asked for
    assert model(X).shape == (2, 10)


class TwoHeads(nn.Module):
    """An attention whose output projection is the root of its own group, as in a model without residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.o = nn.Linear(16, 20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc(self.o(y).mean(1))


def test_an_attention_and_its_reader_are_two_scopes() -> None:
    model = TwoHeads()
    heads = lambda m: {m.q: 2, m.k: 2, m.v: 2}  # noqa: E731
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        own = copy.deepcopy(model)
        pruner = make(
            library, own, torch.randn(2, 3, 12), num_heads=heads(own), in_channel_groups={}, out_channel_groups={}
        )
        pruner.step()
        left[name] = own.q.out_features, own.o.out_features
    assert left == {"theirs": (8, 20), "ours": (8, 10)} or left == {"theirs": (16, 10), "ours": (8, 10)}


def vit() -> tuple[nn.Module, Any]:
    entry = zoo.ZOO["vit_s16"]
    return zoo.randomize_(entry.small(), 0).eval(), entry.example(True)


def test_heads_without_channels() -> None:
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model, inputs = vit()
        pruner = build(library, model, inputs, {
            "pruning_ratio": 0.0, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5
        })  # fmt: skip
        with quiet():
            pruner.step()
        left[name] = model.blocks[0].attn.q.out_features
    assert left == {"theirs": 24, "ours": 8}  # of three heads of eight


def test_head_ratios_do_not_add_up() -> None:
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        torch.manual_seed(0)
        model = zoo.ViT(image=32, patch=8, dim=36, depth=1, num_heads=8, head_dim=4, hidden=52, num_classes=10).eval()
        pruner = build(library, model, (torch.randn(1, 3, 32, 32),), {
            "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5, "iterative_steps": 5
        })  # fmt: skip
        with quiet():
            for _ in range(5):
                pruner.step()
        left[name] = pruner.num_heads[model.blocks[0].attn.q]
    assert left["theirs"] < 4
    assert left["ours"] == 4


class GroupedQueries(nn.Module):
    """Four query heads, two key-value heads, repeated as in transformers."""

    def __init__(self, dim: int = 16, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.embed = nn.Linear(6, dim)
        self.q = nn.Linear(dim, 4 * head_dim)
        self.k, self.v = (nn.Linear(dim, 2 * head_dim) for _ in range(2))
        self.o = nn.Linear(4 * head_dim, dim)
        self.fc = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        times = q.shape[1] // k.shape[1]
        k, v = (
            t[:, :, None].expand(b, t.shape[1], times, n, self.head_dim).reshape(b, -1, n, self.head_dim)
            for t in (k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.fc((x + self.o(y)).mean(1))


@pytest.mark.parametrize("globally", [False, True])
def test_grouped_queries_go_with_their_keys_and_values(globally: bool) -> None:
    """A query head cannot be told from its fellows in the plan: a key-value head goes with all of its queries."""
    torch.manual_seed(0)
    model = GroupedQueries()
    inputs = torch.randn(2, 3, 6)
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        own = copy.deepcopy(model)
        pruner = make(
            library, own, inputs, num_heads={own.q: 4, own.k: 2, own.v: 2}, pruning_ratio=0.25, prune_num_heads=True,
            prune_head_dims=False, head_pruning_ratio=0.5, global_pruning=globally, in_channel_groups={},
            out_channel_groups={},
        )  # fmt: skip
        with quiet():
            pruner.step()
        left[name] = own.q.out_features, own.k.out_features, own.v.out_features, own.o.in_features
        assert own(inputs).shape == (2, 5)
    assert left == {"theirs": (16, 8, 8, 16), "ours": (8, 4, 4, 8)}
    assert pruner.num_heads == {own.q: 2, own.k: 1, own.v: 1}


class Rotary(GroupedQueries):
    """With a rotary embedding, whose pairs of queries and keys are channels that values do not have."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(n).view(n, 1) * torch.ones(self.head_dim)
        q, k = (t * angle.cos() + torch.cat([-t[..., 2:], t[..., :2]], -1) * angle.sin() for t in (q, k))
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.fc((x + self.o(y)).mean(1))


def rotary(**arguments: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Rotary()
    heads = {model.q: 4, model.k: 2, model.v: 2}
    return model, tp.pruner.BasePruner(
        model, torch.randn(2, 3, 6), tp.importance.MagnitudeImportance(), ignored_layers=[model.fc], num_heads=heads,
        **arguments,
    )  # fmt: skip


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("globally", [False, True])
def test_heads_with_rotary_embeddings_go_by_the_head_ratio(globally: bool, interactive: bool) -> None:
    model, pruner = rotary(
        pruning_ratio=0.0, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5, global_pruning=globally
    )
    with torch.no_grad():
        for layer in (model.q, model.k, model.v):  # the first head matters least
            layer.weight[: layer.out_features // 2].mul_(0.1)
    kept = model.v.weight.detach()[4:].clone()
    for group in pruner.step(interactive=True) if interactive else (pruner.step(), ())[1]:
        group.prune()
    sizes = (model.q.out_features, model.k.out_features, model.v.out_features, model.o.in_features)
    assert sizes == (8, 4, 4, 8)
    assert model.embed.out_features == 16
    assert pruner.num_heads == {model.q: 2, model.k: 1, model.v: 1}
    assert torch.equal(model.v.weight, kept)
    assert model(torch.randn(2, 3, 6)).shape == (2, 5)


def test_whole_heads_stay_unless_heads_are_pruned() -> None:
    with pytest.warns(UserWarning, match="num_heads: q: its heads go whole .* prune_num_heads=True"):
        model, pruner = rotary(pruning_ratio=0.5)
    pruner.step()
    assert (model.q.out_features, model.k.out_features, model.embed.out_features) == (16, 8, 8)
    assert pruner.num_heads == {model.q: 4, model.k: 2, model.v: 2}


def test_heads_that_cannot_go_are_said() -> None:
    class Fixed(GroupedQueries):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.q(self.embed(x))[:, 0, :5]

    torch.manual_seed(0)
    model = Fixed()
    arguments = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "num_heads": {model.q: 4, model.k: 2, model.v: 2}}
    with pytest.warns(UserWarning, match="num_heads: q: its heads stay as they are: a slice"):
        tp.pruner.BasePruner(
            model, torch.randn(2, 3, 6), tp.importance.MagnitudeImportance(), ignored_layers=[model.fc], **arguments
        )


class Chain(nn.Module):
    """Layers of which the second and third have the same structure around them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.first, self.second, self.fc = (
            nn.Linear(4, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.enter(x).relu()).relu()).relu())


def test_isomorphic_without_global() -> None:
    """Layers of a scope are ranked together, as isomorphic pruning is meant."""
    model = Chain()
    with torch.no_grad():
        for layer, low in ((model.first, 0.1), (model.second, 0.5), (model.enter, 0.2)):
            layer.weight.copy_(torch.linspace(low, 1.0, 8).view(-1, 1).expand_as(layer.weight))
    arguments = {
        "isomorphic": True,
        "importance": original.importance.MagnitudeImportance(group_reduction="first", normalizer=None),
    }
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        own = copy.deepcopy(model)
        pruner = make(library, own, torch.randn(2, 4), in_channel_groups={}, out_channel_groups={}, **arguments)
        try:
            pruner.step()
            own(torch.randn(2, 4))
            left[name] = sum(layer.out_features for layer in (own.enter, own.first, own.second))
        except RuntimeError:
            left[name] = -1
    assert left["ours"] == 12
    assert left["theirs"] != 12


def test_grouped_convolutions_keep_two_channels_a_group() -> None:
    """With one it would become depthwise, whose groups go as a whole: another structure than was planned."""
    theirs, ours = both(Net(width=16, groups=4), pruning_ratio=0.75)
    assert theirs.conv2.out_channels == theirs.conv2.groups == 4
    assert (ours.conv2.out_channels, ours.conv2.groups) == (8, 4)


def test_group_norms_keep_two_channels_a_group() -> None:
    """With one, all that is not an image is its own mean, and comes out as zero."""
    theirs, ours = both(Net(norm=lambda width: nn.GroupNorm(4, width)), pruning_ratio=0.75)
    assert theirs.conv2.out_channels == 4
    assert ours.conv2.out_channels == 8


class Spanning(nn.Module):
    """Four groups of a norm over 16 and 8 channels: the third has channels of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1)
        self.norm, self.fc = nn.GroupNorm(4, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.norm(torch.cat([self.first(x), self.second(x)], 1)).relu().mean((2, 3)))
        return out


def test_groups_of_a_norm_that_span_a_concatenation() -> None:
    model = Spanning()
    theirs, ours = both(model, pruning_ratio=0.25)
    rows = torch.cat([model.first.weight, model.second.weight])[:, :, 0, 0]

    def group_of(weights: Tensor) -> list[int]:
        return [int((rows == row).all(1).nonzero()) // 6 for row in weights[:, :, 0, 0]]

    kept = {n: [*group_of(m.first.weight), *group_of(m.second.weight)] for n, m in (("ours", ours), ("theirs", theirs))}
    counts = {name: [groups.count(g) for g in range(4)] for name, groups in kept.items()}
    assert counts["ours"] == [len(kept["ours"]) // 4] * 4
    assert len(set(counts["theirs"])) > 1


def test_groups_without_anything_to_remove_are_not_noted() -> None:
    noted = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = Net()
        with torch.no_grad():
            model.conv1.weight.mul_(10)  # without a normaliser all that goes is of the second layer
        importance = library.importance.MagnitudeImportance(normalizer=None)
        pruner = make(library, model, global_pruning=True, pruning_ratio=0.25, importance=importance,
                      in_channel_groups={}, out_channel_groups={})  # fmt: skip
        yielded = len(list(pruner.step(interactive=True)))
        noted[name] = yielded
        assert model.conv2.out_channels == 16
    assert noted == {"theirs": 2, "ours": 1}


def test_one_synchronisation_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that makes Python wait for a device reads values of tensors."""
    read: list[str] = []
    for method in ("tolist", "item", "nonzero", "__bool__", "cpu"):
        own = getattr(Tensor, method)
        monkeypatch.setattr(Tensor, method, lambda t, *a, _m=method, _own=own: (read.append(_m), _own(t, *a))[1])
    counts: dict[str, list[int]] = {"theirs": [], "ours": []}
    for name, library in (("theirs", original), ("ours", tp)):
        for layers in (3, 9):
            model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(layers)), nn.Linear(12, 3))
            pruner = make(library, model, torch.randn(2, 12), in_channel_groups={}, out_channel_groups={})
            read.clear()
            pruner.step()
            counts[name].append(len(read))
    assert counts["theirs"][1] - counts["theirs"][0] >= 6
    assert counts["ours"][0] == counts["ours"][1]
