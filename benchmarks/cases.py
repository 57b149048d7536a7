"""The three operations of a pruning step, done by pat_fast and by Torch-Pruning on the same model.

Torch-Pruning is used as its own examples do: `GroupMagnitudeImportance(p=2)`, the classifier ignored,
attention projections named in `num_heads`. A group of Torch-Pruning and one of ours are the same if our root
layer's output channels are a member of Torch-Pruning's group and both hold the same weights along the same
dimensions; only such groups are compared and timed on Torch-Pruning's side (ours always does all of its
groups).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.common import Case, Mismatch, Timed
from benchmarks.models.attention import Attention
from benchmarks.zoo import ZOO, Inputs, randomize_
from pat_fast.criteria import GroupNorm
from pat_fast.plan import bind, build_plan
from pat_fast.regularizers import GroupNormRegularizer
from pat_fast.selection import Limits, select
from pat_fast.surgery import prune

MODELS = ("resnet50", "densenet121", "vit_s16")
RATIO = 0.5
STRENGTH, ALPHA = 1e-4, 16
SCORE_RTOL = 1e-5
# gamma = alpha ** ((max - s) / (max - min)): a narrow range of scores s magnifies their rounding errors.
GRAD_RTOL = 1e-4
SCORED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Match:
    """A group known to both.

    Attributes:
        root: name of our root layer.
        start, stop: our channel ids.
        group: Torch-Pruning's group.
        order: [stop - start] int64, index into Torch-Pruning's scores for each of our channels.
    """

    root: str
    start: int
    stop: int
    group: Any
    order: Tensor


class Subject:
    """A model of the zoo with random weights, its plan and Torch-Pruning's groups.

    Args:
        name: key of the zoo.
        small: take the small version.
        seed: of the weights.
    """

    def __init__(self, name: str, small: bool = False, seed: int = 0) -> None:
        entry = ZOO[name]
        self.name = name
        self.inputs: Inputs = entry.example(small)
        self.model = randomize_(entry.small() if small else entry.build(), seed).eval()
        self.plan = build_plan(self.model, self.inputs)
        self.binding = bind(self.plan, self.model)
        self.importance = tp.importance.GroupMagnitudeImportance(p=2)
        self.tp_groups = self._tp_groups()
        self.matches = self._match()

    def _tp_groups(self) -> list[Any]:
        """All prunable groups of Torch-Pruning."""
        with quiet():
            graph = tp.DependencyGraph().build_dependency(self.model, self.inputs)
        return list(graph.get_all_groups(ignored_layers=[classifier(self.model)]))

    def _match(self) -> list[Match]:
        """Groups that both know, in Torch-Pruning's order."""
        names = {module: name for name, module in self.model.named_modules()}
        scored = {f"{name}.weight" for module, name in names.items() if isinstance(module, SCORED)}
        ours = {group.root: group for group in self.plan.groups}
        found = []
        for theirs in self.tp_groups:
            members = tp_members(theirs, names)
            for item in theirs:
                group = ours.get(names.get(item.dep.target.module, ""))
                if group is None or (f"{group.root}.weight", out_dim(item.dep.target.module)) not in members:
                    continue
                n = group.stop - group.start
                same = {member for member in group.members if member[0] in scored} == members
                if same and sorted(item.idxs) == list(range(n)) and None not in item.root_idxs:
                    order = torch.empty(n, dtype=torch.int64)
                    order[torch.tensor(item.idxs)] = torch.tensor(item.root_idxs)
                    found.append(Match(group.root, group.start, group.stop, theirs, order))
                    break
        return found

    @property
    def unmatched(self) -> list[str]:
        """Root layers of Torch-Pruning's groups that are not compared."""
        compared = {id(match.group) for match in self.matches}
        names = {module: name for name, module in self.model.named_modules()}
        return [names[g[0].dep.target.module] for g in self.tp_groups if id(g) not in compared]

    @property
    def groups(self) -> str:
        """Compared groups, of all groups of Torch-Pruning."""
        return f"{len(self.matches)}/{len(self.tp_groups)}"

    def pruner(self, kind: Callable[..., Any], model: nn.Module, **kwargs: Any) -> Any:
        """A pruner of Torch-Pruning over `model`, a copy of ours, limited to the groups that both know.

        Its default dicts are shared by all pruners of the process, so each gets dicts of its own.
        """
        ignored = [classifier(model), *(model.get_submodule(name) for name in self.unmatched)]
        with quiet():
            return kind(
                model,
                self.inputs,
                importance=self.importance,
                ignored_layers=ignored,
                num_heads=num_heads(model),
                in_channel_groups={},
                out_channel_groups={},
                **kwargs,
            )

    def fresh(self) -> nn.Module:
        """A copy of the model, without gradients."""
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without Torch-Pruning's warning that it found bare Parameters: it treats them rightly here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")
        yield


