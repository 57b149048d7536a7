"""Which channels go: exact budgets, ties, units, protected axes, multiples, and a property test over the zoo."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from pat_fast import ConfigError
from pat_fast.plan import Plan, build_plan
from pat_fast.selection import Limits, Scope, protected_units, select, unit_scores
from tests.helpers import Case, Small, small_inputs, zoo_names

Keep = NDArray[np.bool_]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


@cache
def small_plan() -> Plan:
    return build_plan(Small(), small_inputs())


@cache
def zoo_plan(name: str) -> Plan:
    case = Case.build(name, torch.float32)
    return build_plan(case.model, case.inputs)


def everything(plan: Plan) -> Keep:
    return np.ones(plan.n_channels, dtype=np.bool_)


def budget(count: int) -> Callable[[str | None], int]:
    return lambda root: count


def kept_of(plan: Plan, keep: Keep) -> dict[str, int]:
    return {g.root: int(keep[g.start : g.stop].sum()) for g in plan.groups}


# Budgets and ranking


@pytest.mark.parametrize("count", [0, 1, 7, 20, 26])
def test_the_least_important_go_and_the_budget_is_met_exactly(count: int) -> None:
    plan = small_plan()
    scores = np.random.default_rng(0).random(plan.n_channels)
    keep = select(plan, scores, everything(plan), budget(count), Limits())
    assert (~keep).sum() == count
    free = np.ones(plan.n_channels, dtype=np.bool_)
    for group in plan.groups:
        free[group.start + scores[group.start : group.stop].argmax()] = False  # the best of each group stays
    lowest = np.flatnonzero(free)[np.argsort(scores[free])][:count]
    assert set(np.flatnonzero(~keep)) == set(lowest)


def test_nothing_goes_below_the_last_channel_of_a_group() -> None:
    plan = small_plan()
    keep = select(plan, np.random.default_rng(0).random(plan.n_channels), everything(plan), budget(10_000), Limits())
    assert set(kept_of(plan, keep).values()) == {1}


def test_equal_scores_go_in_order_and_no_more_than_asked() -> None:
    plan = small_plan()
    first, second = plan.groups
    scores = np.ones(plan.n_channels)
    keep = select(plan, scores, everything(plan), budget(9), Limits())
    assert (~keep).sum() == 9
    # The first channel of each group is its best by the same rule, so the nine that follow go.
    assert np.flatnonzero(~keep).tolist() == list(range(first.start + 1, first.start + 10))
    for _ in range(3):
        np.testing.assert_array_equal(keep, select(plan, scores, everything(plan), budget(9), Limits()))
    assert second.channels == kept_of(plan, keep)[second.root]


def test_local_takes_the_same_share_of_each_group_and_global_does_not() -> None:
    plan = small_plan()
    first, second = plan.groups
    scores = np.random.default_rng(0).random(plan.n_channels)
    scores[first.start : first.stop] += 10

    def half(root: str | None) -> int:
        return sum(g.channels // 2 for g in plan.groups if root in (None, g.root))

    local = kept_of(plan, select(plan, scores, everything(plan), half, Limits("local")))
    assert local == {g.root: g.channels - g.channels // 2 for g in plan.groups}
    overall = kept_of(plan, select(plan, scores, everything(plan), half, Limits("global")))
    assert overall[first.root] == first.channels
    assert overall[second.root] == second.channels - half(None)


def test_only_eligible_channels_go() -> None:
    plan = small_plan()
    first, second = plan.groups
    eligible = everything(plan)
    eligible[first.start : first.stop] = False
    keep = select(plan, np.zeros(plan.n_channels), eligible, budget(100), Limits())
    assert kept_of(plan, keep) == {first.root: first.channels, second.root: 1}


@pytest.mark.parametrize("least", [1, 3, 8, 100])
def test_min_channels_stay_and_they_are_the_best(least: int) -> None:
    plan = small_plan()
    scores = np.random.default_rng(1).random(plan.n_channels)
    keep = select(plan, scores, everything(plan), budget(1000), Limits(min_channels=least))
    for group in plan.groups:
        own = scores[group.start : group.stop]
        left = keep[group.start : group.stop]
        assert left.sum() == min(least, group.channels)
        assert set(np.flatnonzero(left)) == set(np.argsort(-own)[:least])


# Stopping early


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_the_fewest_removals_that_are_enough(ranking: str) -> None:
    plan = small_plan()
    scores = np.random.default_rng(2).random(plan.n_channels)
    limit = 0.6 * plan.macs()
    sizes = []

    def enough(keep: Keep) -> bool:
        return plan.macs(keep) <= limit

    for count in range(27):
        keep = select(plan, scores, everything(plan), budget(count), Limits(ranking), enough)
        sizes.append(int((~keep).sum()))
        if not enough(keep):
            full = select(plan, scores, everything(plan), budget(count), Limits(ranking))
            np.testing.assert_array_equal(keep, full)
    enough_from = max(sizes)
    assert sizes[-1] == enough_from
    if ranking == "global":  # one budget: all that is asked for, until it is enough
        assert sizes == [min(n, enough_from) for n in range(27)]
        one_less = select(plan, scores, everything(plan), budget(enough_from - 1), Limits())
        assert not enough(one_less)


def test_what_is_enough_already_is_left_alone() -> None:
    plan = small_plan()
    keep = select(plan, np.ones(plan.n_channels), everything(plan), budget(20), Limits(), lambda keep: True)
    assert keep.all()


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("needed", [0, 1, 5])
def test_what_is_gone_stays_gone(ranking: str, needed: int) -> None:
    """Masked channels count towards the budget and never come back, however little more is needed."""
    plan = small_plan()
    scores = np.random.default_rng(3).random(plan.n_channels)
    gone = np.arange(plan.groups[1].start, plan.groups[1].start + 6)
    scores[gone] = -np.inf

    def asked(root: str | None) -> int:
        return {plan.groups[0].root: 8, plan.groups[1].root: 10, None: 18}[root]

    def enough(keep: Keep) -> bool:
        return int((~keep).sum()) >= len(gone) + needed

    keep = select(plan, scores, everything(plan), asked, Limits(ranking), enough)
    assert not keep[gone].any()
    assert (~keep).sum() == len(gone) + needed


# Multiples


def test_round_to_takes_the_nearest_multiple() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 20), nn.Linear(20, 3))
    plan = build_plan(model, torch.randn(2, 4))
    scores = np.random.default_rng(0).random(plan.n_channels)

    def local(share: float) -> Callable[[str | None], int]:
        return lambda root: next(int(g.channels * share) for g in plan.groups if g.root == root)

    def left(share: float, limits: Limits) -> list[int]:
        return sorted(kept_of(plan, select(plan, scores, everything(plan), local(share), limits)).values())

    assert left(0.30, Limits("local", round_to=8)) == [16, 24]  # 14 and 23 asked for
    assert left(0.90, Limits("local", round_to=8)) == [8, 8]  # at least one multiple
    assert left(0.90, Limits("local", round_to=8, min_channels=10)) == [16, 16]  # the nearest that is allowed
    assert left(0.05, Limits("local", round_to=8)) == [20, 32]  # 19 and 31: the nearest may be all there are
    assert left(0.50, Limits("local", round_to=100)) == [20, 32]  # smaller than one multiple


def test_round_to_with_units_of_several_channels() -> None:
    plan = grouped_plan()
    scores = np.random.default_rng(0).random(plan.n_channels)
    for count in range(0, plan.n_channels, 3):
        keep = select(plan, scores, everything(plan), budget(count), Limits(round_to=8))
        plan.check_keep(keep)
        assert all(n % 8 == 0 or n == full for n, full in zip_groups(plan, keep))


def zip_groups(plan: Plan, keep: Keep) -> list[tuple[int, int]]:
    return [(int(keep[g.start : g.stop].sum()), g.channels) for g in plan.groups]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_budget_is_met_to_one_rounding_unit(data: st.DataObject) -> None:
    """All groups together, however they are rounded; with ties, without them, and no more where nothing is rounded."""
    plan = wide_plan()
    levels = data.draw(st.sampled_from([1, 3, 999]))
    scores = np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, levels, 96)
    count = data.draw(st.integers(0, 96 - 3 * 8))
    step = data.draw(st.sampled_from([1, 2, 4, 8]))
    keep = select(plan, scores.astype(np.float64), everything(plan), budget(count), Limits(round_to=step))
    gone = int((~keep).sum())
    assert abs(gone - count) <= step // 2
    assert all(n % step == 0 for n in kept_of(plan, keep).values())


@cache
def wide_plan() -> Plan:
    return build_plan(
        nn.Sequential(nn.Linear(4, 40), nn.Linear(40, 24), nn.Linear(24, 32), nn.Linear(32, 3)), torch.randn(2, 4)
    )


def test_scopes_have_budgets_of_their_own() -> None:
    plan = wide_plan()
    scores = np.random.default_rng(0).random(plan.n_channels)
    wide, mid, last = "0", "1", "2"
    limits = Limits(scopes={wide: "a", last: "a"})

    def asked(scope: str | None) -> int:
        return {"a": 30, None: 5}[scope]

    keep = select(plan, scores, everything(plan), asked, limits)
    left = kept_of(plan, keep)
    assert left[wide] + left[last] == 72 - 30
    assert left[mid] == 24 - 5
    own = np.concatenate([scores[g.start : g.stop] for g in plan.groups if g.root != mid])
    gone = np.concatenate([~keep[g.start : g.stop] for g in plan.groups if g.root != mid])
    assert set(np.flatnonzero(gone)) == set(np.argsort(own)[:30])


def test_a_group_keeps_its_least_and_others_give_more() -> None:
    plan = wide_plan()
    scores = np.ones(plan.n_channels)
    for group in plan.groups[:1]:
        scores[group.start : group.stop] = np.linspace(0, 0.5, group.channels)
    root = plan.groups[0].root
    free = kept_of(plan, select(plan, scores, everything(plan), budget(20), Limits()))
    held = kept_of(plan, select(plan, scores, everything(plan), budget(20), Limits(least={root: 30})))
    assert free[root] == plan.groups[0].channels - 20
    assert held[root] == max(30, free[root])
    assert sum(held.values()) == sum(free.values())


# Units and protected axes


@cache
def grouped_plan() -> Plan:
    """Convolutions in 4 groups: a channel goes together with its counterparts in the other groups."""
    model = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 16, 3, groups=4), nn.ReLU(), nn.Conv2d(16, 5, 1))
    return build_plan(model, small_inputs())


def test_units_of_grouped_convolutions_go_as_a_whole() -> None:
    plan = grouped_plan()
    assert set(np.bincount(plan.unit).tolist()) == {4}
    scores = np.random.default_rng(0).random(plan.n_channels)
    keep = select(plan, scores, everything(plan), budget(14), Limits())
    plan.check_keep(keep)
    assert (~keep).sum() == 12  # three units fit into 14
    means = unit_scores(plan, scores)
    assert means == pytest.approx([scores[plan.unit == u].mean() for u in range(plan.n_units)])
    protected = protected_units(plan, means, 1)
    expected = np.flatnonzero(~protected)[np.argsort(means[~protected])][:3]
    assert set(plan.unit[~keep]) == set(expected)


class Branches(nn.Module):
    """A grouped convolution ties the channels of two layers together: the best units may all be of one."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 1)
        self.right = nn.Conv2d(3, 2, 1)
        self.mixed = nn.Conv2d(10, 8, 1, groups=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixed(torch.cat([self.left(x), self.right(x)], 1)))


