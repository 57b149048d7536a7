"""Criteria that look at no tensor: chance, and functions of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, PlanError, check
from ..plan.bind import Binding
from .base import Watching


def _is_seed(value: Any) -> bool:
    return isinstance(value, Integral) and -(2**63) <= int(value) < 2**64


class Random(Watching):
    """Scores drawn evenly from [0, 1): the baseline that every criterion has to beat.

    Args:
        seed: of a generator of its own, whose state a checkpoint holds; by default PyTorch's generator draws.
    Raises:
        ConfigError: the seed is not a whole number of 64 bits.
    """

    def __init__(self, seed: int | None = None) -> None:
        check("seed", seed, lambda v: v is None or _is_seed(v), "a whole number of 64 bits, or None")
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def score(self, binding: Binding) -> Tensor:
        """``[N]`` float32, drawn on the CPU."""
        return torch.rand(binding.plan.n_channels, generator=self._generator, device="cpu").to(binding.device)

    def state_dict(self, binding: Binding) -> dict[str, Any]:
        """The generator's state."""
        return {"generator": None if self._generator is None else self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], binding: Binding) -> None:
        """Go on drawing where :meth:`state_dict` was called."""
        if self._generator is not None and state["generator"] is not None:
            self._generator.set_state(state["generator"])


class Function:
    """A function of the user's own as a criterion: ``score(binding) = function(binding)``, ``[N]``.

    Raises:
        ConfigError: it is not callable.
        PlanError: (from ``score``) it returns something else than a tensor ``[N]``.
    """

    def __init__(self, function: Callable[[Binding], Tensor]) -> None:
        if not callable(function):
            raise ConfigError(f"importance: expected a function from a binding to scores [N], got {function!r}")
        self.function = function

    @torch.no_grad()
    def score(self, binding: Binding) -> Tensor:
        """What the function says."""
        found = self.function(binding)
        if not isinstance(found, Tensor) or found.shape != (binding.plan.n_channels,):
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise PlanError(f"importance: expected scores [{binding.plan.n_channels}] from the function, got {got}")
        return found.detach()
