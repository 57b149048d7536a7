"""Models that are not plain: handled, or refused by name and left as they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pat_fast as pat
from pat_fast.masks import Mask
from pat_fast.plan import bind
from pat_fast.surgery import prune
from tests.helpers import random_keep


def layers() -> list[nn.Module]:
    return [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)]


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    """Three linear layers; subclasses say how they run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers())

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class NoGrad(Chain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        assert not torch.is_grad_enabled()
        return self.body(x)


class Inference(Chain):
    def forward(self, x: Tensor) -> Any:
        with torch.inference_mode():
            return self.body(x)


class Branching(Chain):
    """Which layers run depends on values."""

    def forward(self, x: Tensor) -> Any:
        h = self.body[:2](x)
        if h.sum().item() > -1e9 and int(h.argmax()) >= 0:
            h = self.body[2:4](h)
        return self.body[4](h)


@dataclass
class Found:
    boxes: Tensor
    rest: dict[str, Any]


class OddOutputs(Chain):
    def forward(self, x: Tensor) -> Any:
        return Found(self.body(x), {"names": ["a"], "more": (None, [self.body(x) * 2])})


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class OwnObject(Chain):
    def forward(self, x: Tensor) -> Any:
        return Plain(self.body(x))


class Twice(Chain):
    """A layer used twice, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.other.weight = self.again.weight

    def forward(self, x: Tensor) -> Any:
        h = self.body[0](x).relu()
        return self.body[2:](self.other(self.again(self.again(h).relu())).relu())


class ChangesItself(Chain):
    """Keeps what it computed, as caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.seen["last"] = self.body[0](x)
        return self.body(x)


@pytest.mark.parametrize(
    "kind", [NoGrad, Inference, Branching, OddOutputs, OwnObject, Twice, ChangesItself], ids=lambda k: k.__name__
)
def test_an_unusual_forward_is_pruned_all_the_same(kind: type[Chain]) -> None:
    torch.manual_seed(0)
    model = kind()
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    plan = pat.build_plan(model, X)
    assert {"body.0", "body.2"} <= {layer for g in plan.groups for layer in g.layers}
    assert [f.layer for f in plan.frozen] == ["body.4"]
    assert any("verified in" in note for note in plan.notes), plan.notes
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    prune(bind(plan, model), random_keep(plan, 1))
    model(X)
    assert model.body[0].out_features < 8


def test_a_plan_that_is_made_in_an_optimizers_hook_is_proven_at_once() -> None:
    """Such a hook runs without gradients; the proof takes a backward."""
    model = nn.Sequential(*layers())
    with torch.no_grad():
        plan = pat.build_plan(model, X)
    assert "verified" in plan.notes[-1]
    assert "group by group" not in plan.notes[-1]


def test_what_a_forward_keeps_in_its_module_is_gone_after_planning() -> None:
    model = ChangesItself()
    pat.build_plan(model, X)
    assert (model.seen, model.calls) == ({}, 0)


def test_a_compiled_model_is_planned_as_it_was_written() -> None:
    model = nn.Sequential(*layers())
    compiled: Any = torch.compile(model, backend="eager")
    plan = pat.build_plan(compiled, X)
    assert {g.root for g in plan.groups} == {"_orig_mod.0", "_orig_mod.2"}
    prune(bind(plan, compiled), random_keep(plan, 1))
    torch.testing.assert_close(compiled(X), model(X))


@pytest.mark.parametrize("normed", [weight_norm, torch.nn.utils.weight_norm], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_shrinks_with_its_layer(normed: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), normed(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3)).double()
    x = X.double()
    plan = pat.build_plan(model, x)
    assert sorted(g.channels for g in plan.groups) == [6, 8]
    name = next(t.name for t in plan.tensors if t.name in ("2.weight_v", "2.parametrizations.weight.original1"))
    keep = random_keep(plan, 1, 0.5)
    before = model[2].weight.shape
    rows = keep[plan.tensor(name).axes[0].channels]
    prune(bind(plan, model), keep)
    assert (model[2].in_features, model[2].out_features) == (int(keep.sum() - rows.sum()), int(rows.sum()))
    model(x).sum().backward()
    assert model[2].weight.shape == (model[2].out_features, model[2].in_features) != before


class GroupedNormed(nn.Module):
    """A grouped (or depthwise) convolution with a weight norm, between two plain ones."""

    def __init__(self, normed: Any, groups: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3)
        self.wide = normed(nn.Conv2d(16, 16, 3, groups=groups), dim=dim)
        self.back = nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.wide, self.back):
            x = layer(x).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("normed", [weight_norm, torch.nn.utils.weight_norm], ids=["parametrization", "hook"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_grouped_weight_norm_shrinks_with_its_layer(normed: Any, groups: int, dim: int) -> None:
    model = GroupedNormed(normed, groups, dim).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = pat.build_plan(model, x)
    assert any("verified in" in note for note in plan.notes)
    assert {f.layer for f in plan.frozen} == {"head"}
    binding, before = bind(plan, model), model.wide.weight.shape
    for share in (0.3, 0.5):  # a second time by the plan that is left
        keep = random_keep(binding.plan, 1, share)
        Mask(binding).set(torch.from_numpy(keep), [])
        expected = model(x).detach()
        binding = prune(binding, keep)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-12)
    model(x).sum().backward()
    wide = model.wide
    assert wide.groups == (4 if groups == 4 else wide.in_channels)
    assert wide.weight.shape == (wide.out_channels, wide.in_channels // wide.groups, 3, 3) != before


def test_a_depthwise_transposed_convolution_shrinks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = pat.build_plan(model, x)
    keep = random_keep(plan, 1, 0.5)
    binding = bind(plan, model)
    Mask(binding).set(torch.from_numpy(keep), [])
    expected = model(x).detach()
    prune(binding, keep)
    assert model[1].groups == model[1].in_channels == model[1].out_channels == int(keep.sum()) < 8
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-12)


def test_a_plan_that_could_not_be_verified_says_so_at_every_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no copies")

    monkeypatch.setattr("pat_fast.proof.rehearse", lambda *_, **__: False)  # what proves most models without a copy
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Uncopied(8, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match="could not be verified.*no copies"):
        pruner = pat.Pruner(model, 0.5, "linear", example_inputs=X, end_epoch=2)
    reports = [pruner.step() for _ in range(2)]
    assert all(report.changed for report in reports)
    assert all(any("could not be verified" in note for note in report.notes) for report in reports)


def test_a_parametrization_that_cannot_be_followed_stays_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), spectral_norm(nn.Linear(8, 6)), nn.ReLU(), nn.Linear(6, 3))
    plan = pat.build_plan(model, X)
    assert any("2.parametrizations.weight" in f.layer for f in plan.frozen)
    prune(bind(plan, model), random_keep(plan, 1))
    model(X).sum().backward()


