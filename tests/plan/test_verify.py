"""Lying maps are caught, by the rehearsal and the permutation test, which names the group; hard-coded shapes, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pat_fast as pat
from benchmarks.zoo import ZOO
from pat_fast.dry_run import dry_run
from pat_fast.plan import Plan, TensorMap, build_plan
from pat_fast.plan.double import in_single
from pat_fast.plan.running import Still
from pat_fast.plan.types import Kept
from pat_fast.plan.verify import ANOTHER, bisect, channel_order, draw, verify
from pat_fast.rehearsal import Rehearsal, _Places, rehearse
from tests.helpers import Case, small_inputs


def test_plans_of_the_zoo_prove_themselves(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    before = [p.detach().clone() for p in case.model.parameters()]
    found = verify(plan, case.model, case.inputs)
    assert found.wrong == ()
    assert found.error < 1e-10
    assert found.forwards == 3
    assert dry_run(plan, case.model, case.inputs, found.shapes) == {}
    assert rehearse(plan, case.model, case.inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


def test_a_proof_leaves_gradients_alone(case: Case) -> None:
    """It takes a backward, which must not reach what the plan has no map of (the last bias, say)."""
    given = {name: torch.randn_like(p) for i, (name, p) in enumerate(case.model.named_parameters()) if i % 2}
    for name, p in case.model.named_parameters():
        p.grad = given[name].clone() if name in given else None
        p.register_hook(lambda grad: pytest.fail("a hook of the model saw the gradient of a proof"))
    pat.build_plan(case.model, case.inputs)
    for name, p in case.model.named_parameters():
        assert (p.grad is None) == (name not in given), name
        assert name not in given or torch.equal(p.grad, given[name]), name


def change(plan: Plan, number: int, axis: int, channels: np.ndarray) -> Plan:
    """``plan`` with the channels of one axis of one tensor replaced."""
    tensors = list(plan.tensors)
    axes = list(tensors[number].axes)
    axes[axis] = replace(axes[axis], channels=channels.astype(np.int32))
    tensors[number] = tensors[number]._replace(axes=tuple(axes))
    return replace(plan, tensors=tuple(tensors))


def free(tensor: TensorMap, axis: int) -> bool:
    """An axis whose channels are all free and distinct: each mutation of it is a lie."""
    channels = tensor.axes[axis].channels
    return len(channels) >= 4 and (channels >= 0).all() and len(np.unique(channels)) == len(channels)


def shifted(channels: np.ndarray) -> np.ndarray:
    return np.roll(channels, 1)


def swapped(channels: np.ndarray) -> np.ndarray:
    half = len(channels) // 2
    return np.concatenate([channels[half : 2 * half], channels[:half], channels[2 * half :]])


def missing(channels: np.ndarray) -> np.ndarray:
    return np.full_like(channels, -1)


def repeated(channels: np.ndarray) -> np.ndarray:
    wrong = channels.copy()
    wrong[0], wrong[1] = channels[1], channels[1]
    return wrong


LIES = [shifted, swapped, missing, repeated]


def spots(plan: Plan) -> list[tuple[int, int]]:
    """Axes that can be lied about: (tensor, axis)."""
    whole = np.bincount(plan.unit)  # only groups of single-channel units: elsewhere a lie may be a harmless one
    return [
        (i, j)
        for i, tensor in enumerate(plan.tensors)
        for j, axis in enumerate(tensor.axes)
        if tensor.is_parameter and tensor.groups == 1 and free(tensor, j)
        if (whole[plan.unit[axis.channels]] == 1).all()
    ]


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_map_is_caught_and_its_group_named(case: Case, lie: Callable[[np.ndarray], np.ndarray]) -> None:
    plan = build_plan(case.model, case.inputs)
    rng = np.random.default_rng(len(case.name))
    places = spots(plan)
    if not places:
        pytest.skip("every axis of this model belongs to units of several channels")
    i, j = places[rng.integers(len(places))]
    channels = plan.tensors[i].axes[j].channels
    lying = change(plan, i, j, lie(channels))
    proof = verify(lying, case.model, case.inputs)
    found = set(proof.wrong)
    if not found:  # a wrong repeat makes units that change places with nobody: they break when one is removed
        found = set(dry_run(lying, case.model, case.inputs, proof.shapes))
    where = f"{lie.__name__} {plan.tensors[i].name} dim {plan.tensors[i].axes[j].dim}"
    assert found, where
    assert found <= set(plan.group_of[channels].tolist()), where
    assert not rehearse(lying, case.model, case.inputs), where


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_no_lie_about_any_axis_passes_the_rehearsal(case: Case, lie: Callable[[np.ndarray], np.ndarray]) -> None:
    plan = build_plan(case.model, case.inputs)
    for i, j in spots(plan):
        lying = change(plan, i, j, lie(plan.tensors[i].axes[j].channels))
        assert not rehearse(lying, case.model, case.inputs), (plan.tensors[i].name, j)


def test_lone_channels_are_told_apart() -> None:
    """Three channels that are each of their own kind: wrong repeats that no permutation moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(5, 4)
    honest = build_plan(model, x)
    assert rehearse(honest, model, x)
    number = next(i for i, t in enumerate(honest.tensors) if t.name == "2.weight")
    for wrong in ([0, 1, 2, 3, 4, 4, 6], [0, 0, 1, 1, 4, 5, 6], [-1, 1, 2, 3, 4, 5, 6], [0, 1, 0, 3, 0, 5, 6]):
        assert not rehearse(change(honest, number, 0, np.array(wrong)), model, x), wrong


