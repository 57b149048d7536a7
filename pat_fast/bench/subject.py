"""A model, its plan, and the groups that Torch-Pruning finds in it.

Torch-Pruning is used as its own examples do: `GroupMagnitudeImportance(p=2)`, the classifier ignored, attention
projections named in `num_heads`. A group of Torch-Pruning and one of ours are the same if our root layer's output
channels are a member of Torch-Pruning's group and both hold the same weights along the same dimensions; only such
groups are compared and timed on Torch-Pruning's side (ours always does all of its groups).
"""

from __future__ import annotations

import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..criteria import SCORED
from ..plan import bind
from ..plan import build_plan as lower
from ..proof import build_plan as lower_and_prove
from .models import Inputs

PATIENCE = 120.0
"""Seconds that Torch-Pruning gets for its groups: on some models it does not end."""
PROJECTIONS = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value", "in_proj")


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
    """A model with its plan and Torch-Pruning's groups, in eval mode.

    Args:
        model: moved to ``device``, ``dtype`` and memory format; its weights should be nowhere constant.
        verify: let the plan prove itself.

    Attributes:
        unmatchable: why Torch-Pruning cannot be compared with at all, or "".
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        inputs: Inputs,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        verify: bool = True,
        channels_last: bool = False,
    ) -> None:
        self.name = name
        self.inputs: Inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
        self.model = model.to(dtype).eval()
        self.plan = (lower_and_prove if verify else lower)(self.model, self.inputs)
        self.matches: list[Match] = []
        self.tp_groups: list[Any] = []
        self.unmatchable = ""
        try:
            with at_most(PATIENCE, "Torch-Pruning's groups"):
                self._meet_torch_pruning()
        except Exception as error:  # it cannot trace every model
            self.unmatchable = f"Torch-Pruning: {type(error).__name__}: {error}"
        if device is not None and device.type != "cpu":
            self.model.to(device)
            self.inputs = tuple(x.to(device) for x in self.inputs)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.binding = bind(self.plan, self.model)

    def _meet_torch_pruning(self) -> None:
        import torch_pruning as tp

        self.importance = tp.importance.GroupMagnitudeImportance(p=2)
        with quiet():
            graph = tp.DependencyGraph().build_dependency(self.model, self.inputs, output_transform=differentiable)
            self.tp_groups = list(graph.get_all_groups(ignored_layers=[classifier(self.model)]))
        self.matches = self._match()
        if not self.matches:
            self.unmatchable = "Torch-Pruning: no group in common"

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
                output_transform=differentiable,
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
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in code that runs longer, as far as it is Python in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{what} took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Torch-Pruning's warning that it found bare Parameters: it treats them rightly here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters")
        yield


def differentiable(output: Any) -> list[Tensor]:
    """The tensors of a network's output that Torch-Pruning can trace back; it does not know mappings and caches."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]


def classifier(model: nn.Module) -> nn.Module:
    """The last Linear or convolution: its outputs are classes, not channels."""
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)][-1]


def out_dim(layer: nn.Module) -> int:
    """Dimension of `layer.weight` that holds its output channels."""
    return 1 if getattr(layer, "transposed", False) else 0


def tp_members(group: Any, names: dict[nn.Module, str]) -> set[tuple[str, int]]:
    """(weight, dimension) pairs of the scored layers in a group of Torch-Pruning."""
    import torch_pruning as tp

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
        count = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        layers = [getattr(module, name, None) for name in PROJECTIONS]
        if isinstance(count, int):
            heads.update({layer: count for layer in layers if isinstance(layer, nn.Linear)})
    return heads
