"""What a training loop may contain besides forward, backward and step: masked equals pruned with each of it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.training import Twin, adamw, masked_equals_pruned, sgd

X = small_inputs(dtype=torch.float64)


def twin(mode: str, model: nn.Module, optimizer: Optimizer, extra: Any = None, **options: Any) -> Twin:
    x = X.to(next(model.parameters()).dtype)
    strength = {} if options.get("regularizer", "group_norm") is None else {"reg_strength": 1e-3}
    settings: dict[str, Any] = {**strength, "end_epoch": 2, "verify": False, **options}
    return Twin(model, [optimizer], pat.Pruner(model, 0.5, example_inputs=x, mode=mode, **settings), extra)


def small(mode: str) -> Twin:
    model = Small().double()
    return twin(mode, model, adamw(model))


def plain(one: Twin, step: int) -> Tensor:
    return one.train(X, step)


# Learning rates

SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.8**step]),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 2e-2], total_steps=9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 6)], [2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.1, min_lr=[1e-5, 1e-6]),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_learning_rates_run_the_same_curve(name: str) -> None:
    """Two groups, momentum cycled where the schedule does so; the curve is that of a run without a pruner."""

    def groups(model: nn.Module) -> tuple[Optimizer, Any]:
        first, *rest = model.parameters()
        parts = [{"params": rest, "lr": 0.02}, {"params": [first], "lr": 0.01}]
        optimizer = torch.optim.SGD(parts, lr=0.01, momentum=0.9)
        return optimizer, SCHEDULES[name](optimizer)

    def advance(optimizer: Optimizer, schedule: Any, step: int) -> list[Any]:
        schedule.step(*([1.0 - 0.01 * step] if name == "ReduceLROnPlateau" else []))
        return [(g["lr"], g["momentum"]) for g in optimizer.param_groups]

    def make(mode: str) -> Twin:
        model = Small().double()
        optimizer, schedule = groups(model)
        return twin(mode, model, optimizer, (schedule, []))

    def train(one: Twin, step: int) -> Tensor:
        loss = one.train(X, step)
        one.extra[1].append(advance(one.optimizers[0], one.extra[0], step))
        return loss

    optimizer, schedule = groups(Small())
    expected = []
    for step in range(8):
        optimizer.step()
        expected.append(advance(optimizer, schedule, step))
    assert len({str(rates) for rates in expected}) > 1
    for one in masked_equals_pruned(make, train):
        assert one.extra[1] == expected


# Gradients

CLIPS: dict[str, Callable[[nn.Module], Any]] = {
    "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    "norm, foreach": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=True),
    "largest": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.05, norm_type=torch.inf),
    "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-2),
}


@pytest.mark.parametrize("name", list(CLIPS))
def test_clipped_gradients(name: str) -> None:
    """What flows into a masked channel has to be cleared before the norm is taken: the pruned model has none."""

    def train(one: Twin, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(one.model(X), torch.arange(4))
        one.model.zero_grad()
        loss.backward()
        if one.pruner.mask is not None:
            one.pruner.mask.hold_gradients()
        CLIPS[name](one.model)
        one.optimizers[0].step()
        return loss.detach()

    masked_equals_pruned(lambda mode: twin(mode, m := Small().double(), sgd(m)), train)


def test_gradients_gathered_over_several_batches_with_a_prune_in_between() -> None:
    """Three batches make a step; the prunes come after the first or second of them, with gradients in flight."""

    def train(one: Twin, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(one.model(X * (1 + 0.1 * step)), torch.arange(4)) / 3
        loss.backward()
        if step % 3 == 2:
            one.optimizers[0].step()
            one.optimizers[0].zero_grad()
        return loss.detach()

    twins = masked_equals_pruned(small, train, steps=12, prune_after=(3, 7))
    assert all(p.grad is None for p in twins[0].model.parameters())


def test_optimizers_that_step_in_the_backward() -> None:
    """One for each parameter, as soon as its gradient is there: the backward may still need what others hold."""

    def make(mode: str) -> Twin:
        model = nn.Sequential(Small(), nn.ReLU(), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 5)).double()
        optimizers = {p: torch.optim.Adam([p], lr=1e-2) for p in model.parameters()}

        def step(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        pruner = pat.Pruner(model, 0.5, mode=mode, end_epoch=2, example_inputs=X, optimizer=list(optimizers.values()))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)  # type: ignore[arg-type]
        return Twin(model, list(optimizers.values()), pruner)

    def train(one: Twin, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(one.model(X), torch.arange(len(X)).add(step) % 5)
        loss.backward()
        return loss.detach()

    masked_equals_pruned(make, train)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_hooks_on_gradients_and_gradients_that_stay(set_to_none: bool) -> None:
    """Hooks see gradients of the shape of now; gradients that are zeroed, not dropped, stay in place."""

    def make(mode: str) -> Twin:
        one = small(mode)
        seen: list[bool] = []
        for p in one.model.parameters():
            p.register_hook(lambda g: 0.5 * g)
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None and p.grad.shape == p.shape))
        one.extra = seen
        return one

    def train(one: Twin, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(one.model(X), torch.arange(4))
        one.optimizers[0].zero_grad(set_to_none)
        loss.backward()
        one.optimizers[0].step()
        return loss.detach()

    for one in masked_equals_pruned(make, train):
        assert len(one.extra) == 8 * 9
        assert all(one.extra)


def test_frozen_layers_are_thawed_after_a_prune() -> None:
    def make(mode: str) -> Twin:
        model = Small().double()
        model.inner.requires_grad_(False)
        return twin(mode, model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01))

    def train(one: Twin, step: int) -> Tensor:
        if step == 4:
            one.model.inner.requires_grad_(True)
            one.optimizers[0].add_param_group({"params": list(one.model.inner.parameters()), "lr": 0.001})
        return one.train(X, step)

    torch.manual_seed(0)
    twins = [make("prune"), make("mask")]
    twins[1].model.load_state_dict(twins[0].model.state_dict())
    frozen = twins[0].model.inner.weight
    for step in range(8):
        losses = [train(one, step) for one in twins]
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
        assert frozen.requires_grad == (step >= 4)
        if step in (1, 5):
            for one in twins:
                one.pruner.step()
    assert [len(g["params"]) for g in twins[0].optimizers[0].param_groups] == [7, 2]
    assert twins[0].model.inner.weight is frozen
    assert frozen.shape[0] < 16


# Precision


@pytest.mark.parametrize("kind", ["bf16", "fp16 and a scaler", "fp16, a scaler, fused", "bf16 weights"])
def test_mixed_precision(kind: str) -> None:
    """Half precision rounds what is summed in another order; the scaler's growth and skipped steps are the same."""

    def make(mode: str) -> Twin:
        model = Small().bfloat16() if kind == "bf16 weights" else Small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused="fused" in kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled="scaler" in kind)
        return twin(mode, model, optimizer, (scaler, []), regularizer=None if "weights" in kind else "group_norm")

    def train(one: Twin, step: int) -> Tensor:
        scaler, scales = one.extra
        x = small_inputs(dtype=next(one.model.parameters()).dtype)
        dtype = torch.float16 if "fp16" in kind else torch.bfloat16
        with torch.autocast("cpu", dtype, enabled="weights" not in kind):
            loss = nn.functional.cross_entropy(one.model(x), torch.arange(4))
        one.optimizers[0].zero_grad()
        scaler.scale(loss).backward()
        if scaler.is_enabled() and "fused" not in kind:
            scaler.unscale_(one.optimizers[0])
            nn.utils.clip_grad_norm_(one.model.parameters(), 10.0)
        scaler.step(one.optimizers[0])
        scaler.update()
        scales.append(scaler.get_scale())
        return loss.detach().float()

    twins = masked_equals_pruned(make, train, steps=40, prune_after=(30, 34), tolerance=0.05, state_too=False)
    assert twins[0].extra[1] == twins[1].extra[1]
    assert all(p.isfinite().all() for p in twins[0].model.parameters())
    if "scaler" in kind:
        assert twins[0].extra[1][-1] < 2.0**40  # steps were skipped, and then no more
        assert twins[0].extra[1][-1] == twins[0].extra[1][29]


