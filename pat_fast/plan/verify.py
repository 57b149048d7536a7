"""The permutation test: a plan whose maps are right may shuffle its channels without moving the output.

If the maps are right, permuting the channels of a group consistently in all its tensors leaves the network's
function as it was, layer norms, softmax and all. So every group gets a random permutation at once, while the
parameters hold random values (fresh norm weights are all ones and would hide a missing member) and ops compute in
float64; one forward is compared with another. If the output moved, bisection finds the groups whose maps lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .double import InDouble
from .outputs import fixed_outputs
from .running import call, undisturbed
from .types import Axis, IntArray, Plan, TensorMap, is_grouped

Precision = Callable[[], AbstractContextManager[Any]]
TOLERANCE = 1e-6  # relative, in float64; a right plan moves the output by 1e-14, a wrong one by 1e-2
FINE = 1e-5  # of single precision: what moves no more than rounding does need not be looked at in float64
COARSE = 1e-3  # where float64 is not to be had
# The reason of channels whose removal is not what zeros are, though no statistic explains it.
ANOTHER = "what the model computes without these channels is not what it computes with them at zero"


@dataclass(frozen=True)
class Verification:
    """What the permutation test found.

    ``wrong`` are the indices of groups whose maps do not hold; ``error`` is how far the output moved with all
    groups permuted, relative to its largest element; ``forwards`` is what it cost; ``shapes`` are those of the
    model's outputs.
    """

    wrong: tuple[int, ...]
    error: float
    forwards: int
    shapes: list[torch.Size]


def verify(
    plan: Plan, model: nn.Module, example_inputs: Any, seed: int = 0, training: bool = False
) -> Verification:
    """Test all groups of ``plan`` at once, and bisect if that fails; ``training``: in the model's branches of it.

    The model's own tensors are permuted in place and put back, to the bit, so no copy of a large model is made;
    autograd does not see it. It computes in single precision, and if that is not beyond doubt in float64 (or in its
    own precision, with a wider tolerance, where its code insists on that).
    """
    with _Test(plan, model, seed, training).at_work() as test:
        if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()):
            found = test.run(example_inputs, FINE, nullcontext, search=False)
            if found.error <= FINE:
                return found
        try:
            return test.run(example_inputs, TOLERANCE, InDouble)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return test.run(example_inputs, COARSE, nullcontext)


class _Test:
    """A model whose tensors change places, with random values wherever what they hold can be kept."""

    def __init__(self, plan: Plan, model: nn.Module, seed: int, training: bool) -> None:
        self.plan, self.model, self._training = plan, model, training
        self._generator = np.random.default_rng(seed)
        named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        named.update(model.named_buffers(remove_duplicate=False))
        self._tensors = [named[t.name].data for t in plan.tensors]
        self._orders: list[list[IntArray] | None] = [None] * len(plan.tensors)
        self._kept: dict[int, Tensor] = {}  # by place in the plan: values to permute anew each time
        # Two: by bad luck one may commute with the very mistake (a cycle of few channels with a shift).
        self._permutations = [draw(plan, self._generator) for _ in range(2)]
        self._forwards = 0
        self._precision: Precision = nullcontext

    @contextmanager
    def at_work(self) -> Iterator[_Test]:
        """Everything is put back afterwards."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            _randomize(self.model, self.plan, self._generator, before)
            changed = {tensor.data_ptr() for tensor, _ in before}
            for i, tensor in enumerate(self._tensors):
                if tensor.data_ptr() in changed:
                    self._kept[i] = tensor.clone()
            yield self
        finally:
            self._place(None)
            for tensor, values in before:
                tensor.copy_(values)

    def _place(self, permutation: IntArray | None) -> None:
        """Move every tensor's content to where ``permutation`` (None: as it was) takes it."""
        cache: dict[int, IntArray] = {}
        for i, (tensor, tensor_map) in enumerate(zip(self._tensors, self.plan.tensors, strict=True)):
            orders = None
            if permutation is not None:
                orders = [channel_order(axis, permutation, cache) for axis in tensor_map.axes]
                if i not in self._kept and not all(_is_permutation(o, tensor_map, a) for o, a in
                                                   zip(orders, tensor_map.axes, strict=True)):
                    self._place_one(i, None)
                    self._kept[i] = tensor.clone()  # a lie: it could not be taken back
            self._place_one(i, orders)

    def _place_one(self, i: int, orders: list[IntArray] | None) -> None:
        tensor, tensor_map, now = self._tensors[i], self.plan.tensors[i], self._orders[i]
        if i in self._kept:
            moved = self._kept[i] if orders is None else permuted(self._kept[i], tensor_map, orders)
        elif now is None and orders is None:
            return
        else:
            start = [np.argsort(o) for o in now] if now is not None else [np.arange(len(o)) for o in orders or ()]
            steps = start if orders is None else [s[o] for s, o in zip(start, orders, strict=True)]
            moved = permuted(tensor, tensor_map, steps)
        tensor.copy_(moved)
        self._orders[i] = orders

    def outputs(self, inputs: Any, groups: Sequence[int], permutation: IntArray) -> list[Tensor]:
        """What the model puts out when the channels of ``groups`` have changed places."""
        self._forwards += 1
        chosen = np.isin(self.plan.group_of, groups)
        self._place(np.where(chosen, permutation, np.arange(self.plan.n_channels)) if chosen.any() else None)
        with undisturbed(self.model, self._training), torch.no_grad(), self._precision():
            return [t.detach().clone() for t in fixed_outputs(call(self.model, inputs))]

    def run(self, inputs: Any, tolerance: float, precision: Precision, search: bool = True) -> Verification:
        """Compare outputs of forwards in ``precision``; ``search`` for the groups at fault."""
        self._forwards, self._precision = 0, precision
        still = self.outputs(inputs, [], self._permutations[0])

        def error(groups: Sequence[int]) -> float:
            return max(distance(still, self.outputs(inputs, groups, p)) for p in self._permutations)

        everything = list(range(len(self.plan.groups)))
        worst = error(everything) if everything else 0.0
        wrong = bisect(everything, lambda groups: error(groups) > tolerance) if search and worst > tolerance else []
        return Verification(tuple(wrong), worst, self._forwards, [t.shape for t in still])


