"""What is gathered for every index of every tensor axis over many steps, and follows the model through surgery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PlanError, check, check_count
from ..plan.types import Kept, Plan
from .ledger import Ledger

Key = tuple[str, int, int]  # tensor, dimension, number of indices


class History:
    """A mean over steps of values ``[indices]``, the newest first: step t counts ``decay ** (now - t)``.

    An index that a step does not see (its tensor had no gradient, another optimizer holds it) keeps what it has.

    Args:
        decay: in ``[0, 1]``: 0, the last step alone; 1, all steps alike.
        window: only so many last steps count; all of them by default. Costs as many vectors.
    Raises:
        ConfigError: a value is out of range, or a window of several steps of which all but one weigh nothing.
    """

    def __init__(self, decay: float, window: int | None = None) -> None:
        check("decay", decay, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        check_count("window", window, 1, or_none=True)
        if window is not None and window > 1:
            check("decay", decay, lambda v: v > 0, f"above 0 with a window of {window}: at 0 only the last step counts")
        self.decay = float(decay)
        self.window = window
        self._keys: list[Key] = []
        self._state: dict[str, Tensor] = {}  # the last dimension of each is the indices

    def __bool__(self) -> bool:
        return bool(self._state)

    def clear(self) -> None:
        """Forget everything."""
        self._keys, self._state = [], {}

    def add(self, ledger: Ledger, values: Tensor, seen: Tensor | None = None) -> None:
        """Take up a step: ``values [indices]``, at the indices ``seen [indices]`` (bool; all by default)."""
        self._fit(ledger, values)
        if seen is None:
            seen = torch.ones_like(values, dtype=torch.bool)
        if self.window is None:
            total, weight = self._state["total"], self._state["weight"]
            self._state["total"] = torch.where(seen, self.decay * total + values, total)
            self._state["weight"] = torch.where(seen, self.decay * weight + 1, weight)
        else:
            ring, count = self._state["ring"], self._state["count"]
            place = (count % self.window)[None]
            ring.scatter_(0, place, torch.where(seen, values, ring.gather(0, place)[0])[None])
            count += seen

    def mean(self, ledger: Ledger) -> Tensor:
        """The mean at every index of ``ledger``, 0 where nothing was seen: ``[indices]``.

        Raises:
            PlanError: the model was pruned without the history.
        """
        self._fit(ledger)
        if self.window is None:
            return self._state["total"] / self._state["weight"].clamp_min(torch.finfo(torch.float32).tiny)
        ring, count = self._state["ring"], self._state["count"]
        slot = torch.arange(self.window, device=ring.device)[:, None]
        weight = (self.decay ** ((count - 1 - slot) % self.window)) * (slot < count)
        return (ring * weight).sum(0) / weight.sum(0).clamp_min(torch.finfo(torch.float32).tiny)

    def shrink(self, plan: Plan, kept: Kept) -> None:
        """Keep what is left after a prune of ``plan``'s model (see :meth:`Plan.check_keep`)."""
        if self._state:
            axes = {(t.name, a.dim): kept(a.channels) for t, a in plan.axes()}
            keys, places = [], []
            for (name, dim, count), start in self._starts():
                left = axes.get((name, dim), np.arange(count))
                keys.append((name, dim, len(left)))
                places.append(start + left)
            self._take(keys, np.concatenate(places))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and lists."""
        return {"keys": list(self._keys), **{name: t.clone() for name, t in self._state.items()}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            PlanError: it is of a history with a window where this one has none, or the reverse, or another one.
        """
        found = {name: t.to(device, copy=True) for name, t in state.items() if name != "keys"}
        wanted = {"total", "weight"} if self.window is None else {"ring", "count"}
        if found and (set(found) != wanted or (self.window and len(found["ring"]) != self.window)):
            raise PlanError(f"the saved history was gathered with another window than {self.window}; clear it first")
        self._keys, self._state = [(n, d, c) for n, d, c in state["keys"]], found

    def _starts(self) -> Sequence[tuple[Key, int]]:
        ends = np.cumsum([count for *_, count in self._keys])
        return [(key, int(end) - key[2]) for key, end in zip(self._keys, ends, strict=True)]

    def _fit(self, ledger: Ledger, like: Tensor | None = None) -> None:
        """Lay the state out as ``ledger`` is."""
        keys = [(p.tensor.name, p.axis.dim, p.count) for p in ledger.parts]
        if not self._state:
            dtype = torch.float32 if like is None else like.dtype
            zeros = torch.zeros(ledger.indices, dtype=dtype, device=ledger.device)
            self._keys = keys
            if self.window is None:
                self._state = {"total": zeros, "weight": zeros.clone()}
            else:
                self._state = {"ring": zeros.repeat(self.window, 1), "count": zeros.long()}
        if keys == self._keys:
            return
        have = {(name, dim): (start, count) for (name, dim, count), start in self._starts()}
        places = []
        for name, dim, count in keys:
            start, known = have.get((name, dim), (math.nan, count))
            if known != count:
                raise PlanError(
                    f"{name}, dimension {dim}: what was gathered is of {known} indices, there are {count}: the model "
                    "was pruned without it; call shrink(plan, keep) of the criterion with each prune, or reset()"
                )
            places.append(np.full(count, -1) if math.isnan(start) else np.arange(start, start + count))
        self._take(keys, np.concatenate(places))

    def _take(self, keys: list[Key], places: np.ndarray[Any, Any]) -> None:
        """Keep the indices ``places``, and 0 where a place is -1."""
        for name, tensor in self._state.items():
            index = torch.from_numpy(places.astype(np.int64)).to(tensor.device)
            self._state[name] = tensor[..., index.clamp_min(0)] * (index >= 0)
        self._keys = keys
