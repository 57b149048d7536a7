"""What the user says about single layers: scopes, own ratios, maxima, multiples, on a plan and through the pruner."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.limits import Rules
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.rounding import fast_multiple, multiple_for
from pat_fast.targets import Goal, Target
from tests.helpers import Small, small_inputs


class Blocks(nn.Module):
    """Two stages of two blocks each; the blocks of a stage are made alike, and so are their inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.a, self.b = (nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.Conv2d(24, 16, 1)) for _ in "ab")
        self.wide = nn.Conv2d(16, 32, 1)
        self.c = nn.Sequential(nn.Conv2d(32, 40, 1), nn.Conv2d(40, 32, 1))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.a(x)
        x = self.wide(x + self.b(x)).relu()
        return self.head((x + self.c(x)).mean((2, 3)))


def bound(model: nn.Module | None = None) -> Binding:
    model = model or Blocks()
    return bind(build_plan(model, small_inputs()), model)


@cache
def shared() -> Binding:
    return bound()


def widths(model: nn.Module) -> dict[str, int]:
    return {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def pruned(**options: Any) -> dict[str, int]:
    torch.manual_seed(0)
    model = Blocks()
    pruner = pat.Pruner(model, schedule="one_shot", example_inputs=small_inputs(), verify=False, **options)
    pruner.step()
    return widths(model)


# Scopes


def test_groups_that_are_made_alike_share_an_isomorphic_scope() -> None:
    limits = Rules("isomorphic").limits(bound())
    assert limits.scope("a.0") == limits.scope("b.0")
    assert len({limits.scope(root) for root in ("a.0", "c.0", "stem", "wide")}) >= 3
    left = pruned(target_sparsity=0.5, ranking="isomorphic")
    assert left["a.0"] + left["b.0"] == 24
    assert left["c.0"] == 20
    assert left["stem"] == 8


def test_named_scopes_each_give_the_same_share_and_so_does_the_rest() -> None:
    left = pruned(target_sparsity=0.5, ranking=[["a.0", "c.0"], ["wide", "c.1"]])
    assert left["a.0"] + left["c.0"] == 32
    assert left["wide"] == left["c.1"] == 16
    assert left["b.0"] + left["stem"] == 20


def test_layers_of_one_group_must_be_given_the_same() -> None:
    for options in ({"ranking": [["stem"], ["a.2", "b.2"]]}, {"layer_ratios": {"stem": 0.3}}):
        with pytest.raises(pat.ConfigError, match="share their channels, so both must be given the same"):
            pruned(target_sparsity=0.5, **options)


# Ratios


def test_layers_with_a_ratio_of_their_own_go_by_it_and_the_others_by_the_target() -> None:
    left = pruned(target_sparsity=0.5, layer_ratios={"c": 0.25, "wide": 0.25, "c.0": 0.75, "b.0": 0.0})
    assert left["c.0"] == 10  # the longest name counts
    assert left["wide"] == left["c.1"] == 24
    assert left["b.0"] == 24
    assert left["a.0"] + left["stem"] == 20


def test_the_report_asks_for_the_mean_of_the_ratios() -> None:
    pruner = pat.Pruner(
        Small(), 0.5, "one_shot", layer_ratios={"inner": 0.25}, example_inputs=small_inputs(), verify=False
    )
    assert pruner.step().ratio == pytest.approx((12 * 0.5 + 16 * 0.25) / 28)


@pytest.mark.parametrize("target", [{"channels": 0.5}, {"params": 0.5}, {"macs": 0.5}])
def test_no_group_loses_more_than_its_maximum(target: dict[str, float]) -> None:
    left = pruned(target=target, max_ratio={"a": 0.25, "c": 0.6})
    assert left["a.0"] >= 18
    assert left["stem"] >= 12  # a makes its channels, too
    assert left["c.0"] >= 16
    assert min(pruned(target={"channels": 0.3}, max_ratio=0.34).values()) >= 16 - 5


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_budgets_are_exact_and_the_choice_is_the_same_again_whatever_is_tied(data: st.DataObject) -> None:
    binding = shared()
    plan, everything = binding.plan, np.ones(binding.plan.n_channels, dtype=np.bool_)
    levels = data.draw(st.sampled_from([1, 2, 1000]))
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, levels, plan.n_channels).astype(float)
    ratio = data.draw(st.sampled_from([0.1, 0.25, 0.5]))
    ranking: Any = data.draw(st.sampled_from(["global", "local", "isomorphic", (("a.0",), ("b.0", "c.0"))]))
    rules = Rules(ranking, max_ratio=data.draw(st.sampled_from([1.0, 0.6])))
    goal = Goal(Target("channels", ratio), None, rules)
    goal.start(binding, everything)
    goal.check(plan, everything)
    keep = goal.select(plan, scores, everything, everything, 1.0)
    np.testing.assert_array_equal(keep, goal.select(plan, scores.copy(), everything, everything, 1.0))
    sizes: dict[str | None, int] = {}
    for group in plan.groups:
        scope = goal.limits.scope(group.root)
        sizes[scope] = sizes.get(scope, 0) + group.channels
    assert keep.sum() == sum(int(size * (1 - ratio) + 1e-9) for size in sizes.values())