def classifier(model: nn.Module) -> nn.Module:
    """The last Linear or convolution: its outputs are classes, not channels."""
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)][-1]


def out_dim(layer: nn.Module) -> int:
    """Dimension of `layer.weight` that holds its output channels."""
    return 1 if getattr(layer, "transposed", False) else 0


def tp_members(group: Any, names: dict[nn.Module, str]) -> set[tuple[str, int]]:
    """(weight, dimension) pairs of the scored layers in a group of Torch-Pruning."""
    members = set()
    for item in group:
        layer = item.dep.target.module
        if isinstance(layer, SCORED):
            out = out_dim(layer)
            inward = item.dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
            members.add((f"{names[layer]}.weight", 1 - out if inward else out))
    return members


def num_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Attention projections and their heads, as Torch-Pruning wants to be told."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            layers = [module.qkv] if module.fused_qkv else [module.q, module.k, module.v]
            heads.update(dict.fromkeys(layers, module.num_heads))
    return heads


def weight_bytes(groups: list[Any], types: tuple[Any, ...]) -> int:
    """Bytes of the distinct weights of the layers of `types` in Torch-Pruning's `groups`."""
    weights = {}
    for group in groups:
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, types) and layer.weight is not None:
                weights[id(layer.weight)] = layer.weight.numel() * layer.weight.element_size()
    return sum(weights.values())


def ready(run: Timed) -> Callable[[], Timed]:
    """A preparation that has nothing to prepare."""
    return lambda: run


def compare(what: str, ours: Tensor, theirs: Tensor, rtol: float, atol: float = 0.0) -> None:
    """Raise `Mismatch` unless all entries agree."""
    if ours.shape != theirs.shape:
        raise Mismatch(f"{what}: shape {tuple(ours.shape)}, Torch-Pruning has {tuple(theirs.shape)}")
    if not torch.allclose(ours, theirs, rtol=rtol, atol=atol):
        worst = ((ours - theirs).abs() / theirs.abs().clamp_min(1e-30)).max()
        raise Mismatch(f"{what}: relative difference {float(worst):.1e}, allowed {rtol:.0e}")


def require_matches(subject: Subject) -> list[Match]:
    if not subject.matches:
        raise Mismatch("no group in common")
    return subject.matches


def importance_case(subject: Subject) -> Case:
    """Score every channel of every group: ours in one call, Torch-Pruning's group by group."""
    criterion = GroupNorm(p=2)
    groups = [match.group for match in subject.matches]

    def theirs() -> list[Tensor]:
        return [subject.importance(group) for group in groups]

    def ours() -> Tensor:
        return criterion.score(subject.binding)

    def check() -> int:
        scores = ours()
        for match, expected in zip(require_matches(subject), theirs(), strict=True):
            compare(match.root, scores[match.start : match.stop], expected[match.order], SCORE_RTOL)
        return weight_bytes(groups, SCORED)

    return Case("importance", subject.name, subject.groups, "read", check, ready(theirs), ready(ours))


