"""What the regularisers have in common: a strength that warms up, and a choice of where it is applied."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import check, check_count, check_flag
from ..plan.bind import Binding


class Penalty:
    """A regulariser that adds to gradients or, decoupled, shrinks the weights themselves.

    Coupled, what it adds passes through the optimizer: momentum carries it on, and Adam divides it by the root of the
    second moment, which makes it nearly the same for all weights. Decoupled, it is ``w -= lr * strength * rate * w``
    before the optimizer's step, whatever the optimizer does with gradients: Loshchilov & Hutter, "Decoupled Weight
    Decay Regularization", ICLR 2019, https://arxiv.org/abs/1711.05101, equation 12 and algorithm 2. For SGD without
    momentum the two are the same.

    Args:
        strength: at least 0.
        warmup: optimizer steps over which the strength rises in a line: ``strength * min(k / warmup, 1)`` at the k-th
            step. 0: none.
        decoupled: at the weights.
    Raises:
        ConfigError: a value is out of range.
    """

    _autograd_as_it_is = False  # for an ``_add`` that turns autograd off where it would see something: it takes 20 us

    def __init__(self, strength: float, warmup: int = 0, decoupled: bool = False) -> None:
        check("strength", strength, lambda v: 0 <= v < math.inf, "a number, at least 0")
        check_count("warmup", warmup, 0)
        check_flag("decoupled", decoupled)
        self.strength = strength
        self.warmup = int(warmup)
        self.decoupled = decoupled
        self.steps = 0
        self._counted: int | None = None  # the parameter whose steps count, where several optimizers step

    @property
    def factor(self) -> float:
        """What the strength is multiplied with at this step: 0 .. 1."""
        return min(self.steps / self.warmup, 1.0) if self.warmup else 1.0

    def apply(
        self,
        binding: Binding,
        scale: float = 1.0,
        where: Tensor | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Count a step of the optimizer; coupled: add to the gradients. Weights without a gradient are left alone.

        Args:
            scale: multiplies what is added (a loss scale that is still in the gradients).
            where: bool ``[N]``, the channels to push; all by default.
            only: ``id`` of the parameters to push; all by default.
        """
        self._count(binding, only)
        if self.decoupled:
            return
        with nullcontext() if self._autograd_as_it_is else torch.no_grad():
            self._add(binding, self.factor * scale, where, only)

    @torch.no_grad()
    def before_step(self, binding: Binding, lr: Mapping[int, float], where: Tensor | None = None) -> None:
        """Decoupled: shrink the weights. Called after :meth:`apply`, when the optimizer is about to step.

        Args:
            lr: the learning rate of each parameter that is stepped, by its ``id``; others are left alone.
            where: bool ``[N]``, the channels to shrink; all by default.
        """
        if self.decoupled:
            self._shrink(binding, self.factor, lr, where)

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        raise NotImplementedError

    def _shrink(self, binding: Binding, factor: float, lr: Mapping[int, float], where: Tensor | None) -> None:
        raise NotImplementedError

    def _count(self, binding: Binding, only: Collection[int] | None) -> None:
        if only is not None:
            present = [id(t) for t in binding.tensors.values() if id(t) in only]
            if self._counted is None or self._counted not in {id(t) for t in binding.tensors.values()}:
                self._counted = present[0] if present else None
            if self._counted not in present:
                return
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Steps so far: ``{"steps": int}``."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.steps = int(state["steps"])