def test_places_that_are_found_at_once_are_those_found_one_by_one(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    test = Rehearsal(plan, case.model, [case.inputs], 0)
    keep = test.few(0)
    kept, moves = Kept(keep, plan.vectors), test._moves(keep)
    places, seen = _Places(kept, moves), 0
    for _, axis in plan.axes():
        vector = channel_order(axis, moves, {})[kept(axis.channels)]
        seen += id(axis.channels) in places._found
        found, index = places._axis(axis.channels, axis)
        np.testing.assert_array_equal(found, vector)
        if index is None:
            np.testing.assert_array_equal(vector, np.arange(len(axis.channels)))
        else:
            np.testing.assert_array_equal(index.numpy(), vector)
    assert seen or not plan.groups


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_rehearsal_writes_nothing_and_says_no_to_what_it_cannot_see() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = small_inputs()
    plan = build_plan(model, x)
    state = {n: (t, t._version, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    assert rehearse(plan, model, x)
    for name, tensor in model.state_dict(keep_vars=True).items():
        same, version, before = state[name]
        assert (tensor is same, tensor._version) == (True, version), name
        assert torch.equal(tensor, before), name
    assert (model[0].out_channels, model.training) == (8, True)
    assert not rehearse(plan, torch.jit.script(model), x)


def test_smaller_inputs_are_tried_first() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6 * 64, 2)
            self.sides: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            SIDES.append(x.shape[-1])
            return self.fc(self.conv(x).flatten(1))

    SIDES: list[int] = []
    model, x = Fixed(), small_inputs()
    plan = build_plan(model, x)
    SIDES.clear()
    assert rehearse(plan, model, x, x[..., :4, :4])
    assert SIDES == [4, 8, 8]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_lie_about_a_large_table_is_caught(tied: bool, lie: Callable[[np.ndarray], np.ndarray]) -> None:
    """Its rows overlap in memory, and it is multiplied where it is tied to the head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12000, 16), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16, bias=False))
    model.append(nn.Linear(16, 12000, bias=False))
    if tied:
        model[4].weight = model[0].weight
    x = torch.randint(0, 12000, (2, 5))
    plan = build_plan(model, x)
    assert rehearse(plan, model, x)
    for i, j in spots(plan):
        lying = change(plan, i, j, lie(plan.tensors[i].axes[j].channels))
        assert not rehearse(lying, model, x), (plan.tensors[i].name, j)


class WrittenOut(nn.Module):
    """A layer norm, PyTorch's or written out, and a count of forwards."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(6, 16), nn.Linear(16, 3), nn.LayerNorm(16)
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        FORWARDS.append(1)
        x = self.a(x)
        if not self.written_out:
            return self.b(self.norm(x))
        x = x - x.mean(-1, keepdim=True)
        return self.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.norm.weight + self.norm.bias)


FORWARDS: list[int] = []


@pytest.mark.parametrize("written_out", [False, True])
def test_a_statistic_that_is_written_out_takes_a_third_forward(written_out: bool) -> None:
    torch.manual_seed(0)
    model, x = WrittenOut(written_out), torch.randn(4, 6)
    plan = build_plan(model, x)
    assert [g.statistic is not None for g in plan.groups] == [True]
    FORWARDS.clear()
    assert rehearse(plan, model, x)
    assert len(FORWARDS) == 2 + written_out
    number = next(i for i, t in enumerate(plan.tensors) if t.name == "norm.bias")
    for lie in LIES:
        assert not rehearse(change(plan, number, 0, lie(plan.tensors[number].axes[0].channels)), model, x), lie


class Narrow(torch.autograd.Function):
    """Its backward has a size in the code."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad.view(-1, 16)


class Backward(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(6, 16), nn.Linear(16, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.how == "function":
            x = Narrow.apply(x)
        elif x.requires_grad:
            x.register_hook(lambda grad: grad.view(-1, 16))
        return self.b(x)


@pytest.mark.parametrize("how", ["function", "hook"])
def test_a_size_in_the_code_of_a_backward_is_found(how: str) -> None:
    plan = pat.build_plan(Backward(how), torch.randn(4, 6))
    assert plan.n_channels == 0
    assert "does not run when it is smaller" in next(f.reason for f in plan.frozen if f.layer == "a")


def test_lying_groups_are_frozen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    honest = build_plan(model, x)
    number = next(i for i, t in enumerate(honest.tensors) if t.name == "0.bias")
    lying = change(honest, number, 0, np.roll(honest.tensors[number].axes[0].channels, 1))
    monkeypatch.setattr("pat_fast.proof.lower", lambda *_: lying)
    plan = pat.build_plan(model, x)
    assert [g.root for g in plan.groups] == ["2"]
    assert ("0", "map does not hold") in [(f.layer, f.reason[4:21]) for f in plan.frozen]
    assert plan.params() == honest.params()
    assert plan.macs() == honest.macs()


@pytest.mark.parametrize("training", [False, True])
def test_any_plan_can_be_put_to_the_proof_at_any_time(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train(training)
    x = torch.randn(5, 4)
    pruner = pat.Pruner(model, target_sparsity=0.5, end_epoch=1, example_inputs=x)
    for _ in range(2):
        pruner.step()
    before = [p.clone() for p in model.parameters()]
    honest = pruner.plan.verify(model, x)
    assert [g.root for g in honest.groups] == [g.root for g in pruner.plan.groups] == ["2", "0"]
    assert honest.notes[-1].startswith("verified in")
    number = next(i for i, t in enumerate(honest.tensors) if t.name == "0.bias")
    lying = change(honest, number, 0, np.roll(honest.tensors[number].axes[0].channels, 1))
    assert [g.root for g in lying.verify(model, x).groups] == ["2"]
    assert model.training == training
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(pat.PlanError, match=r"0.weight: the plan expects shape \(., 4\), the model has shape \(9, 4\)"):
        honest.verify(nn.Sequential(nn.Linear(4, 9)), x)
    with pytest.raises(pat.PlanError, match="forward fails on the example inputs: RuntimeError"):
        honest.verify(model, torch.randn(5, 7))


def tf32() -> list[Any]:
    """All that says whether TF32 is allowed, in both of PyTorch's ways to say it."""
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    found: list[Any] = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision]
    for read in (lambda: cudnn.allow_tf32, lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:  # it was set in the other way
            found.append(None)
    return found


@pytest.mark.parametrize("setting", ["default", "high", "medium", "off", "conv"])
def test_a_proof_allows_no_tf32_and_leaves_what_was_allowed(setting: str) -> None:
    cudnn: Any = torch.backends.cudnn
    at_first = cudnn.conv.fp32_precision
    try:
        if setting == "off":
            cudnn.allow_tf32 = False
        elif setting == "conv":
            cudnn.conv.fp32_precision = "ieee"
        elif setting != "default":
            torch.set_float32_matmul_precision(setting)
        before = tf32()
        with in_single():
            assert not {"tf32", True, "high", "medium"} & set(tf32())
        assert tf32() == before
    finally:
        cudnn.conv.fp32_precision = at_first
        cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "densenet121", "vit_s16"])
