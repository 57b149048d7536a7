"""What most criteria are: sums over what belongs to an index, reduced over a group's members, normalised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ConfigError, check_flag, did_you_mean
from ..ops import channel_reduce
from ..plan.bind import Binding, Tiles, has_floats
from ..plan.recurrent import weight_or_bias
from ..plan.types import Axis, Plan, TensorMap
from .accumulator import Accumulator
from .group_norm import SCORED, is_scored
from .history import History
from .ledger import Book, book
from .normalizers import Normalizer, Segments, check_normalizer, normalize
from .reductions import REDUCTIONS, Reduction, check_reduction, reduce_members

# What makes no sense of scores that may be negative, and why.
SIGNLESS = {
    "sum": "a sum near zero or below it turns the order around",
    "mean": "a mean near zero or below it turns the order around",
    "max": "a maximum below zero turns the order around",
    "lamp": "it divides by sums of what is larger",
    "sentinel": "a sentinel below zero turns the order around",
}


class Criterion(Protocol):
    """Anything that scores channels."""

    def score(self, binding: Binding) -> Tensor:
        """Importance of every channel: ``[N]``, on the model's device; less is pruned first, ``inf`` never."""
        ...


class MemberCriterion:
    """A criterion made of four parts: what each index counts, members, reduction, normaliser.

    ``score[c] = normalise(reduce_m(v[m, c]))`` with ``v[m, c]`` the sum of what the indices of channel c count in
    member m (a side of a layer), and both steps over the members and the channels of a group. Channels of a group
    without a member that counts score ``inf``: what cannot be scored stays.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"max"``, ``"prod"``, ``"first"`` (the layer that makes the channels),
            ``"gate"`` (the last member), or a function from ``[members, channels]`` to ``[channels]``.
        normalizer: see :func:`pat_fast.criteria.normalize`.
        bias: count biases as members of their own.
    Raises:
        ConfigError: an unknown reduction or normaliser, or one that makes no sense of this criterion's scores.
    """

    types: tuple[type, ...] = SCORED
    signed = False  # whether scores may be negative

    def __init__(self, reduction: Reduction = "mean", normalizer: Normalizer = "mean", bias: bool = False) -> None:
        check_reduction(reduction)
        check_normalizer(normalizer)
        if reduction is None:
            known = ", ".join(REDUCTIONS)
            raise ConfigError(f"reduction: expected one of {known} or a function, got None: a channel has one score")
        check_flag("bias", bias)
        if self.signed and reduction == "prod":
            raise ConfigError("reduction: expected another than 'prod': a product of two negative scores is positive")
        kind = normalizer.partition("_")[0] if isinstance(normalizer, str) else ""
        if self.signed and kind in SIGNLESS:
            raise ConfigError(
                f"normalizer: expected 'standarization', 'gaussian', a function or None, got {normalizer!r}: these "
                f"scores may be negative, and {SIGNLESS[kind]}"
            )
        self.reduction = reduction
        self.normalizer = normalizer
        self.bias = bias

    @torch.no_grad()
    def score(self, binding: Binding) -> Tensor:
        """Scores ``[N]``: float32, or float64 where the model is."""
        tally = self._book(binding)
        found = reduce_members(self._values(binding, tally), tally.ledger, self.reduction)
        found = normalize(found, Segments.of(binding), self.normalizer)
        return tally.ledger.fill_unscored(found, torch.inf)

    def _book(self, binding: Binding) -> Book:
        """The tensors that count, and what their indices count for."""
        return self._book_of(binding, self._usable)

    def _book_of(self, binding: Binding, usable: Callable[[Tensor], bool]) -> Book:
        left_out = sorted(name for name, tensor in binding.tensors.items() if not usable(tensor))
        key = f"{type(self).__module__}.{type(self).__qualname__} bias={self.bias} without {left_out}"

        def wanted(tensor_map: TensorMap) -> bool:
            return tensor_map.name not in left_out and self._counts(binding, tensor_map)

        return book(binding, key, wanted, self._counts_axis, pooled=False)

    def _usable(self, tensor: Tensor) -> bool:
        return True

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        names = ("weight", "bias") if self.bias else ("weight",)
        return tensor_map.is_parameter and any(
            has_floats(owner, local)
            and (
                (isinstance(owner, self.types) and weight_or_bias(owner, local) in names)
                or (self.types is SCORED and is_scored(tensor_map, owner, local))
            )
            for owner, local in binding.owners(tensor_map.name)
        )

    def _counts_axis(self, tensor_map: TensorMap, axis: Axis) -> bool:
        return True

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        """What each index of the ledger counts: ``[indices]``."""
        raise NotImplementedError


