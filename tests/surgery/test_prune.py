"""Surgery keeps a running training alive, and masked equals pruned, step for step."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.optim import Optimizer

import pat_fast as pat
from pat_fast.masks import Mask
from pat_fast.plan import bind, build_plan
from pat_fast.plan.running import call
from pat_fast.plan.types import Kept
from pat_fast.surgery import journal
from pat_fast.surgery.prune import dense_strides, prune, prune_checked
from pat_fast.surgery.record import records
from tests.helpers import Case, Small, random_keep, small_inputs

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
}


def train_step(model: nn.Module, optimizer: Optimizer, inputs, seed: int) -> float:
    torch.manual_seed(seed)
    model.train()
    out = call(model, inputs)
    loss = nn.functional.cross_entropy(out.flatten(0, -2), torch.randint(0, out.shape[-1], out.shape[:-1]).flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("resnet18", "sgd"), ("resnet18", "adam"), ("resnet18", "adamw")]
    + [(n, "sgd") for n in ("vgg16_bn", "densenet121", "mobilenet_v2", "resnext50", "se_resnet18")],
)
def test_masked_and_pruned_follow_the_same_trajectory(name: str, optimizer: str) -> None:
    """20 steps in float64 with two prunes in between, the regulariser on: 1e-9."""
    case = Case.build(name)
    inputs = case.inputs
    pruned, masked = case.model, copy.deepcopy(case.model)
    optimizers = [OPTIMIZERS[optimizer](m) for m in (pruned, masked)]
    pruners = [
        pat.Pruner(
            model, 0.4, example_inputs=inputs, optimizer=opt, mode=mode, end_epoch=2, reg_strength=1e-3
        )
        for model, opt, mode in zip((pruned, masked), optimizers, ("prune", "mask"), strict=True)
    ]
    for step in range(20):
        losses = [train_step(m, o, inputs, step) for m, o in zip((pruned, masked), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        if step in (6, 13):
            reports = [p.step() for p in pruners]
            assert reports[0].channels == reports[1].channels
            assert reports[0].macs == reports[1].macs
            assert reports[0].channels[0] > reports[0].channels[1]
    pruners[1].finalize()
    for (key, a), b in zip(pruned.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=key)
        for name_, value in optimizers[0].state[a].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, optimizers[1].state[b][name_], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_twenty_prunes_end_with_the_optimizer_they_began_with(optimizer: str) -> None:
    model = Small(width=40)
    x = small_inputs()
    opt = OPTIMIZERS[optimizer](model)
    parameters = list(model.parameters())
    settings = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    binding = bind(build_plan(model, x), model)
    for step in range(20):
        train_step(model, opt, x, step)
        keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
        keep[[0, binding.plan.groups[-1].start]] = False
        binding = prune(binding, keep, [opt])
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert [p for g in opt.param_groups for p in g["params"]] == parameters
    assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == settings
    assert model.stem.out_channels == 20
    for p in parameters:
        for key, value in opt.state[p].items():
            assert not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == p.shape, key
    before = [p.detach().clone() for p in parameters]
    train_step(model, opt, x, 99)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def some_prune(model: nn.Module, x: torch.Tensor, optimizers=()) -> None:
    plan = build_plan(model, x)
    prune(bind(plan, model), random_keep(plan, 0, ratio=0.5), optimizers)


def test_prune_while_an_old_loss_is_alive() -> None:
    """Autograd keeps the old shape in the gradient accumulator as long as any earlier output lives."""
    model, x = Small(), small_inputs()
    old = model(x).sum()
    old.backward(retain_graph=True)
    other = model(x)
    some_prune(model, x)
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert old.item() == old.item()
    assert other.shape == (4, 5)


class Shifted(Small):
    """Adds a parameter, whose backward needs nothing but the gradient's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(12, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((self.stem(x) + self.shift).mean((2, 3)))


@pytest.mark.parametrize("make", [Small, Shifted])
def test_a_loss_from_before_the_prune_cannot_be_backpropagated(make: Callable[[], nn.Module]) -> None:
    """Its graph would see the weights of now; and a gradient of the old shape would wait for the next step."""
    model, x = make(), small_inputs()
    if make is Shifted:
        for module in (model.stem, model.head):
            module.requires_grad_(False)
    old = model(x).sum()
    some_prune(model, x)
    expected = pat.SurgeryError if make is Shifted else RuntimeError
    message = "computed before the model was pruned" if make is Shifted else "modified by an inplace operation"
    with pytest.raises(expected, match=message):
        old.backward()
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_hooks_of_tensors_stay() -> None:
    model, x = Small(), small_inputs()
    seen = []
    model.stem.weight.register_hook(lambda g: seen.append(tuple(g.shape)))
    model.inner.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    loss = model(x).sum()
    some_prune(model, x)
    del loss
    model(x).sum().backward()
    assert sorted(seen) == sorted([tuple(model.stem.weight.shape), tuple(model.inner.weight.shape)])