def bisect(items: list[int], fails: Callable[[list[int]], bool]) -> list[int]:
    """The members of ``items`` that fail by themselves, given that ``items`` as a whole does.

    A set that fails although neither half does is returned whole: its members fail only together.
    """
    if len(items) == 1:
        return items
    half = len(items) // 2
    parts = [part for part in (items[:half], items[half:]) if fails(part)]
    return sorted(i for part in parts for i in bisect(part, fails)) if parts else items


def draw(plan: Plan, generator: np.random.Generator) -> IntArray:
    """A random permutation of the channels, within what each group allows: ``[N]``.

    Units change places as a whole, with units of their kind: so blocks of grouped convolutions are respected.
    """
    permutation = np.arange(plan.n_channels)
    for _, units in plan.kinds:
        sources = np.array(units)
        permutation[sources] = sources[_derangement(len(units), generator)]
    return permutation


def _derangement(n: int, generator: np.random.Generator) -> IntArray:
    """A random permutation in which (for n > 1) everything moves: one cycle in random order."""
    order = generator.permutation(n)
    moved = np.empty(n, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def permuted(tensor: Tensor, tensor_map: TensorMap, orders: Sequence[IntArray]) -> Tensor:
    """``tensor`` with, for each axis, the content of index ``order[i]`` at index i."""
    for axis, order in zip(tensor_map.axes, orders, strict=True):
        if is_grouped(tensor_map, axis):
            width, rows = tensor_map.shape[1], tensor_map.shape[0] // tensor_map.groups
            parts = []
            for g, part in enumerate(tensor.split(rows, 0)):
                local = torch.from_numpy((order[g * width : (g + 1) * width] - g * width) % width)
                parts.append(part.index_select(1, local.to(tensor.device)))
            tensor = torch.cat(parts, 0)
        else:
            tensor = tensor.index_select(axis.dim, torch.from_numpy(order).to(tensor.device))
    return tensor


def channel_order(axis: Axis, permutation: IntArray, cache: dict[int, IntArray]) -> IntArray:
    """For each index of an axis, the index whose content it gets: the r-th place of a channel gets the r-th
    place of the channel it takes over. Axes share their vectors of channels, and so ``cache``."""
    found = cache.get(id(axis.channels))
    if found is None and len(axis.channels) and axis.channels[0] >= 0 and (np.diff(axis.channels) > 0).all():
        # What is said below, where every index has a channel of its own and these ascend.
        target = np.searchsorted(axis.channels, permutation[axis.channels])
        cache[id(axis.channels)] = found = np.minimum(target, len(target) - 1)
    if found is None:
        places = np.argsort(axis.channels, kind="stable")
        ranked = axis.channels[places]
        held = np.bincount(ranked + 1, minlength=len(permutation) + 1)  # the first counts what must stay
        first = np.cumsum(held)[:-1]
        found = np.arange(len(axis.channels))
        live = ranked >= 0
        rank = np.arange(len(ranked)) - first[np.where(live, ranked, 0)]
        target = first[permutation[np.where(live, ranked, 0)]] + rank
        found[places[live]] = places[np.minimum(target[live], len(places) - 1)]
        cache[id(axis.channels)] = found
    return found


def _is_permutation(order: IntArray, tensor_map: TensorMap, axis: Axis) -> bool:
    """Whether a move can be taken back; a plan that lies may overwrite, or leave the block of a group."""
    every = np.arange(len(order))
    if not np.array_equal(np.sort(order), every):
        return False
    width = tensor_map.shape[1] if is_grouped(tensor_map, axis) else len(order)
    return np.array_equal(order // width, every // width)


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """Largest difference of two sets of outputs, relative to the largest element; inf if shapes differ."""
    if [t.shape for t in one] != [t.shape for t in two]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if not a.numel() or not a.is_floating_point():
            continue
        scale = float(a.abs().max())
        moved = float((a - b).abs().max())
        if not np.isfinite(moved) or not np.isfinite(scale):
            return float("inf")
        worst = max(worst, moved / scale if scale > 0 else moved)
    return worst


def _randomize(
    model: nn.Module, plan: Plan, generator: np.random.Generator, before: list[tuple[Tensor, Tensor]]
) -> None:
    """Random values where the model's own are likely alike: matrices by fan-in, vectors around 0 or 1.

    Vectors, and of the rest only those whose elements are all the same, which could hide a mistake; what they held
    is noted in ``before``.
    """
    noise = torch.Generator().manual_seed(int(generator.integers(2**31)))
    mapped = {t.name for t in plan.tensors}
    tensors: list[tuple[str, Tensor]] = [(n, p.data) for n, p in model.named_parameters()]
    tensors += [(n, b.data) for n, b in model.named_buffers() if n in mapped]
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or (tensor.ndim > 1 and tensor.amin() != tensor.amax()):
            continue
        before.append((tensor, tensor.clone()))
        random = torch.randn(tensor.shape, generator=noise, device="cpu")
        if name.endswith("running_var") or (tensor.ndim == 1 and "weight" in name.rpartition(".")[2]):
            random = 1.0 + 0.5 * torch.tanh(random)
        elif tensor.ndim > 1:
            random = random / max(tensor[0].numel(), 1) ** 0.5
        else:
            random = 0.5 + 0.25 * torch.tanh(random)  # biases that keep a ReLU from hiding its channels
        tensor.copy_(random)
