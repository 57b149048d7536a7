"""A criterion of the activations that a channel's readers get, gathered by hooks while the model trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..plan.bind import Binding
from ..plan.hooks import Hook
from ..plan.types import Axis, TensorMap
from .base import LAYERS, MemberCriterion, Watching, check_choice
from .history import History
from .ledger import Book
from .normalizers import Normalizer
from .reductions import Reduction

STATISTICS = ("mean", "std", "apoz")


class Activation(MemberCriterion, Watching):
    """Statistics of the activations x of a channel, over examples and positions, where layers read them.

    - ``"mean"``: ``v[m, c] = E|x_c|``;
    - ``"std"``: ``v[m, c] = sqrt(E x_c^2 - (E x_c)^2)``;
    - ``"apoz"``: ``v[m, c] = 1 - APoZ(c)``, the share of activations that are not zero. Hu et al., "Network
      Trimming", 2016, https://arxiv.org/abs/1607.03250. For networks with ReLU.

    A member is the input side of a convolution or linear layer that reads the channel (what activation function
    and norm leave of it); a depthwise convolution reads its own channel. Means over the elements of each training
    step, step t counting ``decay ** (now - t)``. Forwards in eval mode do not count. Channels that no such layer
    reads stay. Costs a read of every layer's inputs per forward.

    Args:
        statistic: see above.
        decay: in ``[0, 1]``; 0: the last step alone; 1: all steps alike.
        window: only so many last steps count; by default all.
        reduction, normalizer: as :class:`MemberCriterion`.
    Raises:
        ConfigError: a value out of range.
        PlanError: (from ``score``) no training forward was seen.
    """

    types = LAYERS

    def __init__(
        self,
        statistic: str = "mean",
        decay: float = 0.9,
        window: int | None = None,
        reduction: Reduction = "mean",
        normalizer: Normalizer = "mean",
    ) -> None:
        check_choice("statistic", statistic, STATISTICS)
        super().__init__(reduction, normalizer)
        self.statistic = statistic
        self._first = History(decay, window)
        self._second = History(decay, window)  # of squares, for "std"
        self.histories = (self._first, self._second) if statistic == "std" else (self._first,)
        self._sums: dict[str, list[Any]] = {}  # of the forwards since the last step, by weight: [sums, elements]
        self._handles: list[Any] = []

    def attach(self, binding: Binding) -> None:
        """Watch the layers that read channels."""
        self.detach()
        for part in self._book(binding).ledger.parts:
            layer, _ = binding.owner(part.tensor.name)
            self._handles.append(layer.register_forward_pre_hook(Hook(self._watcher(part.tensor.name, layer))))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watcher(self, name: str, layer: nn.Module) -> Callable[..., None]:
        mine, me = weakref.ref(layer), weakref.ref(self)

        @torch.no_grad()
        def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            criterion = me()
            if criterion is None or module is not mine() or not module.training or not inputs:
                return
            criterion._gather(name, inputs[0].detach(), -1 if isinstance(module, nn.Linear) else _channels(module))

        return watch

    def _gather(self, name: str, x: Tensor, dim: int) -> None:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rest = [d for d in range(x.ndim) if d != dim % x.ndim]
        shown = {"mean": x.abs, "std": lambda: x, "apoz": lambda: (x != 0).to(x.dtype)}[self.statistic]()
        sums = [shown.sum(rest)] + ([x.square().sum(rest)] if self.statistic == "std" else [])
        count = x.numel() // max(x.shape[dim], 1)
        known = self._sums.get(name)
        if known is not None and known[0][0].shape == sums[0].shape:
            sums, count = [a + b for a, b in zip(known[0], sums, strict=True)], count + known[1]
        self._sums[name] = [sums, count]

    @torch.no_grad()
    def observe(self, binding: Binding, scale: float = 1.0, only: Collection[int] | None = None) -> None:
        """Close a step: its forwards are one step of the mean; see :class:`Watching`."""
        if self._sums:
            self._close(self._book(binding), binding)

    def shrink(self, plan: Any, keep: Any) -> None:
        """Follow a prune; see :class:`Watching`."""
        self._sums.clear()
        super().shrink(plan, keep)

    def reset(self) -> None:
        """Forget what was gathered."""
        self._sums.clear()
        super().reset()

    def _close(self, tally: Book, binding: Binding) -> None:
        ledger = tally.ledger
        wide = any(sums[0].dtype == torch.float64 for sums, _ in self._sums.values())
        for place, history in enumerate(self.histories):
            dtype = torch.float64 if wide else torch.float32
            values = torch.zeros(ledger.indices, dtype=dtype, device=ledger.device)
            seen = torch.zeros(ledger.indices, dtype=torch.bool, device=ledger.device)
            for part in ledger.parts:
                sums, count = self._sums.get(part.tensor.name, (None, 0))
                if sums is not None and count:
                    mean = _by_index(sums[place] / count, part.count)
                    values[part.start : part.start + part.count] = mean.to(values)
                    seen[part.start : part.start + part.count] = True
            history.add(ledger, values, seen)
        self._sums.clear()

    def _counts(self, binding: Binding, tensor_map: TensorMap) -> bool:
        return len(tensor_map.shape) > 1 and super()._counts(binding, tensor_map)

    def _counts_axis(self, tensor_map: TensorMap, axis: Axis) -> bool:
        return axis.role == "in" or tensor_map.whole_groups

    def _values(self, binding: Binding, tally: Book) -> Tensor:
        if self._sums:
            self._close(tally, binding)
        if not self._first:
            raise PlanError(
                f"{type(self).__name__} has seen no training forward; train for a step before pruner.step(), or, by "
                "hand, call attach(binding) before the forward"
            )
        found = self._first.mean(tally.ledger)
        if self.statistic == "std":
            found = (self._second.mean(tally.ledger) - found.square()).clamp_min(0).sqrt()
        return found / _repeats(tally)


def _channels(module: nn.Module) -> int:
    """Where the channels of a convolution's inputs are, counted from the end: its inputs may come without a batch."""
    assert isinstance(module, nn.modules.conv._ConvNd)
    return -1 - len(module.kernel_size)


def _by_index(values: Tensor, count: int) -> Tensor:
    """A depthwise convolution's inputs at its outputs: ``[in]`` to ``[out]``."""
    return values if len(values) == count else values.repeat_interleave(count // len(values))


def _repeats(tally: Book) -> Tensor:
    """How many indices a member has for the channel of an index (positions behind a flatten): ``[indices]``."""
    ledger = tally.ledger
    cell, *_ = ledger.cells
    size = torch.bincount(cell)[cell]
    found = torch.ones(ledger.indices, device=ledger.device)
    found[ledger.index] = size.to(found)
    return found