def test_a_gpu_proves_at_once_what_a_cpu_does(name: str) -> None:
    """Products rounded to TF32 once moved the outputs by more than a right plan may."""
    model = ZOO[name].small().eval()
    x = ZOO[name].example(True)
    expected = pat.build_plan(model, x)
    plan = pat.build_plan(model.cuda(), tuple(t.cuda() for t in x))
    assert [g.root for g in plan.groups] == [g.root for g in expected.groups]
    assert plan.n_channels == expected.n_channels
    assert "group by group" not in plan.notes[-1]


def test_units_change_places_as_a_whole() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3), nn.Conv2d(12, 2, 1))
    plan = build_plan(model, small_inputs())
    permutation = draw(plan, np.random.default_rng(0))
    assert (permutation != np.arange(plan.n_channels)).all()
    for unit in range(plan.n_units):
        assert len(np.unique(plan.unit[permutation[plan.unit == unit]])) == 1


def test_bisection_finds_the_guilty_and_sets_that_fail_together() -> None:
    assert bisect(list(range(9)), lambda g: bool({3, 7} & set(g))) == [3, 7]
    assert bisect(list(range(4)), lambda g: {0, 3} <= set(g)) == [0, 1, 2, 3]


class HardCoded(nn.Module):
    """A flatten with its size in the code, and a layer that can shrink all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.hidden = nn.Conv2d(6, 8, 1)
        self.fc = nn.Linear(8 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.first(x)).view(-1, 8 * 64))


class SplitByNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).split(4, 1)
        return self.last(a * b)


def test_a_size_in_the_code_is_found_by_the_dry_run() -> None:
    plan = pat.build_plan(HardCoded(), small_inputs())
    assert [g.root for g in plan.groups] == ["first"]
    reason = next(f.reason for f in plan.frozen if f.layer == "hidden")
    assert "does not run when it is smaller (RuntimeError: shape '[-1, 512]' is invalid" in reason, reason
    plan = pat.build_plan(SplitByNumber(), small_inputs())
    assert plan.n_channels == 0
    assert "does not run when it is smaller" in next(f.reason for f in plan.frozen if f.layer == "first")


def test_verification_can_be_left_out_and_says_what_it_cost() -> None:
    assert any("verified in" in note for note in pat.build_plan(HardCoded(), small_inputs()).notes)
    with pytest.raises(pat.ConfigError, match="verify: expected true or false, got 0"):
        pat.build_plan(HardCoded(), small_inputs(), verify=0)  # type: ignore[arg-type]
    unproven = pat.build_plan(HardCoded(), small_inputs(), verify=False)
    assert [g.root for g in unproven.groups] == ["hidden", "first"]


def test_single_precision_code_is_verified_coarsely() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.b(hidden @ torch.eye(6) if hidden.dtype != torch.float32 else hidden)

    plan = pat.build_plan(Insists(), torch.randn(3, 4))
    assert [g.root for g in plan.groups] == ["a"]
    assert any("verified in" in note for note in plan.notes)


def test_what_one_draw_of_a_small_group_hides_another_shows() -> None:
    """Halves that are swapped, where only three of four channels stay: for some draws the two look alike."""
    case = Case.build("googlenet", torch.float64)
    plan = build_plan(case.model, case.inputs)
    name = "stages.4.branch4.1.0.weight"
    number = next(i for i, t in enumerate(plan.tensors) if t.name == name)
    for axis in range(2):
        lying = change(plan, number, axis, swapped(plan.tensors[number].axes[axis].channels))
        assert not any(rehearse(lying, case.model, case.inputs, seed=seed) for seed in range(12))


class OnlyTogether(nn.Module):
    """Does not run if ``a`` and ``b`` come to be of one width below 16; and ``d`` is of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 16), nn.Linear(3, 16), nn.Linear(40, 2), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if a.shape[-1] == b.shape[-1] != 16:
            raise ValueError("two of one width")
        return self.c(torch.cat([a, b, self.d(x).reshape(2, 8)], -1))


