"""Customised layers and nn.MultiheadAttention: pruned by layer pruners, parameters and optimizers kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn

import pat_fast.torch_pruning as tp
from pat_fast import SurgeryError
from tests.torch_pruning.against import build


class Wide(nn.Module):
    """A linear layer with sizes and names of its own, and a table that goes with its outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.sizes = (inputs, outputs)
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))
        self.register_buffer("shift", torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape[-1], self.matrix.shape[1]) != self.sizes:
            raise RuntimeError("sizes do not fit")
        return x @ self.matrix + self.shift


class WidePruner(original.BasePruningFunc):
    def prune_out_channels(self, layer: Wide, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.sizes[1]) if i not in set(idxs)]
        layer.matrix = nn.Parameter(layer.matrix.data[:, keep])
        layer.shift = layer.shift[keep]
        layer.sizes = (layer.sizes[0], len(keep))
        return layer

    def prune_in_channels(self, layer: Wide, idxs: Sequence[int]) -> nn.Module:
        keep = [i for i in range(layer.sizes[0]) if i not in set(idxs)]
        layer.matrix = nn.Parameter(layer.matrix.data[keep])
        layer.sizes = (len(keep), layer.sizes[1])
        return layer

    def get_out_channels(self, layer: Wide) -> int:
        return layer.sizes[1]

    def get_in_channels(self, layer: Wide) -> int:
        return layer.sizes[0]


class Failing(WidePruner):
    def prune_in_channels(self, layer: Wide, idxs: Sequence[int]) -> nn.Module:
        raise KeyError("not today")


class Computing(WidePruner):
    def prune_in_channels(self, layer: Wide, idxs: Sequence[int]) -> nn.Module:
        super().prune_in_channels(layer, idxs)
        layer.matrix = nn.Parameter(layer.matrix.data * 0.5)
        return layer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), Wide(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)
    )


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def make(library: Any, model: nn.Module, pruner: Any) -> Any:
    kinds = (original.ops.TORCH_CONV, original.ops.TORCH_LINEAR, Wide)
    return build(library, model, X, {"customized_pruners": {Wide: pruner}, "root_module_types": kinds})


def trained(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return optimizer


def test_equal_to_torch_pruning() -> None:
    model = net()
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    make(tp, ours, WidePruner()).step()
    make(original, theirs, WidePruner()).step()
    assert ours[2].sizes == theirs[2].sizes == (6, 8)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_parameters_and_optimizer_live() -> None:
    model = net()
    optimizer = trained(model)
    before = {name: (p, copy.deepcopy(optimizer.state[p]["exp_avg"])) for name, p in model.named_parameters()}
    pruner = make(tp, model, WidePruner())
    pruner.step()
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert p.shape == p.grad.shape == optimizer.state[p]["exp_avg"].shape
    rows = [i for i in range(12) if i not in pruner.pruning_history()[-1][2]]
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], before["0.weight"][1][rows])
    loss = model(X).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("pruner", "message"), [
    (Failing(), "not today.*the prune was undone"),
    (Computing(), r"2\.matrix: its layer pruner computes new values"),
])  # fmt: skip
def test_what_fails_is_undone(pruner: Any, message: str) -> None:
    model = net()
    optimizer = trained(model)
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(SurgeryError, match=message):
        make(tp, model, pruner).DG.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 3]).prune()
    assert all(torch.equal(t, before[0][name]) for name, t in model.state_dict().items())
    assert model[0].out_features == 12
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["exp_avg"], s["exp_avg"]) for i, s in before[1]["state"].items())


def test_a_history_of_all_parameters_is_refused() -> None:
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := model(X).square().sum()).backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=r"layer by layer cannot be in a history of all parameters.*LBFGS"):
        make(tp, model, WidePruner()).DG.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 3]).prune()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    optimizer.step(closure)  # type: ignore[arg-type]


def test_several_steps() -> None:
    model = net()
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"iterative_steps": 3, "customized_pruners": {Wide: WidePruner()}, "global_pruning": True}
    mine, its = build(tp, ours, X, arguments), build(original, theirs, X, dict(arguments))
    for _ in range(3):
        mine.step()
        its.step()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.fc2(self.fc1(x).relu())).mean(1))


def test_multihead_attention_as_torch_pruning_prunes_it() -> None:
    torch.manual_seed(0)
    model = Encoder()
    inputs = torch.randn(2, 5, 6)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.Adam(ours.parameters())
    ours(inputs).sum().backward()
    optimizer.step()
    theirs.load_state_dict(ours.state_dict())
    parameters = dict(ours.named_parameters())
    build(tp, ours, inputs, {"round_to": 4}).step()
    build(original, theirs, inputs, {"round_to": 4}).step()
    assert ours.attention.embed_dim == theirs.attention.embed_dim == 8
    assert ours.fc1.out_features == theirs.fc1.out_features == 12
    for name, value in theirs.state_dict().items():
        got = ours.state_dict()[name]
        assert torch.equal(got, value) or torch.equal(got.sort().values, value.sort().values), name
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    ours(inputs).sum().backward()
    optimizer.step()
