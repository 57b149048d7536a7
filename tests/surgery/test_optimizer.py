"""Every optimizer of torch.optim keeps training through a prune; state of unknown layout is refused by name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pat_fast as pat
from pat_fast.plan import bind, build_plan
from pat_fast.plan.types import Kept
from pat_fast.surgery import prune
from tests.helpers import Small, random_keep, small_inputs
from tests.training import Twin, masked_equals_pruned, same, train_one_epoch, weights

pytestmark = pytest.mark.usefixtures("one_thread_and_the_usual_layouts")

Make = Callable[[list[nn.Parameter]], Optimizer]
MAKE: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, fused=True, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
}
# These keep no state per parameter, or only for parameters of a kind; they have tests of their own (test_lbfgs.py).
APART = {"LBFGS", "SparseAdam", "Muon"}


def test_no_optimizer_of_torch_is_forgotten() -> None:
    classes = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
    assert classes - {"Optimizer"} == {name.split()[0] for name in MAKE} | APART


@pytest.mark.parametrize("name", list(MAKE))
def test_train_prune_train(name: str) -> None:
    model = Small()
    optimizer = MAKE[name](list(model.parameters()))
    parameters = list(model.parameters())
    train_one_epoch(model, optimizer)
    binding = bind(build_plan(model, small_inputs()), model)
    for seed in range(2):
        before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
        data = weights(model)
        keep = random_keep(binding.plan, seed, ratio=0.3)
        plan = binding.plan
        binding = prune(binding, keep, [optimizer])
        assert [p for g in optimizer.param_groups for p in g["params"]] == parameters
        gathered = 0
        for parameter_name, p in model.named_parameters():
            assert torch.equal(p, taken(plan, parameter_name, data[parameter_name], keep))
            assert optimizer.state[p].keys() == before[parameter_name].keys()
            for key, value in optimizer.state[p].items():
                old = before[parameter_name][key]
                if isinstance(value, Tensor) and value.ndim:
                    expected = taken(plan, parameter_name, old, keep)
                    assert torch.equal(value, expected), (parameter_name, key)
                    assert value.stride() == expected.stride()
                    gathered += value.shape != old.shape
                else:
                    assert value is None or value == old
        assert gathered or name == "SGD without momentum"
        now = weights(model)
        train_one_epoch(model, optimizer)
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(not torch.equal(now[n], p) for n, p in model.named_parameters())


# Of these, what happens to an entry depends on that entry alone: masked equals pruned.
FOREACH = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "Rprop", "ASGD")
ALONE: dict[str, Make] = {
    **{name: make for name, make in MAKE.items() if name != "Adafactor"},
    **{
        f"{name} foreach={foreach}, maximize": lambda p, name=name, foreach=foreach: getattr(torch.optim, name)(
            p, lr=1e-3, foreach=foreach, maximize=True
        )
        for name in FOREACH
        for foreach in (True, False)
    },
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True, foreach=True, weight_decay=0.1),
    "NAdam decoupled": lambda p: torch.optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD maximize, dampening": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.1, maximize=True),
    "Adam with its rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "several groups": lambda p: torch.optim.AdamW(
        [{"params": p[:3], "lr": 1e-2}, {"params": p[3:4], "betas": (0.5, 0.9)}, {"params": p[4:], "amsgrad": True}]
    ),
}


SWITCHES = ("foreach", "fused", "maximize", "amsgrad", "centered", "nesterov", "decoupled_weight_decay")
NOT_HERE = {
    "capturable": "needs a GPU, see test_capturable_state_stays_on_the_gpu",
    "differentiable": "refuses leaves, and models are pruned between steps, not inside a graph",
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # on the CPU
BESIDE: dict[str, dict[str, Any]] = {"nesterov": {"momentum": 0.9}, "decoupled_weight_decay": {"weight_decay": 0.1}}


def switched() -> Iterator[tuple[str, str, bool]]:
    """Every class of torch.optim that treats entries alone, with each switch that its constructor has."""
    for name in sorted({name.split()[0] for name in ALONE} - {"several"}):
        for option in inspect.signature(getattr(torch.optim, name)).parameters:
            if option in SWITCHES and (option != "fused" or name in FUSED):
                yield from ((name, option, value) for value in ((True, False) if option == "foreach" else (True,)))


@pytest.mark.parametrize(("name", "option", "value"), list(switched()))
def test_masked_equals_pruned_with_every_switch(name: str, option: str, value: bool) -> None:
    x = small_inputs(dtype=torch.float64)

    def make(mode: str) -> Twin:
        model = Small().double()
        options: dict[str, Any] = {"lr": 1e-3, option: value, **BESIDE.get(option, {})}
        return Twin(model, [getattr(torch.optim, name)(model.parameters(), **options)], pruner_of(model, mode))

    masked_equals_pruned(make, lambda twin, step: twin.train(x, step), steps=6, prune_after=(1, 3))


def test_no_switch_of_an_optimizer_is_forgotten() -> None:
    for name in {name.split()[0] for name in MAKE} | APART:
        for option, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items():
            if parameter.default in (True, False) and isinstance(parameter.default, bool):
                assert option in SWITCHES or option in NOT_HERE, (name, option)


@pytest.mark.parametrize("name", list(ALONE))
def test_masked_equals_pruned(name: str) -> None:
    def make(mode: str) -> Twin:
        model = Small().double()
        optimizer = ALONE[name](list(model.parameters()))
        return Twin(model, [optimizer], pruner_of(model, mode))

    x = small_inputs(dtype=torch.float64)
    masked_equals_pruned(make, lambda twin, step: twin.train(x, step))


def pruner_of(model: nn.Module, mode: str) -> pat.Pruner:
    x = small_inputs(dtype=torch.float64)
    return pat.Pruner(model, 0.5, example_inputs=x, mode=mode, end_epoch=2, reg_strength=1e-3, verify=False)


@pytest.mark.parametrize("given", [True, False])
def test_masked_equals_pruned_with_several_optimizers_and_state_before_the_first_step(given: bool) -> None:
    """One begins late; one has state before its first step (Adagrad)."""

    def make(mode: str) -> Twin:
        model = Small().double()
        parts = [
            torch.optim.Adagrad(model.stem.parameters(), lr=0.01),
            torch.optim.Adam([*model.norm.parameters(), *model.inner.parameters()], lr=0.01),
            torch.optim.SGD([*model.outer.parameters(), *model.head.parameters()], lr=0.01, momentum=0.9),
        ]
        x = small_inputs(dtype=torch.float64)
        optimizer = parts if given else None
        options: dict[str, Any] = {"mode": mode, "end_epoch": 3, "verify": False, "regularizer": None}
        return Twin(model, parts, pat.Pruner(model, 0.5, "linear", example_inputs=x, optimizer=optimizer, **options))

    def train(twin: Twin, step: int) -> Tensor:
        loss = nn.functional.cross_entropy(twin.model(small_inputs(dtype=torch.float64)), torch.arange(4))
        twin.model.zero_grad()
        loss.backward()
        for optimizer in twin.optimizers[: 2 if step < 4 else 3]:
            optimizer.step()
        return loss.detach()

    twins = masked_equals_pruned(make, train, prune_after=(0, 2, 5))
    assert all(len(o.state) == len(o.param_groups[0]["params"]) for t in twins for o in t.optimizers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "RMSprop", "Rprop", "ASGD"])
@pytest.mark.parametrize("foreach", [True, False])
def test_capturable_state_stays_on_the_gpu(name: str, foreach: bool) -> None:
    model = Small().cuda()
    x = small_inputs().cuda()
    optimizer = getattr(torch.optim, name)(model.parameters(), capturable=True, foreach=foreach)
    pruner = pat.Pruner(model, 0.5, end_epoch=3, example_inputs=x)
    for step in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (torch.arange(4) + step).cuda() % 5).backward()
        optimizer.step()
        pruner.step()
    assert model.stem.out_channels < 12
    for p in model.parameters():
        assert all(t.is_cuda and (t.ndim == 0 or t.shape == p.shape) for t in optimizer.state[p].values())


def taken(plan: pat.Plan, name: str, tensor: Tensor, keep: np.ndarray) -> Tensor:
    """What is kept of a tensor that lies over parameter ``name``, axis by axis; axes of size 1 stay."""
    maps = [t for t in plan.tensors if t.name == name]
    for tensor_map in maps:
        for axis, kept in zip(tensor_map.axes, tensor_map.kept(Kept(keep)), strict=True):
            if tensor.shape[axis.dim] != 1:
                tensor = tensor.index_select(axis.dim, torch.from_numpy(kept))
    return tensor


def test_muon_and_another_optimizer_share_the_work() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))
    x = torch.randn(8, 6)
    muon = torch.optim.Muon([model[2].weight], lr=0.01)
    rest = torch.optim.AdamW([p for p in model.parameters() if p is not model[2].weight], lr=0.01)
    pruner = pat.Pruner(model, 0.5, end_epoch=3)
    for _ in range(5):
        for optimizer in (muon, rest):
            optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 5).backward()
        for optimizer in (muon, rest):
            optimizer.step()
        pruner.step()
    assert model[2].weight.numel() < 24 * 20
    assert muon.state[model[2].weight]["momentum_buffer"].shape == model[2].weight.shape
    assert rest.state[model[2].bias]["exp_avg"].shape == model[2].bias.shape


def test_lbfgs_that_has_not_started_has_no_history() -> None:
    model = Small()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    binding = bind(build_plan(model, small_inputs()), model)
    prune(binding, random_keep(binding.plan, 0), [optimizer])
    optimizer.step(lambda: model(small_inputs()).square().mean())


def test_sparse_adam_shrinks_between_its_gradients() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3))
    sparse = torch.optim.SparseAdam([model[0].weight])
    dense = torch.optim.SGD(model[1].parameters(), lr=0.1)
    ids = torch.tensor([1, 3, 3])
    binding = bind(build_plan(model, ids), model)
    for _ in range(2):
        for optimizer in (sparse, dense):
            optimizer.zero_grad()
        model(ids).square().sum().backward()
        for optimizer in (sparse, dense):
            optimizer.step()
        if model[0].embedding_dim == 8:
            keep = np.arange(8) % 2 == 0
            with pytest.raises(pat.SurgeryError, match=r"0.weight has a sparse gradient; call zero_grad\(\)"):
                prune(binding, keep, [sparse, dense])
            sparse.zero_grad()
            prune(binding, keep, [sparse, dense])
    assert sparse.state[model[0].weight]["exp_avg"].shape == (9, 4)


# Layouts of one's own


class Sketching(Optimizer):
    """Keeps a moment, a factored one, a count in a vector, and a number, none of which torch knows."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["rows"] = torch.zeros(p.shape[:1] + (1,) * (p.ndim - 1))
                    state["trace"] = torch.zeros_like(p)
                    state["count"] = torch.zeros(1)
                    state["age"] = 0
                state["trace"].lerp_(p.grad, 0.1)
                state["rows"] += state["trace"].abs().sum_to_size(state["rows"].shape)
                state["count"] += 1
                state["age"] += 1
                p -= group["lr"] * state["trace"] / (1 + state["rows"])