def test_every_axis_keeps_what_it_needs() -> None:
    plan = build_plan(Branches(), small_inputs())
    assert [g.channels for g in plan.groups] == [8, 10]  # mixed; left and right
    for seed in range(20):
        scores = np.random.default_rng(seed).random(plan.n_channels)
        keep = select(plan, scores, everything(plan), budget(1000), Limits())
        kept = plan.check_keep(keep)
        assert len(kept(plan.tensor("mixed.weight").axes[0].channels)) >= 4  # two in each of two groups
        assert len(kept(plan.tensor("right.weight").axes[0].channels)) >= 1


@pytest.mark.parametrize("name", zoo_names())
def test_asking_for_everything_leaves_a_network(name: str) -> None:
    plan = zoo_plan(name)
    scores = np.random.default_rng(0).random(plan.n_channels)
    keep = select(plan, scores, everything(plan), budget(plan.n_channels), Limits())
    plan.check_keep(keep)
    assert all(left >= 1 for left, _ in zip_groups(plan, keep))
    assert keep.sum() < 0.6 * plan.n_channels


# Any plan, any scores


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_result_is_always_possible(data: st.DataObject) -> None:
    plan = zoo_plan(data.draw(st.sampled_from(zoo_names())))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties
    scores = rng.integers(0, levels, plan.n_channels).astype(np.float64)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    capped = data.draw(st.booleans())
    limits = Limits(
        data.draw(st.sampled_from(["global", "local"])),
        data.draw(st.sampled_from([1, 2, 4, 8])),
        data.draw(st.sampled_from([1, 2, 7])),
        steps={g.root: 4 for g in plan.groups[::3]} if data.draw(st.booleans()) else {},
        least={g.root: g.channels - g.channels // 2 for g in plan.groups[::2]} if capped else {},
    )
    eligible = np.isin(plan.group_of, np.flatnonzero(rng.random(len(plan.groups)) < 0.8))
    gone = select(plan, scores, eligible, budget(plan.n_channels // 5), Limits()) == 0
    if data.draw(st.booleans()):
        scores[gone] = -np.inf
    else:
        gone[:] = False
    sizes = {g.root: g.channels for g in plan.groups} | {None: plan.n_channels}

    def asked(root: str | None) -> int:
        own = plan.group_of == next((i for i, g in enumerate(plan.groups) if g.root == root), -1)
        return max(int(sizes[root] * share), int(gone[own if root else slice(None)].sum()))

    limit = data.draw(st.sampled_from([0.0, 0.5, 0.9])) * plan.macs()
    enough = data.draw(st.sampled_from([None, lambda keep: plan.macs(keep) <= limit]))
    keep = select(plan, scores, eligible, asked, limits, enough)

    plan.check_keep(keep)
    assert keep[~eligible].all()
    assert not keep[gone].any()
    np.testing.assert_array_equal(keep, select(plan, scores, eligible, asked, limits, enough))
    for group, (left, full) in zip(plan.groups, zip_groups(plan, keep), strict=True):
        own = slice(group.start, group.stop)
        before = full - int(gone[own].sum())
        units, units_before = (len(np.unique(plan.unit[own][alive[own]])) for alive in (keep, ~gone))
        assert units >= min(limits.min_channels, units_before)
        assert left == before or left % limits.step(group) == 0
        assert units == units_before or left >= limits.least.get(group.root, 0)
        if limits.ranking == "local" and limits.step(group) == 1:
            assert full - left <= asked(group.root)
    coarsest = max(limits.step(group) for group in plan.groups)
    if limits.ranking == "global":
        over = (~keep).sum() - max(asked(None), gone.sum())
        assert over <= 0 if coarsest == 1 else over <= math.lcm(coarsest, 8) // 2 + plan.n_channels // plan.n_units


# Which groups the user wants pruned


def reasons(model: nn.Module, wanted: list[str] | None, ignored: list[str | nn.Module] | None) -> dict[str, str]:
    plan = build_plan(model, small_inputs())
    eligible, skipped = Scope(model, wanted, ignored).apply(plan)
    for group in plan.groups:
        assert eligible[group.start : group.stop].all() == (group.root not in dict(skipped))
    return dict(skipped)


def test_layers_are_named_or_given() -> None:
    model = Small()
    assert reasons(model, None, None) == {}
    assert reasons(model, None, ["inner"]) == {"inner": "inner is in ignored_layers"}
    assert reasons(model, None, [model.inner]) == {"inner": "inner is in ignored_layers"}
    assert reasons(model, None, ["stem"]) == {"outer": "stem is in ignored_layers"}
    assert reasons(model, None, ["norm"]) == {"outer": "norm is in ignored_layers"}
    assert reasons(model, ["inner"], None) == {"outer": "not in layers_to_prune"}
    assert reasons(model, ["stem", "outer"], None) == {"inner": "not in layers_to_prune"}
    assert reasons(model, ["stem", "inner"], None) == {
        "outer": "stem shares its channels with outer, which is not in layers_to_prune"
    }


def test_a_name_covers_everything_under_it_and_nothing_beside_it() -> None:
    model = nn.Sequential()
    model.add_module("a", nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)))
    model.add_module("ab", nn.Conv2d(4, 4, 1))
    model.add_module("out", nn.Conv2d(4, 2, 1))
    assert reasons(model, ["a"], None) == {"ab": "not in layers_to_prune"}
    assert reasons(model, None, ["a"]) == {"a.0": "a.0 is in ignored_layers", "a.1": "a.1 is in ignored_layers"}


@pytest.mark.parametrize(
    ("wanted", "ignored", "message"),
    [
        (["steam"], None, r"layers_to_prune: 'steam' matches no layer of the model; did you mean 'stem'\?"),
        (None, ["iner"], r"ignored_layers: 'iner' matches no layer .*did you mean 'inner'"),
        ([3], None, r"layers_to_prune: 3 matches no layer"),
        ([], None, r"layers_to_prune: expected at least one name, got an empty list"),
        ("stem", None, r"layers_to_prune: expected a list of layers, got 'stem'; put it in brackets"),
        (None, nn.Linear(2, 2), r"ignored_layers: expected a list of layers, got Linear"),
        (None, [nn.Linear(2, 2)], r"ignored_layers: Linear is not a part of the model"),
        (7, None, r"layers_to_prune: expected a list of layers, got int"),
    ],
)
def test_layers_that_do_not_exist(wanted: object, ignored: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scope(Small(), wanted, ignored)
