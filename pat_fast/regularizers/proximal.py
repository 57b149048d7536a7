"""Group lasso by its proximal operator: channels that become exactly zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..criteria.ledger import Book, book
from ..ops import channel_reduce, channel_scale_
from ..plan.bind import Binding
from ..plan.types import Axis, TensorMap
from .penalty import Penalty
from .push import by_slot


class ProximalGroupLasso(Penalty):
    """Group lasso over what makes a channel, solved by proximal steps after the optimizer's.

    The penalty is ``strength * sum_c sqrt(d_c) * |W_c|``, with ``W_c`` all of the channel's weights on the side that
    puts it out (rows of convolutions and linear layers, scales and biases of norms, biases), ``d_c`` of them: Yuan &
    Lin, "Model selection and estimation in regression with grouped variables", 2006, equation 2.1. These blocks share
    no weight, so that its proximal operator is ``W_c *= max(0, 1 - lr * strength * sqrt(d_c) / |W_c|)``: Parikh & Boyd,
    "Proximal Algorithms", 2014, section 6.5.4. A block whose norm falls under the threshold is zero to the bit, and
    where what follows maps zero to zero, and no statistic is taken over the channels, the network is the same without
    it. The metric is the Euclidean one for every optimizer.

    Args:
        strength: at least 0.
        warmup: see :class:`Penalty`.
    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(self, strength: float = 1e-4, warmup: int = 0) -> None:
        super().__init__(strength, warmup)

    def _add(self, binding: Binding, factor: float, where: Tensor | None, only: Collection[int] | None) -> None:
        """Nothing goes through the gradients."""

    @torch.no_grad()
    def after_step(self, binding: Binding, lr: Mapping[int, float], where: Tensor | None = None) -> None:
        """Take the proximal step. Called after each step of an optimizer.

        Args:
            lr: the learning rate of each parameter that was stepped, by its ``id``; the others count in the norms, and
                stay. Where those of a channel differ, their mean counts.
            where: bool ``[N]``, the channels to shrink; all by default.
        """
        tally = _blocks(binding)
        threshold = self._sqrt_size(binding, tally) * self._rate(binding, tally, lr) * (self.strength * self.factor)
        norms = self.norms(binding).to(threshold)
        scale = (1 - threshold / norms).clamp_min(0.0).where(norms > 0, torch.ones_like(norms))
        if where is not None:
            scale = scale.where(where, torch.ones_like(scale))
        for tiles, of_block in zip(tally.tiles, tally.named, strict=True):
            stepped = by_slot(binding, tiles, [float(id(t) in lr) for t in tiles.tensors]) > 0
            slots = binding.to_slots(tiles, scale, fill=1.0)
            channel_scale_(tiles.tensors, tiles.table, slots.where(stepped & of_block, torch.ones_like(slots)))

    @torch.no_grad()
    def norms(self, binding: Binding) -> Tensor:
        """``|W_c|``: ``[N]``."""
        tally = _blocks(binding)
        sums = tally.collect([channel_reduce(t.tensors, t.table, f="pow", p=2.0) for t in tally.tiles])
        return tally.ledger.by_channel(sums).sqrt()

    def _sqrt_size(self, binding: Binding, tally: Book) -> Tensor:
        """``sqrt(d_c)``: ``[N]``."""
        known: tuple[Book, Tensor] | None = binding.derived.get("block sizes")
        if known is None or known[0] is not tally:
            sizes = _spread(tally, [binding.tensors[p.tensor.name].numel() / p.count for p in tally.ledger.parts])
            known = binding.derived["block sizes"] = (tally, sizes.sqrt())
        return known[1]

    def _rate(self, binding: Binding, tally: Book, lr: Mapping[int, float]) -> Tensor | float:
        """The learning rate of each channel: ``[N]``, or one for all."""
        rates = [lr.get(id(binding.tensors[p.tensor.name])) for p in tally.ledger.parts]
        if len(set(rates)) == 1:
            return rates[0] or 0.0
        total, count = (_spread(tally, v) for v in ([r or 0.0 for r in rates], [float(r is not None) for r in rates]))
        return total / count.clamp_min(1.0)


def _spread(tally: Book, values: Sequence[float]) -> Tensor:
    """Sums over members of ``values``, one for each part of the ledger: ``[N]``."""
    counts = torch.tensor([p.count for p in tally.ledger.parts], dtype=torch.int64, device="cpu")
    each = torch.tensor(values, dtype=torch.float32, device="cpu").repeat_interleave(counts)
    return tally.ledger.by_channel(each.to(tally.ledger.device, non_blocking=True))


def _blocks(binding: Binding) -> Book:
    """The tensors that make channels, by the side that puts them out; one with two such sides belongs to no block."""
    frozen = sorted(name for name, tensor in binding.tensors.items() if not tensor.requires_grad)

    def wanted(tensor_map: TensorMap) -> bool:
        sides = sum(axis.role != "in" for axis in tensor_map.axes)
        return tensor_map.is_parameter and sides == 1 and tensor_map.name not in frozen

    return book(binding, f"blocks without {frozen}", wanted, _is_output, pooled=False)


def _is_output(tensor_map: TensorMap, axis: Axis) -> bool:
    return axis.role != "in"
