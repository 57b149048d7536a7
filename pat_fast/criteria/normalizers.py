"""Normalisers: what makes the scores of different groups comparable, for all groups at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, did_you_mean
from ..plan.bind import Binding

Normalizer = str | Callable[[Tensor], Tensor] | None
NORMALIZERS = ("sum", "standarization", "mean", "max", "gaussian", "sentinel", "lamp")
EPSILON = 1e-8  # Torch-Pruning's, in "standarization", "gaussian" and "sentinel"


@dataclass(frozen=True)
class Segments:
    """Channels in contiguous groups.

    ``group_of [N]`` int64; ``alive [N]`` bool, or None where all are: the dead take no part in statistics.
    ``lengths [groups]`` int64: how many channels each has, if that is known.
    """

    group_of: Tensor
    count: int
    alive: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def of(cls, binding: Binding) -> Segments:
        """The groups of a binding's plan."""
        return cls(binding.group_of, len(binding.plan.groups), binding.alive, binding.group_size)

    @classmethod
    def one(cls, n: int, device: torch.device) -> Segments:
        """A single group of ``n`` channels."""
        return cls(torch.zeros(n, dtype=torch.int64, device=device), 1)

    def are_plain(self, values: Tensor) -> bool:
        """Whether all of them count and ``values [N]`` can be looked at by NumPy."""
        plain = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
        return plain and self.alive is None and not values.requires_grad

    def living(self, values: Tensor, dead: float) -> Tensor:
        """``values [N]`` with ``dead`` in place of masked channels."""
        return values if self.alive is None else values.masked_fill(~self.alive, dead)

    def total(self, values: Tensor) -> Tensor:
        """Sum of ``values [N]`` over each group: ``[groups]``."""
        if self.alive is None and self.lengths is not None:
            return torch.segment_reduce(values, "sum", lengths=self.lengths, unsafe=True)
        return values.new_zeros(self.count).index_add_(0, self.group_of, self.living(values, 0.0))

    def size(self) -> Tensor:
        """Living channels of each group: ``[groups]`` float64."""
        if self.alive is None and self.lengths is not None:
            return self.lengths.double()
        return self.total(torch.ones_like(self.group_of, dtype=torch.float64))

    def extreme(self, values: Tensor, which: str) -> Tensor:
        """``"amax"`` or ``"amin"`` of ``values [N]`` over each group: ``[groups]``."""
        values = self.living(values, -torch.inf if which == "amax" else torch.inf)
        return values.new_zeros(self.count).scatter_reduce_(0, self.group_of, values, which, include_self=False)

    def spread(self, per_group: Tensor) -> Tensor:
        """``per_group [groups]`` at each of its channels: ``[N]``."""
        return per_group.index_select(0, self.group_of)

    def ascending(self, values: Tensor) -> Tensor:
        """Channels, group by group, by rising ``values [N]`` (ties in channel order, the dead last): ``[N]``."""
        order = self.living(values, torch.inf).argsort(stable=True)
        return order[self.group_of[order].argsort(stable=True)]


def check_normalizer(how: Normalizer) -> None:
    """Raise :class:`ConfigError` unless ``how`` is a normaliser that :func:`normalize` knows."""
    if how is None or callable(how):
        return
    known = ", ".join(NORMALIZERS) + " (as sentinel_0.5), a function of a group's scores, or None"
    if not isinstance(how, str) or how.partition("_")[0] not in NORMALIZERS:
        hint = did_you_mean(how, NORMALIZERS) if isinstance(how, str) else ""
        raise ConfigError(f"normalizer: expected one of {known}, got {how!r}{hint}")
    if how.startswith("sentinel"):
        _sentinel(how)
    elif how not in NORMALIZERS:
        raise ConfigError(f"normalizer: expected one of {known}, got {how!r}{did_you_mean(how, NORMALIZERS)}")