class OneWidth(nn.Module):
    """Another path where two layers come to be of one width below 16."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fails = nn.Linear(3, 16), nn.Linear(3, 16), nn.Linear(32, 2), fails

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        if a.shape == b.shape and a.shape[-1] != 16:
            if self.fails:
                raise ValueError("two of one width")
            a = 2 * a
        return self.c(torch.cat([a, b], -1))


@pytest.mark.parametrize("fails", [True, False])
def test_what_happens_at_equal_widths_alone_is_found(fails: bool) -> None:
    model, x = OneWidth(fails), torch.randn(2, 3)
    still = Still(model)
    plan = build_plan(model, x, still)
    assert (len(plan.groups), still.compares) == (2, True)
    assert not rehearse(plan, model, x, still=still)
    if fails:
        assert [g.root for g in pat.build_plan(model, x).groups] == ["a"]


def test_groups_that_fail_only_together_are_not_all_kept() -> None:
    plan = pat.build_plan(OnlyTogether(), torch.randn(2, 3))
    assert [g.root for g in plan.groups] == ["a"]
    frozen = {f.layer: f.reason for f in plan.frozen}
    assert frozen["b"] == (
        "the model does not run when it is smaller together with others (ValueError: two of one width)"
    )
    assert "[2, 8]" in frozen["d"]


def test_a_width_made_a_plain_number_is_found_beside_norms_over_channels() -> None:
    """The scale of this attention goes with its width, a little, and the dry run has random weights against it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16)
            self.q, self.k, self.v = (nn.Conv2d(16, width, 1) for width in (32, 32, 16))
            self.out = nn.Conv2d(16, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.stem(x))
            q, k, v = (layer(y).flatten(2) for layer in (self.q, self.k, self.v))
            w = torch.bmm(q.mT, k) * int(q.shape[1]) ** -0.5
            return self.out(y + torch.bmm(v, w.softmax(2).mT).view_as(y))

    torch.manual_seed(0)
    plan = pat.build_plan(Attention(), torch.randn(2, 3, 6, 6))
    assert {f.layer: f.reason for f in plan.frozen if f.layer != "out"} == {"k": ANOTHER}
    assert [g.root for g in plan.groups] == ["stem"]
