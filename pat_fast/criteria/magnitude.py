"""Criteria of the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, check
from ..ops import channel_reduce
from ..plan.bind import Binding
from ..plan.types import TensorMap
from .base import LAYERS, NORMS, MemberCriterion, axis_rows, wide
from .ledger import Book
from .normalizers import Normalizer
from .reductions import Reduction


class Magnitude(MemberCriterion):
    """``v[m, c] = sum |w|^p`` over the weights of channel c in member m; see :class:`MemberCriterion` for the rest.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, https://arxiv.org/abs/1608.08710 (p = 1, one
    member); over groups: Fang et al., CVPR 2023, https://arxiv.org/abs/2301.12900. With its defaults it is
    :class:`GroupNorm`.

    Args:
        p: a positive exponent.
        reduction, normalizer, bias: as :class:`MemberCriterion`.
    """

    def __init__(
        self, p: float = 2.0, reduction: Reduction = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        check("p", p, lambda v: 0 < v < math.inf, "a positive number (1 or 2, say)")
        super().__init__(reduction, normalizer, bias)
        self.p = float(p)

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        return tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=self.p) for t in tally.tiles])


class BNScale(Magnitude):
    """``v[m, c] = |gamma_c|`` over the batch norms of a group, as they are (``normalizer=None``).

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    https://arxiv.org/abs/1708.06519. Groups without a batch norm stay.
    """

    types = NORMS

    def __init__(self, reduction: Reduction = "mean", normalizer: Normalizer = None) -> None:
        super().__init__(1.0, reduction, normalizer)


class LAMP(Magnitude):
    """Magnitude divided by that of all channels of the group that are not smaller:
    ``score[c] = s_c / sum(s_d : s_d >= s_c)``.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
    https://arxiv.org/abs/2010.07611, over channels instead of weights. A group's best channel scores 1, so a
    global ranking empties no group. Within a group it ranks as magnitude does.
    """

    def __init__(self, p: float = 2.0, reduction: Reduction = "mean", bias: bool = False) -> None:
        super().__init__(p, reduction, "lamp", bias)


class FPGM(MemberCriterion):
    """``v[m, c] = sum_d ||w_c - w_d||_2`` over the living channels d of the group: the distance from the rest.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019, https://arxiv.org/abs/1811.00250: what lies close
    to the geometric median can be replaced by the others. Weights of convolutions and linear layers count, the
    outputs and the inputs as members of their own.

    Raises:
        ConfigError: as :class:`MemberCriterion`; ``bias`` is not offered, a scalar has no direction.
    """

    types = LAYERS

    def __init__(self, reduction: Reduction = "mean", normalizer: Normalizer = "mean") -> None:
        if normalizer == "lamp":
            raise ConfigError("normalizer: expected another than 'lamp', which adds up magnitudes, got 'lamp'")
        super().__init__(reduction, normalizer)

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        return len(tensor_map.shape) > 1 and super()._counts(binding, tensor_map)

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        return distances_of(tally, binding.alive)


def distances_of(tally: Book, alive: Tensor | None = None, change: Callable[[Tensor], Tensor] = wide) -> Tensor:
    """For each index, the sum of distances to the other living indices of its member: ``[indices]``.

    A matrix product per member is what it takes. ``change`` makes of a weight the elements to compare.
    """
    ledger = tally.ledger
    found = [tensor for tiles in tally.tiles for tensor in tiles.tensors]
    names = [name for tiles in tally.tiles for name in tiles.names]
    tensors = dict(zip(names, found, strict=True))
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in found) else torch.float32
    values = torch.zeros(ledger.indices, dtype=dtype, device=ledger.device)
    group_of = ledger.plan.group_of
    for part in ledger.parts:
        channels = part.axis.channels
        held = channels >= 0
        groups = group_of[channels]
        rows = axis_rows(part.tensor, part.axis, change(tensors[part.tensor.name]))
        for group in set(groups[held].tolist()):
            own = torch.from_numpy((held & (groups == group)).nonzero()[0])
            living = None if alive is None else alive.cpu()[torch.from_numpy(channels).long()[own]]
            sums = distances(rows[own.to(rows.device)], living)
            values[part.start + own.to(values.device)] = sums.to(values)
    return values


def distances(vectors: Tensor, living: Tensor | None = None) -> Tensor:
    """Sum over the other rows (only ``living [n]`` ones) of the distance to ``vectors [n, d]``: ``[n]``."""
    apart = torch.cdist(vectors.unsqueeze(0), vectors.unsqueeze(0)).squeeze(0)
    return apart.sum(0) if living is None else apart[living.to(apart.device)].sum(0)