LAYOUT = {"rows": "factored", "trace": "elementwise", "count": "scalar"}


@pytest.mark.parametrize("missing", list(LAYOUT))
def test_unknown_state_is_refused_by_class_and_key_and_can_be_registered(missing: str) -> None:
    model = Small()
    optimizer = Sketching(model.parameters())
    train_one_epoch(model, optimizer)
    known = {k: v for k, v in LAYOUT.items() if k != missing}
    if known:
        pat.register_state_layout(Sketching, known)
    binding = bind(build_plan(model, small_inputs()), model)
    keep = random_keep(binding.plan, 0)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    message = rf"Sketching keeps state '{missing}' for stem.weight \(tensor of shape .*register_state_layout\(Sketching"
    with pytest.raises(pat.SurgeryError, match=message):
        prune(binding, keep, [optimizer])
    assert same(weights(model), before)
    for i, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, state[i][k]) for k, v in entry.items() if isinstance(v, Tensor))
    pat.register_state_layout(Sketching, {missing: LAYOUT[missing]})
    prune(binding, keep, [optimizer])
    assert optimizer.state[model.inner.weight]["trace"].shape == model.inner.weight.shape
    assert optimizer.state[model.inner.weight]["rows"].shape == (model.inner.out_channels, 1, 1, 1)
    assert optimizer.state[model.inner.weight]["count"] == 2
    train_one_epoch(model, optimizer)