def test_gradients_in_flight_are_cut_with_their_weights() -> None:
    model, x = Small().double(), small_inputs(dtype=torch.float64)
    model(x).sum().backward()
    before = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    plan = build_plan(model, x)
    keep = random_keep(plan, 3, ratio=0.5)
    prune(bind(plan, model), keep)
    for tensor_map in plan.tensors:
        if not tensor_map.is_parameter:
            continue
        data, grad = before[tensor_map.name]
        for axis, kept in zip(tensor_map.axes, tensor_map.kept(Kept(keep)), strict=True):
            data = data.index_select(axis.dim, torch.from_numpy(kept))
            grad = grad.index_select(axis.dim, torch.from_numpy(kept))
        now = dict(model.named_parameters())[tensor_map.name]
        assert torch.equal(now, data)
        assert torch.equal(now.grad, grad)


def test_frozen_parameters_shrink_and_stay_frozen() -> None:
    model, x = Small(), small_inputs()
    model.inner.requires_grad_(False)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    train_step(model, opt, x, 0)
    some_prune(model, x, [opt])
    assert not any(p.requires_grad for p in model.inner.parameters())
    assert model.inner.weight.shape[0] < 16
    train_step(model, opt, x, 1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50", "unet"])
def test_channels_last_stays_and_gives_the_same_values(name: str) -> None:
    plain = Case.build(name, torch.float32)
    last = copy.deepcopy(plain.model).to(memory_format=torch.channels_last)
    for model in (plain.model, last):
        plan = build_plan(model, plain.inputs)
        call(model, plain.inputs).sum().backward()
        prune(bind(plan, model), random_keep(plan, 0))
    for (key, a), b in zip(plain.model.named_parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b), key
        if b.ndim == 4 and b.shape[1] > 1 and b.shape[2] > 1:
            assert b.is_contiguous(memory_format=torch.channels_last), key
            assert b.stride() == dense_strides(b.shape, b.stride())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_channel_can_be_left_where_only_inputs_are_pruned(layout: torch.memory_format) -> None:
    """The other dimensions of what is left then lie behind one another in memory; those of the whole do not."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)).to(memory_format=layout)  # type: ignore[call-overload]
    last = model[1].weight.detach().clone()
    plan = build_plan(model, (torch.randn(1, 3, 8, 8),))
    prune(bind(plan, model), np.arange(plan.n_channels) == 2)
    assert torch.equal(model[1].weight, last[:, 2:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_and_empty_state(dtype: torch.dtype) -> None:
    """Before the first optimizer step there is no state; half precision moves bit for bit."""
    model, x = Small().to(dtype), small_inputs(dtype=dtype)
    opt = torch.optim.Adam(model.parameters())
    wide = copy.deepcopy(model).double()
    for m, inputs, optimizers in ((model, x, [opt]), (wide, x.double(), [])):
        plan = build_plan(m, inputs)
        prune(bind(plan, m), random_keep(plan, 0), optimizers)
    for a, b in zip(model.parameters(), wide.parameters(), strict=True):
        assert a.dtype == dtype
        assert torch.equal(a.double(), b)
    train_step(model, opt, x, 0)


class Fails(Exception):
    pass


@pytest.mark.parametrize("stage", ["batches", "_cut", "put", "apply_changes", "Binding"])
@pytest.mark.parametrize("error", [Fails, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("room", [0, journal.ROOM])
def test_all_or_nothing(stage: str, error: type[BaseException], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prune that fails at any stage leaves weights, gradients, state and attributes bit for bit."""
    monkeypatch.setattr(journal, "MUCH", 0)
    model, x = Small(), small_inputs()
    opt = torch.optim.Adam(model.parameters())
    train_step(model, opt, x, 0)
    plan = build_plan(model, x)
    binding = bind(plan, model)
    model(x).sum().backward()
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], opt.state_dict()))
    widths = [(m.out_channels, m.in_channels) for m in (model.stem, model.inner, model.outer)]
    module = journal.Moves if stage == "put" else sys.modules[prune.__module__]
    calls = 0
    real = getattr(module, stage)

    def failing_midway(moves, places, new):
        nonlocal calls
        real_all(moves, list(places)[:3], list(new)[:3])
        calls = 10  # what is put from now on is put back
        raise error("no")

    real_all = journal.Moves.put_all
    if stage == "put":
        monkeypatch.setattr(journal.Moves, "put_all", failing_midway)

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (4 if stage == "put" else 1):
            raise error("no")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, stage, failing)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else pat.SurgeryError
    kept = plan.check_keep(random_keep(plan, 0, ratio=0.5))
    with pytest.raises(expected):
        prune_checked(binding, kept, [opt], then=lambda smaller: smaller(), room=room)
    monkeypatch.undo()
    after = (model.state_dict(), [p.grad for p in model.parameters()], opt.state_dict())
    for key, value in before[0].items():
        assert torch.equal(value, after[0][key]), key
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    for index, state in before[2]["state"].items():
        assert all(torch.equal(v, after[2]["state"][index][k]) for k, v in state.items())
    assert widths == [(m.out_channels, m.in_channels) for m in (model.stem, model.inner, model.outer)]
    train_step(model, opt, x, 1)


