"""The importance that all others vary: magnitude, summed over what belongs to a channel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import Importance

from ..criteria import Normalizer, Reduction, Segments, check_normalizer, check_reduction, normalize
from ..criteria.accumulator import Accumulator
from ..criteria.base import wide
from ..criteria.ledger import Book, Order, book
from ..criteria.reductions import reduce_members, reduce_rows
from ..errors import check
from ..ops import channel_reduce
from ..ops.functional import expect
from ..ops.grouped import Grouping, channel_totals
from ..plan.bind import Binding, Tiles, magnitudes
from ..plan.types import Axis, TensorMap
from ._groups import LAYERS, NORMS, Item, items, repeats, sums, width

WEIGHTED = (*LAYERS, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


@lru_cache(maxsize=64)
def _key(rule: str, bias: bool, types: tuple[type, ...], skipped: frozenset[str]) -> str:
    names = [f"{t.__module__}.{t.__qualname__} {id(t)}" for t in types]
    return f"importance: {rule} bias={bias} {names} without {sorted(skipped)}"


class GroupMagnitudeImportance(Importance):
    """``sum |w|^p`` over what belongs to a channel in each member of its group, reduced over the members.

    A member is one side (outputs, inputs) of one layer. The result is divided by a statistic of the group, so
    that groups can be compared. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023,
    https://arxiv.org/abs/2301.12900.

    Args:
        p: the exponent, positive.
        group_reduction: see :func:`pat_fast.criteria.reduce_rows`.
        normalizer: see :func:`pat_fast.criteria.normalize`.
        bias: count the biases of outputs and norms as members, too.
        target_types: layers that count: convolutions, linear layers and norms.
    Raises:
        ConfigError: an argument is out of range or unknown.
    """

    p: float = 2

    def __init__(
        self,
        p: float = 2,
        group_reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = WEIGHTED,
    ) -> None:
        check("p", p, lambda v: 0 < v < math.inf, "a positive number (1 or 2, say)")
        self.p = p
        self._configure(group_reduction, normalizer, bias, target_types)

    def _configure(
        self, group_reduction: Reduction, normalizer: Normalizer, bias: bool, target_types: Sequence[type]
    ) -> None:
        check_reduction(group_reduction)
        check_normalizer(normalizer)
        types = "layer types, as [nn.Conv2d, nn.Linear]"
        check("target_types", target_types, lambda ts: all(isinstance(t, type) for t in ts), types)
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self.bias = bias
        self.target_types = list(target_types)

    @property
    def accumulators(self) -> list[Accumulator]:
        """What was gathered over backward passes: to be shrunk with the model, as an optimizer's state."""
        return []

    # On one group

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """The scores of the channels of a ``tp.Group``: ``[channels]``, or None if nothing in it can be scored.

        A channel that the group's first layer has at several indices has its score at each.
        float32 (float64 where the weights are), on the weights' device. Nothing of the group is changed.
        """
        found, places = [], []
        for item in items(group, self.target_types):
            for values in self._item_scores(item):
                found.append(values[item.idxs.to(values.device)])
                places.append(item.places)
        if not found:
            return None
        # A class of the user's may have Torch-Pruning's signature.
        own = type(self)._reduce is not GroupMagnitudeImportance._reduce
        scores = self._reduce(found, places) if own else self._reduce(found, places, width(group))
        several = repeats(group)
        if several is not None:
            scores = scores[..., several]
        return self._normalize(scores, self.normalizer)

    def _reduce(self, group_imp: Sequence[Tensor], group_idxs: Sequence[Any], channels: int | None = None) -> Tensor:
        """One score per channel (one per member and channel if ``group_reduction`` is None).

        Args:
            group_imp: for each member, the scores of its indices.
            group_idxs: for each member, the channels of its indices; None for a lost one: that member is left out.
            channels: of the group; by default as many as the indices name.
        """
        members = [
            (values, torch.as_tensor(idxs, dtype=torch.int64))
            for values, idxs in zip(group_imp, group_idxs, strict=True)
            if isinstance(idxs, Tensor) or None not in idxs
        ]
        if channels is None:
            channels = max((int(idxs.max()) + 1 for _, idxs in members if len(idxs)), default=0)
        like = group_imp[0]
        dtype = torch.float64 if any(v.dtype == torch.float64 for v in group_imp) else torch.float32
        table = torch.zeros(len(members), channels, dtype=dtype, device=like.device)
        covers = torch.zeros_like(table, dtype=torch.bool)
        for row, cover, (values, idxs) in zip(table, covers, members, strict=True):
            idxs = idxs.to(like.device)
            row.index_add_(0, idxs, values.to(row))
            cover[idxs] = True
        return reduce_rows(table, covers, self.group_reduction)

    def _normalize(self, group_importance: Tensor, normalizer: Normalizer) -> Tensor:
        """The scores of a group measured against one another."""
        flat = group_importance.flatten()
        return normalize(flat, Segments.one(len(flat), flat.device), normalizer).view(group_importance.shape)

    def _item_scores(self, item: Item) -> Iterator[Tensor]:
        """For each member that an entry of a group makes, the scores of all indices of that side: ``[n]``."""
        elements = self._elements(item.layer.weight)
        if elements is not None:
            yield self._finish(sums(item.layer, item.side, elements))
        bias = getattr(item.layer, "bias", None)
        if self.bias and bias is not None and item.side != "in":
            elements = self._elements(bias)
            if elements is not None:
                yield self._finish(elements)

    def _elements(self, parameter: Tensor) -> Tensor | None:
        """What each element of a parameter adds to a score, or None if it cannot be scored."""
        return wide(parameter).abs().pow(self.p)

    def _finish(self, values: Tensor) -> Tensor:
        """Applied to the sums of each index."""
        return values

    # On a plan

    @torch.no_grad()
    def score(self, binding: Binding, order: Order | None = None) -> Tensor:
        """The scores of all channels of a bound plan: ``[N]``, NaN for groups in which nothing can be scored.

        float32 (float64 where the weights are), on ``binding.device``. Equal to calling the importance on
        Torch-Pruning's groups wherever these have the same members.

        Args:
            order: the members of each group from the first to the last, for ``group_reduction`` ``"first"``,
                ``"gate"`` and functions: :func:`member_order`. By default the root's output is first, and the
                others follow as they are executed.
        """
        tally = self._book(binding)
        totals = self._totals(binding, tally)
        if totals is not None:
            return totals
        found = reduce_members(self._values(tally), tally.ledger, self.group_reduction, order)
        found = normalize(found, Segments.of(binding), self.normalizer)
        return tally.ledger.fill_unscored(found, torch.nan)

    def score_beside(self, binding: Binding, meanwhile: Callable[[], None]) -> Tensor | None:
        """As :meth:`score`, with ``meanwhile`` called once, while other threads read the weights.

        None, and nothing is called, where no single call makes the scores.
        """
        return self._totals(binding, self._book(binding), meanwhile) if self._sums_plainly else None

    def _totals(self, binding: Binding, tally: Book, meanwhile: Callable[[], None] | None = None) -> Tensor | None:
        grouping = self._grouping(binding, tally)
        if grouping is None:
            return None
        (tiles,) = tally.tiles
        return channel_totals(tiles.tensors, grouping, float(self.p), True, meanwhile)

    def _grouping(self, binding: Binding, tally: Book) -> Grouping | None:
        """What the scores can be made with in one call, or None.

        A group's members are as many for each of its channels, so they cancel out in a mean over its channels.
        """
        return binding.grouping(tally.key) if self._sums_plainly and tally.is_plain else None

    @property
    def _sums_plainly(self) -> bool:
        own, base = type(self), GroupMagnitudeImportance
        if own._values is not base._values or own._slots is not base._slots or own._finish is not base._finish:
            return False
        return self.normalizer == "mean" and self.group_reduction in ("mean", "sum")

    def prepare(self, binding: Binding) -> None:
        """Work out ahead which indices of which tensors :meth:`score` adds up, where that is known already."""
        if type(self)._usable is GroupMagnitudeImportance._usable:
            tally = self._book(binding)
            tally.ledger.prepare()
            for tiles in tally.tiles:
                expect(magnitudes(tiles.tensors), tiles.table)
            self._grouping(binding, tally)

    def _book(self, binding: Binding) -> Book:
        """The tensors that count, and what their indices count for."""
        all_usable = type(self)._usable is GroupMagnitudeImportance._usable
        skipped = set() if all_usable else {name for name in binding.tensors if not self._usable(binding, name)}
        key = _key(self._rule, self.bias, tuple(self.target_types), frozenset(skipped))

        def wanted(tensor_map: TensorMap) -> bool:
            return tensor_map.name not in skipped and self._counts(binding, tensor_map)

        return book(binding, key, wanted, self._counts_axis, self._pooled)

    _rule = "all axes"  # what of the plan counts; part of the key under which the book is kept
    _pooled = True

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        """Whether a tensor is a weight (or bias, if these count) of a layer of the target types."""
        locals_ = ("weight", "bias") if self.bias else ("weight",)
        return tensor_map.is_parameter and any(
            local in locals_ and isinstance(owner, tuple(self.target_types)) and isinstance(owner, LAYERS + NORMS)
            for owner, local in binding.owners(tensor_map.name)
        )

    def _counts_axis(self, tensor_map: TensorMap, axis: Axis) -> bool:
        return True

    def _usable(self, binding: Binding, name: str) -> bool:
        """Whether what the scores of a tensor need is there (a gradient, say)."""
        return True

    def _values(self, tally: Book) -> Tensor:
        """What each index of the ledger counts: ``[indices]``."""
        return self._finish(tally.collect([self._slots(tiles) for tiles in tally.tiles]))

    def _slots(self, tiles: Tiles) -> Tensor:
        """The same before indices with several slots are added up: ``[slots]``."""
        return channel_reduce(magnitudes(tiles.tensors), tiles.table, f="pow", p=float(self.p))
