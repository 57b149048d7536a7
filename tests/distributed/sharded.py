"""What each rank does in the tests of FSDP2: ``python -m tests.distributed.sharded CASE FOLDER``."""

from __future__ import annotations

import copy
import pkgutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import pat_fast as pat
from pat_fast.criteria import GroupNorm
from pat_fast.distributed.fsdp import prune_sharded, sharded_scores
from pat_fast.plan import bind
from pat_fast.plan.running import call
from pat_fast.surgery import prune
from tests.distributed.worker import main
from tests.helpers import Case, Small, random_keep, small_inputs


class Depthwise(nn.Module):
    """A depthwise convolution, a bias-free norm, widths that two and three ranks split unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 11, 1), nn.Conv2d(11, 11, 3, groups=11), nn.GroupNorm(1, 11), nn.ReLU(), nn.Conv2d(11, 7, 1),
            nn.ReLU(), nn.Flatten(), nn.Linear(7 * 36, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, clear: bool = True, part: slice = slice(None)
) -> None:
    x = small_inputs(6, dtype=torch.float64)
    for i in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), (torch.arange(len(x)).add(i) % 3)[part]).backward()
        optimizer.step()
    if clear:
        optimizer.zero_grad()


def difference(model: nn.Module, alone: nn.Module) -> float:
    """Of whole tensors from those of the model that is not sharded, the largest."""
    worst = 0.0
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        whole = p.full_tensor()  # type: ignore[attr-defined]
        assert whole.shape == q.shape, (name, whole.shape, q.shape)
        worst = max(worst, float((whole - q).detach().abs().max()))
    for b, c in zip(model.buffers(), alone.buffers(), strict=True):
        worst = max(worst, float((b.double() - c.double()).abs().max()))
    return worst


def follows() -> Any:
    """A sharded model is scored, pruned and trained as one that is not, step for step."""
    found = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind in (Small, Depthwise):
        torch.manual_seed(0)
        model = kind().double()
        alone = copy.deepcopy(model)
        plan = pat.build_plan(model, small_inputs(dtype=torch.float64), verify=False)
        binding = bind(plan, alone)
        if kind is Small:
            fully_shard(model.inner, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]
        objects = list(model.parameters())
        errors = []
        for seed in range(3):
            for m, o in zip((model, alone), optimizers, strict=True):
                steps(m, o, clear=seed != 1)  # once with gradients in flight
            scores = sharded_scores(plan, model)
            errors.append(float((scores - GroupNorm().score(binding)).abs().max()))
            keep = random_keep(plan, seed)
            plan = prune_sharded(plan, keep, model, [optimizers[0]])
            binding = prune(binding, keep, [optimizers[1]])
            errors.append(difference(model, alone))
            grads = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
            errors += [float((g.full_tensor() - h).abs().max()) for g, h in grads if g is not None]  # type: ignore[attr-defined]
        for m, o in zip((model, alone), optimizers, strict=True):
            steps(m, o)
        errors.append(difference(model, alone))
        held = [p for group in optimizers[0].param_groups for p in group["params"]]
        same = all(a is b for a, b in zip(objects, model.parameters(), strict=True))
        same = same and all(a is b for a, b in zip(held, objects, strict=True))
        found[kind.__name__] = [max(errors), same, plan.n_channels, [list(p.shape) for p in alone.parameters()]]
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "decoupled": {
        "regularizer": {"name": "group_norm", "decoupled": True, "strength": 1e-2},
        "importance": "magnitude",
    },
    "taylor": {"importance": "taylor", "regularizer": {"name": "growing", "delta": 1e-3}, "unit": "step"},
    "proximal": {"regularizer": {"name": "proximal", "strength": 1e-3}, "target": {"macs": 0.5}},
    "mask": {"mode": {"name": "mask", "shrink": True}},
    "hybrid": {"mode": {"name": "hybrid", "steps": 2}, "importance": "magnitude"},
    "soft": {"mode": "soft", "schedule": "constant"},
    "movement": {"importance": "movement", "regularizer": None, "ranking": "local", "round_to": 2},
}


class Pair:
    """A sharded model and one that is whole, each with its pruner and optimizer, trained alike."""

    def __init__(self, kind: type[nn.Module], when: str = "after", **settings: Any) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.model = kind().double()
        self.alone = copy.deepcopy(self.model)
        x = small_inputs(dtype=torch.float64)
        inputs = None if when == "later" else x
        pruner = pat.Pruner(self.model, example_inputs=inputs, **settings) if when == "before" else None
        shard(self.model)
        pruner = pruner or pat.Pruner(self.model, example_inputs=inputs, **settings)
        self.pruners = [pruner, pat.Pruner(self.alone, example_inputs=x, **settings)]
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (self.model, self.alone)]
        self.objects = list(self.model.parameters())

    def train(self, count: int = 2, clear: bool = True) -> None:
        """The whole model on a joint batch, each rank on its part of it (a batch norm needs all of it)."""
        part = slice(dist.get_rank(), None, dist.get_world_size()) if self.kind is Depthwise else slice(None)
        for model, optimizer, own in zip((self.model, self.alone), self.optimizers, (part, slice(None)), strict=True):
            steps(model, optimizer, count, clear, own)

    def step(self) -> list[Any]:
        return [pruner.step().macs for pruner in self.pruners]

    def difference(self) -> float:
        return difference(self.model, self.alone)

    def same(self) -> bool:
        """Whether parameters are the objects that they were, in the model and in the optimizer."""
        held = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        return all(a is b is c for a, b, c in zip(self.objects, self.model.parameters(), held, strict=True))


def shard(model: nn.Module, **how: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if hasattr(model, "inner"):
        fully_shard(model.inner, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)


def pruner_follows() -> Any:
    """A pruner of a sharded model does what one of a model that is whole does, step for step."""
    found = {}
    for name, settings in SETTINGS.items():
        for kind in (Small, Depthwise):
            for when in ("before", "after", "later") if name in ("default", "hybrid") else ("later",):
                pair = Pair(kind, when, start_epoch=1, end_epoch=6, **settings)
                errors, reports = [], []
                for epoch in range(5):
                    pair.train(clear=epoch != 2)  # once with gradients in flight
                    reports.append(pair.step())
                    errors.append(pair.difference())
                pair.model.eval()(small_inputs(dtype=torch.float64))  # after which the root is not resharded
                pair.model.train()
                reports.append(pair.step())
                pair.train()
                reports.append([pruner.finalize().macs for pruner in pair.pruners])
                pair.train()
                errors.append(pair.difference())
                found[f"{name} {kind.__name__} {when}"] = [max(errors), pair.same(), reports]
    return found


def networks() -> Any:
    """Networks of the zoo, every part of them sharded on its own (layers are then of classes that FSDP makes)."""
    found = {}
    for name in ("mobilenet_v2", "densenet121", "vit_s16", "text", "conv1d"):
        case = Case.build(name)
        models = [case.model, copy.deepcopy(case.model)]
        for part in case.model.children():
            if not isinstance(part, nn.ModuleList) and any(True for _ in part.parameters()):
                shard(part)
        shard(case.model)
        pruners = [pat.Pruner(m, 0.4, example_inputs=case.inputs, end_epoch=2) for m in models]
        optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in models]
        for _ in range(3):
            for model, optimizer, pruner in zip(models, optimizers, pruners, strict=True):
                call(model, case.inputs).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                pruner.step()
        found[name] = [difference(*models), pruners[0].plan.n_channels, pruners[1].plan.n_channels]
    return found


def undone() -> Any:
    """A prune that fails, at any of its stages, leaves weights, gradients, state and FSDP as they were."""
    found = {}
    for where in ("then", "attributes", "swap"):
        pair = Pair(Depthwise, end_epoch=3)
        pair.train(clear=False)
        target = {
            "then": "pat_fast.state.State.shrunk",
            "attributes": "pat_fast.distributed.fsdp.apply_changes",
            "swap": "torch.utils.swap_tensors",
        }[where]
        before = everything(pair)
        with mock.patch(target, failing(target, 1 if where == "swap" else 0)):  # the second of them
            try:
                pair.pruners[0].step()
                said = ""
            except pat.SurgeryError as error:
                said = str(error)
        after = everything(pair)
        unchanged = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        for _ in range(3):
            pair.step()
            pair.train()
        found[where] = [said, unchanged, pair.difference(), pair.same()]
    return found


def old_losses() -> Any:
    """The backward of a loss from before a prune is refused, before the first prune and later; training goes on."""
    found = {}
    x = small_inputs(6, dtype=torch.float64)
    for kind in (Small, Depthwise):
        pair = Pair(kind, end_epoch=4)
        pair.train()
        said = []
        for _ in range(2):
            old, _ = (model(x).square().mean() for model in (pair.model, pair.alone))
            pair.step()
            try:
                old.backward()
            except pat.SurgeryError as error:
                said.append(str(error))
            pair.train(clear=False)
        found[kind.__name__] = [said, pair.difference()]
    return found


def failing(target: str, after: int) -> Any:
    """A stand-in for a function that fails on the first rank, the first time that it is called so often."""
    module, _, name = target.rpartition(".")
    holder = pkgutil.resolve_name(module)
    real, calls = getattr(holder, name), [0]

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1 and dist.get_rank() == 0:
            raise MemoryError("no more")
        return real(*args, **kwargs)

    return fail


def everything(pair: Pair) -> dict[str, Tensor]:
    """Copies of this rank's part of a model, its gradients and its optimizer's state."""
    found = {}
    for name, p in pair.model.named_parameters():
        state = pair.optimizers[0].state[p]
        for key, value in {"": p, "grad": p.grad, **state}.items():
            if isinstance(value, Tensor):
                found[f"{name} {key}"] = getattr(value, "_local_tensor", value).detach().clone()
    return found


def lowered() -> Any:
    """Mixed precision: inputs are caught after FSDP lowered them; weights are whole in their own precision."""
    model = Depthwise()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    pruner = pat.Pruner(model, 0.3, end_epoch=2)
    shard(model, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for _ in range(2):
        nn.functional.cross_entropy(model(small_inputs()).float(), torch.arange(4) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        report = pruner.step()
    nn.functional.cross_entropy(model(small_inputs()).float(), torch.arange(4) % 3).backward()
    return [report.channels, str(next(model.parameters()).dtype)]


def resumed() -> Any:
    """The state of a sharded model's pruner, loaded before a dense model is sharded, gives it its shape."""
    settings: dict[str, Any] = {"target_sparsity": 0.5, "end_epoch": 4, "importance": "taylor"}
    first = Pair(Small, **settings)
    for _ in range(2):
        first.train()
        first.step()
    state = first.pruners[0].state_dict()
    model = Small().double()
    pruner = pat.Pruner(model, example_inputs=small_inputs(dtype=torch.float64), **settings)
    pruner.load_state_dict(state)
    shard(model)
    for p, q in zip(model.parameters(), first.model.parameters(), strict=True):
        p.detach().copy_(q.detach())
    for b, c in zip(model.buffers(), first.model.buffers(), strict=True):
        b.copy_(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(first.optimizers[0].state_dict()))
    for _ in range(2):
        first.train()
        first.step()
        steps(model, optimizer, 2)
        pruner.step()
    late = Small().double()
    shard(late)
    said = ""
    try:
        pat.Pruner(late, example_inputs=small_inputs(dtype=torch.float64), **settings).load_state_dict(state)
    except pat.CheckpointError as error:
        said = str(error)
    return [difference(model, first.alone), pruner.epoch, said]