def test_nothing_is_collected_while_tensors_are_cut() -> None:
    """A finalizer would see a model in pieces."""
    model, x = Small(), small_inputs()
    plan = build_plan(model, x)
    seen: list[bool] = []
    prune(bind(plan, model), random_keep(plan, 0), then=lambda _: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()


def test_what_many_prunes_leave_is_put_together_when_it_is_read() -> None:
    model, x = Small(24), small_inputs()
    binding = bind(build_plan(model, x), model)
    group = binding.plan.groups[0]
    left = list(range(group.channels))
    for number in range(20):
        keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
        keep[number % 3] = False
        del left[number % 3]
        binding = prune(binding, keep)
        assert len(vars(model)["_pat_fast"].get("noted", ())) <= 16
    other = copy.deepcopy(model)
    for one in (model, other):
        ((_, record),) = records(one)
        assert record["channels"][group.root] == {"of": group.channels, "kept": left}
        assert record["prunes"] == 20
        assert "noted" not in record


def test_parameters_that_no_graph_holds_get_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Small(), small_inputs()
    plan = build_plan(model, x)
    hooked: list[Any] = []
    monkeypatch.setattr(sys.modules[prune.__module__], "accumulators", lambda some: hooked.append(some) or {})
    prune(bind(plan, model), random_keep(plan, 0))
    assert hooked == [[]]


def test_a_model_changed_behind_the_plan_is_refused() -> None:
    model, x = Small(), small_inputs()
    plan = build_plan(model, x)
    binding = bind(plan, model)
    keep = random_keep(plan, 0)
    prune(binding, keep)
    with pytest.raises(pat.PlanError, match="the model was changed since the plan was bound"):
        prune(binding, keep)
    with pytest.raises(pat.PlanError, match="build a new plan"):
        bind(plan, model)


def test_batch_statistics_shrink_in_place() -> None:
    model, x = Small(), small_inputs()
    mean = model.norm.running_mean
    some_prune(model, x)
    assert model.norm.running_mean is mean
    assert len(mean) == model.norm.num_features == model.stem.out_channels


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "mobilenet_v2", "convnext_tiny", "conv1d", "text", "unet"])
def test_torch_prunings_layer_pruners_set_the_same_attributes(name: str) -> None:
    """Their attributes are the oracle of ours, layer by layer."""
    case = Case.build(name, torch.float32)
    twin = copy.deepcopy(case.model)
    plan = build_plan(case.model, case.inputs)
    graph = tp.DependencyGraph()
    keep = random_keep(plan, 0)
    for tensor_map in plan.tensors:
        path, _, local = tensor_map.name.rpartition(".")
        module = twin.get_submodule(path)
        pruner = graph.get_pruner_of_module(module)
        if local != "weight" or isinstance(module, nn.GroupNorm) or pruner is None:
            continue
        for axis, kept in zip(tensor_map.axes, tensor_map.kept(Kept(keep)), strict=True):
            gone = sorted(set(range(len(axis.channels))) - set(kept.tolist()))
            transposed = getattr(module, "transposed", False)
            out = axis.dim == (1 if transposed else 0) or isinstance(module, nn.Embedding)
            pruner.pruning_dim = -1
            (pruner.prune_out_channels if out else pruner.prune_in_channels)(module, gone)
    prune(bind(plan, case.model), keep)
    names = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "embedding_dim",
             "num_parameters", "normalized_shape")  # fmt: skip
    for (key, ours), theirs in zip(case.model.named_modules(), twin.modules(), strict=True):
        for attribute in names:
            assert getattr(ours, attribute, None) == getattr(theirs, attribute, None), f"{key}.{attribute}"


def test_a_fresh_dependency_graph_agrees_after_surgery(case: Case) -> None:
    if case.name == "shufflenet_v2":
        pytest.skip("Torch-Pruning divides by zero on its channel shuffle, pruned or not")
    plan = build_plan(case.model, case.inputs)
    prune(bind(plan, case.model), random_keep(plan, 0))
    graph = tp.DependencyGraph().build_dependency(case.model, case.inputs, verbose=False)
    for module in case.model.modules():
        if isinstance(module, nn.Linear):
            assert graph.get_out_channels(module) == module.weight.shape[0]


def test_mask_upkeep_survives_gradients_and_decay() -> None:
    model, x = Small(), small_inputs()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    train_step(model, opt, x, 0)
    binding = bind(build_plan(model, x), model)
    mask = Mask(binding)
    alive = torch.from_numpy(random_keep(binding.plan, 0, ratio=0.5))
    mask.set(alive, [opt])
    for _ in range(3):
        opt.zero_grad()
        model(x).sum().backward()
        mask.hold_gradients()
        opt.step()
        mask.hold_weights()
        assert (model.stem.weight[~alive[binding_range(binding, "outer")]] == 0).all()
    state = opt.state[model.stem.weight]
    assert (state["exp_avg"][~alive[binding_range(binding, "outer")]] == 0).all()


def binding_range(binding, root: str) -> slice:
    found = next(g for g in binding.plan.groups if g.root == root)
    return slice(found.start, found.stop)