def refused() -> dict[str, tuple[Any, str]]:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    meta = nn.Sequential(nn.Linear(4, 8, device="meta"), nn.Linear(8, 3))
    half = torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers()), {nn.Linear}, dtype=torch.qint8)
    return {
        "lazy": (lazy, "0.weight has no shape yet.*run one forward"),
        "meta": (meta, "0.weight is on the meta device.*load"),
        "quantized": (half, "quantized Linear; prune first"),
        "parallel": (nn.DataParallel(nn.Sequential(*layers())), "DataParallel; build the plan of the model inside"),
        "scripted": (nn.Sequential(torch.jit.script(nn.Linear(4, 8)), nn.Linear(8, 3)), "0 is scripted or traced"),
        "exported": (torch.export.export(nn.Sequential(*layers()), (X,)).module(), "comes from torch.export"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["lazy", "meta", "quantized", "parallel", "scripted", "exported"])
def test_what_cannot_be_cut_is_refused_by_name(name: str) -> None:
    model, message = refused()[name]
    before = {key: (value, dict(vars(value))) for key, value in model.named_modules()}
    with pytest.raises(pat.PlanError, match=message):
        pat.build_plan(model, X)
    assert all(vars(module) == (attributes) for module, attributes in before.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_no_model_and_no_example_is_refused() -> None:
    with pytest.raises(pat.ConfigError, match=r"expected a torch\.nn\.Module, got NoneType"):
        pat.build_plan(None, X)
    scripted = torch.jit.script(nn.Sequential(*layers()))
    for use in (pat.Pruner, lambda model: pat.build_plan(model, X)):
        with pytest.raises(pat.ConfigError, match="the model is scripted or traced"):
            use(scripted)
    with pytest.raises(pat.PlanError, match=r"\(\(0, 4\)\) hold no example"):
        pat.build_plan(nn.Sequential(*layers()), X[:0])


def test_a_model_in_distributed_data_parallel_is_refused_by_name() -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers()))
        with pytest.raises(pat.PlanError, match="wrapped in DistributedDataParallel; build the plan of the model in"):
            pat.build_plan(model, X)
        assert pat.build_plan(model.module, X).n_channels == 14
    finally:
        dist.destroy_process_group()


def test_a_forward_that_fails_leaves_the_model_as_it_was() -> None:
    class Fails(ChangesItself):
        def forward(self, x: Tensor) -> Any:
            super().forward(x)
            self.body.eval()
            self.body[0].weight.requires_grad_(False)
            raise ValueError("seven examples, please")

    model = Fails()
    model.body[2].weight.requires_grad_(False)
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    with pytest.raises(pat.PlanError, match=r"fails on the example inputs \(\(5, 4\)\): ValueError: seven examples"):
        pat.build_plan(model, X)
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert ([m.training for m in model.modules()], model.seen, model.calls) == (modes, {}, 0)


class Subclass(Tensor):
    pass


def test_tensors_of_other_kinds_are_refused() -> None:
    model = nn.Sequential(*layers())
    model[0].register_buffer("scale", torch.ones(2).as_subclass(Subclass))
    with pytest.raises(pat.PlanError, match=r"0\.scale is a Subclass.*prune first"):
        pat.build_plan(model, X)


def test_a_forward_without_tensors_is_refused() -> None:
    class Silent(Chain):
        def forward(self, x: Tensor) -> Any:
            self.body(x)
            return {"answer": 42}

    with pytest.raises(pat.PlanError, match="returned a dict in which no tensor was found"):
        pat.build_plan(Silent(), X)
