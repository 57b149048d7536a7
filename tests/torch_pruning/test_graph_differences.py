"""Where Torch-Pruning's surgery and graph are wrong: its result and ours. The list is ``docs/differences.md``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn
from torch_pruning.pruner import function

import pat_fast.torch_pruning as tp
from pat_fast import ConfigError, PlanError
from pat_fast.bench.subject import at_most
from tests.torch_pruning.against import quiet
from tests.torch_pruning.nets import Net, X, both, make

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


def test_what_a_bare_parameter_makes_is_left_whole() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.kernel = nn.Parameter(torch.randn(6, 5))
            self.last = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) @ self.kernel)

    model = Bare()
    make(tp, model, torch.randn(3, 4), ignored_layers=[model.last]).step()
    assert (model.first.out_features, tuple(model.kernel.shape)) == (3, (3, 5))


def test_an_lstm_keeps_its_hidden_units() -> None:
    inputs = torch.randn(2, 5, 6)
    broken = Recurrent()

    def prune_and_run() -> None:
        make(original, broken, inputs, in_channel_groups={}, out_channel_groups={}).step()
        broken(inputs)

    with pytest.raises((RuntimeError, IndexError, AttributeError, TypeError)), quiet():
        prune_and_run()
    model = Recurrent()
    make(tp, model, inputs).step()
    assert (model.lstm.input_size, model.lstm.hidden_size, model.hidden.out_features) == (4, 8, 4)
    assert model(inputs).shape == (2, 3)


def test_an_operation_of_another_kind_of_layer_is_refused() -> None:
    theirs, ours = Net(), Net()
    with quiet():
        make(original, theirs).DG.get_pruning_group(theirs.conv1, original.prune_batchnorm_out_channels, [0])
    with pytest.raises(
        ConfigError, match=r"conv1 is a Conv2d, which prune_out_channels of BatchnormPruner does not prune"
    ):
        make(tp, ours).DG.get_pruning_group(ours.conv1, tp.prune_batchnorm_out_channels, [0])


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


@pytest.mark.slow
def test_rotary_embeddings_come_to_an_end() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=56, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(0, 50, (1, 6))}
    arguments = {"output_transform": lambda out: out.logits.sum()}
    with pytest.raises(TimeoutError), at_most(5.0, "Torch-Pruning"), quiet():
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
    assert ours(**inputs).logits.shape == (2, 5)


def test_swin_attention_goes_with_its_table_of_positions() -> None:
    """Torch-Pruning takes a head's bias for a channel of its queries, and skips the group without a word."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[4, 4], window_size=4, num_labels=5
    )
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    left = {}
    for name, library in (("theirs", original), ("ours", tp)):
        model = transformers.SwinForImageClassification(config).eval()
        named = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        queries = ("query", "key", "value", "q_proj", "k_proj", "v_proj")
        heads = {m: 4 for n, m in named if n.endswith(queries)}
        pruner = make(
            library, model, inputs, num_heads=heads, prune_num_heads=True, prune_head_dims=False,
            head_pruning_ratio=0.5, output_transform=lambda out: out.logits.sum(), in_channel_groups={},
            out_channel_groups={}, ignored_layers=[m for n, m in named if m not in heads],
        )  # fmt: skip
        with quiet():
            pruner.step()
        tables = [p.shape[1] for n, p in model.named_parameters() if "relative_position_bias_table" in n]
        left[name] = [m.out_features for m in heads], tables
        assert model(**inputs).logits.shape == (2, 5)
    assert left["theirs"] == ([24] * 3 + [48] * 3, [4, 4])
    assert left["ours"] == ([12] * 3 + [24] * 3, [2, 2])


def test_a_history_that_was_asked_for_does_not_grow() -> None:
    lengths = {}
    for name, library in (("theirs", original), ("ours", tp)):
        pruner = make(library, Net(), iterative_steps=2)
        pruner.step()
        history = pruner.pruning_history()
        before = len(history)
        pruner.step()
        lengths[name] = len(history) - before
    assert lengths["theirs"] > 0
    assert lengths["ours"] == 0
