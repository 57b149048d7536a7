"""What scripts do with a pruner beside calling it: classes of their own, groups that they change or prune by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_pruning as original
from torch import Tensor, nn

import pat_fast.torch_pruning as tp
from pat_fast import ConfigError, PlanError
from tests.torch_pruning.against import quiet
from tests.torch_pruning.nets import Net, X, make


def same(run: Callable[[Any, nn.Module], None], model: nn.Module) -> nn.Module:
    """The model after ``run`` with the drop-in, which is equal to what Torch-Pruning makes of it."""
    made = []
    for library in (original, tp):
        own = copy.deepcopy(model).eval()
        with quiet():
            run(library, own)
        made.append(own)
    theirs, ours = (m.state_dict() for m in made)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(value, ours[name]), name
    return made[1]


# Classes that change a part of Torch-Pruning's loop


def _prune(self: Any) -> Iterator[Any]:
    yield from (
        group for group in super(type(self), self)._prune() if group[0].dep.target.module is not self.model.conv1
    )


def _prune_of_its_own(self: Any) -> Iterator[Any]:
    for group in self.DG.get_all_groups(self.ignored_layers, self.root_module_types):
        going = torch.argsort(self.estimate_importance(group))[:3].tolist()
        yield self.DG.get_pruning_group(group[0].dep.target.module, group[0].dep.handler, going)


CHANGES: list[tuple[str, Any]] = [
    ("_prune", _prune),
    ("_prune", _prune_of_its_own),
    ("_check_pruning_ratio", lambda self, group: group[0].dep.target.module is not self.model.conv1),
    ("_round_to", lambda self, n_pruned, current_channels, round_to: n_pruned // 2),
    ("_get_channel_groups", lambda self, group: 4),
    ("_is_atten_group", lambda self, group: (False, [])),
]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_class_that_changes_the_loop_gets_it(number: int, interactive: bool) -> None:
    name, change = CHANGES[number]

    def run(library: Any, model: nn.Module) -> None:
        kind = type("Changed", (library.pruner.MetaPruner,), {name: change})
        pruner = kind(
            model, X, importance=library.importance.MagnitudeImportance(), ignored_layers=[model.fc], round_to=2,
            iterative_steps=2,
        )  # fmt: skip
        for _ in range(2):
            if interactive:
                for group in pruner.step(interactive=True):
                    group.prune()
            else:
                pruner.step()

    assert same(run, Net()).conv2.out_channels < 16  # type: ignore[operator]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out, self.fc = nn.Linear(12, 48), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1)
        out: Tensor = self.fc(self.out(read))
        return out


@pytest.mark.parametrize("whole", [False, True])
def test_a_class_that_changes_the_loop_prunes_attentions(whole: bool) -> None:
    def run(library: Any, model: nn.Module) -> None:
        kind = type("Changed", (library.pruner.BasePruner,), {"_round_to": lambda self, n, now, to: n})
        pruner = kind(
            model, torch.randn(2, 6, 12), importance=library.importance.MagnitudeImportance(),
            ignored_layers=[model.fc], num_heads={model.qkv: 4}, prune_num_heads=whole, prune_head_dims=not whole,
            head_pruning_ratio=0.5 * whole, in_channel_groups={}, out_channel_groups={},
        )  # fmt: skip
        pruner.step()
        model.heads = pruner.num_heads[model.qkv]
        assert model.heads == (2 if whole else 4)

    assert same(run, Attention()).qkv.out_features == 24


def test_a_loop_that_fails_is_no_step() -> None:
    class Changed(tp.pruner.MetaPruner):
        def _prune(self) -> Iterator[Any]:
            raise RuntimeError("not today")
            yield

    pruner = Changed(Net(), X, importance=tp.importance.MagnitudeImportance())
    with pytest.raises(RuntimeError, match="not today"):
        pruner.step()
    assert pruner.current_step == 0


def test_layers_that_are_ignored_later_stay() -> None:
    def run(library: Any, model: nn.Module) -> None:
        pruner = make(library, model, iterative_steps=2)
        pruner.step()
        pruner.ignored_layers.append(model.conv1)
        pruner.step()

    ours = same(run, Net())
    assert (ours.conv1.out_channels, ours.conv2.out_channels) == (12, 8)


# Groups that are changed, or pruned by hand


@pytest.mark.parametrize("how", ["replaced", "left out", "emptied"])
def test_a_group_that_was_changed_is_pruned_as_it_says(how: str) -> None:
    def run(library: Any, model: nn.Module) -> None:
        pruner = make(library, model)
        group = pruner.DG.get_pruning_group(model.conv1, library.prune_conv_out_channels, [0, 5])
        places = [i for i, (dep, _) in enumerate(group) if dep.target.module is model.norm1]
        for i in reversed(places):
            if how == "replaced":
                group[i] = (group[i][0], [])
            elif how == "left out":
                del group._group[i]
            else:
                group[i].idxs.clear()
        group.prune()

    ours = same(run, Net())
    assert (ours.conv1.out_channels, ours.norm1.num_features) == (14, 16)


def test_a_changed_group_keeps_optimizers_and_is_noted() -> None:
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    pruner = make(tp, model)
    group = pruner.DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0, 5])
    group[1] = (group[1][0], list(group[1][1]))
    group.prune()
    assert pruner.pruning_history() == [["conv1", True, [0, 5]]]
    assert optimizer.state[model.conv1.weight]["exp_avg"].shape == model.conv1.weight.shape == (14, 3, 3, 3)
    pruner.step()
    assert model(X).shape == (2, 10)


@pytest.mark.parametrize("by", ["dependencies", "handlers"])
def test_groups_of_a_step_may_be_pruned_by_hand(by: str) -> None:
    def run(library: Any, model: nn.Module) -> None:
        for group in make(library, model).step(interactive=True):
            for dep, idxs in group:
                if by == "dependencies":
                    dep(idxs)
                else:
                    dep.handler(dep.target.module, idxs)

    ours = same(run, Net())
    assert (ours.conv1.out_channels, ours.conv2.out_channels) == (8, 8)


def test_a_group_that_was_pruned_in_part_by_hand_is_refused() -> None:
    model = Net()
    pruner = make(tp, model)
    groups = pruner.step(interactive=True)
    other = model.conv2 if next(groups)[0].dep.target.module is model.conv1 else model.conv1
    for dep, idxs in pruner.DG.get_pruning_group(other, tp.prune_conv_out_channels, [0]):
        dep(idxs)
    with pytest.raises(PlanError, match="changed by other means during an interactive step"):
        next(groups)


# A layer with a pruner of its own, behind slices that Torch-Pruning's graph takes for slices of the channels


class Merging(nn.Module):
    """Patches of two by two become one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.norm, self.reduction = width, nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return out


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 32), nn.Linear(32, 16)
        self.merging, self.norm, self.fc = Merging(16), nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        x = self.merging(x + self.down(self.up(x).relu()))
        out: Tensor = self.fc(self.norm(x).mean((1, 2)))
        return out


