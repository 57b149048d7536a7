"""What a training script does not say is found: example inputs and optimizers; and all hooks go away again."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.training import adamw, hooks, no_hooks_left, same, sgd, train_one_epoch, untouched, weights


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with no_hooks_left():
        yield


# Inputs


def test_inputs_come_from_the_first_forward_and_its_hook_is_gone() -> None:
    model = Small()
    optimizer = sgd(model)
    pruner = pat.Pruner(model)
    assert pruner.plan is None
    train_one_epoch(model, optimizer, batches=1)
    assert not model._forward_pre_hooks
    assert pruner.plan is not None
    assert pruner.plan.batch == 2  # two examples of the four are enough
    assert not pruner._inputs.catcher.has_inputs  # the batch is not kept alive


class Named(Small):
    """A forward with keyword arguments and something that is not a tensor."""

    def forward(self, *, image: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(image * scale)


def test_inputs_by_keyword() -> None:
    model = Named()
    optimizer = sgd(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    model(image=small_inputs(), scale=0.5).sum().backward()
    optimizer.step()
    assert pruner.step().channels == (28, 14)
    pruner = pat.Pruner(Named(), 0.5, end_epoch=1, example_inputs={"image": small_inputs()})
    assert pruner.step().channels == (28, 14)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_first_forward_may_be_an_evaluation(batch: int, mode: Callable[[], Any]) -> None:
    model = Small()
    optimizer = sgd(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    with mode():
        model.eval()(small_inputs(batch) * 1.0)
    train_one_epoch(model, optimizer)
    assert pruner.step().channels == (28, 14)


def test_a_batch_that_cannot_be_cut_is_taken_whole() -> None:
    class Pairs(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.reshape(2, 2, 3, 8, 8).sum(0))

    model = Pairs()
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    model(small_inputs())
    assert pruner.step().channels == (28, 14)


def test_a_copy_made_before_the_first_forward_is_a_model_of_its_own() -> None:
    model = Small()
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    average = copy.deepcopy(model)
    average(small_inputs())
    with pytest.raises(pat.PlanError, match="no forward of the model was seen yet"):
        pruner.step()
    model(small_inputs())
    assert pruner.step().channels == (28, 14)
    assert average.stem.out_channels == 12


# Optimizers


def test_given_optimizers_are_hooked_themselves() -> None:
    model = Small()
    parts = [
        torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam([p for n, p in model.named_parameters() if not n.startswith("head")], lr=0.01),
    ]
    before = hooks(model)
    pruner = pat.Pruner(model, 0.5, optimizer=parts, end_epoch=2, reg_strength=1e-2)
    assert hooks(model, *parts) == before + 1 + 4  # the first forward; two for each optimizer
    for _ in range(3):
        model.zero_grad()
        model(small_inputs()).square().mean().backward()
        for optimizer in parts:
            optimizer.step()
        pruner.step()
    assert parts[0].state[model.head.weight]["momentum_buffer"].shape == model.head.weight.shape
    assert parts[1].state[model.stem.weight]["exp_avg"].shape == model.stem.weight.shape
    assert model.stem.out_channels + model.inner.out_channels == 14
    pruner.close()
    assert hooks(model, *parts) == before


@pytest.mark.parametrize("given", [True, False])
def test_what_would_stop_the_first_prune_is_said_after_the_first_step(given: bool) -> None:
    """Not when pruning begins, which may be days later."""

    class Lion(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in (p for group in self.param_groups for p in group["params"]):
                self.state[p]["lion_avg"] = torch.zeros_like(p)
                self.state[p]["lion_rows"] = torch.zeros(p.shape[0])
            return super().step(closure)

    model = Small()
    optimizer = Lion(model.parameters(), lr=0.1)
    pruner = pat.Pruner(model, 0.5, start_epoch=50, end_epoch=60, optimizer=optimizer if given else None)
    with pytest.warns(UserWarning, match=r"a prune will be refused as things are: Lion keeps state 'lion_avg'") as said:
        train_one_epoch(model, optimizer)
    pruner.step()
    train_one_epoch(model, optimizer)  # warnings are errors here
    assert len(said) == 1
    pat.register_state_layout(Lion, {"lion_avg": "elementwise"})
    other = pat.Pruner(model, 0.5)
    with pytest.warns(UserWarning, match=r"'lion_rows' .*register_state_layout\(Lion, \{'lion_rows': 'rows'\}\)"):
        train_one_epoch(model, optimizer)
    other.close()


@pytest.mark.parametrize("given", [True, False])
def test_two_optimizers_regularise_their_own_share_once(given: bool) -> None:
    one, two = Small(), Small()
    two.load_state_dict(one.state_dict())
    whole = [sgd(one)]
    parts = [  # biases have no part in the scores, so the order of the steps does not matter
        torch.optim.SGD([p for n, p in two.named_parameters() if n.endswith("bias") == first], lr=0.05, momentum=0.9)
        for first in (True, False)
    ]
    for model, optimizers in ((one, whole), (two, parts)):
        pruner = pat.Pruner(model, 0.5, optimizer=optimizers if given else None, reg_strength=0.1)
        for _ in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(small_inputs()), torch.arange(4)).backward()
            for optimizer in optimizers:
                optimizer.step()
        assert pruner.plan is not None
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_an_optimizer_that_has_not_stepped_yet_is_found() -> None:
    """Its state is loaded, say: nobody has seen a step, and still it must shrink along."""
    model = Small()
    optimizer = adamw(model)
    train_one_epoch(model, optimizer)
    pruner = pat.Pruner(model, 0.5, end_epoch=1, example_inputs=small_inputs())
    pruner.step()
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
    train_one_epoch(model, optimizer)


def test_an_optimizer_that_gains_the_parameters_later_is_found() -> None:
    model, other = Small(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    pruner = pat.Pruner(model, 0.5, end_epoch=1, example_inputs=small_inputs(), reg_strength=1e-2)
    optimizer.step()  # looked at, and not ours
    optimizer.add_param_group({"params": list(model.parameters()), "lr": 0.01})
    train_one_epoch(model, optimizer)
    assert not any("regularised" in note for note in pruner.step().notes)
    assert optimizer.state[model.stem.weight]["momentum_buffer"].shape == model.stem.weight.shape
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 9]
    train_one_epoch(model, optimizer)


@pytest.mark.parametrize("by_keyword", [True, False])
@pytest.mark.parametrize("zero_inside", [True, False])
def test_gradients_that_a_closure_makes_are_regularised(by_keyword: bool, zero_inside: bool) -> None:
    """The pre-hook runs before the closure, which overwrites what it did to the gradients."""
    plain = Small()
    closed = copy.deepcopy(plain)
    pruners = [pat.Pruner(m, 0.5, example_inputs=small_inputs(), reg_strength=0.1) for m in (plain, closed)]
    optimizers = [sgd(m) for m in (plain, closed)]

    def loss(model: nn.Module, optimizer: Optimizer) -> Tensor:
        if zero_inside:
            optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(small_inputs()), torch.arange(4))
        value.backward()
        return value

    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = loss(plain, optimizers[0])
        optimizers[0].step()
        closure: Callable[[], Any] = lambda: loss(closed, optimizers[1])  # noqa: E731
        given = optimizers[1].step(closure=closure) if by_keyword else optimizers[1].step(closure)
        assert given == value
    assert same(weights(plain), weights(closed))
    assert not any("regularised" in note for p in pruners for note in p.step().notes)


def test_an_optimizer_within_an_optimizer_regularises_once() -> None:
    class Wrapping(torch.optim.Optimizer):
        """Shares groups and state with the one that it steps, as look-ahead optimizers do."""

        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner, self.fails = inner, False
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> None:
            if self.fails:
                raise RuntimeError("no")
            self.inner.step(closure)

    plain = Small()
    wrapped = copy.deepcopy(plain)
    optimizers = [sgd(plain), Wrapping(sgd(wrapped))]
    pruners = [pat.Pruner(m, 0.5, example_inputs=small_inputs(), reg_strength=0.1) for m in (plain, wrapped)]
    for step in range(3):
        for model, optimizer in zip((plain, wrapped), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(small_inputs()), torch.arange(4)).backward()
            if step == 1 and model is wrapped:
                regularised, optimizers[1].fails = [p.grad.clone() for p in model.parameters()], True
                with pytest.raises(RuntimeError, match="no"):
                    optimizer.step()
                for p, grad in zip(model.parameters(), regularised, strict=True):
                    p.grad = grad  # the script tries the same gradients once more
                optimizers[1].fails = False
            optimizer.step()
    assert same(weights(plain), weights(wrapped))
    for pruner in pruners:
        pruner.step()


class Outer(torch.optim.Optimizer):
    """Steps another one, and keeps nothing itself."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