def normalize(scores: Tensor, segments: Segments, how: Normalizer) -> Tensor:
    """``scores [N]`` divided by, or measured against, a statistic of their group; computed in float64.

    ============== ==========================================================================================
    sum, mean, max ``s / statistic(s)``
    standarization ``(s - min) / (max - min + 1e-8)``
    gaussian       ``(s - mean) / (std + 1e-8)``, std with n - 1
    sentinel_q     ``s / (t + 1e-8)`` with t the element of rank ``floor(q n)``, counted from the smallest
    lamp           ``s / (sum of all s of the group that are not smaller)``; Lee et al., "Layer-adaptive
                   Sparsity for the Magnitude-based Pruning", ICLR 2021, https://arxiv.org/abs/2010.07611
    a function     called with the scores of each group
    ============== ==========================================================================================

    A statistic of zero divides nothing: a group of zeros stays zero, and a lone channel is 0 deviations from
    its mean (Torch-Pruning: NaN).

    Raises:
        ConfigError: an unknown normaliser, or a function that returns another shape.
    """
    check_normalizer(how)
    if how is None or not len(scores):
        return scores
    if not isinstance(how, str):
        return _by_function(scores, segments, how)
    if how in ("sum", "mean") and segments.lengths is not None and segments.are_plain(scores):
        return _by_sums(scores, segments.lengths, how)
    x = scores.double()
    if how == "lamp":
        found = _lamp(x, segments)
    elif how.startswith("sentinel"):
        found = x / (segments.spread(_at_rank(x, segments, _sentinel(how))) + EPSILON)
    elif how == "standarization":
        low, high = segments.extreme(x, "amin"), segments.extreme(x, "amax")
        found = (x - segments.spread(low)) / segments.spread(high - low + EPSILON)
    elif how == "gaussian":
        off = x - segments.spread(segments.total(x) / segments.size().clamp_min(1))
        std = (segments.total(off.square()) / (segments.size() - 1).clamp_min(1)).sqrt()
        found = off / segments.spread(std + EPSILON)
    elif how == "max":
        found = _by_statistic(x, segments, segments.extreme(x, "amax"))
    else:
        total = segments.total(x)
        found = _by_statistic(x, segments, total if how == "sum" else total / segments.size().clamp_min(1))
    return found.to(scores.dtype)


def _by_sums(scores: Tensor, lengths: Tensor, how: str) -> Tensor:
    """Scores divided by their group's sum or mean, in a few steps of NumPy: a vector of some thousand channels takes
    PyTorch longer to hand from op to op than to compute with."""
    x, sizes = scores.numpy().astype(np.float64), lengths.numpy()
    by = np.add.reduceat(x, np.cumsum(sizes) - sizes)
    if how == "mean":
        by /= sizes
    by[by == 0] = 1.0
    x /= np.repeat(by, sizes)
    return torch.from_numpy(x).to(scores.dtype)


def _by_statistic(x: Tensor, segments: Segments, by: Tensor) -> Tensor:
    """``x [N]`` divided by what ``by [groups]`` says of its group, unless that is zero."""
    return x / segments.spread(by.masked_fill(by == 0, 1.0))


def _divide(x: Tensor, by: Tensor) -> Tensor:
    return x / by.where(by != 0, torch.ones_like(by))


def _sentinel(how: str) -> float:
    """The ``q`` of ``"sentinel_q"``."""
    try:
        q = float(how.partition("_")[2])
    except ValueError:
        q = math.nan
    if not 0 <= q < 1:
        raise ConfigError(f"normalizer: expected sentinel_q with q in [0, 1), as sentinel_0.5, got {how!r}")
    return q


def _starts(segments: Segments) -> Tensor:
    """Where each group begins among the channels sorted by group: ``[groups]`` int64."""
    sizes = torch.bincount(segments.group_of, minlength=segments.count)
    return sizes.cumsum(0) - sizes


def _at_rank(x: Tensor, segments: Segments, q: float) -> Tensor:
    """The value of rank ``floor(q n)`` in each group: ``[groups]``."""
    place = _starts(segments) + (q * segments.size()).long()
    return x[segments.ascending(x)[place.clamp_max(len(x) - 1)]]


def _lamp(x: Tensor, segments: Segments) -> Tensor:
    # Scale does not matter; at the same scale, one running sum serves all groups without loss.
    top = segments.spread(segments.extreme(x.abs(), "amax"))
    broken = ~top.isfinite()  # must not leak into the other groups
    scaled = segments.living(_divide(x, top), 0.0).masked_fill(broken, 0.0)
    order = segments.ascending(x)
    rising = scaled[order]
    from_here = rising.flip(0).cumsum(0).flip(0)
    ends = _starts(segments).roll(-1)
    beyond = torch.cat([from_here, from_here.new_zeros(1)])[ends.where(ends > 0, torch.full_like(ends, len(x)))]
    found = torch.empty_like(x)
    found[order] = _divide(rising, from_here - segments.spread(beyond)[order])
    return found.masked_fill(broken, torch.nan)


def _by_function(scores: Tensor, segments: Segments, how: Callable[[Tensor], Tensor]) -> Tensor:
    parts = scores.split(torch.bincount(segments.group_of, minlength=segments.count).tolist())
    found = [how(part) for part in parts]
    for part, new in zip(parts, found, strict=True):
        if not isinstance(new, Tensor) or new.shape != part.shape:
            got = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise ConfigError(f"normalizer: expected a function from scores to a tensor {tuple(part.shape)}, got {got}")
    return torch.cat(found).to(scores.dtype)
