"""A model's latency as a function of its widths: measured layers, corrected by measured models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import PlanError
from ..plan.bind import Binding, bind
from ..plan.running import call, undisturbed
from ..plan.types import BoolArray, Kept, Plan
from ..surgery import prune
from .layers import Layer, layers_of
from .table import Grid, Tables, fastest

SHARES = (0.3, 0.6)  # of every group, cut from the copies that are measured beside the dense model
SECONDS, RUNS = 0.5, 10  # per model
ROUNDS = 3


class LatencyModel:
    """Milliseconds that one forward in eval mode takes on this machine, of the model with any of its channels left.

    ``predict(keep) = f(sum over layers of t_layer(widths))``: t is linear between the points of the layer's table, and
    f is linear between measured models (the dense one and copies cut at random), so that all that is no layer of the
    tables (activations, sums, attention's products, Python) is in it as far as it goes with the layers.

    Args:
        layers: of one forward.
        grids: their tables.
        sums: what the tables say of the models that were measured, ascending.
        measured: ms that these took.
    Raises:
        PlanError: ``model`` lacks one of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        grids: Mapping[tuple[Any, Any], Grid],
        sums: NDArray[np.float64],
        measured: NDArray[np.float64],
    ) -> None:
        live = dict(model.named_parameters(remove_duplicate=False))
        missing = [x.weight for x in layers if x.weight not in live]
        if missing:
            raise PlanError(f"target: expected the model whose latency was measured, got one without {missing[0]}")
        self._live = WeakValueDictionary({x.weight: live[x.weight] for x in layers})
        self._layers = layers
        self._grids = dict(grids)
        self._sums = sums
        self._measured = np.maximum.accumulate(measured)
        self.dense = float(self._measured[-1])

    @classmethod
    def measure(
        cls,
        binding: Binding,
        example_inputs: Any,
        batch: int,
        cut: Callable[[float], BoolArray],
        folder: Path | None = None,
    ) -> LatencyModel:
        """Measure the layers of a model (or find them in the cache), the model, and copies of it that are smaller.

        Args:
            binding: of the dense model; its parameters and buffers stay as they are.
            batch: examples per forward; ``example_inputs`` are repeated or cut to it.
            cut: the channels to keep, bool ``[N]``, of a model that lost this share of each group.
            folder: of the cache.
        Raises:
            PlanError: the forward of such a batch fails, or calls no layer that can be measured.
        """
        inputs = of_batch(example_inputs, batch)
        plan, model, device = binding.plan, binding.model, binding.device
        try:
            layers = layers_of(model, inputs)
        except Exception as error:
            raise PlanError(
                f"target: expected a forward with a batch of {batch} for its latency, got {type(error).__name__}: "
                f"{error}; say which batch with {{'latency_ms': ..., 'batch': ...}}"
            ) from error
        if not layers:
            raise PlanError("target: the forward calls no convolution, linear layer or norm whose latency is known")
        grids = Tables(device, folder).grids(layers, lambda layer: _free(plan, layer))
        bare = cls(model, layers, grids, np.ones(1), np.ones(1))
        keeps = [cut(share) for share in sorted(SHARES, reverse=True)] + [np.ones(plan.n_channels, dtype=np.bool_)]
        points = {bare.total(plan, keep): keep for keep in keeps}  # equal where nothing could be cut
        sums = sorted(points)
        measured = _measure([_smaller(binding, points[total]) for total in sums], inputs, device)
        return cls(model, layers, grids, np.array(sums), np.array(measured))

    def total(self, plan: Plan, keep: BoolArray) -> float:
        """The sum of the layers' own times, in ms, with the channels ``keep [N]`` of ``plan``."""
        kept = Kept(keep)
        shapes = {t.name: kept.of(t)[1] for t in plan.tensors}
        for name, parameter in self._live.items():  # what has no channels left to lose keeps the shape that it has
            shapes.setdefault(name, tuple(parameter.shape))
        return sum(self._grids[x.spec, x.widths(x.shape)](x.widths(shapes[x.weight])) for x in self._layers)

    def predict(self, plan: Plan, keep: BoolArray) -> float:
        """Milliseconds of the model with the channels ``keep [N]`` of ``plan``."""
        total, sums, ms = self.total(plan, keep), self._sums, self._measured
        if total >= sums[0] or len(sums) == 1:
            scale = max(total / sums[-1], 1.0) if len(sums) > 1 else total / sums[0]
            return float(np.interp(total, sums, ms)) * scale
        # Smaller than all that were measured: the line goes on, but never below the same share of the smallest.
        slope = (ms[1] - ms[0]) / (sums[1] - sums[0])
        return float(max(ms[0] + slope * (total - sums[0]), ms[0] * total / sums[0]))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for :meth:`from_state`."""
        kinds = list(self._grids)
        return {
            "layers": [
                {"weight": x.weight, "shape": list(x.shape), "grid": kinds.index((x.spec, x.widths(x.shape)))}
                for x in self._layers
            ],
            "grids": [
                {"spec": spec, "axes": [a.tolist() for a in g.axes], "steps": list(g.steps), "ms": g.ms.tolist()}
                for (spec, _), g in self._grids.items()
            ],
            "sums": self._sums.tolist(),
            "measured": self._measured.tolist(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], model: nn.Module) -> LatencyModel:
        """What :meth:`state_dict` gave, for the model as it was then."""
        specs = [_tuples(g["spec"]) for g in state["grids"]]
        made = [Grid(g["axes"], tuple(g["steps"]), np.array(g["ms"])) for g in state["grids"]]
        layers = [Layer(x["weight"], tuple(x["shape"]), specs[x["grid"]]) for x in state["layers"]]
        numbers = [x["grid"] for x in state["layers"]]
        grids = {(x.spec, x.widths(x.shape)): made[n] for x, n in zip(layers, numbers, strict=True)}
        return cls(model, layers, grids, np.array(state["sums"]), np.array(state["measured"]))


def of_batch(example_inputs: Any, batch: int) -> Any:
    """``example_inputs`` with ``batch`` examples: the first dimension of every tensor that has as many as the first."""
    sizes = [t.shape[0] for t in tree_leaves(example_inputs) if isinstance(t, Tensor) and t.ndim > 0]

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != sizes[0]:
            return value
        return value.detach()[torch.arange(batch, device=value.device) % sizes[0]]

    return tree_map(cut, example_inputs) if sizes else example_inputs


def _free(plan: Plan, layer: Layer) -> list[bool]:
    """Which widths of ``layer`` can shrink."""
    widths = layer.widths(layer.shape)
    tensor = next((t for t in plan.tensors if t.name == layer.weight), None)
    if tensor is None:
        return [False] * len(widths)
    dims = {axis.dim for axis in tensor.axes}
    if len(widths) == 1:
        return [bool(dims)]
    first = 0 if "Transpose" in layer.kind else 1  # the dimension of what goes in
    return [first in dims, 1 - first in dims]


def _smaller(binding: Binding, keep: BoolArray) -> nn.Module:
    """The model, or a copy of it with the channels ``keep [N]``."""
    if keep.all():
        return binding.model
    copied = copy.deepcopy(binding.model)
    for parameter in copied.parameters():
        parameter.grad = None
    prune(bind(binding.plan, copied), keep)
    return copied


def _measure(models: list[Any], inputs: Any, device: torch.device) -> list[float]:
    """Milliseconds of a forward of each; they take turns, so that what slows the machine down slows all."""
    best = [float("inf")] * len(models)
    for _ in range(ROUNDS):
        for i, model in enumerate(models):
            with undisturbed(model), torch.no_grad():
                run = lambda model=model: call(model, inputs)  # noqa: E731
                best[i] = min(best[i], fastest(run, device, SECONDS / ROUNDS, RUNS))
    return best


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