def test_channels_last() -> None:
    def make(mode: str) -> Twin:
        model = Small().double().to(memory_format=torch.channels_last)
        return twin(mode, model, adamw(model))

    twins = masked_equals_pruned(make, lambda one, step: one.train(X.to(memory_format=torch.channels_last), step))
    for one in twins:
        weight = one.model.inner.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        assert one.optimizers[0].state[weight]["exp_avg"].stride() == weight.stride()


# Modules


class Checkpointed(Small):
    """The block in the middle is computed again in the backward."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        inside: Any = checkpoint(lambda y: self.outer(self.inner(y).relu()), x, use_reentrant=self.reentrant)
        return self.head((x + inside).mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    def make(mode: str) -> Twin:
        model = Checkpointed().double()
        model.reentrant = reentrant
        return twin(mode, model, adamw(model))

    twins = masked_equals_pruned(make, plain)
    assert twins[0].model.inner.out_channels < 16


def test_synchronised_batch_norm() -> None:
    """Of one process it is a batch norm; its statistics are pruned in place."""

    def make(mode: str) -> Twin:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(Small()).double()
        return twin(mode, model, adamw(model), model.norm.running_mean)

    for one in masked_equals_pruned(make, plain):
        assert isinstance(one.model.norm, nn.SyncBatchNorm)
        assert one.model.norm.running_mean is one.extra
        assert len(one.extra) == one.model.norm.num_features == one.model.stem.out_channels < 12


def test_instance_norms_with_statistics() -> None:
    """Torch-Pruning forgets theirs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 12, 3)
            self.norm = nn.InstanceNorm2d(12, affine=True, track_running_stats=True)
            self.inner, self.head = nn.Conv2d(12, 8, 3), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.norm(self.stem(x)).relu()).relu().mean((2, 3)))

    def make(mode: str) -> Twin:
        model = Net().double()
        return twin(mode, model, adamw(model), model.norm.running_mean)

    for one in masked_equals_pruned(make, plain):
        assert one.model.norm.running_mean is one.extra
        assert len(one.extra) == len(one.model.norm.running_var) == one.model.norm.num_features < 12


