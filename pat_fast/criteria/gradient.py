"""Criteria of the gradients, gathered while the model trains."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PlanError, check
from ..plan.bind import Binding
from .accumulator import Accumulator
from .base import MemberCriterion, Watching, check_choice, product_slots
from .history import History
from .ledger import Book
from .normalizers import Normalizer
from .reductions import Reduction

HOW = ("abs", "joint", "signed")
AUTO = "auto"  # the normaliser: "mean", or None for scores that may be negative


class Taylor(MemberCriterion, Watching):
    """First-order Taylor expansion of the loss: what the removal of a channel does to it.

    With w the weights of channel c in member m and g their gradients, at each optimizer step

    - ``how="abs"``: ``v[m, c] = sum |w g|``;
    - ``how="joint"``: ``v[m, c] = |sum w g|``;
    - ``how="signed"``: ``v[m, c] = -sum w g``, the estimated rise of the loss; negative where the loss would fall.

    The mean of v over the steps is reduced and normalised (:class:`MemberCriterion`); step t counts
    ``decay ** (now - t)``. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
    https://arxiv.org/abs/1906.10771. Gradients are taken before the regulariser adds to them, and free of a loss
    scale. Frozen parameters do not count. Costs one read of weights and gradients per step.

    Args:
        how: see above.
        decay: in ``[0, 1]``; 0: the last step alone; 1: all steps alike.
        window: only so many last steps count; by default all.
        reduction, bias: as :class:`MemberCriterion`.
        normalizer: by default ``"mean"``, or None for ``"signed"``.
    Raises:
        ConfigError: a value out of range; a normaliser or reduction that would turn signed scores around.
        PlanError: (from ``score``) there are no gradients and no step was seen.
    """

    def __init__(
        self,
        how: str = "abs",
        decay: float = 0.9,
        window: int | None = None,
        reduction: Reduction = "mean",
        normalizer: Normalizer = AUTO,
        bias: bool = False,
    ) -> None:
        check_choice("how", how, HOW)
        self.signed = how == "signed"
        super().__init__(reduction, _resolve(normalizer, self.signed), bias)
        self.how = how
        self._history = History(decay, window)
        self.histories = (self._history,)

    @torch.no_grad()
    def observe(self, binding: Binding, scale: float = 1.0, only: Collection[int] | None = None) -> None:
        """Take up the gradients of a step; see :class:`Watching`."""
        tally = self._book(binding)
        seen = _seen(tally, only)
        if seen is None or bool(seen.any()):
            self._history.add(tally.ledger, self._now(tally, only) / scale, seen)

    def _usable(self, tensor: Tensor) -> bool:
        return tensor.requires_grad

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        if self._history:
            return self._history.mean(tally.ledger)
        if all(t.grad is None for tiles in tally.tiles for t in tiles.tensors):
            raise PlanError(
                f"{type(self).__name__} needs gradients and has seen none; train for a step before pruner.step(), or, "
                "by hand, call pruner.regularize() after loss.backward()"
            )
        return self._now(tally, None)

    def _now(self, tally: Book, only: Collection[int] | None) -> Tensor:
        f = "absmul" if self.how == "abs" else "mul"
        found = tally.collect([product_slots(tiles, _gradients(tiles.tensors, only), f) for tiles in tally.tiles])
        return -found if self.signed else found.abs()


class Movement(Taylor):
    """``v[m, c] = -sum w g``, averaged over all steps: channels that move away from zero score high.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020,
    https://arxiv.org/abs/2005.07683, over channels as in Lagunas et al., "Block Pruning For Faster Transformers",
    EMNLP 2021, https://arxiv.org/abs/2109.04838. The paper adds up where this takes the mean: the order is the
    same. For fine-tuning a trained network; scores may be negative.

    Args:
        decay: in ``[0, 1]``; 1 as in the paper: all steps alike.
        reduction, normalizer, bias: as :class:`Taylor`.
    """

    def __init__(
        self,
        decay: float = 1.0,
        reduction: Reduction = "mean",
        normalizer: Normalizer = None,
        bias: bool = False,
    ) -> None:
        super().__init__("signed", decay, None, reduction, normalizer, bias)


class Hessian(MemberCriterion, Watching):
    """Optimal brain damage: ``v[m, c] = sum w^2 F / 2``, F the diagonal of the empirical Fisher matrix.

    ``F = mean_t g_t^2`` over the optimizer steps t, step t counting ``decay ** (now - t)``, element by element, with
    the weights as they are when channels are scored. LeCun et al., "Optimal Brain Damage", NeurIPS 1989; Theis et
    al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, https://arxiv.org/abs/1801.05787.
    The gradient is that of the batch: with batches of one it is the Fisher matrix's diagonal, with larger ones a
    smaller number that ranks alike as far as samples are independent. Costs a float32 copy of the weights, and a
    read and write of it per step.

    Args:
        decay: in ``[0, 1]``; 1: the mean over all steps; 0: the last step alone.
        reduction, normalizer, bias: as :class:`MemberCriterion`.
    Raises:
        ConfigError: as :class:`MemberCriterion`, or a decay out of range.
        PlanError: (from ``score``) no step was seen.
    """

    def __init__(
        self,
        decay: float = 1.0,
        reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
    ) -> None:
        check("decay", decay, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        super().__init__(reduction, normalizer, bias)
        self.decay = float(decay)
        self._squares = Accumulator()
        self.accumulators = (self._squares,)

    @torch.no_grad()
    def observe(self, binding: Binding, scale: float = 1.0, only: Collection[int] | None = None) -> None:
        """Take up the gradients of a step; see :class:`Watching`."""
        pairs = [
            (t, t.grad)
            for tiles in self._book_of(binding, lambda t: t.requires_grad).tiles
            for t in tiles.tensors
            if t.grad is not None and _is_seen(t, only)
        ]
        self._squares.add_squares([t for t, _ in pairs], [g for _, g in pairs], scale, self.decay)

    def _book(self, binding: Binding) -> Book:
        if not self._squares:
            raise PlanError(
                "Hessian has seen no gradients; train for a step before pruner.step(), or, by hand, call "
                "pruner.regularize() after loss.backward()"
            )
        return super()._book(binding)

    def _usable(self, tensor: Tensor) -> bool:
        return tensor in self._squares.state

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        means = [[m for t in tiles.tensors if (m := self._squares.mean(t)) is not None] for tiles in tally.tiles]
        slots = [product_slots(tiles, mean, "sqmul") for tiles, mean in zip(tally.tiles, means, strict=True)]
        return tally.collect(slots) / 2


def _resolve(normalizer: Normalizer, signed: bool) -> Normalizer:
    if isinstance(normalizer, str) and normalizer == AUTO:
        return None if signed else "mean"
    return normalizer


def _is_seen(tensor: Tensor, only: Collection[int] | None) -> bool:
    return tensor.grad is not None and (only is None or id(tensor) in only)


def _gradients(tensors: Collection[Tensor], only: Collection[int] | None) -> list[Tensor]:
    """The gradients, zeros where there is none."""
    return [
        t.grad if t.grad is not None and _is_seen(t, only) else torch.zeros_like(t, requires_grad=False)
        for t in tensors
    ]


def _seen(tally: Book, only: Collection[int] | None) -> Tensor | None:
    """The indices whose tensors have a gradient: bool ``[indices]``, or None for all."""
    flags: dict[str, Any] = {}
    for tiles in tally.tiles:
        for name, tensor in zip(tiles.names, tiles.tensors, strict=True):
            flags[name] = _is_seen(tensor, only)
    if all(flags.values()):
        return None
    parts = tally.ledger.parts
    per_index = np.repeat([flags[p.tensor.name] for p in parts], [p.count for p in parts])
    return torch.from_numpy(per_index).to(tally.ledger.device)
