"""LBFGS keeps vectors over all of its parameters together: they are gathered as the parameters are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel

import pat_fast as pat
from pat_fast import torch_pruning as tp
from pat_fast.plan import bind, build_plan
from pat_fast.plan.bind import Binding
from pat_fast.surgery import prune
from tests.helpers import Case, Small, random_keep, small_inputs
from tests.training import Twin, check_vectors, masked_equals_pruned, same, train_one_epoch, vectors, weights

pytestmark = pytest.mark.usefixtures("one_thread_and_the_usual_layouts")

Settings = dict[str, Any]
X = small_inputs(dtype=torch.float64)


def step(model: nn.Module, optimizer: LBFGS, number: int = 0) -> Tensor:
    """A step; the first loss."""
    return Twin(model, [optimizer], None).train(X, number)  # type: ignore[arg-type]


def train(twin: Twin, number: int) -> Tensor:
    return twin.train(X, number)


def flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([torch.view_as_real(p).reshape(-1) if p.is_complex() else p.reshape(-1) for p in parameters])


def with_history(model: nn.Module, length: int = 2, kind: type[LBFGS] = LBFGS) -> tuple[LBFGS, list[Tensor]]:
    """An LBFGS whose vectors hold the parameters' own values, so that they must stay theirs."""
    optimizer = kind(model.parameters())
    parameters: list[Tensor] = optimizer.param_groups[0]["params"]
    state: Any = optimizer.state[parameters[0]]
    values = [flat([p.detach() for p in parameters]) for _ in range(2 * length + 2)]
    state.update(d=values[0], prev_flat_grad=values[1], old_dirs=values[2 : 2 + length], old_stps=values[2 + length :])
    state.update(ro=[torch.ones(())] * length, H_diag=torch.ones(()), al=[None] * 100, t=1.0, n_iter=3, func_evals=3)
    optimizer._numel()
    return optimizer, parameters


# Masked equals pruned