class Tied(nn.Module):
    """One weight, forwards and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 12)
        self.mix = nn.Linear(12, 9, bias=False)
        self.back = nn.Linear(9, 12, bias=False)
        self.back.weight = nn.Parameter(self.mix.weight.detach().t().clone())
        self.again = nn.Linear(12, 9, bias=False)
        self.again.weight = self.mix.weight
        self.leave = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.mix(self.enter(x).relu()).relu()).relu()
        return self.leave(self.again(x).relu())


def test_tied_weights_stay_tied() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def make(mode: str) -> Twin:
        model = Tied().double()
        pruner = pat.Pruner(model, 0.4, example_inputs=x, mode=mode, end_epoch=2, reg_strength=1e-3, verify=False)
        return Twin(model, [adamw(model)], pruner)

    for one in masked_equals_pruned(make, lambda one, step: one.train(x, step)):
        assert one.model.again.weight is one.model.mix.weight
        assert one.model.again.in_features == one.model.mix.in_features == one.model.mix.weight.shape[1]


class Sequence(nn.Module):
    def __init__(self, change: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        layers = [nn.Linear(5, 12), nn.ReLU(), change(nn.Linear(12, 10)), nn.ReLU(), nn.Linear(10, 8), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# Changes of a layer of 12 inputs and 10 outputs, what is left of its weight, and whose channels stay, by name.
PARAMETRIZED: dict[str, tuple[Callable[[nn.Module], nn.Module], tuple[int, int], str]] = {
    "weight norm": (parametrizations.weight_norm, (6, 7), ""),
    "weight norm by hook": (nn.utils.weight_norm, (6, 7), ""),
    "spectral norm": (parametrizations.spectral_norm, (10, 7), "layers.2.parametrizations.weight.original"),
    "spectral norm by hook": (nn.utils.spectral_norm, (6, 7), ""),
    "orthogonal": (parametrizations.orthogonal, (10, 7), ""),
}


@pytest.mark.parametrize("name", list(PARAMETRIZED))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_parametrised_weights_are_pruned_right_or_stay(name: str) -> None:
    change, left, frozen = PARAMETRIZED[name]
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def make(mode: str) -> Twin:
        model = Sequence(change).double()
        options: dict[str, Any] = {"mode": mode, "end_epoch": 2, "regularizer": None, "ranking": "local"}
        return Twin(model, [adamw(model)], pat.Pruner(model, 0.4, example_inputs=x, **options))

    for one in masked_equals_pruned(make, lambda one, step: one.train(x, step)):
        one.model(x)  # hooks make the weight anew
        layers = one.model.layers
        assert layers[2].weight.shape == left
        if name != "orthogonal":  # of which a buffer is cut, and not the weight
            assert (layers[2].out_features, layers[2].in_features) == left
        assert layers[4].out_features < 8
        assert frozen in dict([*one.pruner.step().frozen, ("", "")])


# Processes


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_data_loaders_that_fork_after_the_kernels_ran() -> None:
    """A forked child that would use the parent's OpenMP threads hangs; here each epoch forks its workers anew."""
    data = TensorDataset(torch.cat([X] * 3), torch.arange(12) % 5)
    loader = DataLoader(
        data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=120, collate_fn=scored_in_the_worker
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = Small().double()
        optimizer = adamw(model)
        pruner = pat.Pruner(model, 0.5, example_inputs=X, end_epoch=2, verify=False)
        for _ in range(3):
            for x, target in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
            pruner.step()
        assert model.stem.out_channels < 12
    finally:
        torch.set_num_threads(threads)


def scored_in_the_worker(examples: list[Any]) -> Any:
    """Runs an op of the package in the child, too."""
    x, target = torch.utils.data.default_collate(examples)
    assert multiprocessing.parent_process() is not None
    assert os.getpid() != multiprocessing.parent_process().pid  # type: ignore[union-attr]
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    pat.Pruner(net, 0.5, example_inputs=torch.randn(2, 4), end_epoch=1, verify=False).step()
    assert net[0].out_features == 3
    return x, target
