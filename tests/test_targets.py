"""Targets in channels, parameters and MACs: hit, refused with what is feasible, and true to the pruned model."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import pat_fast as pat
from benchmarks.models.attention import ViT
from pat_fast.limits import Rules
from pat_fast.measure import count_macs
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.plan.running import call
from pat_fast.surgery import prune
from pat_fast.targets import Goal, Target
from tests.helpers import Case, Small, random_keep, small_inputs
from tests.training import adamw, steps, train_one_epoch

NAMES = ["resnet18", "mobilenet_v2", "resnext50", "vgg16_bn", "densenet121", "vit_s16"]


def test_macs_of_the_plan_are_those_of_the_pruned_model(case: Case) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    for seed in range(2):
        keep = random_keep(binding.plan, seed)
        expected = binding.plan.macs(keep), binding.plan.params(keep)
        binding = prune(binding, keep)
        assert (binding.plan.macs(), binding.plan.params()) == expected
        # The counter does not know the fused attention of the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            call(case.model.eval(), case.inputs)
        batch = next(len(t) for t in tree_leaves(case.inputs) if isinstance(t, Tensor))
        assert expected[0] == pytest.approx(counter.get_total_flops() / 2 / batch, abs=1)
        assert expected[1] == sum(p.numel() for p in case.model.parameters())


def test_fused_attention_is_counted_where_macs_are_measured() -> None:
    model = ViT(image=8, patch=2, dim=64, depth=2, num_heads=4, head_dim=16, hidden=128, num_classes=10)
    images = torch.randn(2, 3, 8, 8)
    assert count_macs(model, images) == build_plan(model, images).macs()


def dearest_unit(plan: pat.Plan, kind: str) -> int:
    """The most that the removal of one unit saves."""
    count = getattr(plan, kind)
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    return max(count() - count(everything & (plan.unit != u)) for u in range(plan.n_units))


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("name", NAMES)
def test_a_target_is_met_by_the_fewest_removals(name: str, kind: str, ranking: str) -> None:
    case = Case.build(name, torch.float32)
    plan = build_plan(case.model, case.inputs)
    goal = Goal(Target(kind, 0.6), None, Rules(ranking))
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    goal.start(bind(plan, case.model), everything)
    goal.check(plan, everything)
    scores = np.random.default_rng(0).random(plan.n_channels)
    keep = goal.select(plan, scores, everything, everything, 1.0)
    dense, left = getattr(plan, kind)(), getattr(plan, kind)(keep)
    assert left <= 0.6 * dense
    assert left > 0.6 * dense - max(0.01 * dense, dearest_unit(plan, kind))
    half = goal.select(plan, scores, everything, everything, 0.5)
    assert (
        getattr(plan, kind)(half)
        <= 0.8 * dense
        < getattr(plan, kind)(half) + max(0.01 * dense, dearest_unit(plan, kind))
    )


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg16_bn", "densenet121"])
def test_a_rounded_target_is_met_to_one_rounding_unit(name: str) -> None:
    case = Case.build(name, torch.float32)
    plan = build_plan(case.model, case.inputs)
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    goal = Goal(Target("macs", 0.6), None, Rules(round_to=4))
    goal.start(bind(plan, case.model), everything)
    keep = goal.select(plan, np.random.default_rng(0).random(plan.n_channels), everything, everything, 1.0)
    coarsest = 0
    for group in plan.groups:  # four channels more of one group, of those that went
        gone = np.flatnonzero(~keep[group.start : group.stop])[:4] + group.start
        more = keep.copy()
        more[gone] = True
        coarsest = max(coarsest, plan.macs(more) - plan.macs(keep))
        left = int(keep[group.start : group.stop].sum())
        assert left % 4 == 0 or left == group.channels
    assert 0 <= 0.6 * plan.macs() - plan.macs(keep) <= max(0.01 * plan.macs(), coarsest)


@pytest.mark.parametrize("mode", ["prune", "mask"])
@pytest.mark.parametrize("target", [{"macs": 0.4}, {"params": 0.4}, {"params": 2000}, {"macs": 90000}])
def test_targets_in_training(target: dict[str, float], mode: str) -> None:
    model = Small()
    optimizer = adamw(model)
    pruner = pat.Pruner(model, target=target, mode=mode, end_epoch=4, schedule="linear")
    kind, value = next(iter(target.items()))
    seen = []
    for _ in range(5):
        train_one_epoch(model, optimizer)
        seen.append(pruner.step())
    pruner.finalize()
    last = seen[-1]
    dense = getattr(last, f"dense_{kind}")
    wanted = value * dense if value <= 1 else value
    for epoch, report in enumerate(seen[:4], 1):
        due = dense - (dense - wanted) * epoch / 4
        assert getattr(report, kind)[1] <= due
        assert getattr(report, kind)[1] > due - 0.1 * dense  # a unit of a network this small
        assert report.ratio == pytest.approx((1 - wanted / dense) * epoch / 4)
    assert sum(p.numel() for p in model.parameters()) == last.params[1]
    assert pruner.stage == "finetune"


def test_a_target_with_round_to_is_met_and_rounded() -> None:
    model = Small(width=40)
    report = steps(model, 1, target={"macs": 0.5}, schedule="one_shot", round_to=8)[0]
    assert report.macs[1] <= 0.5 * report.dense_macs
    assert (model.stem.out_channels % 8, model.inner.out_channels % 8) == (0, 0)


def test_a_target_in_channels_is_the_sparsity() -> None:
    one, two = Small(), Small()
    two.load_state_dict(one.state_dict())
    first = steps(one, 1, target={"channels": 0.3}, schedule="one_shot")[0]
    second = steps(two, 1, target_sparsity=0.3, schedule="one_shot")[0]
    assert first == second


def test_ties_never_take_more_than_is_due() -> None:
    def alike(binding: Binding) -> Tensor:
        return torch.ones(binding.plan.n_channels)

    for count in (1, 5, 13):
        report = steps(Small(), 1, target_sparsity=count / 28, schedule="one_shot", importance=alike)[0]
        assert report.channels == (28, 28 - count)
    model, again = Small(), Small()
    again.load_state_dict(model.state_dict())
    for m in (model, again):
        report = steps(m, 1, target={"params": 0.7}, schedule="one_shot", importance=alike)[0]
        assert 0.6 * report.dense_params < report.params[1] <= 0.7 * report.dense_params
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_what_cannot_be_reached_is_refused_with_what_can(kind: str) -> None:
    model = Small()
    optimizer = adamw(model)
    options: dict[str, Any] = {"example_inputs": small_inputs(), "min_channels": 6, "schedule": "one_shot"}
    before = [p.detach().clone() for p in model.parameters()]
    pruner = pat.Pruner(model, target={kind: 0.01}, optimizer=optimizer, **options)
    with pytest.raises(pat.ConfigError, match=r"target: expected at least [\d,]+ .* lower min_channels") as caught:
        train_one_epoch(model, optimizer, batches=1)  # before anything was trained
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    pruner.close()
    found = re.search(r"\(([\d.]+) of", str(caught.value))
    assert found is not None
    report = steps(model, 1, target={kind: float(found[1])}, min_channels=6, schedule="one_shot")[0]
    assert (model.stem.out_channels, model.inner.out_channels) == (6, 6)
    assert getattr(report, kind)[1] <= float(found[1]) * getattr(report, f"dense_{kind}")


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_target_above_the_dense_model_is_refused(kind: str) -> None:
    pruner = pat.Pruner(Small(), target={kind: 10**9}, example_inputs=small_inputs(), verify=False)
    with pytest.raises(pat.ConfigError, match=r"fewer than the [\d,]+ of the dense model.*nothing would be pruned"):
        pruner.step()


def test_a_criterion_that_leaves_groups_unscored_may_make_a_target_impossible() -> None:
    pruner = pat.Pruner(
        Small(), target={"params": 0.05}, importance="bn_scale", example_inputs=small_inputs(), schedule="one_shot"
    )
    with pytest.raises(pat.PlanError, match="stay with what the criterion scores highest, or not at all"):
        pruner.step()
    assert pruner.epoch == 0


def test_a_resumed_target_goes_by_the_dense_model() -> None:
    model = Small(16)
    first = pat.Pruner(model, target={"macs": 0.3}, end_epoch=2, example_inputs=small_inputs())
    first.step()
    second = pat.Pruner(model, target={"macs": 0.3}, end_epoch=2, example_inputs=small_inputs())
    second.load_state_dict(first.state_dict())
    report = second.step()
    assert report.dense_macs == first.goal.dense[2]
    assert 0.2 * report.dense_macs < report.macs[1] <= 0.3 * report.dense_macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"flops": 0.5}}, r"target: expected one of channels, params, .* got 'flops'"),
        ({"target": {"macs": 0.5, "params": 0.5}}, r"target: expected one of .* got \{'macs'"),
        ({"target": 0.5}, r"target: expected one of .* got 0.5"),
        ({"target": {"macs": 0}}, r"target: macs: expected a fraction of the dense model in \(0, 1\], or .* got 0"),
        ({"target": {"channels": 1.0}}, r"target: channels: expected the fraction to remove"),
        ({"target": {"macs": 0.5}, "target_sparsity": 0.3}, r"expected none beside target_sparsity \(0.3\)"),
        ({"target": {"params": 0.5}, "mac_target": 0.5}, r"mac_target: expected None beside a target in parameters"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pat.ConfigError, match=message):
        pat.Pruner(nn.Linear(2, 2), end_epoch=2, **options)


def test_channels_of_a_last_head_are_counted() -> None:
    """A budget in channels is exact after a group has come down to one head, which leaves the plan."""
    torch.manual_seed(0)
    model = ViT(image=8, patch=2, dim=16, depth=1, num_heads=2, head_dim=6, hidden=12, num_classes=3)
    options = {"target_sparsity": 0.5, "ranking": "local", "end_epoch": 2, "regularizer": None}
    pruner = pat.Pruner(model, example_inputs=torch.randn(2, 3, 8, 8), **options)
    dense = pruner.goal.dense[0]
    pruner.step()
    pruner.step()
    assert model.blocks[0].attn.q.out_features == 6
    alive = np.ones(pruner.plan.n_channels, dtype=np.bool_)
    assert pruner.plan.lone() == {"blocks.0.attn.v": 12}
    assert pruner.goal.counts(pruner.plan, alive)[0] == pruner.plan.n_channels + 12 == dense // 2


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("value", [0.5, 0.25, 0.125])
def test_a_target_is_met_within_a_percent_where_heads_go(kind: str, value: float) -> None:
    """The last head that goes frees more than is needed; what is smaller and went before it stays then."""
    model = ViT(image=16, patch=4, dim=96, depth=3, num_heads=4, head_dim=16, hidden=256, num_classes=10)
    plan = build_plan(model, torch.randn(1, 3, 16, 16))
    goal = Goal(Target(kind, value), None, Rules())
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    goal.start(bind(plan, model), everything)
    for seed in range(5):
        keep = goal.select(plan, np.random.default_rng(seed).random(plan.n_channels), everything, everything, 1.0)
        assert 0.99 < getattr(plan, kind)(keep) / (value * getattr(plan, kind)()) <= 1


def test_small_units_are_spared_though_many_large_ones_lie_in_between() -> None:
    model = ViT(image=8, patch=2, dim=64, depth=4, num_heads=4, head_dim=16, hidden=128, num_classes=10)
    plan = build_plan(model, torch.randn(1, 3, 8, 8))
    scores = np.full(plan.n_channels, 4.0)
    for group in plan.groups:  # hidden units go first, then the residual stream, then heads
        if "fc1" in group.root:
            scores[group.start : group.start + 60] = 1.0
        elif group.channels == 64 and "attn" not in group.root:
            scores[group.start : group.start + 30] = 2.0
        elif "attn" in group.root:
            scores[group.start : group.stop] = 3.0
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    before_heads = plan.macs(scores > 2.0)
    limit = before_heads - plan.macs() // 1000  # a thousandth is due, and a head is far more
    goal = Goal(Target("macs", limit), None, Rules())
    goal.start(bind(plan, model), everything)
    keep = goal.select(plan, scores, everything, everything, 1.0)
    assert 0.995 < plan.macs(keep) / limit <= 1


@pytest.mark.parametrize("round_to", [None, 8])
def test_a_head_stays_where_less_is_due(round_to: int | None) -> None:
    """It ranks lowest, but frees far more than the target asks: the next ones that are smaller go."""
    model = ViT(image=8, patch=2, dim=64, depth=2, num_heads=4, head_dim=16, hidden=128, num_classes=10)
    plan = build_plan(model, torch.randn(1, 3, 8, 8))
    scores = np.full(plan.n_channels, 2.0)
    heads = next(g for g in plan.groups if "attn" in g.root)
    scores[heads.start : heads.stop] = 1.0
    everything = np.ones(plan.n_channels, dtype=np.bool_)
    goal = Goal(Target("macs", 0.96), None, Rules(round_to=round_to))
    goal.start(bind(plan, model), everything)
    keep = goal.select(plan, scores, everything, everything, 1.0)
    assert keep[heads.start : heads.stop].all()
    assert (0.99 if round_to is None else 0.97) < plan.macs(keep) / (0.96 * plan.macs()) <= 1
    # A part of the target may be overshot as far as the whole of it allows.
    keep = goal.select(plan, scores, everything, everything, 0.1)
    assert plan.macs(keep) < 0.99 * plan.macs()