class Watching:
    """What a criterion that watches the training has beside :meth:`score`; the pruner calls these.

    ``histories`` and ``accumulators`` are what it gathers. They shrink with the model: histories by
    :meth:`shrink`, accumulators by surgery, as an optimizer's state.
    """

    histories: Sequence[History] = ()
    accumulators: Sequence[Accumulator] = ()

    def observe(self, binding: Binding, scale: float = 1.0, only: Collection[int] | None = None) -> None:
        """Take up a training step: called after backward, before the regulariser and the optimizer's step.

        Args:
            scale: a loss scale that is still in the gradients.
            only: ``id`` of the parameters that are stepped; all by default.
        """

    def attach(self, binding: Binding) -> None:
        """Put hooks on the model."""

    def detach(self) -> None:
        """Take them off."""

    def shrink(self, plan: Plan, keep: Tensor | NDArray[np.bool_]) -> None:
        """Follow a prune. ``plan`` is that before it, ``keep [N]`` as given to :func:`pat_fast.surgery.prune`."""
        kept = plan.check_keep(keep.cpu().numpy() if isinstance(keep, Tensor) else keep)
        for history in self.histories:
            history.shrink(plan, kept)

    def reset(self) -> None:
        """Forget what was gathered."""
        for history in self.histories:
            history.clear()
        for accumulator in self.accumulators:
            accumulator.state.clear()

    def state_dict(self, binding: Binding) -> dict[str, Any]:
        """What was gathered, by names."""
        names = {tensor: name for name, tensor in binding.tensors.items()}
        return {
            "histories": [history.state_dict() for history in self.histories],
            "accumulators": [
                {names[p]: {"sum": e["sum"].clone(), "count": e["count"]} for p, e in a.state.items() if p in names}
                for a in self.accumulators
            ],
        }

    def load_state_dict(self, state: dict[str, Any], binding: Binding) -> None:
        """Take up what :meth:`state_dict` gave, of a model of the same shapes."""
        for history, saved in zip(self.histories, state["histories"], strict=True):
            history.load_state_dict(saved, binding.device)
        for accumulator, sums in zip(self.accumulators, state["accumulators"], strict=True):
            accumulator.state.clear()
            for name, entry in sums.items():
                tensor = binding.tensors[name]
                accumulator.state[tensor] = {**entry, "sum": entry["sum"].to(tensor.device, copy=True)}
                accumulator.mean(tensor)  # raises if the shapes differ


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {value!r}{hint}")


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` without autograd, in the dtype in which scores are added up; complex ones as they are."""
    if tensor.is_complex():
        return tensor.detach()
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def product_slots(tiles: Tiles, partners: Sequence[Tensor], f: str) -> Tensor:
    """``channel_reduce`` of two-argument functions, whatever memory layout and dtype the partners have."""
    xs: Sequence[Tensor] = tiles.tensors
    if any(y.dtype != x.dtype for x, y in zip(xs, partners, strict=True)):
        xs, partners = [wide(x) for x in xs], [wide(y) for y in partners]
    fitting = [
        y if y.stride() == x.stride() else torch.empty_like(x).copy_(y) for x, y in zip(xs, partners, strict=True)
    ]
    return channel_reduce(xs, tiles.table, fitting, f=f)


def axis_rows(tensor_map: TensorMap, axis: Axis, elements: Tensor) -> Tensor:
    """``elements``, of a tensor's shape, by the indices of an axis: ``[indices, rest]``."""
    if len(axis.channels) != tensor_map.shape[axis.dim]:
        return elements.unflatten(0, (tensor_map.groups, -1)).movedim(2, 1).flatten(0, 1).flatten(1)
    return elements.movedim(axis.dim, 0).flatten(1)


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (nn.modules.batchnorm._BatchNorm,)