class Cover(torch.optim.Optimizer):
    """No more than the look of the one within, as Accelerate's is."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", [Outer, Cover])
def test_the_state_of_an_optimizer_inside_another_is_cut(kind: Any, given: bool) -> None:
    model = Small()
    inner = sgd(model)
    outer = kind(Outer(inner))
    pruner = pat.Pruner(model, 0.5, end_epoch=2, optimizer=outer if given else None)
    for _ in range(3):
        train_one_epoch(model, outer)
        assert not any("regularised" in note for note in pruner.step().notes)
    assert inner.state[model.stem.weight]["momentum_buffer"].shape == model.stem.weight.shape


def test_an_optimizer_step_before_the_first_forward_is_let_through() -> None:
    """Some scripts prime a scheduler with an optimizer step that has no gradients."""
    model = Small()
    optimizer = sgd(model)
    pruner = pat.Pruner(model, 0.5, end_epoch=1)
    optimizer.step()
    assert pruner.plan is None
    train_one_epoch(model, optimizer)
    assert pruner.step().channels == (28, 14)


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scale_does_not_change_the_strength(fused: bool) -> None:
    """A fused optimizer unscales inside its step, after the regulariser's hook; others before."""
    model = Small()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, fused=fused) for m in (model, twin)]
    pruners = [pat.Pruner(m, 0.5, example_inputs=small_inputs(), reg_strength=0.05) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        loss = nn.functional.cross_entropy(m(small_inputs()), torch.arange(4))
        if m is model:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
    assert all(p.stage == "prune" for p in pruners)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (lambda m: nn.Linear(2, 2).parameters(), r"9 of the model's 9 trained parameters are not in it \(such as stem"),
        (lambda m: copy.deepcopy(m).parameters(), r"was it built for another copy of the model\?"),
        (lambda m: m.head.parameters(), r"7 of the model's 9 trained parameters .*requires_grad=False"),
    ],
)
def test_an_optimizer_that_does_not_hold_the_parameters(held: Callable[[nn.Module], Any], message: str) -> None:
    model = Small()
    optimizer = torch.optim.SGD(held(model), lr=0.1)
    untouched(model, optimizer, pat.ConfigError, message, lambda: pat.Pruner(model, optimizer=optimizer))


