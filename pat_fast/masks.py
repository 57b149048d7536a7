"""Masks: channels that are held at zero, so that the network computes what the pruned one would."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.optim import Optimizer

from .ops import channel_scale_
from .plan.bind import Binding, Own, Tiles, has_floats
from .plan.types import Axis, TensorMap, is_grouped
from .surgery.optimizer import Joint, check_state, joint_states, state_tensors

_ACTIVE: weakref.WeakSet[Mask] = weakref.WeakSet()  # those that hold, or held, channels at zero


def masked_channels(model: nn.Module) -> int:
    """How many channels of ``model``, of parts of it or of what it is a part of, a pruner holds at zero."""
    parts = set(model.modules())
    found = [m for m in _ACTIVE if m.is_active and (m.binding.model in parts or model in m.binding.modules.values())]
    return sum(int((~m.alive).sum()) for m in found)


def weight_norm_dim(owner: nn.Module, local: str) -> int | None:
    """The dimension whose slices a weight norm scales to length one, if ``owner.local`` is its direction ``v``."""
    length: Tensor | None = None
    if local == "original1" and isinstance(owner, nn.ModuleList) and any(isinstance(m, _WeightNorm) for m in owner):
        length = owner.original0  # type: ignore[assignment]
    elif local.endswith("_v"):
        length = owner._parameters.get(local.removesuffix("_v") + "_g")
    if length is None:
        return None
    return next((dim for dim, size in enumerate(length.shape) if size > 1), None)


def _apart(owner: nn.Module, local: str) -> int | None:
    """For a parameter that is cleared axis by axis, the dimension that is not; None for what a kernel scales.

    Of a weight norm's direction that is the one along its lengths. Numbers that no kernel takes (complex ones, whole
    ones) are cleared along all: -1.
    """
    return weight_norm_dim(owner, local) if has_floats(owner, local) else -1


def _is_plain(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    return tensor_map.is_parameter and _apart(owner, local) is None


def clear_(tensor: Tensor, tensor_map: TensorMap, axis: Axis, gone: Tensor) -> None:
    """Zero the indices of ``axis`` that belong to the channels ``gone [N]``; inf and nan are cleared as well."""
    channels = torch.from_numpy(axis.channels).to(tensor.device, torch.int64)
    dead = (channels >= 0) & gone.to(tensor.device)[channels]
    view, dim = tensor, axis.dim
    if is_grouped(tensor_map, axis):  # [groups, rows of a group, columns, ...]
        view, dim = tensor.unflatten(0, (tensor_map.groups, -1)), 2
        shape = [tensor_map.groups, 1, -1]
    else:
        shape = [1] * dim + [-1]
    view.masked_fill_(dead.view(shape + [1] * (view.ndim - dim - 1)), 0)


class Mask:
    """Which channels live, and the upkeep that holds the others at zero.

    Weights, gradients and optimizer state of a masked channel are zero, rows and columns alike; the network
    then computes what the pruned one would, except where a norm takes a statistic over the channels
    (:attr:`Group.statistic`). Batch norms keep running statistics of masked channels; they have no effect.

    Of a weight norm ``g * v / |v|`` a masked output has ``g`` at zero and keeps its ``v``: zero divided by zero is
    no number.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.alive = torch.ones(binding.plan.n_channels, dtype=torch.bool, device=binding.device)
        self.is_active = False  # whether any channel is masked
        self._apart = [
            (m, dim)
            for m in binding.plan.tensors
            if m.is_parameter and (dim := _apart(*binding.owner(m.name))) is not None
        ]

    @torch.no_grad()
    def set(self, alive: Tensor, optimizers: Iterable[Optimizer], copies: Iterable[nn.Module] = ()) -> None:
        """Mask the channels ``~alive [N]``: zero their weights, gradients and optimizer state.

        Args:
            copies: averages of the model's weights. Theirs are zeroed once: an average with zeros stays there.
        Raises:
            SurgeryError: an optimizer keeps state of unknown layout; nothing was changed.
        """
        optimizers = list(optimizers)
        check_state(optimizers)
        named = [(m.name, self.binding.tensors[m.name]) for m in self.binding.plan.tensors if m.is_parameter]
        states = [
            (name, state)
            for name, tensor in named
            if isinstance(tensor, nn.Parameter)
            for state in state_tensors(optimizers, tensor, name)
        ]
        joints = joint_states(optimizers)
        averages = [Mask(Binding(self.binding.plan, copy)) for copy in copies]
        self.alive = self.binding.alive = alive.to(self.binding.device)
        self.is_active = not bool(alive.all())
        _ACTIVE.add(self)
        self.hold_weights()
        self.hold_gradients()
        for name, state in states:
            if not state.factored:  # factored statistics decay by themselves: the gradients are zero
                self._zero(name, state.tensor)
        for joint in joints:
            self._zero_joint({id(tensor): name for name, tensor in named}, joint)
        for average in averages:
            average.alive = self.alive.to(average.binding.device)
            average.hold_weights()

    @torch.no_grad()
    def hold_weights(self, only: Collection[int] | None = None) -> None:
        """Zero the weights of masked channels. Call after every optimizer step.

        Args:
            only: ``id`` of the parameters that the step has changed; all by default. The others may be in a backward.
        """
        for tiles in self._tiles(only):
            channel_scale_(tiles.tensors, tiles.table, self._scale(tiles))
        for own, dim in self._own_apart(only):
            self._clear(own, dim)

    @torch.no_grad()
    def hold_gradients(self, only: Collection[int] | None = None) -> None:
        """Zero the gradients of masked channels. Call before every optimizer step.

        Sparse gradients (of embeddings) stay as they are: the weights are cleared after the step.

        Args:
            only: ``id`` of the parameters that are about to step; all by default.
        """
        with self.binding.gradients():
            for tiles in self._tiles(only):
                grads = [t.grad for t in tiles.tensors]
                if all(g is not None and g.stride() == t.stride() for g, t in zip(grads, tiles.tensors, strict=True)):
                    channel_scale_([g for g in grads if g is not None], tiles.table, self._scale(tiles))
                else:
                    for name, grad in zip(tiles.names, grads, strict=True):
                        if grad is not None and grad.layout == torch.strided:
                            self._zero(name, grad)
            for own, dim in self._own_apart(only):
                if own.tensor.grad is not None:
                    self._clear(own._replace(tensor=own.tensor.grad), dim)

    def _tiles(self, only: Collection[int] | None) -> tuple[Tiles, ...]:
        return self.binding.part("maskable parameters", _is_plain, only)

    def _own_apart(self, only: Collection[int] | None) -> Iterator[tuple[Own, int]]:
        """What is here of the parameters that are cleared axis by axis, and the dimension that is not."""
        for tensor_map, dim in self._apart:
            own = self.binding.own(tensor_map)
            if only is None or id(own.tensor) in only:
                yield own, dim

    def _scale(self, tiles: Tiles) -> Tensor:
        return self.binding.to_slots(tiles, self.alive.float(), fill=1.0)

    def _zero(self, name: str, tensor: Tensor) -> None:
        """Zero the masked channels of one tensor with the shape of parameter ``name``."""
        for tensor_map, dim in self._apart:
            if tensor_map.name == name:
                self._clear(self.binding.own(tensor_map)._replace(tensor=tensor), dim)
                return
        one = self.binding.like(name, tensor)
        channel_scale_(one.tensors, one.table, self._scale(one))

    def _zero_joint(self, names: dict[int, str], joint: Joint) -> None:
        """Zero the masked channels of vectors over many parameters, of which these have ``names``, by their ``id``."""
        ones = torch.ones_like(joint.states[0][1].tensor)
        for parameter, part in joint.views(ones):
            if id(parameter) in names:
                self._zero(names[id(parameter)], part)
        gone = ones == 0
        for _, state in joint.states:
            state.tensor.masked_fill_(gone, 0)

    def _clear(self, own: Own, dim: int) -> None:
        """Zero the masked channels of a tensor on all of its axes but ``dim``."""
        for axis in own.map.axes:
            if axis.dim != dim:
                clear_(own.tensor, own.map, axis, ~self.alive)


@torch.no_grad()
def zero_filters(binding: Binding, gone: Tensor) -> None:
    """Zero what makes the channels ``gone [N]``: filters and biases of their layers, not what reads or scales them.

    Gradients and optimizer state stay, so the filters may grow again.
    """
    for tensor_map, axis in _filters(binding):
        own = binding.own(tensor_map)
        mine = next(a for a in own.map.axes if a.dim == axis.dim)
        clear_(own.tensor.detach(), own.map, mine, gone)


def _filters(binding: Binding) -> Iterator[tuple[TensorMap, Axis]]:
    """The axes along which layers put their channels out; of a weight norm, those of its lengths."""
    makers = {_layer(t.name) for t, axis in binding.plan.axes() if axis.role == "out"}
    for tensor_map, axis in binding.plan.axes():
        made_here = tensor_map.is_parameter and _layer(tensor_map.name) in makers and axis.role != "in"
        if made_here and weight_norm_dim(*binding.owner(tensor_map.name)) != axis.dim:
            yield tensor_map, axis


def _layer(name: str) -> str:
    """The module of parameter ``name``, parametrized or not."""
    return ("." + name).rpartition(".")[0].partition(".parametrizations.")[0]
