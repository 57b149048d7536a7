"""Optimal brain damage over channels, with the Fisher matrix's diagonal from per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..criteria import Normalizer, Reduction
from ..criteria.accumulator import Accumulator
from ..criteria.base import product_slots, wide
from ..criteria.ledger import Book
from ..errors import PlanError, check
from ..plan.bind import Binding, Tiles
from ..plan.types import Axis, TensorMap
from ._groups import LAYERS, Item, dimension, items
from ._magnitude import GroupMagnitudeImportance

EPSILON = 1e-10
NAMES = ("weight", "bias")


class OBDCImportance(GroupMagnitudeImportance):
    """``w^2 F`` summed over the outputs of a channel, F the mean square of the gradients of single samples.

    Wang et al., "EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis", ICML 2019,
    https://arxiv.org/abs/1905.05934 (its baseline OBD, by channels). A loss that is a mean over the batch is
    expected. Call ``_prepare_model(model, pruner)``, then after each backward pass ``step()``, and
    ``_rm_hooks(model)`` in the end: only hooks of this importance are removed.

    Args:
        num_classes: linear layers with as many outputs are classifiers and do not count.
    """

    def __init__(
        self,
        group_reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = LAYERS,
        num_classes: int = 100,
    ) -> None:
        self._configure(group_reduction, normalizer, bias, target_types)
        check("num_classes", num_classes, lambda n: n == int(n) and n >= 0, "a whole number")
        self.num_classes = num_classes
        self._rule = f"outputs, unless {num_classes}"
        self.eps = EPSILON
        self.steps = 0
        self.modules: list[nn.Module] = []
        self._squares = Accumulator()
        self._handles: list[Any] = []
        self._seen: list[tuple[nn.Module, Tensor, Tensor]] = []  # layer, its inputs, gradient of its outputs
        self._parameters: dict[tuple[nn.Module, str], nn.Parameter] = {}

    @property
    def accumulators(self) -> list[Accumulator]:
        """The squared gradients."""
        return [self._squares]

    @property
    def Fisher(self) -> dict[nn.Module, Tensor]:
        """For each layer, the sum over all steps of the squared gradients: ``[out, rest]``, bias last."""
        self._follow()
        found = {}
        for layer in self.modules:
            parameters = [self._parameters[key] for name in NAMES if (key := (layer, name)) in self._parameters]
            if parameters:
                totals = [self._squares.state[p]["sum"] for p in parameters]
                found[layer] = torch.cat([t.reshape(len(t), -1) for t in totals], 1)
        return found

    # Gathering

    def _prepare_model(self, model: nn.Module, pruner: Any) -> None:
        """Watch the layers whose outputs ``pruner`` may prune."""
        groups = pruner.DG.get_all_groups(
            ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
        )
        for group in groups:
            for item in items(group, self.target_types):
                if item.side == "out" and isinstance(item.layer, LAYERS) and item.layer not in self.modules:
                    self.modules.append(item.layer)
                    self._handles.append(item.layer.register_forward_hook(self._watch))
        self._follow()

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        if output.requires_grad:
            output.register_hook(lambda gradient: self._seen.append((layer, x, gradient.detach())))

    def _rm_hooks(self, model: nn.Module) -> None:
        """Stop watching; other hooks stay."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _clear_buffer(self) -> None:
        """Forget what was gathered."""
        self._squares.state.clear()
        self._seen.clear()
        self._parameters.clear()
        self.modules = []
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Add the squared gradients of the samples of the last backward pass.

        Raises:
            PlanError: there was none through the layers that are watched.
        """
        if not self._seen:
            raise PlanError(
                "step() found no gradients: call _prepare_model(model, pruner) first, then loss.backward() before "
                "each step()"
            )
        self._follow()
        gradients: dict[nn.Module, list[Tensor]] = {}
        for layer, x, gradient in self._seen:
            parts = sample_gradients(layer, x, gradient)
            known = gradients.get(layer)
            gradients[layer] = parts if known is None else [a + b for a, b in zip(known, parts, strict=True)]
        self._seen.clear()
        for layer, parts in gradients.items():
            for name, part in zip(NAMES, parts, strict=False):
                parameter = getattr(layer, name)
                self._squares.add(parameter, (wide(part) * len(part)).square().sum(0))
                self._parameters[layer, name] = parameter
        self.steps += 1

    def _follow(self) -> None:
        """What was gathered for a parameter belongs to the one that has taken its place (after ``group.prune()``)."""
        for (layer, name), old in list(self._parameters.items()):
            new = getattr(layer, name)
            if new is not old and old in self._squares.state:
                self._squares.state[new] = self._squares.state.pop(old)
                self._parameters[layer, name] = new

    @torch.no_grad()
    def adjust_fisher(self, group: Any, idxs: Sequence[int]) -> None:
        """Take the channels ``idxs`` of ``group`` out of what was gathered, before Torch-Pruning prunes them."""
        self._follow()
        gone = torch.as_tensor(list(idxs), dtype=torch.int64)
        for item in items(group, LAYERS):
            lost = item.idxs[torch.isin(item.places, gone)]
            dims = {"weight": dimension(item.layer, item.side)} | ({"bias": 0} if item.side == "out" else {})
            for name, dim in dims.items():
                key = (item.layer, name)
                if key in self._parameters:
                    entry = self._squares.state[self._parameters[key]]
                    n = entry["sum"].shape[dim]
                    left = torch.isin(torch.arange(n), lost % n, invert=True).nonzero()[:, 0]
                    entry["sum"] = entry["sum"].index_select(dim, left.to(entry["sum"].device))

    # Scoring

    def _curvature(self, parameter: Tensor) -> Tensor | None:
        entry = self._squares.state.get(parameter)
        mean = self._squares.mean(parameter)
        # A layer that some step did not reach had no gradient there: the mean is over all steps.
        return None if mean is None or entry is None else mean * (entry["count"] / self.steps) + self.eps

    def __call__(self, group: Any) -> Tensor | None:
        """The scores of one group; see :class:`GroupMagnitudeImportance`."""
        self._check_gathered()
        return super().__call__(group)

    def _check_gathered(self) -> None:
        if not self.steps:
            raise PlanError(
                "nothing was gathered; call _prepare_model(model, pruner), then loss.backward() and step() for some "
                "batches"
            )
        self._follow()

    def _item_scores(self, item: Item) -> Iterator[Tensor]:
        if item.side == "out" and not self._is_classifier(item.layer):
            yield from super()._item_scores(item)

    def _elements(self, parameter: Tensor) -> Tensor | None:
        curvature = self._curvature(parameter)
        return None if curvature is None else wide(parameter).square() * curvature

    def _is_classifier(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and layer.out_features == self.num_classes

    def _book(self, binding: Binding) -> Book:
        self._check_gathered()
        return super()._book(binding)

    def _usable(self, binding: Binding, name: str) -> bool:
        return binding.tensors[name] in self._squares.state

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        owner, _ = binding.owner(tensor_map.name)
        return not self._is_classifier(owner) and super()._counts(binding, tensor_map)

    def _counts_axis(self, tensor_map: TensorMap, axis: Axis) -> bool:
        return axis.role != "in"

    def _slots(self, tiles: Tiles) -> Tensor:
        return product_slots(tiles, [f for t in tiles.tensors if (f := self._curvature(t)) is not None], "sqmul")


def sample_gradients(layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The gradients of a layer's weight ``[samples, *shape]`` and bias ``[samples, out]``, one per sample.

    Args:
        x: the layer's inputs, samples first.
        gradient: of the loss, by the layer's outputs.
    """
    if isinstance(layer, nn.Linear):
        x, gradient = x.reshape(len(x), -1, x.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
        found = [torch.einsum("sto,sti->soi", gradient, x)]
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        padding: Any = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode), (0,) * len(layer.stride)

        def one(x: Tensor, gradient: Tensor) -> Tensor:
            return torch.ops.aten.convolution_backward(
                gradient[None], x[None], layer.weight, None, layer.stride, padding, layer.dilation, layer.transposed,
                layer.output_padding, layer.groups, (False, True, False),
            )[1]  # fmt: skip

        found = [torch.vmap(one)(x, gradient)]
        gradient = gradient.flatten(2).transpose(1, 2)
    return found if layer.bias is None else [*found, gradient.sum(1)]
