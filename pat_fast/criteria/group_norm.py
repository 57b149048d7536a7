"""Group magnitude, the default criterion."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

from ..errors import check
from ..ops import channel_reduce
from ..ops.grouped import Grouping, channel_totals
from ..plan.bind import Binding, Tiles, has_floats, magnitudes
from ..plan.recurrent import RECURRENT, weight_or_bias
from ..plan.types import TensorMap

SCORED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, *RECURRENT, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def is_scored(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    """Weights of convolutions, linear and recurrent layers, batch and layer norms count; biases do not.

    So do parameters that modules of other kinds multiply with, and the lengths of a weight norm.
    """
    if not has_floats(owner, local, or_complex=True):
        return False
    if local == "original0":
        return isinstance(owner, nn.ModuleList) and any(isinstance(m, _WeightNorm) for m in owner)
    return (isinstance(owner, SCORED) and weight_or_bias(owner, local) == "weight") or is_bare(tensor_map, owner)


def is_bare(tensor_map: TensorMap, owner: nn.Module) -> bool:
    """Whether it is a weight of no layer of PyTorch's (GPT-2's ``Conv1D``, stacked experts): it is multiplied with."""
    # Of a layer's subclass (fully_shard makes one) the weight is the layer's; a container is no layer.
    containers = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
    own = not any(k.__module__.startswith("torch.nn") and k not in containers for k in type(owner).__mro__)
    return own and tensor_map.is_parameter and len(tensor_map.shape) > 1 and any(
        axis.role in ("out", "in") for axis in tensor_map.axes
    )


def _unscored(binding: Binding) -> Tensor | None:
    """Channels of groups in which nothing counts: bool ``[N]``; None if there are none."""
    if "unscored" not in binding.derived:
        names = {t.name for t in binding.plan.tensors if is_scored(t, *binding.owner(t.name))}
        of_groups = [names.isdisjoint(name for name, _ in g.members) for g in binding.plan.groups]
        found = binding.spread(torch.tensor(of_groups, device=binding.device)) if any(of_groups) else None
        binding.derived["unscored"] = found
    mask: Tensor | None = binding.derived["unscored"]
    return mask


class GroupNorm:
    """Group magnitude: the mean over a group's members of ``sum |w|^p`` over what belongs to the channel.

    ``score[c] = (1 / members) * sum_members sum |w_c|^p``, divided by its mean over the group, so that
    groups can be compared. A member is one side (outputs or inputs) of one layer; see Fang et al.,
    "DepGraph: Towards Any Structural Pruning", CVPR 2023, https://arxiv.org/abs/2301.12900. Equal to
    ``torch_pruning.importance.GroupMagnitudeImportance(p)`` with its defaults.

    Args:
        p: 1 or 2 (any positive exponent works).
    Raises:
        ConfigError: ``p`` is not positive.
    """

    def __init__(self, p: float = 2.0) -> None:
        check("p", p, lambda v: 0 < v < math.inf, "a positive number (1 or 2, say)")
        self.p = float(p)

    def score(self, binding: Binding) -> Tensor:
        """Scores ``[N]``: float32, or float64 where the model is; inf where nothing of a group can be scored."""
        found: Tensor | None = binding.at_once("scored", is_scored, self._score_at_once)
        found = self._divided(binding) if found is None else found
        unscored = _unscored(binding)
        return found if unscored is None else found.masked_fill(unscored, torch.inf)

    @torch.no_grad()
    def _divided(self, binding: Binding) -> Tensor:
        # The number of members cancels out. A group of zeros: all equally unimportant.
        total = self.total(binding)
        mean = binding.over_groups(total.double(), "mean").to(total.dtype)
        return total.div_(binding.spread(mean.clamp_min_(torch.finfo(total.dtype).tiny)))

    def magnitude(self, binding: Binding) -> Tensor:
        """The same before it is divided by the group's mean: ``[N]``."""
        return self.total(binding) / binding.member_count("scored")

    def total(self, binding: Binding) -> Tensor:
        """The sum over a group's members: ``[N]``."""
        total: Tensor | None = binding.at_once("scored", is_scored, self._total_at_once)
        if total is not None:
            return total
        for tiles in binding.tiles("scored", is_scored):
            sums = channel_reduce(magnitudes(tiles.tensors), tiles.table, f="pow", p=self.p)
            found = binding.to_channels(tiles, sums).to(binding.device)
            total = found if total is None else total + found
        if total is None:
            return torch.zeros(binding.plan.n_channels, device=binding.device)
        return total

    def _score_at_once(self, tiles: Tiles, grouping: Grouping, _: bool) -> Tensor | None:
        return channel_totals(tiles.tensors, grouping, self.p, True)

    def _total_at_once(self, tiles: Tiles, grouping: Grouping, _: bool) -> Tensor | None:
        return channel_totals(tiles.tensors, grouping, self.p, False)
