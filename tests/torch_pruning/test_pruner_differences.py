"""Where Torch-Pruning 1.6.1 is wrong: its result and ours, side by side. The list is ``docs/differences.md``."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn
from torch.nn import functional as F
from torch_pruning.pruner import function

import pat_fast.torch_pruning as tp
from benchmarks import zoo
from tests.torch_pruning.against import build, last_linear, quiet

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions with norms and a classifier."""

    def __init__(self, width: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.norm2 = norm(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.fc(x.mean((2, 3)))


def make(library: Any, model: nn.Module, inputs: Any = X, kind: str = "BasePruner", **arguments: Any) -> Any:
    arguments = {
        "importance": library.importance.MagnitudeImportance(),
        "ignored_layers": [last_linear(model)],
        **arguments,
    }
    with quiet():
        return getattr(library.pruner, kind)(model, inputs, **arguments)


def both(model: nn.Module, **arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The model after one step of Torch-Pruning's and of the drop-in's pruner."""
    made = []
    for library in (original, tp):
        own = copy.deepcopy(model)
        more = {"in_channel_groups": {}, "out_channel_groups": {}, **arguments}
        with quiet():
            make(library, own, **more).step()
        made.append(own)
    return made[0], made[1]


# base_pruner.py


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


# function.py


def test_the_optimizer_lives() -> None:
    trained = {}
    for name, library in (("theirs", original), ("ours", tp)):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.Adam(model.parameters())
        model(X).sum().backward()
        optimizer.step()
        make(library, model, in_channel_groups={}, out_channel_groups={}).step()
        optimizer.zero_grad()
        model(X).sum().backward()
        before = copy.deepcopy(model.state_dict())
        optimizer.step()
        trained[name] = sum(not torch.equal(before[n], p) for n, p in model.named_parameters())
    assert trained["theirs"] <= 1  # the classifier's bias
    assert trained["ours"] == 10


def test_frozen_weights_stay_frozen_and_ties_tied() -> None:
    seen = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = Net()
        model.conv1.weight.requires_grad_(False)
        model.norm2.weight = model.norm1.weight
        pruner = make(library, model, in_channel_groups={}, out_channel_groups={})
        pruner.DG.get_pruning_group(model.conv1, library.prune_conv_out_channels, [0]).prune()
        seen[name] = model.conv1.weight.requires_grad, model.norm2.weight is model.norm1.weight
    assert seen == {"theirs": (True, False), "ours": (False, True)}


def test_instance_norm_statistics_are_pruned() -> None:
    theirs, ours = both(Net(norm=lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True)))
    assert len(theirs.norm1.running_mean) == 16
    assert len(ours.norm1.running_mean) == len(ours.norm1.running_var) == 8
    with pytest.raises(RuntimeError):
        theirs.eval()(X)
    assert ours.eval()(X).shape == (2, 10)


def test_layer_norm_weights_stay_in_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 36), nn.LayerNorm(36), nn.Linear(36, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.arange(36.0))
    idxs = [0, 3, 7, 8, 10, 11, 12, 14, 15, 18, 19, 21, 22, 27, 28, 30, 31, 33]
    kept = [float(i) for i in range(36) if i not in idxs]
    got = {}
    for name, library in (("theirs", original), ("ours", tp)):
        own = copy.deepcopy(model)
        pruner = make(library, own, torch.randn(2, 4))
        pruner.DG.get_pruning_group(own[0], library.prune_linear_out_channels, idxs).prune()
        got[name] = own[1].weight.tolist()
    assert got["theirs"] != kept
    assert sorted(got["theirs"]) == kept
    assert got["ours"] == kept


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.hidden = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(self.enter(x))
        return self.fc(self.hidden(y[:, -1]).relu())


def test_an_lstm_is_left_whole() -> None:
    inputs = torch.randn(2, 5, 6)
    broken = Recurrent()

    def prune_and_run() -> None:
        make(original, broken, inputs, in_channel_groups={}, out_channel_groups={}).step()
        broken(inputs)

    with pytest.raises((RuntimeError, IndexError, AttributeError, TypeError)), quiet():
        prune_and_run()
    model = Recurrent()
    make(tp, model, inputs).step()
    assert (model.lstm.hidden_size, model.hidden.out_features) == (8, 4)
    assert model(inputs).shape == (2, 3)


def test_an_operation_of_another_kind_of_layer_is_refused() -> None:
    theirs, ours = Net(), Net()
    with quiet():
        make(original, theirs).DG.get_pruning_group(theirs.conv1, original.prune_batchnorm_out_channels, [0])
    with pytest.raises(
        tp_error(), match=r"conv1 is a Conv2d, which prune_out_channels of BatchnormPruner does not prune"
    ):
        make(tp, ours).DG.get_pruning_group(ours.conv1, tp.prune_batchnorm_out_channels, [0])


def tp_error() -> type[Exception]:
    from pat_fast import ConfigError

    return ConfigError


# dependency/


def test_pruning_by_indices_is_noted_once() -> None:
    noted = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = Net()
        pruner = make(library, model)
        group = pruner.DG.get_pruning_group(model.conv1, library.prune_conv_out_channels, [0, 1, 2, 3])
        group.prune([1, 2])
        noted[name] = pruner.pruning_history()
    assert len(noted["theirs"]) == 2
    assert noted["ours"] == [["conv1", True, [1, 2]]]


class Scale(nn.Module):
    """A layer that Torch-Pruning does not know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.width:
            raise RuntimeError(f"expected {self.width} channels, got {x.shape[1]}")
        return x * self.scale


class ScalePruner(original.BasePruningFunc):
    def prune_out_channels(self, layer: Scale, idxs: Any) -> nn.Module:
        keep = sorted(set(range(layer.width)) - set(idxs))
        layer.width -= len(idxs)
        layer.scale = nn.Parameter(layer.scale.data[keep])
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Scale) -> int:
        return layer.width

    get_in_channels = get_out_channels


def test_a_customised_pruner_for_one_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Scale(8), nn.Conv2d(8, 4, 1))
    with pytest.raises(TypeError), quiet():
        make(original, model, customized_pruners={model[1]: ScalePruner()}).step()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Scale(8), nn.Conv2d(8, 4, 1))
    make(tp, model, customized_pruners={model[1]: ScalePruner()}, ignored_layers=[model[2]]).step()
    assert (model[0].out_channels, model[1].width, model[1].scale.shape[0], model[2].in_channels) == (4, 4, 4, 4)
    assert model(X).shape == (2, 4, 16, 16)


