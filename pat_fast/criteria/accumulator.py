"""What is gathered for each parameter over several backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import PlanError


class Accumulator:
    """Sums of tensors shaped like their parameters, and how many there were.

    ``state[parameter] = {"sum": Tensor, "count": number}``, laid out as an optimizer's state is, so that surgery
    shrinks it along with the parameter (pass it to :func:`pat_fast.surgery.prune` among the optimizers). Sums
    are float32, or float64 where the parameter is.
    """

    state_layout: ClassVar = {"sum": "elementwise"}

    def __init__(self) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {}

    def __bool__(self) -> bool:
        return bool(self.state)

    def add(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Add ``value``, of the parameter's shape, to its sum."""
        entry = self.state.get(parameter)
        if entry is None:
            self.state[parameter] = {"sum": value.to(_wider(parameter), copy=True), "count": 1}
        else:
            entry["sum"] = self._fitting(parameter, entry["sum"]) + value
            entry["count"] += 1

    def add_squares(self, parameters: Sequence[Tensor], values: Sequence[Tensor], scale: float, decay: float) -> None:
        """``sum = decay * sum + (value / scale)^2`` and ``count = decay * count + 1``, for all of them at once."""
        sums, wide = [], []
        for parameter, value in zip(parameters, values, strict=True):
            entry = self.state.get(parameter)
            if entry is None:
                zeros = torch.zeros_like(parameter, dtype=_wider(parameter), memory_format=torch.preserve_format)
                entry = self.state[parameter] = {"sum": zeros.detach(), "count": 0.0}
            sums.append(self._fitting(parameter, entry["sum"]))
            wide.append(value.to(entry["sum"].dtype))
            entry["count"] = decay * entry["count"] + 1
        if sums:
            torch._foreach_mul_(sums, decay)
            torch._foreach_addcmul_(sums, wide, wide, value=1 / scale**2)

    def mean(self, parameter: Tensor) -> Tensor | None:
        """The sum divided by the count, or None for a parameter that nothing was added for.

        Raises:
            PlanError: the parameter has changed its shape since.
        """
        entry = self.state.get(parameter)
        return None if entry is None else self._fitting(parameter, entry["sum"]) / entry["count"]

    @staticmethod
    def _fitting(parameter: Tensor, total: Tensor) -> Tensor:
        if total.shape != parameter.shape:
            raise PlanError(
                f"what was accumulated has shape {tuple(total.shape)} and its parameter {tuple(parameter.shape)}: the "
                "model was pruned without it; call zero_grad() of the importance and accumulate again"
            )
        return total


def _wider(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
