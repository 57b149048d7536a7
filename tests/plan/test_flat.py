"""What is found for all channel vectors in one pass, against what is found for one after the other."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from pat_fast.plan import Plan, bind, build_plan
from pat_fast.plan.bind import blocks
from pat_fast.plan.flat import Kept, Vectors, groups_left, shrunk_shape
from pat_fast.plan.types import by_first_use
from pat_fast.surgery import prune
from pat_fast.surgery.layout import Layout
from tests.helpers import Case, canonical, random_keep

NAMES = ("resnet18", "densenet121", "vgg16_bn", "mobilenet_v2", "resnext50", "vit_s16", "unet", "text")


@pytest.fixture(scope="module", params=NAMES)
def planned(request: pytest.FixtureRequest) -> tuple[Case, Plan]:
    case = Case.build(request.param, torch.float32)
    return case, build_plan(case.model, case.inputs)


def test_one_pass_finds_what_is_left_of_every_vector(planned: tuple[Case, Plan]) -> None:
    _, plan = planned
    keep = random_keep(plan, 0)
    one, all_ = Kept(keep), Kept(keep, plan.vectors)
    for channels, count in zip(plan.vectors.arrays, all_.counts, strict=True):
        assert all_(channels).tolist() == one(channels).tolist()
        assert count == len(one(channels))
    sizes, groups = plan.shapes.left(all_)
    for tensor, shape, blocks_ in zip(plan.tensors, plan.shapes.tuples(sizes), groups, strict=True):
        assert shape == shrunk_shape(tensor, tensor.kept(one))
        assert blocks_ == groups_left(tensor, tensor.kept(one))
    assert plan.params(keep) == plan.other_params + sum(
        math.prod(one.of(t)[1]) for t in plan.tensors if t.is_parameter
    )
    assert plan.macs(keep) == round(
        sum(t.scale * math.prod(len(one(a)) for a in t.axes) for t in plan.work) / plan.batch
    )


def test_tables_of_a_smaller_plan_are_those_made_from_its_tensors(planned: tuple[Case, Plan]) -> None:
    _, plan = planned
    keep = random_keep(plan, 1, ratio=0.6)
    smaller = plan.shrink(plan.check_keep(keep))
    handed, shapes = smaller.vectors, smaller.shapes
    assert [t.shape for t in smaller.tensors] == shapes.tuples(shapes.sizes)
    del smaller.__dict__["vectors"], smaller.__dict__["shapes"]  # made anew from the tensors
    afresh = smaller.shapes
    for field in ("sizes", "ndim", "groups", "whole", "tensor", "dim"):
        assert getattr(afresh, field).tolist() == getattr(shapes, field).tolist(), field
    arrays = [smaller.vectors.arrays[i] for i in afresh.vector]
    assert all(a is handed.arrays[i] for a, i in zip(arrays, shapes.vector, strict=True))
    assert afresh.least.tolist() == [smaller.least(t, a) for t, a in smaller.axes()]


def test_groups_of_each_vector(planned: tuple[Case, Plan]) -> None:
    _, plan = planned
    for array in plan.vectors.arrays:
        held, channels, groups, which = plan.holds(array)
        assert held.tolist() == np.flatnonzero(array >= 0).tolist()
        assert channels.tolist() == array[held].tolist()
        expected, inverse = np.unique(plan.group_of[channels], return_inverse=True)
        assert groups == expected.tolist()
        assert np.broadcast_to(which, len(held)).tolist() == inverse.tolist()


def test_units_of_groups(planned: tuple[Case, Plan]) -> None:
    _, plan = planned
    for number, group in enumerate(plan.groups):
        assert plan.group_units[number] == len(np.unique(plan.unit[group.start : group.stop]))
    assert plan.unit_size.tolist() == [int((plan.unit == u).sum()) for u in range(plan.n_units)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "resnext50"])
def test_a_layout_that_follows_is_that_of_the_smaller_model(name: str, layout: torch.memory_format) -> None:
    case = Case.build(name, torch.float32)
    model = case.model.to(memory_format=layout)  # type: ignore[call-overload]
    binding = bind(build_plan(model, case.inputs), model)
    for seed in range(2):
        binding = prune(binding, random_keep(binding.plan, seed))
        followed = binding.derived["layout"]
        afresh = Layout.of(binding.plan, [t.stride() for t in binding.tensors.values()])
        assert followed.strides == afresh.strides
        for field in ("plain", "places", "order"):
            assert getattr(followed, field).tolist() == getattr(afresh, field).tolist(), field
        tiles = afresh.tiles(binding.plan.shapes.sizes, afresh.dense(binding.plan.shapes.sizes))
        for tensor, stride, plain, tile in zip(
            binding.plan.tensors, afresh.strides, afresh.plain, tiles.tolist(), strict=True
        ):
            if plain:
                (block,) = blocks(tensor, stride)
                pairs = [block.row, block.col, block.kernel]
                assert sorted(p for p in zip(tile[:3], tile[3:], strict=True) if p[0] > 1) == sorted(
                    p for p in pairs if p[0] > 1
                )


def test_a_copied_plan_knows_its_own_vectors() -> None:
    plan = build_plan(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(2, 4))
    keep = np.arange(8) != 3
    expected = canonical(plan.shrink(plan.check_keep(keep)))
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin.macs(keep) == plan.macs(keep)
        assert canonical(twin.shrink(twin.check_keep(keep))) == expected


def test_vectors_may_be_empty_or_few() -> None:
    vectors = Vectors([np.zeros(0, np.int32), np.array([0, -1, 1], np.int32), np.zeros(0, np.int32)])
    assert Kept(np.array([False, True]), vectors).counts.tolist() == [0, 2, 0]
    assert vectors.free.tolist() == [False, True, False]
    assert Kept(np.zeros(0, np.bool_), Vectors([])).counts.tolist() == []


@pytest.mark.parametrize("unit", [[], [0], [5, 2, 5, 0], [3, 3, 1, 1000]])
def test_units_are_numbered_as_they_come(unit: list[int]) -> None:
    first = list(dict.fromkeys(unit))
    assert by_first_use(np.array(unit, np.int64)).tolist() == [first.index(u) for u in unit]