def test_the_mode_of_the_model_is_restored() -> None:
    modes = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = Net().train()
        model.norm1.eval()
        pruner = make(library, model)
        _ = pruner.DG.module2node
        modes[name] = model.training, model.norm1.training, model.norm2.training
    assert modes == {"theirs": (False, False, False), "ours": (True, False, True)}


def test_a_tensor_is_one_input() -> None:
    shapes: dict[str, list[Any]] = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        seen = shapes[name] = []
        model[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(tuple(args[0].shape)))
        pruner = make(library, model, X[:1])
        _ = pruner.DG.module2node
    assert (3, 16, 16) in shapes["theirs"]  # unpacked along the batch
    assert set(shapes["ours"]) == {(1, 3, 16, 16)}


def test_a_failing_forward_says_why() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such thing")

    from pat_fast import PlanError

    with pytest.raises(PlanError, match="no such thing"):
        make(tp, Broken())


def test_layer_pruners_of_the_process_stay_as_they_were() -> None:
    class Shifted(Net):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.rand(16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm1(self.conv1(x)).relu() + self.shift
            return self.fc(self.norm2(self.conv2(x)).mean((2, 3)))

    box = function.PrunerBox[original.ops.OPTYPE.PARAMETER]
    dims = {}
    for name, library in (("theirs", original), ("ours", tp)):
        box.pruning_dim = -1
        model = Shifted()
        pruner = make(library, model, unwrapped_parameters=[(model.shift, 0)])
        with quiet():
            pruner.step()
        dims[name] = box.pruning_dim
        assert model.shift.shape == (8, 1, 1)
    assert dims == {"theirs": 0, "ours": -1}
    box.pruning_dim = -1


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_rotary_embeddings_come_to_an_end() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=56, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (1, 6))}
    arguments = {"output_transform": lambda out: out.logits.sum()}
    with pytest.raises(TimeoutError), at_most(5.0), quiet():
        make(original, transformers.LlamaForCausalLM(config), inputs, in_channel_groups={}, **arguments)
    model = transformers.LlamaForCausalLM(config)
    attention = model.model.layers[0].self_attn
    pruner = make(tp, model, inputs, **arguments)
    assert list(pruner.DG.get_all_groups(ignored_layers=[model.lm_head]))
    pruner.step()
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (32, 16)
    assert model(**inputs).logits.shape == (1, 6, 50)


def test_swin_runs_after_pruning() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    theirs, ours = (transformers.SwinForImageClassification(config).eval() for _ in range(2))
    arguments = {"num_heads": {}, "output_transform": lambda out: out.logits.sum(), "in_channel_groups": {}}
    with quiet():
        make(original, theirs, inputs, out_channel_groups={}, **arguments).step()
    with pytest.raises(RuntimeError):
        theirs(**inputs)
    make(tp, ours, inputs, **arguments).step()
    for block in (b for b in ours.modules() if hasattr(b, "num_attention_heads") and hasattr(b, "attention_head_size")):
        block.num_attention_heads = (
            next(m for m in block.modules() if isinstance(m, nn.Linear)).out_features // block.attention_head_size
        )
    assert ours(**inputs).logits.shape == (2, 5)