def regularize_case(subject: Subject) -> Case:
    """Add the group-norm penalty's gradient: norms of all groups, then `grad += strength * gamma * weight`.

    Torch-Pruning skips LayerNorm here; parameters that it leaves alone are not compared.
    """
    groups = [match.group for match in subject.matches]
    regularizer = GroupNormRegularizer(strength=STRENGTH, alpha=ALPHA)

    @cache
    def pruner() -> Any:
        made = subject.pruner(tp.pruner.GroupNormPruner, subject.model, reg=STRENGTH)
        made._groups = groups
        return made

    regularized = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)

    def theirs() -> None:
        pruner().regularize(subject.model, alpha=ALPHA)

    def ours() -> None:
        regularizer.apply(subject.binding)

    def grads(run: Timed) -> dict[str, Tensor]:
        """What `run` adds: starting from zero, so that the small penalty is not rounded into a gradient."""
        for p in subject.model.parameters():
            p.grad = torch.zeros_like(p)
        run()
        return {name: p.grad.clone() for name, p in subject.model.named_parameters() if p.grad is not None}

    def check() -> int:
        require_matches(subject)
        expected, got = grads(theirs), grads(ours)
        skipped = only_ours(subject)
        compared = [name for name, g in expected.items() if g.any() and name not in skipped]
        if not compared:
            raise Mismatch("no parameter in common")
        for name in compared:
            compare(name, got[name], expected[name], GRAD_RTOL, atol=1e-12)
        return weight_bytes(groups, SCORED) + 3 * weight_bytes(groups, regularized)

    return Case("regularize", subject.name, subject.groups, "axpy", check, ready(theirs), ready(ours))


def only_ours(subject: Subject) -> set[str]:
    """Parameters that also belong to a group of ours which is not compared."""
    compared = {match.root for match in subject.matches}
    return {name for group in subject.plan.groups if group.root not in compared for name, _ in group.members}


def eligible_channels(subject: Subject) -> NDArray[np.bool_]:
    """Channels of the compared groups: [N]; the others stay on both sides."""
    eligible = np.zeros(subject.plan.n_channels, dtype=np.bool_)
    for match in subject.matches:
        eligible[match.start : match.stop] = True
    return eligible


def step_case(subject: Subject) -> Case:
    """Score, rank globally and remove half of the channels, from a dense model."""
    criterion = GroupNorm(p=2)
    eligible = eligible_channels(subject)
    total = int(eligible.sum())
    budget = total - int(total * (1 - RATIO))

    def theirs(model: nn.Module) -> Timed:
        kwargs = {"global_pruning": True, "pruning_ratio": RATIO}
        return subject.pruner(tp.pruner.BasePruner, model, **kwargs).step

    def ours(model: nn.Module) -> Timed:
        binding = bind(subject.plan, model)

        def run() -> None:
            scores = criterion.score(binding).double().numpy()
            keep = select(subject.plan, scores, eligible, lambda _: budget, Limits(ranking="global"))
            prune(binding, keep, optimizers=())

        return run

    def check() -> int:
        require_matches(subject)
        left, right = subject.fresh(), subject.fresh()
        before = {name: t.shape for name, t in left.state_dict().items()}
        theirs(left)()
        ours(right)()
        got, expected = right.state_dict(), left.state_dict()
        moved = 0
        for name, value in expected.items():
            if got[name].shape != value.shape or not torch.equal(got[name], value):
                shapes = f"{tuple(got[name].shape)} and {tuple(value.shape)}"
                raise Mismatch(f"{name} differs after the step (shapes {shapes})")
            if value.shape != before[name]:
                moved += 2 * value.numel() * value.element_size()
        if not moved:
            raise Mismatch("nothing was pruned")
        with torch.no_grad():
            expected_out, got_out = left(*subject.inputs), right(*subject.inputs)
        compare("output after the step", got_out, expected_out, 1e-3, atol=1e-5)
        return moved + weight_bytes([match.group for match in subject.matches], SCORED)

    def prepare(run: Callable[[nn.Module], Timed]) -> Timed:
        return run(subject.fresh())

    tp_side, our_side = partial(prepare, theirs), partial(prepare, ours)
    return Case("step", subject.name, subject.groups, "copy", check, tp_side, our_side, slow=True)


CASES: dict[str, Callable[[Subject], Case]] = {
    "importance": importance_case,
    "regularize": regularize_case,
    "step": step_case,
}
