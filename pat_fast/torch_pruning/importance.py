"""Importance estimators with Torch-Pruning's names, arguments and results.

Each is called on one ``tp.Group``, as Torch-Pruning's, and has ``score(binding)`` for all channels of a whole
plan at once. Where Torch-Pruning's result is wrong, these give the right one: see ``docs/differences.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import ComputeMatGrad, Group, Importance

from ..criteria import Normalizer, Reduction
from ..criteria.accumulator import Accumulator
from ..criteria.base import product_slots, wide
from ..criteria.ledger import Book, Order
from ..criteria.magnitude import distances, distances_of
from ..errors import ConfigError, PlanError
from ..plan.bind import Binding, Tiles
from ..plan.types import Axis, TensorMap
from ._fisher import OBDCImportance
from ._groups import LAYERS, Item, is_depthwise, member_order, rows
from ._magnitude import WEIGHTED, GroupMagnitudeImportance

__all__ = [
    "ActivationImportance",
    "BNScaleImportance",
    "ComputeMatGrad",
    "FPGMImportance",
    "Group",
    "GroupHessianImportance",
    "GroupMagnitudeImportance",
    "GroupTaylorImportance",
    "HessianImportance",
    "Importance",
    "LAMPImportance",
    "MagnitudeImportance",
    "OBDCImportance",
    "RandomImportance",
    "TaylorImportance",
    "member_order",
]


class MagnitudeImportance(GroupMagnitudeImportance):
    """Another name of :class:`GroupMagnitudeImportance`."""


class BNScaleImportance(GroupMagnitudeImportance):
    """``|gamma|`` of the batch norms of a group. Liu et al., "Learning Efficient Convolutional Networks through
    Network Slimming", ICCV 2017, https://arxiv.org/abs/1708.06519.
    """

    def __init__(self, group_reduction: Reduction = "mean", normalizer: Normalizer = "mean") -> None:
        norms = (nn.modules.batchnorm._BatchNorm,)
        super().__init__(1, group_reduction, normalizer, bias=False, target_types=norms)


class LAMPImportance(GroupMagnitudeImportance):
    """Magnitude, normalised by what is left when all smaller channels of the group are gone.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
    https://arxiv.org/abs/2010.07611.

    Raises:
        ConfigError: another normaliser than ``"lamp"``.
    """

    def __init__(
        self, p: float = 2, group_reduction: Reduction = "mean", normalizer: Normalizer = "lamp", bias: bool = False
    ) -> None:
        if normalizer != "lamp":
            raise ConfigError(f"normalizer: expected 'lamp', which makes this LAMP, got {normalizer!r}")
        super().__init__(p, group_reduction, normalizer, bias)


class FPGMImportance(GroupMagnitudeImportance):
    """How far a channel's ``|w|^p`` lies from those of the other channels: the sum of Euclidean distances.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019, https://arxiv.org/abs/1811.00250. Norms do not
    count. A grouped convolution's inputs are compared as they are: each with the weights of its own block.
    """

    _rule = "weights of layers, each block its own"

    def __init__(
        self, p: float = 2, group_reduction: Reduction = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)

    def __call__(self, group: Any, **kwargs: Any) -> Tensor | None:
        """The scores of one group; see :class:`GroupMagnitudeImportance`."""
        return super().__call__(group)

    def _item_scores(self, item: Item) -> Iterator[Tensor]:
        if isinstance(item.layer, LAYERS):
            found = rows(item.layer, item.side, wide(item.layer.weight).abs().pow(self.p))
            scores = found.new_zeros(len(found))
            idxs = item.idxs.to(found.device)
            scores[idxs] = distances(found[idxs])
            yield scores

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        owner, local = binding.owner(tensor_map.name)
        return local == "weight" and isinstance(owner, LAYERS) and super()._counts(binding, tensor_map)

    _pooled = False

    def _values(self, tally: Book) -> Tensor:
        return distances_of(tally, change=lambda weight: wide(weight).abs().pow(self.p))


class RandomImportance(Importance):
    """Uniform in [0, 1). With the same seed, a plan's scores are those that its groups get one after another."""

    accumulators: tuple[Accumulator, ...] = ()

    @torch.no_grad()
    def __call__(self, group: Any, **kwargs: Any) -> Tensor:
        """``[channels]`` float32 on the CPU."""
        return torch.rand(len(group[0][1]))

    def score(self, binding: Binding, order: Order | None = None) -> Tensor:
        """``[N]`` float32 on ``binding.device``."""
        return self.drawn(binding, range(len(binding.plan.groups))).to(binding.device)

    def drawn(self, binding: Binding, numbers: Iterable[int]) -> Tensor:
        """Scores ``[N]`` of the groups ``numbers``, drawn one after another; NaN for the others."""
        found = torch.full((binding.plan.n_channels,), torch.nan)
        for group in (binding.plan.groups[number] for number in numbers):
            found[group.start : group.stop] = torch.rand(group.channels)
        return found