class Packed(Tensor):
    """Entries that are stored in another way, as those of 8-bit optimizers are."""

    @staticmethod
    def __new__(cls, like: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@pytest.mark.parametrize("registered", [True, False])
def test_state_that_is_packed_is_refused(registered: bool) -> None:
    class Quantised(torch.optim.SGD):
        pass

    if registered:
        pat.register_state_layout(Quantised, {"codes": "elementwise"})
    model = Small()
    optimizer = Quantised(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        optimizer.state[parameter]["codes"] = Packed(parameter)
    binding = bind(build_plan(model, small_inputs()), model)
    before = weights(model)
    with pytest.raises(pat.SurgeryError, match=r"Quantised keeps state 'codes' for stem.weight as Packed, .* plain"):
        prune(binding, random_keep(binding.plan, 0), [optimizer])
    assert same(weights(model), before)
    optimizer.state.clear()
    prune(binding, random_keep(binding.plan, 0), [optimizer])


class Preconditioning(Optimizer):
    """Statistics of rows, of columns, of both, as lists and as squares."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, flat = self.state[p], p.grad.flatten(1) if p.ndim > 1 else p.grad[:, None]
                state["gram"] = flat @ flat.T
                wide = p.grad.abs().unsqueeze(-1)
                state["sums"] = [wide.transpose(0, d).flatten(1).sum(1) for d in range(p.ndim)]
                state["top"] = flat.topk(1, dim=1).values
                if p.ndim > 1:
                    state["means"] = p.grad.transpose(0, 1).flatten(1).mean(1)
                    state["without_last"] = p.grad.mean(-1)
                p -= group["lr"] * p.grad / (1 + state["gram"].diagonal().view(-1, *[1] * (p.ndim - 1)))


def test_rows_columns_squares_and_lists() -> None:
    pat.register_state_layout(
        Preconditioning,
        {
            "gram": (0, 0),
            "sums": "per axis",
            "top": "rows",
            "means": "columns",
            "without_last": lambda shape: tuple(range(len(shape) - 1)),
        },
    )
    model = Small()
    optimizer = Preconditioning(model.parameters())
    train_one_epoch(model, optimizer)
    binding = bind(build_plan(model, small_inputs()), model)
    keep = random_keep(binding.plan, 0)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    prune(binding, keep, [optimizer])
    for name, p in model.named_parameters():
        old, state = before[name], optimizer.state[p]
        axes = {a.dim: Kept(keep)(a.channels) for t in binding.plan.tensors if t.name == name for a in t.axes}
        kept = [torch.from_numpy(axes[d]) if d in axes else torch.arange(n) for d, n in enumerate(old_shape(old))]
        assert [len(k) for k in kept] == list(p.shape)
        assert torch.equal(state["gram"], old["gram"][kept[0]][:, kept[0]])
        assert torch.equal(state["top"], old["top"][kept[0]])
        assert isinstance(state["sums"], list)
        assert all(torch.equal(a, b[k]) for a, b, k in zip(state["sums"], old["sums"], kept, strict=True))
        if p.ndim > 1:
            assert torch.equal(state["means"], old["means"][kept[1]])
            assert state["without_last"].shape == p.shape[:-1]
    train_one_epoch(model, optimizer)


def old_shape(state: dict[str, Any]) -> list[int]:
    return [len(t) for t in state["sums"]]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"gram": (0, 1)}, r"Preconditioning state 'gram' of stem.weight has shape \(12, 12\), expected one that fits"),
        ({"gram": (0,)}, r"'gram' of stem.weight has shape \(12, 12\)"),
        ({"gram": "per axis"}, r"Preconditioning keeps state 'gram' .*how it follows .* is not known"),
        ({"gram": (0, 0), "sums": "elementwise"}, r"keeps state 'sums' for stem.weight \(list\)"),
        ({"gram": (0, 0), "sums": "per axis", "top": "columns"}, r"'top' of stem.weight has shape \(12, 1\)"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: dict[str, Any], message: str) -> None:
    pat.register_state_layout(Preconditioning, {"means": "scalar", "without_last": "scalar", "top": "rows", **layout})
    model = Small()
    optimizer = Preconditioning(model.parameters())
    train_one_epoch(model, optimizer)
    binding = bind(build_plan(model, small_inputs()), model)
    before = weights(model)
    with pytest.raises(pat.SurgeryError, match=message):
        prune(binding, random_keep(binding.plan, 0), [optimizer])
    assert same(weights(model), before)


def test_parameters_that_live_in_buckets_are_refused() -> None:
    model, x = Small(), small_inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.parameters_as_bucket_view = True  # type: ignore[attr-defined]
    plan = build_plan(model, x)
    with pytest.raises(pat.SurgeryError, match="make it with parameters_as_bucket_view=False"):
        prune(bind(plan, model), random_keep(plan, 0), [optimizer])


def test_state_of_all_parameters_together_is_refused() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["count"] = {"steps": 3, "norm": torch.tensor(1.0)}
    binding = bind(build_plan(model, small_inputs()), model)
    keep = random_keep(binding.plan, 0)
    optimizer.state["flat"] = {"averages": [torch.zeros(100)]}
    with pytest.raises(pat.SurgeryError, match="SGD keeps state under 'flat', which is no parameter"):
        prune(binding, keep, [optimizer])
    del optimizer.state["flat"]
    prune(binding, keep, [optimizer])


def test_a_subclass_inherits_what_is_known_of_its_base() -> None:
    class Averaging(torch.optim.Adam):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p]["average"] = p.detach().clone()

    model = Small()
    optimizer = Averaging(model.parameters())
    train_one_epoch(model, optimizer)
    binding = bind(build_plan(model, small_inputs()), model)
    keep = random_keep(binding.plan, 0)
    with pytest.raises(pat.SurgeryError, match="Averaging keeps state 'average'"):
        prune(binding, keep, [optimizer])
    pat.register_state_layout(Averaging, {"average": "elementwise"})
    prune(binding, keep, [optimizer])
    for p in model.parameters():
        assert {k: v.shape for k, v in optimizer.state[p].items() if v.ndim} == dict.fromkeys(
            ("exp_avg", "exp_avg_sq", "average"), p.shape
        )


def test_state_that_is_no_tensor_is_refused() -> None:
    model = Small()
    optimizer = torch.optim.Adam(model.parameters())
    train_one_epoch(model, optimizer)
    optimizer.state[model.outer.weight]["history"] = [torch.zeros(3)]
    binding = bind(build_plan(model, small_inputs()), model)
    with pytest.raises(pat.SurgeryError, match=r"Adam keeps state 'history' for outer.weight \(list\)"):
        prune(binding, random_keep(binding.plan, 0), [optimizer])


@pytest.mark.parametrize("key", ["exp_avg", "momentum_buffer"])
def test_state_that_does_not_fit_its_parameter_is_refused(key: str) -> None:
    model = Small()
    cls = torch.optim.Adam if key == "exp_avg" else torch.optim.SGD
    optimizer = cls(model.parameters(), lr=0.1)
    train_one_epoch(model, optimizer)
    optimizer.state[model.outer.weight][key] = torch.zeros(3, 3)
    binding = bind(build_plan(model, small_inputs()), model)
    message = rf"{cls.__name__} state '{key}' of outer.weight has shape \(3, 3\), expected .*\(12, 16, 1, 1\)"
    with pytest.raises(pat.SurgeryError, match=message):
        prune(binding, random_keep(binding.plan, 0), [optimizer])


def test_factored_state_of_a_grouped_convolution_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 5, 1), nn.Flatten())
    optimizer = torch.optim.Adafactor(model.parameters())
    model(small_inputs()).square().mean().backward()
    optimizer.step()
    binding = bind(build_plan(model, small_inputs()), model)
    before = weights(model)
    keep = np.ones(binding.plan.n_channels, dtype=np.bool_)
    keep[binding.plan.unit == binding.plan.unit[0]] = False
    with pytest.raises(pat.SurgeryError, match=r"1.weight: the factored optimizer state of a grouped convolution's in"):
        prune(binding, keep, [optimizer])
    assert same(weights(model), before)


def test_layouts_have_names() -> None:
    with pytest.raises(pat.SurgeryError, match=r"layout of Adam.state.*\['x'\]: expected 'elementwise'.*got 'round'"):
        pat.register_state_layout(torch.optim.Adam, {"x": "round"})
    for optimizer, layout in (("Adam", {"x": "rows"}), (torch.optim.Adam, "rows")):
        with pytest.raises(pat.SurgeryError, match="expected a class of optimizers and a layout for each key"):
            pat.register_state_layout(optimizer, layout)  # type: ignore[arg-type]
