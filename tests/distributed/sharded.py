"""What each rank does in the tests of FSDP2: ``python -m tests.distributed.sharded CASE FOLDER``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pat_fast as pat
from pat_fast.criteria import GroupNorm
from pat_fast.distributed.fsdp import prune_sharded, sharded_scores
from pat_fast.plan import bind
from pat_fast.surgery import prune
from tests.distributed.worker import main
from tests.helpers import Small, random_keep, small_inputs


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


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, clear: bool = True) -> None:
    x = small_inputs(dtype=torch.float64)
    for i in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(len(x)).add(i) % 3).backward()
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


def refused() -> Any:
    """What cannot be done is said, and nothing is changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = Small().double()
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
    try:
        pat.Pruner(model, 0.5, example_inputs=x)
    except pat.PatError as error:
        found.append([str(error), True])
    return found


if __name__ == "__main__":
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