SETTINGS: dict[str, Settings] = {
    "fixed steps": {"lr": 0.1, "max_iter": 4},
    "one iteration": {"lr": 0.1, "max_iter": 1},
    "a short history": {"lr": 0.5, "max_iter": 4, "history_size": 3},
    "a line search": {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"},
    "a line search, a short history": {"max_iter": 4, "history_size": 3, "line_search_fn": "strong_wolfe"},
}


def twin(mode: Any, make: Callable[[nn.Module], list[Optimizer]], **options: Any) -> Twin:
    model = Small().double()
    options = {"end_epoch": 2, "reg_strength": 1e-3, **options}
    return Twin(model, make(model), pat.Pruner(model, 0.5, example_inputs=X, mode=mode, verify=False, **options))


@pytest.mark.parametrize("name", list(SETTINGS))
def test_masked_equals_pruned(name: str) -> None:
    """The history with it, and what was computed from it before the prune: ``ro``, ``H_diag``."""
    twins = masked_equals_pruned(lambda mode: twin(mode, lambda m: [LBFGS(m.parameters(), **SETTINGS[name])]), train)
    states = [t.optimizers[0].state[t.model.stem.weight] for t in twins]
    assert len(states[0]["old_dirs"]) == len(states[1]["old_dirs"]) >= 3
    assert states[0]["func_evals"] == states[1]["func_evals"]
    for t in twins:
        check_vectors(t.optimizers[0])


@pytest.mark.parametrize("name", ["fixed steps", "a line search"])
def test_hybrid_equals_pruned(name: str) -> None:
    """Held at zero for a step, then removed."""

    def make(mode: str) -> Twin:
        kind = mode if mode == "prune" else {"name": "hybrid", "steps": 1}
        return twin(kind, lambda m: [LBFGS(m.parameters(), **SETTINGS[name])])

    masked_equals_pruned(make, train, prune_after=(2, 5))


def test_masked_equals_pruned_beside_others() -> None:
    """Two of them and Adam, each with a part; one has parameters of another model, too."""

    def make(model: nn.Module) -> list[Optimizer]:
        other = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        parts = [[*model.stem.parameters(), other], [*model.inner.parameters(), *model.outer.parameters()]]
        rest = [*model.norm.parameters(), *model.head.parameters()]
        return [*(LBFGS(part, lr=0.1, max_iter=3) for part in parts), torch.optim.Adam(rest, lr=0.01)]

    def alone(one: Twin) -> None:
        for optimizer in one.optimizers[:2]:
            check_vectors(optimizer)

    torch.manual_seed(0)
    pruned = twin("prune", make)
    torch.manual_seed(0)
    masked = twin("mask", make)
    for number in range(6):
        torch.testing.assert_close(train(pruned, number), train(masked, number), rtol=1e-9, atol=1e-9)
        if number in (1, 3):
            assert pruned.pruner.step().channels == masked.pruner.step().channels
            alone(pruned)
    masked.pruner.finalize()
    alone(masked)
    for a, b in zip(pruned.model.parameters(), masked.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_frozen_and_tied_parameters_and_parts_that_stay() -> None:
    """A frozen one has zeros in the vectors, a tied one a single place; some layers are not pruned."""

    class Tied(Small):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(12, 16, 3, padding=1)
            self.again.weight = self.inner.weight
            self.inner.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            return self.head((x + self.outer(self.inner(x).relu() + self.again(x).relu())).mean((2, 3)))

    def make(mode: str) -> Twin:
        model = Tied().double()
        options: Settings = {"end_epoch": 2, "verify": False, "layers_to_prune": ["inner"]}
        # not those of the norm, which is trained by none; all others, the frozen one too
        parameters = [p for name, p in model.named_parameters() if not name.startswith("norm")]
        for p in model.norm.parameters():
            p.requires_grad_(False)
        optimizer = LBFGS(parameters, lr=0.1, max_iter=3)
        return Twin(model, [optimizer], pat.Pruner(model, 0.5, example_inputs=X, mode=mode, **options))

    def stepped(one: Twin, number: int) -> Tensor:
        loss = train(one, number)
        check_vectors(one.optimizers[0])
        return loss

    torch.manual_seed(0)
    first = make("prune")
    torch.manual_seed(0)
    second = make("mask")
    for number in range(6):
        torch.testing.assert_close(stepped(first, number), stepped(second, number), rtol=1e-9, atol=1e-9)
        if number in (1, 3):
            assert first.pruner.step().channels == second.pruner.step().channels
    assert first.model.inner.weight.shape[0] == 8


# Masks


@pytest.mark.parametrize("mode", ["mask", "soft"])
def test_the_history_of_masked_channels_is_zero(mode: str) -> None:
    """And stays so; in soft mode filters alone are zeroed, until the last choice is held."""
    one = twin(mode, lambda m: [LBFGS(m.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")])
    optimizer = one.optimizers[0]
    for number in range(5):
        train(one, number)
        before = [vector.clone() for vector in vectors(optimizer)]
        one.pruner.step()
        mask = one.pruner.mask
        assert mask is not None
        assert mask.is_active == (mode == "mask" or number > 0)
        if not mask.is_active:
            assert all(torch.equal(*pair) for pair in zip(before, vectors(optimizer), strict=True))
            continue
        gone = torch.from_numpy(one.pruner.plan.tensor("stem.weight").axes[0].channels).long()  # type: ignore[union-attr]
        dead = ~mask.alive[gone]
        assert dead.any()
        for vector in vectors(optimizer):
            rows = vector[: one.model.stem.weight.numel()].view_as(one.model.stem.weight)
            assert (rows[dead] == 0).all()
            assert (rows[~dead] != 0).any()


def test_numbers_that_are_none_are_cleared() -> None:
    model = Small()
    optimizer, parameters = with_history(model)
    pruner = pat.Pruner(model, 0.5, "one_shot", example_inputs=small_inputs(), mode="mask", verify=False)
    for vector in vectors(optimizer):
        vector[:] = torch.nan
    pruner.step()
    first = vectors(optimizer)[0][: parameters[0].numel()].view(12, -1)
    assert {int(row.isnan().sum()) for row in first} == {0, 27}


# Where its entries are


def test_vectors_are_gathered_as_parameters_are(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    optimizer, parameters = with_history(case.model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(pat.SurgeryError, match="was undone"):
        prune(bind(plan, case.model), random_keep(plan, 0, ratio=0.5), [optimizer], then=fails)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert optimizer._numel_cache == len(vectors(optimizer)[0])
    binding = prune(bind(plan, case.model), random_keep(plan, 0, ratio=0.5), [optimizer])
    for _ in range(2):
        check_vectors(optimizer)
        assert all(torch.equal(vector, flat([p.detach() for p in parameters])) for vector in vectors(optimizer))
        binding = prune(binding, random_keep(binding.plan, 1, ratio=0.2), [optimizer])


def fails(*_: Any) -> None:
    raise MemoryError("no")


def test_complex_parameters_take_two_numbers_an_entry() -> None:
    """Also in the blocks of a grouped convolution, which a plan knows of its real twin."""
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=2), nn.Conv1d(8, 5, 1))
    plan = build_plan(model, torch.randn(2, 3, 6))
    for p in model.parameters():
        p.data = torch.complex(torch.randn_like(p), torch.randn_like(p))
    model.register_parameter("scale", nn.Parameter(torch.randn(3)))
    optimizer, parameters = with_history(model)
    prune(bind(plan, model), random_keep(plan, 0, ratio=0.5), [optimizer])
    assert model[1].weight.numel() < 8 * 4 * 3
    assert len(vectors(optimizer)[0]) == 3 + sum(2 * p.numel() for p in parameters if p.is_complex())
    assert all(torch.equal(vector, flat([p.detach() for p in parameters])) for vector in vectors(optimizer))


def test_averages_and_parameters_stay_what_they_are() -> None:
    model = Small().double()
    average = AveragedModel(model)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
    parameters = list(model.parameters())
    pruner = pat.Pruner(model, 0.5, example_inputs=X, end_epoch=2, averaged=average)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for number in range(3):
        step(model, optimizer, number=number)
        average.update_parameters(model)
        pruner.step()
    held = optimizer.param_groups[0]
    assert all(a is b for a, b in zip(held["params"], parameters, strict=True))
    assert {k: v for k, v in held.items() if k != "params"} == settings
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in parameters]
    check_vectors(optimizer)


def test_a_training_that_is_saved_goes_on_to_the_bit(tmp_path: Path) -> None:
    """From the dense definition, in every mode."""
    for mode in ("prune", "mask", "soft", "hybrid"):
        torch.manual_seed(0)
        one = twin(mode, lambda m: [LBFGS(m.parameters(), lr=0.1, max_iter=3)], end_epoch=4)
        for number in range(3):
            train(one, number)
            one.pruner.step()
        parts = {"model": one.model, "optimizer": one.optimizers[0], "pruner": one.pruner}
        pat.save_training(tmp_path / mode, **parts)
        other = twin(mode, lambda m: [LBFGS(m.parameters(), lr=0.1, max_iter=3)], end_epoch=4)
        parts = {"model": other.model, "optimizer": other.optimizers[0], "pruner": other.pruner}
        pat.load_training(tmp_path / mode, **parts)
        for number in range(3):
            assert torch.equal(train(one, number), train(other, number)), mode
            assert one.pruner.step().channels == other.pruner.step().channels
        assert same(weights(one.model), weights(other.model))
        state, its = (o.state_dict()["state"] for o in (one.optimizers[0], other.optimizers[0]))
        torch.testing.assert_close(state, its, rtol=0, atol=0)


def test_the_drop_in_cuts_it_too() -> None:
    model = Small().double()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=3)
    importance = tp.importance.GroupMagnitudeImportance()
    options: Settings = {"iterative_steps": 2, "pruning_ratio": 0.5, "ignored_layers": [model.head]}
    pruner = tp.pruner.BasePruner(model, X, importance, **options)
    for number in range(3):
        assert step(model, optimizer, number=number).isfinite()
        check_vectors(optimizer)
        if number < 2:
            pruner.step()
    assert model.inner.out_channels == 8


# What is refused


def test_a_history_from_before_a_prune_is_refused_at_the_next_step() -> None:
    model = Small().double()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
    pruner = pat.Pruner(model, 0.5, "one_shot", example_inputs=X)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    pruner.step()
    optimizer.load_state_dict(saved)
    with pytest.raises(pat.SurgeryError, match=r"LBFGS state 'd' of all parameters together has .*loaded that was"):
        step(model, optimizer)


def test_a_state_for_other_shapes_is_taken_up_after_steps_of_the_dense_model() -> None:
    """LBFGS counts its parameters' entries once, whatever becomes of them."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Small().double()
        optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=2)
        runs.append((model, optimizer, pat.Pruner(model, 0.5, example_inputs=X, end_epoch=2, verify=False)))
        step(model, optimizer)
    (model, optimizer, pruner), (dense, its_optimizer, its_pruner) = runs
    pruner.step()
    its_pruner.load_state_dict(pruner.state_dict())
    dense.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(3):
        assert torch.equal(step(model, optimizer, number=number), step(dense, its_optimizer, number=number))
        assert pruner.step().channels == its_pruner.step().channels
    assert same(weights(model), weights(dense))
    check_vectors(its_optimizer)


class Averaging(LBFGS):
    """Keeps an average of all parameters in a vector of its own."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        first, *_ = self._params
        self.state[first]["average"] = flat([p.detach() for p in self._params])
        return loss


def test_a_subclass_with_state_of_its_own_has_to_describe_it() -> None:
    """Though the parameter that it lies under is not pruned itself."""
    model = Small().double()
    optimizer = Averaging(model.parameters(), lr=0.1, max_iter=2)
    pruner = pat.Pruner(model, 0.5, "one_shot", example_inputs=X, layers_to_prune=["inner"])
    step(model, optimizer)
    before, history = weights(model), copy.deepcopy(optimizer.state_dict())
    message = r"Averaging keeps state 'average' for its parameters .*_layout\(Averaging, {'average': 'flat'}"
    with pytest.raises(pat.SurgeryError, match=message):
        pruner.step()
    assert same(weights(model), before)
    torch.testing.assert_close(optimizer.state_dict(), history, rtol=0, atol=0)
    pat.register_state_layout(Averaging, {"average": "flat"})
    pruner.step()
    state = optimizer.state[model.stem.weight]
    assert torch.equal(state["average"], flat([p.detach() for p in model.parameters()]))
    step(model, optimizer)


class Quasi(Optimizer):
    """Someone else's: its history is under a name, not under a parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        state = self.state["global"]  # type: ignore[index]
        grad = flat([p.grad for p in parameters])
        state["pairs"] = (*state.get("pairs", ()), grad)[-2:]
        state["steps"] = state.get("steps", 0) + 1
        start = 0
        for p in parameters:
            p -= 0.1 * sum(state["pairs"])[start : start + p.numel()].view_as(p)
            start += p.numel()


def test_another_one_is_refused_until_it_is_described() -> None:
    model, x = Small(), small_inputs()
    optimizer = Quasi([{"params": list(model.inner.parameters())}, {"params": list(model.stem.parameters())}])
    rest = torch.optim.SGD([*model.norm.parameters(), *model.outer.parameters(), *model.head.parameters()])
    pruner = pat.Pruner(model, 0.5, "one_shot", example_inputs=x)
    for _ in range(2):
        train_one_epoch(model, optimizer)
    with pytest.raises(pat.SurgeryError, match="Quasi keeps state under 'global', which is no parameter"):
        pruner.step()
    pat.register_state_layout(Quasi, {"pairs": "flat"})
    optimizer.state["global"]["pairs"] = tuple(  # type: ignore[index]
        flat([p.detach() for p in (*model.inner.parameters(), *model.stem.parameters())]) for _ in range(2)
    )
    pruner.step()
    pairs = optimizer.state["global"]["pairs"]  # type: ignore[index]
    assert isinstance(pairs, tuple)
    expected = flat([p.detach() for p in (*model.inner.parameters(), *model.stem.parameters())])
    assert all(torch.equal(pair, expected) for pair in pairs)
    train_one_epoch(model, optimizer)
    assert not rest.state


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(3, 3), "strided"])
def test_vectors_that_do_not_fit_are_refused(wrong: Any) -> None:
    model = Small()
    optimizer, parameters = with_history(model)
    length = sum(p.numel() for p in parameters)
    wrong = torch.zeros(2 * length)[::2] if isinstance(wrong, str) else wrong
    optimizer.state[parameters[0]]["old_dirs"][1] = wrong
    binding = bind(build_plan(model, small_inputs()), model)
    before = weights(model)
    for act in (prune, masked):
        with pytest.raises(pat.SurgeryError, match=rf"LBFGS state 'old_dirs' of all .*, expected a .*\({length},\)"):
            act(binding, random_keep(binding.plan, 0), [optimizer])
    assert same(weights(model), before)


def masked(binding: Binding, keep: np.ndarray, optimizers: list[Optimizer]) -> None:
    from pat_fast.masks import Mask

    Mask(binding).set(torch.from_numpy(keep), optimizers)


def test_a_history_of_parameters_that_stay_is_left_alone() -> None:
    model = Small()
    optimizer = LBFGS(model.head.parameters())
    state: Any = optimizer.state[model.head.weight]
    state["d"] = kept = torch.zeros(sum(p.numel() for p in model.head.parameters()))
    binding = bind(build_plan(model, small_inputs()), model)
    keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
    group = next(g for g in binding.plan.groups if g.root == "inner")
    keep[group.start] = False
    prune(binding, keep, [optimizer])
    assert state["d"] is kept
