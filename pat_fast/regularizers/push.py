"""What all regularisers share: adding ``coefficient of the channel * weight`` to the gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..backends.known import is_compiled, is_plain
from ..criteria import is_scored
from ..ops import channel_axpy_, channel_scale_
from ..ops.grouped import Grouping, Pushed, group_push
from ..ops.memory import check_apart
from ..ops.tiles import COL, ROW, TENSOR, C, R, TileTable
from ..plan.bind import Binding, Tiles, Wanted, has_floats
from ..plan.recurrent import RECURRENT, weight_or_bias
from ..plan.types import TensorMap


class Regularizer(Protocol):
    """Anything that adds to gradients.

    Where it has them, ``before_step(binding, lr, where)`` is called when an optimizer is about to step, and
    ``after_step(binding, lr, where)`` when it has; ``lr`` has the learning rate of each of its parameters by ``id``.
    """

    def apply(
        self,
        binding: Binding,
        scale: float = 1.0,
        where: Tensor | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Add to the gradients, before the optimizer's step.

        Args:
            scale: a loss scale that is still in the gradients.
            where: bool ``[N]``, the channels to push; all by default.
            only: ``id`` of the parameters to push; all by default.
        """
        ...


NORMS = (nn.modules.batchnorm._BatchNorm,)
REGULARIZED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, *RECURRENT, *NORMS)