def test_what_is_not_trained_need_not_be_held() -> None:
    model = Small()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    pruner = pat.Pruner(model, 0.5, optimizer=optimizer, end_epoch=1)
    train_one_epoch(model, optimizer)
    assert pruner.step().channels == (28, 14)
    train_one_epoch(model, optimizer)


# Life and death


def test_two_models_and_two_optimizers_do_not_disturb_one_another() -> None:
    def start(width: int) -> tuple[Small, Optimizer, pat.Pruner]:
        torch.manual_seed(width)
        model = Small(width)
        optimizer = (adamw if width == 12 else sgd)(model)
        target = 0.5 if width == 12 else 0.25
        return model, optimizer, pat.Pruner(model, target, end_epoch=3, reg_strength=1e-2)

    def train(*started: tuple[Small, Optimizer, pat.Pruner]) -> None:
        for _ in range(4):
            for model, optimizer, _ in started:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model.train()(small_inputs()), torch.arange(4)).backward()
            for _, optimizer, _ in started:  # while the gradients of all of them wait
                optimizer.step()
            for _, _, pruner in started:
                pruner.step()

    alone = {}
    for width in (12, 20):
        started = start(width)
        train(started)
        alone[width] = weights(started[0])
        del started
    together = {width: start(width) for width in (12, 20)}
    train(*together.values())
    for width, (model, _, _) in together.items():
        assert same(weights(model), alone[width])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("explicit", [False, True])
def test_hooks_go_with_the_pruner(trained: bool, explicit: bool) -> None:
    model = Small()
    optimizer = sgd(model)
    before = hooks(model, optimizer)
    pruner = pat.Pruner(model, reg_strength=1e-2, optimizer=optimizer if explicit else None)
    if trained:
        train_one_epoch(model, optimizer)
    assert hooks(model, optimizer) == before + 2 + (not trained)
    del pruner
    gc.collect()
    assert hooks(model, optimizer) == before


@pytest.mark.parametrize("explicit", [False, True])
def test_a_pruner_may_be_collected_in_an_optimizer_step(explicit: bool) -> None:
    """While PyTorch goes through the hooks of a step none may leave."""
    model, other = Small(), nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    optimizer = sgd(model)

    def collect(*_: Any) -> None:
        gc.collect()

    register = optimizer.register_step_pre_hook if explicit else torch_optimizer.register_optimizer_step_pre_hook
    handle = register(collect)
    before = hooks(model, optimizer)
    pruner: Any = pat.Pruner(model, optimizer=optimizer if explicit else None)
    pruner.itself = pruner  # so that it is for the collector
    del pruner
    train_one_epoch(model, optimizer, batches=2)
    pat.Pruner(other, example_inputs=torch.randn(3, 2), auto=False)  # or any other that begins
    handle.remove()
    assert hooks(model, optimizer) == before - 1


def test_the_model_can_be_collected_while_its_optimizer_lives() -> None:
    model = Small()
    other = sgd(nn.Linear(2, 2))
    pat.Pruner(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    other.step()