class MergingPruner(original.BasePruningFunc):  # type: ignore[misc]
    def prune_out_channels(self, layer: Any, idxs: Any) -> nn.Module:
        original.prune_linear_out_channels(layer.reduction, idxs)
        return layer  # type: ignore[no-any-return]

    def prune_in_channels(self, layer: Any, idxs: Any) -> nn.Module:
        every = [i + layer.width * corner for corner in range(4) for i in idxs]
        original.prune_linear_in_channels(layer.reduction, every)
        original.prune_layernorm_out_channels(layer.norm, every)
        layer.width -= len(idxs)
        return layer  # type: ignore[no-any-return]

    def get_out_channels(self, layer: Any) -> int:
        return layer.reduction.out_features  # type: ignore[no-any-return]

    def get_in_channels(self, layer: Any) -> int:
        return layer.width  # type: ignore[no-any-return]


def test_what_torch_prunings_graph_loses_on_the_way_to_a_customised_layer_stays() -> None:
    def run(library: Any, model: nn.Module) -> None:
        pruner = library.pruner.BasePruner(
            model, X, importance=library.importance.MagnitudeImportance(), ignored_layers=[model.fc],
            customized_pruners={Merging: MergingPruner()}, root_module_types=(nn.Linear, nn.LayerNorm, nn.Conv2d),
            iterative_steps=2, in_channel_groups={}, out_channel_groups={},
        )  # fmt: skip
        for _ in range(2):
            pruner.step()

    ours = same(run, Patches())
    assert (ours.embed.out_channels, ours.up.out_features, ours.norm.weight.shape) == (16, 16, (16,))
    assert ours(X).shape == (2, 5)
    with pytest.warns(UserWarning, match="down: it stays as it is: .* loses channels between it and merging"):
        tp.pruner.BasePruner(
            Patches(), X, importance=tp.importance.MagnitudeImportance(), customized_pruners={Merging: MergingPruner()}
        ).step()


