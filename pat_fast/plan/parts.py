"""What a plan is made of: tensors and their axes, groups, what is frozen, widths, work. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .flat import ChannelArray, IndexArray, Kept


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of a tensor. ``channels [n]``: the channel of each index, -1 where it must stay.

    For dimension 1 of a grouped convolution's weight ``n`` is ``groups * shape[1]``: the indices of group
    g are ``channels[g * shape[1] : (g + 1) * shape[1]]``.
    """

    dim: int
    channels: ChannelArray
    role: str  # "out": labels what the layer puts out; "in": is summed over; "both": element-wise


class TensorMap(NamedTuple):
    """A parameter or buffer and its one or two prunable axes."""

    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    groups: int
    whole_groups: bool  # a grouped convolution that loses groups as it shrinks (depthwise), not their widths
    axes: tuple[Axis, ...]

    def kept(self, kept: Kept) -> list[IndexArray]:
        """For each axis, the indices into its channels that stay."""
        return [kept(a.channels) for a in self.axes]


@dataclass(frozen=True)
class Group:
    """Channels ``start .. stop`` of the flat space, ranked together because one layer makes them."""

    root: str  # the layer whose output channels these are, in order
    start: int
    stop: int
    layers: tuple[str, ...]  # modules that put out these channels
    members: tuple[tuple[str, int], ...]  # (tensor, dimension) pairs that hold them
    statistic: str | None = None  # a statistic over these channels: masking is then not the same as removing
    multiple: int = 1  # of which the number of channels must stay one: a kernel asks for it
    above: tuple[str, ...] = ()  # weights of projections: the units are their columns, which stay more than their rows

    @property
    def channels(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Frozen:
    """An output axis that stays as it is, and why."""

    layer: str
    channels: int
    reason: str


@dataclass(frozen=True, eq=False)
class Width:
    """A size that a module keeps as an attribute, whether or not it has parameters: ``kept(channels) / per``.

    ``attribute`` may be one of an object that the module keeps (``"config.hidden_size"``); ``index`` is the place
    in a tuple or list, counted from the end, None for a plain integer. ``told``: the forward does not need it, others
    read it; it is left as it is where several widths of one attribute come to differ.
    """

    module: str
    attribute: str
    index: int | None
    channels: ChannelArray
    per: int = 1
    told: bool = False


class WorkTerm(NamedTuple):
    """``scale * prod(kept positions of each axis)`` multiply-accumulates."""

    scale: float
    axes: tuple[ChannelArray, ...]