class GroupTaylorImportance(GroupMagnitudeImportance):
    """``|w g|``, summed over what belongs to a channel: to first order, what removing it does to the loss.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. Parameters without a
    gradient (frozen ones) do not count.

    Args:
        multivariable: ``|sum w g|`` instead.
    Raises:
        PlanError: (when called) nothing has a gradient: there was no backward pass.
    """

    def __init__(
        self,
        group_reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = WEIGHTED,
    ) -> None:
        self._configure(group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable

    def _item_scores(self, item: Item) -> Iterator[Tensor]:
        weight = item.layer.weight
        if weight.grad is None and weight.requires_grad:
            raise _no_gradient(f"{type(item.layer).__name__} of shape {tuple(weight.shape)} has none")
        return super()._item_scores(item)

    def _elements(self, parameter: Tensor) -> Tensor | None:
        if parameter.grad is None:
            return None
        product = wide(parameter) * wide(parameter.grad)
        return product if self.multivariable else product.abs()

    def _finish(self, values: Tensor) -> Tensor:
        return values.abs()

    def _usable(self, binding: Binding, name: str) -> bool:
        return binding.tensors[name].grad is not None

    def _book(self, binding: Binding) -> Book:
        tally = super()._book(binding)
        if not tally.ledger.parts:
            raise _no_gradient("none of the plan's weights has one")
        return tally

    def _slots(self, tiles: Tiles) -> Tensor:
        gradients = [g for t in tiles.tensors if (g := t.grad) is not None]
        return product_slots(tiles, gradients, "mul" if self.multivariable else "absmul")


def _no_gradient(got: str) -> PlanError:
    return PlanError(
        f"this importance needs gradients, and {got}; run loss.backward() first, and score before zero_grad()"
    )


class TaylorImportance(GroupTaylorImportance):
    """Another name of :class:`GroupTaylorImportance`."""


class GroupHessianImportance(GroupMagnitudeImportance):
    """``w^2 h`` with ``h`` the mean square of the gradients of single samples: the diagonal of the Fisher matrix.

    LeCun et al., "Optimal Brain Damage", NeurIPS 1989. Call ``accumulate_grad(model)`` after the backward pass
    of each sample, and ``zero_grad()`` before a new round; gradients themselves are left as they are. Until
    something was accumulated, the gradients stand for ``h``, as in Torch-Pruning. Parameters without either do
    not count.
    """

    def __init__(
        self,
        group_reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = WEIGHTED,
    ) -> None:
        self._configure(group_reduction, normalizer, bias, target_types)
        self._squares = Accumulator()

    @property
    def accumulators(self) -> list[Accumulator]:
        """The squared gradients."""
        return [self._squares]

    def zero_grad(self) -> None:
        """Forget what was accumulated."""
        self._squares.state.clear()

    @torch.no_grad()
    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squares of the gradients that ``model`` has now."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._squares.add(parameter, wide(parameter.grad).square())

    def _curvature(self, parameter: Tensor) -> Tensor | None:
        return self._squares.mean(parameter) if self._squares.state else parameter.grad

    def _elements(self, parameter: Tensor) -> Tensor | None:
        curvature = self._curvature(parameter)
        return None if curvature is None else wide(parameter).square() * wide(curvature)

    def _usable(self, binding: Binding, name: str) -> bool:
        return self._curvature(binding.tensors[name]) is not None

    def _slots(self, tiles: Tiles) -> Tensor:
        return product_slots(tiles, [h for t in tiles.tensors if (h := self._curvature(t)) is not None], "sqmul")


class HessianImportance(GroupHessianImportance):
    """Another name of :class:`GroupHessianImportance`."""


class ActivationImportance(GroupMagnitudeImportance):
    """The mean (of a linear layer: the sum) of ``|x|`` over the inputs that a layer gets for a channel.

    Gathered in the forwards inside ``with importance.compute_importance(model):``, the last of which counts, and
    kept with each layer as ``_importance [in_channels]``.
    """

    _rule = "inputs of layers, each block its own"
    _pooled = False

    @contextmanager
    def compute_importance(self, model: nn.Module) -> Iterator[None]:
        """Gather activations in the forwards inside; the hooks are gone afterwards, whatever happens."""

        @torch.no_grad()
        def gather(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().abs()
            if isinstance(module, nn.Linear):
                module._importance = x.reshape(-1, x.shape[-1]).sum(0)
            else:
                module._importance = x.mean([d for d in range(x.ndim) if d != 1])

        layers = [m for m in model.modules() if isinstance(m, LAYERS) and isinstance(m, tuple(self.target_types))]
        hooks = [layer.register_forward_hook(gather) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _item_scores(self, item: Item) -> Iterator[Tensor]:
        if isinstance(item.layer, LAYERS) and (item.side == "in" or is_depthwise(item.layer)):
            found = getattr(item.layer, "_importance", None)
            if found is None:
                warnings.warn(
                    f"{item.layer} has no _importance and does not count; run a forward inside "
                    "compute_importance(model)",
                    stacklevel=4,
                )
            else:
                yield found if item.side == "in" else _by_output(item.layer, found)

    def _usable(self, binding: Binding, name: str) -> bool:
        return hasattr(binding.owner(name)[0], "_importance")

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        owner, local = binding.owner(tensor_map.name)
        return local == "weight" and isinstance(owner, LAYERS) and super()._counts(binding, tensor_map)

    def _counts_axis(self, tensor_map: TensorMap, axis: Axis) -> bool:
        return axis.role == "in" or tensor_map.whole_groups

    def _book(self, binding: Binding) -> Book:
        tally = super()._book(binding)
        if not tally.ledger.parts:
            raise PlanError(
                "no layer of the plan has seen activations; run a forward inside "
                "`with importance.compute_importance(model):` first"
            )
        self._layers: dict[str, Any] = {p.tensor.name: binding.owner(p.tensor.name)[0] for p in tally.ledger.parts}
        return tally

    def _values(self, tally: Book) -> Tensor:
        found = []
        for part in tally.ledger.parts:
            layer = self._layers[part.tensor.name]
            inputs = layer._importance
            values = inputs if part.axis.role == "in" else _by_output(layer, inputs)
            if len(values) != part.count:
                raise PlanError(
                    f"{part.tensor.name}: the activations are of {len(inputs)} channels, the layer has "
                    f"{part.count}: it was pruned since; run a forward inside compute_importance(model) again"
                )
            found.append(values.to(tally.ledger.device))
        return torch.cat(found)


def _by_output(layer: Any, inputs: Tensor) -> Tensor:
    """What a depthwise convolution's outputs are made of: ``[in_channels]`` to ``[out_channels]``."""
    return inputs.repeat_interleave(layer.out_channels // len(inputs))