# Multiples


def test_round_to_goes_by_the_types_of_a_groups_layers() -> None:
    limits = Rules(round_to={"Conv2d": 4, "Linear": 6, "BatchNorm2d": 8}).limits(bound())
    steps = {g.root: limits.step(g) for g in bound().plan.groups}
    assert steps["a.0"] == 8
    assert steps["c.0"] == 4
    assert next(step for root, step in steps.items() if root in ("wide", "c.1")) == 12  # the head reads it


def test_auto_asks_the_device_and_says_what_for() -> None:
    widest, least, why = fast_multiple(torch.device("cpu"), torch.float32)
    assert widest in (4, 8, 16)
    assert "CPU with" in why
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1))
    pruner = pat.Pruner(model, 0.3, "one_shot", round_to="auto", example_inputs=small_inputs(), verify=False)
    report = pruner.step()
    assert model[0].out_channels % widest == 0
    assert model[2].out_channels % multiple_for(12, widest, least) == 0
    assert any(note.startswith("round_to: auto keeps multiples of") and why in note for note in report.notes)


@pytest.mark.parametrize(
    ("capability", "dtype", "multiples"),
    [
        ((9, 0), torch.float16, (64, 8)),
        ((8, 0), torch.bfloat16, (64, 8)),
        ((8, 0), torch.float32, (64, 8)),  # as under autocast
        ((7, 0), torch.float16, (8, 8)),
        ((6, 1), torch.float32, (4, 1)),
        ((9, 0), torch.float64, (2, 2)),
    ],
)
def test_tensor_cores_take_rows_of_sixteen_bytes(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, multiples: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    assert fast_multiple(torch.device("cuda"), dtype)[:2] == multiples


def test_small_groups_have_smaller_multiples() -> None:
    assert [multiple_for(n, 64, 8) for n in (1024, 256, 128, 64, 16, 8, 6)] == [64, 64, 32, 16, 8, 8, 1]
    assert [multiple_for(n, 16, 4) for n in (64, 32, 16, 3)] == [16, 8, 4, 1]


def test_what_was_decided_for_the_dense_model_holds_after_a_resume() -> None:
    options: dict[str, Any] = {"round_to": "auto", "max_ratio": 0.6, "ranking": "isomorphic", "end_epoch": 2}
    model = Blocks()
    first = pat.Pruner(model, 0.5, example_inputs=small_inputs(), verify=False, **options)
    first.step()
    second = pat.Pruner(model, 0.5, example_inputs=small_inputs(), verify=False, **options)
    assert second.goal.limits != first.goal.limits
    second.load_state_dict(first.state_dict())
    assert second.goal.limits == first.goal.limits


# Nonsense


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "isomorfic"}, "ranking: expected one of global, .* did you mean 'isomorphic'"),
        ({"ranking": []}, "ranking: expected one of .* or lists of layer names"),
        ({"ranking": [["inner"], []]}, "ranking: expected one of .* or lists of layer names"),
        ({"ranking": [["inner"], ["inner", "stem"]]}, "ranking: expected each layer in one list, got 'inner'"),
        ({"ranking": [["iner"]]}, "ranking: 'iner' matches no layer .* did you mean 'inner'"),
        ({"round_to": "fast"}, "round_to: expected a whole number, at least 1, 'auto'"),
        ({"round_to": {"Conv2d": 0}}, "round_to: Conv2d: expected a whole number"),
        ({"round_to": {"Conv3d": 4}}, "round_to: the model has no layer of type 'Conv3d'; did you mean 'Conv2d'"),
        ({"layer_ratios": {"inner": 1.0}}, r"layer_ratios: inner: expected a number in \[0, 1\), got 1.0"),
        ({"layer_ratios": 0.5}, "layer_ratios: expected a number in .* for each layer name, got 0.5"),
        ({"layer_ratios": {"inner": 0.5}, "target": {"macs": 0.5}}, "layer_ratios: expected none beside a target in"),
        ({"max_ratio": 1.5}, r"max_ratio: expected a number in \[0, 1\], or one per layer, got 1.5"),
        ({"max_ratio": {"steam": 0.5}}, "max_ratio: 'steam' matches no layer .* did you mean 'stem'"),
        ({"max_ratio": {"stem": True}}, "max_ratio: stem: expected a number"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        pat.Pruner(Small(), end_epoch=2, **options)


def test_a_share_that_the_limits_forbid_is_refused_with_what_they_allow() -> None:
    pruner = pat.Pruner(Small(), 0.5, "one_shot", max_ratio=0.25, example_inputs=small_inputs(), verify=False)
    with pytest.raises(pat.ConfigError, match=r"target: expected at most 0.25 of the channels.*, got 0.5; .*max_ratio"):
        pruner.step()
