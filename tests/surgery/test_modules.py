"""The sizes that layers keep as attributes, against layers that PyTorch makes with those sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pat_fast.plan.types import Width
from pat_fast.surgery.modules import (
    SIZES,
    apply_changes,
    attributes_from_shape,
    attributes_from_widths,
    sizes,
)

# Layers of one kind at two sizes: what the first must say of itself to be the second.
PAIRS: dict[str, tuple[Callable[..., nn.Module], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = {
    "conv1d": (nn.Conv1d, (8, 12, 3), (5, 7, 3), {}),
    "conv2d": (nn.Conv2d, (8, 12, 3), (5, 7, 3), {}),
    "conv3d": (nn.Conv3d, (8, 12, 3), (5, 7, 3), {"bias": False}),
    "conv_transpose1d": (nn.ConvTranspose1d, (8, 12, 3), (5, 7, 3), {}),
    "conv_transpose2d": (nn.ConvTranspose2d, (8, 12, (3, 1)), (5, 7, (3, 1)), {}),
    "conv_transpose3d": (nn.ConvTranspose3d, (8, 12, 3), (5, 7, 3), {}),
    "grouped": (nn.Conv2d, (8, 12, 3), (4, 6, 3), {"groups": 2}),
    "grouped_transpose": (nn.ConvTranspose2d, (8, 12, 3), (4, 6, 3), {"groups": 2}),
    "linear": (nn.Linear, (8, 12), (5, 7), {}),
    "embedding": (nn.Embedding, (8, 12), (8, 7), {}),
    "embedding_bag": (nn.EmbeddingBag, (8, 12), (8, 7), {}),
    "bilinear": (nn.Bilinear, (8, 12, 6), (5, 7, 4), {}),
    "prelu": (nn.PReLU, (8,), (5,), {}),
    "batch_norm": (nn.BatchNorm2d, (8,), (5,), {}),
    "sync_batch_norm": (nn.SyncBatchNorm, (8,), (5,), {}),
    "instance_norm": (nn.InstanceNorm1d, (8,), (5,), {"affine": True, "track_running_stats": True}),
    "group_norm": (lambda n: nn.GroupNorm(2, n), (8,), (4,), {}),
    "layer_norm": (nn.LayerNorm, (8,), (5,), {}),
    "rms_norm": (nn.RMSNorm, (8,), (5,), {}),
}  # fmt: skip


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    make, before, after, options = PAIRS[name]
    return make(*before, **options), make(*after, **options)


@pytest.mark.parametrize("name", list(PAIRS))
def test_shapes_that_follow_from_the_attributes_are_the_layers_own(name: str) -> None:
    for module in pair(name):
        rule = next(rule for kind, rule in SIZES.items() if isinstance(module, kind))
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        assert tensors
        for local, tensor in tensors.items():
            expected = rule.shape(module, sizes(module), local)
            assert expected == (None if local == "num_batches_tracked" else tuple(tensor.shape)), local


@pytest.mark.parametrize("name", [n for n in PAIRS if "norm" not in n])
def test_attributes_that_follow_from_the_weight_are_the_layers_own(name: str) -> None:
    module, smaller = pair(name)
    weight = smaller.weight
    changes = attributes_from_shape(module, "weight", tuple(weight.shape), getattr(smaller, "groups", 1))
    apply_changes(changes, [])
    assert sizes(module) == sizes(smaller)
    assert not attributes_from_shape(smaller, "weight", tuple(weight.shape), getattr(smaller, "groups", 1))
    assert not attributes_from_shape(module, "bias", (1,), 1)


def test_a_depthwise_convolution_loses_groups() -> None:
    module = nn.Conv2d(8, 16, 3, groups=8)
    apply_changes(attributes_from_shape(module, "weight", (10, 1, 3, 3), groups=5), [])
    assert (module.in_channels, module.out_channels, module.groups) == (5, 10, 5)


@pytest.mark.parametrize("name", [n for n in PAIRS if "norm" in n])
def test_norms_follow_their_width(name: str) -> None:
    module, smaller = pair(name)
    (attribute,) = sizes(module)
    index = -1 if attribute == "normalized_shape" else None
    left = smaller.weight.shape[0]
    width = Width("", attribute, index, np.zeros(8, np.int32))
    apply_changes(attributes_from_widths([(module, width, left)]), [])
    assert sizes(module) == sizes(smaller)
    assert not attributes_from_shape(module, "weight", (1,), 1)


def test_two_dimensions_of_several_of_a_layer_norm() -> None:
    module = nn.LayerNorm((8, 4, 3))
    eight, three = (Width("", "normalized_shape", i, np.zeros(n, np.int32)) for i, n in ((-3, 8), (-1, 3)))
    apply_changes(attributes_from_widths([(module, eight, 5), (module, three, 2)]), [])
    assert module.normalized_shape == (5, 4, 2)


def test_subclasses_follow_the_rule_of_their_base_and_others_have_none() -> None:
    class Mine(nn.Linear):
        pass

    assert sizes(Mine(3, 4)) == {"in_features": 3, "out_features": 4}
    assert sizes(nn.LazyLinear(4)) == {"in_features": 0, "out_features": 4}
    assert sizes(nn.ReLU()) == sizes(nn.Module()) == {}
    assert attributes_from_shape(nn.ReLU(), "weight", (3,), 1) == []


def test_changes_can_be_undone() -> None:
    module, undo = nn.Linear(3, 4), []
    apply_changes([(module, "in_features", 2), (module, "in_features", 1), (module, "out_features", 1)], undo)
    assert sizes(module) == {"in_features": 1, "out_features": 1}
    apply_changes(list(reversed(undo)), [])
    assert sizes(module) == {"in_features": 3, "out_features": 4}


def test_what_a_layer_says_is_what_it_computes_with() -> None:
    """A layer whose tensors and attributes were both set runs, and prints itself rightly."""
    module = nn.Conv2d(8, 12, 3, groups=2)
    module.weight.data = torch.randn(6, 2, 3, 3)
    module.bias.data = torch.randn(6)
    apply_changes(attributes_from_shape(module, "weight", (6, 2, 3, 3), groups=2), [])
    assert module(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)
    assert repr(module) == "Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), groups=2)"