def refused() -> Any:
    """What cannot be done is said, and nothing is changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Small().double()
    alone = copy.deepcopy(model)
    x = small_inputs(dtype=torch.float64)
    plan = pat.build_plan(model, x, verify=False)
    found = []
    keep = random_keep(plan, 0)
    for shard in (False, True):
        if shard:
            fully_shard(model, mesh=mesh)
        others = keep if dist.get_rank() != 1 else random_keep(plan, 1)
        before = [tuple(p.shape) for p in model.parameters()]
        try:
            prune_sharded(plan, others, model)
        except pat.SurgeryError as error:
            found.append([str(error), before == [tuple(p.shape) for p in model.parameters()]])
    for settings in (
        {"importance": "hessian"}, {"importance": lambda binding: binding.device}, {"regularizer": "bn_scale"},
        {"target": {"latency": 0.5}}, {"importance": {"name": "fpgm"}},
    ):  # fmt: skip
        try:
            pat.Pruner(model, example_inputs=x, **settings)
        except pat.ConfigError as error:
            found.append([str(error), True])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pat.Pruner(model, end_epoch=2, example_inputs=x, averaged=alone)
    steps(model, optimizer)
    found.append(refusal(pruner, model))
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    pruner = pat.Pruner(model, end_epoch=2, example_inputs=x)
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    found.append(refusal(pruner, model))
    even = Small(classes=2 * dist.get_world_size()).double()  # LBFGS takes no rows that do not divide evenly
    fully_shard(even, mesh=mesh)
    lbfgs = torch.optim.LBFGS(even.parameters(), lr=0.1, max_iter=2)

    def closure() -> Tensor:
        even.zero_grad()
        (loss := nn.functional.cross_entropy(even(x), torch.arange(4))).backward()
        return loss

    for mode in ("prune", "mask"):
        pruner = pat.Pruner(even, end_epoch=2, example_inputs=x, mode=mode, optimizer=lbfgs)
        lbfgs.step(closure)  # type: ignore[arg-type]
        found.append(refusal(pruner, even))
    return found


def refusal(pruner: pat.Pruner, model: nn.Module) -> list[Any]:
    """Why a step is refused, and whether the model is as it was."""
    before = [tuple(p.shape) for p in model.parameters()]
    try:
        pruner.step()
    except pat.SurgeryError as error:
        return [str(error), before == [tuple(p.shape) for p in model.parameters()]]
    return ["", False]


if __name__ == "__main__":
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