# A layer that has each channel twice: a gate and its values


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.gate_up = nn.Linear(12, 32)
        self.down = nn.Linear(16, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.first(x)).chunk(2, dim=-1)
        out: Tensor = self.fc(self.down(nn.functional.silu(gate) * up))
        return out


def gated(library: Any, model: nn.Module, importance: Any) -> Any:
    return library.pruner.BasePruner(
        model,
        torch.randn(2, 8),
        importance=importance,
        ignored_layers=[model.fc],
        out_channel_groups={model.gate_up: 2},
    )


def rows_of_the_root(group: Any) -> Tensor:
    return group[0].dep.target.module.weight.detach()[group[0].idxs].abs().sum(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["as it is", "a subclass", "a function of the root's weights"])
def test_gates_and_values_in_one_layer(kind: str) -> None:
    def run(library: Any, model: nn.Module) -> None:
        base = library.importance.GroupMagnitudeImportance
        kinds: dict[str, Any] = {
            "as it is": base(),
            "a subclass": type("Own", (base,), {"__call__": lambda self, group: base.__call__(self, group)})(),
            "a function of the root's weights": rows_of_the_root,
        }
        gated(library, model, kinds[kind]).step()

    ours = same(run, Gated())
    assert (ours.gate_up.out_features, ours.down.in_features) == (16, 8)


def test_scores_of_gates_and_values_are_as_many_as_the_layer_has_rows() -> None:
    model = Gated()
    pruner = gated(tp, model, tp.importance.GroupMagnitudeImportance())
    weights = model.gate_up.weight.square().sum(1).view(2, 16).sum(0) + model.down.weight.square().sum(0)
    (group,) = (g for g in pruner.DG.get_all_groups() if g[0].dep.target.module is model.gate_up)
    torch.testing.assert_close(pruner.importance(group), (weights / weights.mean()).repeat(2))
    pruner.manual_prune_width(model.gate_up, tp.prune_linear_out_channels, 0.25)
    left = weights.sort().values[4:]
    after = model.gate_up.weight.square().sum(1).view(2, 12).sum(0) + model.down.weight.square().sum(0)
    torch.testing.assert_close(after.sort().values, left)


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (torch.ones(3), "a tensor of shape \\(3,\\)"),
        (torch.tensor(1.0), "a tensor of shape \\(\\)"),
        (torch.ones(16, 2), "a tensor of shape \\(16, 2\\)"),
        ([1.0] * 16, "a list"),
    ],
)
@pytest.mark.parametrize("manual", [False, True])
def test_scores_that_are_none_are_refused_by_the_layers_name(scores: Any, got: str, manual: bool) -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    pruner = make(tp, model, importance=lambda group: scores)
    act = (lambda: pruner.manual_prune_width(model.conv1, tp.prune_conv_out_channels, 0.5)) if manual else pruner.step
    with pytest.raises(ConfigError, match=f"expected a tensor of 16 scores for the group of conv.*, got {got}"):
        act()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("name", ["num_heads", "out_channel_groups", "in_channel_groups"])
def test_groups_that_are_set_later_are_refused(name: str, interactive: bool) -> None:
    """The plan is made with them: to set them on the pruner did nothing."""
    model = Net()
    pruner = make(tp, model)
    getattr(pruner, name)[model.conv1] = 4
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*\(None for conv1\), got 4; pass it to a new pruner"):
        pruner.step(interactive)
    assert model.conv1.out_channels == 16
    assert pruner.current_step == 0
    del getattr(pruner, name)[model.conv1]
    pruner.step()
    assert model.conv1.out_channels == 8