def is_regularized(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of convolutions, linear and recurrent layers and batch norms."""
    is_weight = isinstance(owner, REGULARIZED) and weight_or_bias(owner, local) == "weight"
    return is_weight and tensor_map.is_parameter and has_floats(owner, local)


def is_regularized_bias(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Biases of the same."""
    is_bias = isinstance(owner, REGULARIZED) and weight_or_bias(owner, local) == "bias"
    return is_bias and tensor_map.is_parameter and has_floats(owner, local)


def is_norm_weight(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of batch norms."""
    return local == "weight" and isinstance(owner, NORMS) and tensor_map.is_parameter


@torch.no_grad()
def push(binding: Binding, key: str, wanted: Wanted, gamma: Tensor, only: Collection[int] | None = None) -> None:
    """``g += gamma[c] * w`` for what belongs to channel c, by row and by column; without a gradient: nothing.

    Args:
        key: under which the tables of the tensors that ``wanted`` names are kept.
        gamma: ``[N]``.
        only: ``id`` of the tensors to push; all by default.

    Raises:
        OpError: gradients share memory, with one another or with weights.
    """
    for tiles in binding.part(key, wanted, only):
        found: list[Any] = [t.grad for t in tiles.tensors]
        missing = sum(g is None for g in found)
        if not missing:
            _add(binding, tiles, found, gamma)
        elif missing < len(found):
            if not is_compiled():  # one at a time does not see it
                plain = [i for i, own in enumerate(found) if own is not None and is_plain(own)]
                check_apart("gradients", [found[i] for i in plain], [tiles.tensors[i] for i in plain])
            for one, own in zip(binding.each(tiles), found, strict=True):
                if own is not None:
                    _add(binding, one, [own], gamma)


def push_norms(
    binding: Binding, p: float, alpha: float, strength: float, where: Tensor | None, only: Collection[int] | None
) -> bool:
    """:func:`push_layers` by the norms of the groups, in one call: see :func:`pat_fast.ops.grouped.group_push`.

    False: there is no such call for this model; nothing was done.
    """

    def call(scored: Tiles, grouping: Grouping, looked: bool) -> bool:
        found = binding.tiles("regularized", is_regularized, looked)
        places = _places(binding, scored, found[0]) if len(found) == 1 else None
        if places is None:
            return False
        own = found[0]

        def pushed() -> Pushed:
            grads: list[Any] = [t.grad for t in own.tensors]
            if only is not None:
                grads = [g if id(t) in only else None for g, t in zip(grads, own.tensors, strict=True)]
            if looked:  # they may be what did not fit
                grads = _fitting(own, grads)
            present = [g for g in grads if g is not None]
            if len(present) < len(grads):
                return Pushed(present, [i for i, g in zip(places, grads, strict=True) if g is not None], None)
            return Pushed(present, places, (scored if len(places) == len(scored.tensors) else own).table)

        return group_push(pushed, scored.tensors, grouping, p, alpha, strength, where)

    return bool(binding.at_once("scored", is_scored, call))


def _places(binding: Binding, scored: Tiles, pushed: Tiles) -> tuple[int, ...] | None:
    """Where the tensors of ``pushed`` are among those of ``scored``, in the same order; None if they are not."""
    known = binding.derived.get("places")
    if known is None or known[0] is not scored or known[1] is not pushed:
        at = {name: i for i, name in enumerate(scored.names)}
        places = tuple(at.get(name, -1) for name in pushed.names)
        fits = -1 not in places and list(places) == sorted(places)
        known = binding.derived["places"] = (scored, pushed, places if fits else None)
    found: tuple[int, ...] | None = known[2]
    return found


def push_layers(binding: Binding, gamma: Tensor, bias: bool, only: Collection[int] | None = None) -> None:
    """:func:`push` the weights of convolutions, linear layers and batch norms, with ``bias`` their biases too."""
    push(binding, "regularized", is_regularized, gamma, only)
    if bias:
        push(binding, "regularized biases", is_regularized_bias, gamma, only)


@torch.no_grad()
def shrink(binding: Binding, key: str, wanted: Wanted, gamma: Tensor, lr: Mapping[int, float]) -> None:
    """``w *= max(0, 1 - lr * gamma[c])`` for what belongs to channel c, by row and by column.

    For a weight that both a row and a column shrink this is ``1 - lr * (gamma[r] + gamma[c])`` up to the product of the
    two, which is far below the rounding of single precision for usual strengths, and never changes its sign.

    Args:
        key: under which the tables of the tensors that ``wanted`` names are kept.
        gamma: ``[N]``.
        lr: learning rates by the ``id`` of tensors; what has none, or no gradient, is left alone.
    """
    for tiles in binding.tiles(key, wanted):
        rates = [0.0 if t.grad is None else lr.get(id(t), 0.0) for t in tiles.tensors]
        if any(rates):
            slots = binding.to_slots(tiles, gamma, fill=0.0) * by_slot(binding, tiles, rates)
            channel_scale_(tiles.tensors, tiles.table, (1 - slots).clamp_min_(0.0))


def shrink_layers(binding: Binding, gamma: Tensor, bias: bool, lr: Mapping[int, float]) -> None:
    """:func:`shrink` what :func:`push_layers` pushes."""
    shrink(binding, "regularized", is_regularized, gamma, lr)
    if bias:
        shrink(binding, "regularized biases", is_regularized_bias, gamma, lr)


_owners: WeakKeyDictionary[Binding, dict[int, tuple[TileTable, Tensor]]] = WeakKeyDictionary()


def by_slot(binding: Binding, tiles: Tiles, values: Sequence[float]) -> Tensor:
    """``values``, one for each tensor, at the slots of its tiles: ``[slots]``, or one where all are the same."""
    device = tiles.slot_channel.device
    if len(set(values)) == 1:
        return torch.full((), values[0], device=device)
    known = _owners.setdefault(binding, {})
    if id(tiles.table) not in known or known[id(tiles.table)][0] is not tiles.table:
        owner = torch.zeros(tiles.table.slots, dtype=torch.int64)
        for row in tiles.table.rows:
            for start, size in ((row[ROW], row[R]), (row[COL], row[C])):
                if start >= 0:
                    owner[start : start + size] = row[TENSOR]
        known[id(tiles.table)] = (tiles.table, owner.to(device))
    # Which does not wait for a GPU: the driver has read what is not pinned when it returns.
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)[known[id(tiles.table)][1]]


def _add(binding: Binding, tiles: Tiles, found: list[Tensor], gamma: Tensor) -> None:
    coef = binding.to_slots(tiles, gamma, fill=0.0)
    channel_axpy_(_fitting(tiles, found), tiles.tensors, tiles.table, coef)


@torch.no_grad()
def _fitting(tiles: Tiles, found: list[Any]) -> list[Any]:
    """``found``, gradients of ``tiles.tensors``, in the memory layout of their parameters (changed if need be)."""
    if is_compiled():  # not a thing for a graph, and strides that vary are more than Dynamo can compare
        torch._dynamo.graph_break()
    if any(g is None for g in found) or not tiles.fit(found):
        for i, tensor in enumerate(tiles.tensors):
            if found[i] is not None and found[i].stride() != tensor.stride():
                found[i] = tensor.grad = torch.empty_like(tensor).copy_(found[i])
    return found


def without_nan_groups(binding: Binding, values: Tensor) -> Tensor:
    """``values [N]`` with 0 for all channels of a group that has a NaN: what cannot be scored is not pushed."""
    return values.masked_fill(binding.spread(binding.over_groups(values, "max").isnan()), 0.0)
