"""Tile tables of a bound plan name every element once, with the channels that the plan gives it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pat_fast import PlanError
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.plan.bind import Tiles, blocks, collapse
from pat_fast.plan.types import TensorMap, is_grouped
from tests.helpers import Case, Small, small_inputs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


def every(*_: object) -> bool:
    return True


def parameters(tensor_map: TensorMap, owner: nn.Module, local: str) -> bool:
    return tensor_map.is_parameter


def small_binding() -> tuple[Small, Binding]:
    model = Small()
    return model, bind(build_plan(model, small_inputs()), model)


# Tiles


def channels_by_hand(tensor_map: TensorMap) -> list[Tensor]:
    """For each axis: the channel of every element, as a tensor of the parameter's shape."""
    found = []
    for axis in tensor_map.axes:
        channels = torch.from_numpy(axis.channels.astype(np.int64))
        shape = [1] * len(tensor_map.shape)
        if is_grouped(tensor_map, axis):  # [groups * width] -> [rows, width], a block of rows per group
            rows = tensor_map.shape[0] // tensor_map.groups
            by_row = channels.reshape(tensor_map.groups, -1).repeat_interleave(rows, 0)
            shape[0], shape[1] = by_row.shape
            channels = by_row
        else:
            shape[axis.dim] = len(channels)
        found.append(channels.reshape(shape).expand(tensor_map.shape))
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_hold_every_element_once_and_its_channels(case: Case, layout: torch.memory_format) -> None:
    plan = build_plan(case.model, case.inputs)
    for tensor_map in plan.tensors:
        number = torch.arange(int(np.prod(tensor_map.shape))).reshape(tensor_map.shape)
        if number.ndim == 4:
            number = number.contiguous(memory_format=layout)
        seen = torch.zeros(number.numel(), dtype=torch.int64)
        sides = [torch.full_like(seen, -1) for _ in range(2)]
        for block in blocks(tensor_map, number.stride()):
            (r, sr), (c, sc), (k, sk) = block.row, block.col, block.kernel
            ids = number.as_strided((r, c, k), (sr, sc, sk), block.offset)
            seen.index_add_(0, ids.reshape(-1), torch.ones(ids.numel(), dtype=torch.int64))
            for side, channels, shape in (
                (sides[0], block.row_channels, (r, 1, 1)),
                (sides[1], block.col_channels, (1, c, 1)),
            ):
                if channels is not None:
                    named = torch.from_numpy(channels.astype(np.int64)).reshape(shape)
                    side[ids.reshape(-1)] = named.expand(r, c, k).reshape(-1)
        assert (seen == 1).all(), tensor_map.name
        got = torch.stack(sides).sort(0).values
        by_hand = [c.reshape(-1) for c in channels_by_hand(tensor_map)]
        by_hand += [torch.full_like(by_hand[0], -1)] * (2 - len(by_hand))
        assert torch.equal(got, torch.stack(by_hand).sort(0).values), tensor_map.name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_are_runs_of_memory_where_only_inputs_can_be_pruned(layout: torch.memory_format) -> None:
    """A classifier's: a tile whose rows were its neighbouring columns would be read across."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3)).to(memory_format=layout)  # type: ignore[call-overload]
    plan = build_plan(model, (torch.randn(1, 3, 8, 8),))
    weight = plan.tensor("1.weight")
    assert [a.dim for a in weight.axes] == [1]
    (block,) = blocks(weight, model[1].weight.stride())
    assert block.row_channels is None
    assert block.col_channels is weight.axes[0].channels
    assert block.row[1] > max(block.col[1], block.kernel[1])


def test_tables_sum_what_a_loop_sums(case: Case) -> None:
    """The slots of all tables lead back to channels: the number of elements per channel and axis."""
    plan = build_plan(case.model, case.inputs)
    binding = bind(plan, case.model)
    count = torch.zeros(plan.n_channels)
    for tiles in binding.tiles("all", every):
        slots = torch.zeros(tiles.table.slots)
        for _, _, r, c, k, _, _, _, row, col in tiles.table.table.tolist():
            if row >= 0:
                slots[row : row + r] = c * k
            if col >= 0:
                slots[col : col + c] = r * k
        count += binding.to_channels(tiles, slots)
    expected = torch.zeros(plan.n_channels)
    for tensor_map in plan.tensors:
        for channels in channels_by_hand(tensor_map):
            flat = channels.reshape(-1)
            expected += torch.bincount(flat[flat >= 0], minlength=plan.n_channels)
    assert torch.equal(count, expected)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.randoms(use_true_random=False), st.booleans())
def test_collapsed_dimensions_visit_the_same_memory(sizes: list[int], chance, gap: bool) -> None:
    """In any order of dimensions, with or without gaps between them."""
    order = list(range(len(sizes)))
    chance.shuffle(order)
    strides, step = [0] * len(sizes), 1
    for dim in order:
        strides[dim] = step
        step = step * sizes[dim] + (chance.randrange(3) if gap else 0)
    merged = collapse(list(zip(sizes, strides, strict=True)))

    def visited(extents: list[tuple[int, int]]) -> list[int]:
        places = np.zeros(1, dtype=np.int64)
        for size, stride in extents:
            places = (places[:, None] + np.arange(size) * stride).reshape(-1)
        return sorted(places.tolist())

    assert visited(merged) == visited(list(zip(sizes, strides, strict=True)))
    assert [stride for _, stride in merged] == sorted((stride for _, stride in merged), reverse=True)
    assert all(size > 1 for size, _ in merged)
    if not gap:
        assert len(merged) <= 1


# Slots and channels


class Padded(nn.Module):
    """The second layer sees two inputs that no channel makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.pad(self.first(x), (0, 0, 0, 0, 1, 1)))


def test_slots_and_channels_are_inverse() -> None:
    model = Padded()
    binding = bind(build_plan(model, small_inputs()), model)
    (tiles,) = binding.tiles("weights", parameters)
    values = torch.arange(1.0, binding.plan.n_channels + 1)
    slots = binding.to_slots(tiles, values, fill=-7.0)
    known = tiles.slot_channel < binding.plan.n_channels
    assert torch.equal(slots[known], values[tiles.slot_channel[known]])
    assert (slots[~known] == -7.0).all()
    assert int((~known).sum()) == 2
    back = binding.to_channels(tiles, known.float())
    assert torch.equal(back, torch.bincount(tiles.slot_channel[known], minlength=binding.plan.n_channels).float())


def test_one_table_for_each_dtype() -> None:
    model, x = Small().double(), small_inputs(dtype=torch.float64)
    plan = build_plan(model, x)
    model.head.float()
    tables = bind(plan, model).tiles("weights", parameters)
    assert [t.tensors[0].dtype for t in tables] == [torch.float64, torch.float32]
    assert [name for t in tables for name in t.names] == [t.name for t in plan.tensors if t.is_parameter]
    assert {t.slot_channel.dtype for t in tables} == {torch.int64}


def test_tables_are_kept_until_a_layout_changes() -> None:
    model, binding = small_binding()
    first = binding.tiles("weights", parameters)
    assert binding.tiles("weights", parameters) is first
    model.inner.weight.data = model.inner.weight.data.clone()
    assert binding.tiles("weights", parameters) is first
    model.inner.weight.data = model.inner.weight.data.contiguous(memory_format=torch.channels_last)
    again = binding.tiles("weights", parameters)
    assert again is not first
    number = again[0].names.index("inner.weight")
    assert again[0].table.layouts[number][1] == model.inner.weight.stride()


def test_one_tensor_at_a_time() -> None:
    _, binding = small_binding()
    (tiles,) = binding.tiles("weights", parameters)
    single: list[Tiles] = list(binding.each(tiles))
    assert [t.names for t in single] == [(name,) for name in tiles.names]
    assert sum(t.table.slots for t in single) == tiles.table.slots
    grad = torch.zeros(12, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    like = binding.like("outer.weight", grad)
    assert like.tensors[0] is grad
    assert like.table.layouts[0][1] == grad.stride()


# Statistics of groups


def test_means_and_extremes_are_those_of_each_group() -> None:
    _, binding = small_binding()
    values = torch.randn(binding.plan.n_channels, dtype=torch.float64)
    for alive in (None, torch.rand(binding.plan.n_channels) < 0.7):
        binding.alive = alive
        mean, low, high = (binding.spread(binding.over_groups(values, how)) for how in ("mean", "min", "max"))
        for group in binding.plan.groups:
            own = slice(group.start, group.stop)
            living = values[own] if alive is None else values[own][alive[own]]
            torch.testing.assert_close(mean[own], living.mean().expand(group.channels))
            assert (low[own] == living.min()).all()
            assert (high[own] == living.max()).all()


def test_a_nan_is_told_of_its_group_alone_and_not_of_what_is_masked() -> None:
    _, binding = small_binding()
    first, second, *_ = binding.plan.groups
    values = torch.ones(binding.plan.n_channels)
    values[[first.start, second.start]] = torch.nan
    binding.alive = torch.arange(binding.plan.n_channels) != second.start
    for how in ("mean", "min", "max"):
        assert binding.over_groups(values, how).isnan().tolist() == [True] + [False] * (len(binding.plan.groups) - 1)


def test_members_are_counted_per_axis() -> None:
    _, binding = small_binding()
    binding.tiles("weights", lambda m, owner, local: local == "weight")
    count = binding.member_count("weights")
    found = {g.root: count[g.start : g.stop].unique().tolist() for g in binding.plan.groups}
    # inner: its own rows, the columns of outer; outer: stem, norm, outer, and the columns of inner and head.
    assert found == {"inner": [2.0], "outer": [5.0]}


# Names


def test_aliases_of_a_tied_tensor() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.mix = nn.Linear(6, 6)
            self.out = nn.Linear(6, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.mix(self.embed(ids)))

    model = Tied()
    binding = bind(build_plan(model, torch.arange(7)), model)
    assert binding.owner("embed.weight") == (model.embed, "weight")
    assert binding.aliases("embed.weight") == ["embed.weight", "out.weight"]
    assert binding.aliases("mix.weight") == ["mix.weight"]


def test_buffers_are_bound_too() -> None:
    model, binding = small_binding()
    assert binding.tensors["norm.running_mean"] is model.norm.running_mean
    assert binding.tensors["stem.weight"] is model.stem.weight


def test_another_model_is_refused() -> None:
    model, binding = small_binding()
    with pytest.raises(PlanError, match=r"stem.weight: the plan expects shape \(12, 3, 3, 3\), the model has shape"):
        bind(binding.plan, Small(width=9))
    with pytest.raises(PlanError, match=r"the model has no such tensor; build a new plan"):
        bind(binding.plan, nn.Linear(2, 2))
    other = copy.deepcopy(model)
    assert bind(binding.plan, other).tensors["stem.weight"] is other.stem.weight


# Looking at the model


def test_tensors_that_were_remembered_are_looked_at_anew_once_they_differ() -> None:
    _, binding = small_binding()
    binding.remember()
    weight = binding.tensors["inner.weight"]
    place = list(binding.tensors).index("inner.weight")
    assert binding.is_current()
    assert binding.look().strides[place] == weight.stride()
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    assert binding.is_current()
    assert binding.look().strides[place] == weight.stride()
    weight.data = weight.data.double()
    assert binding.look().kinds[place] == (weight.device, torch.float64)
    assert binding.is_true
    assert not binding.is_current()
    weight.data = weight.data[:-1]
    assert not binding.is_true


def replaced(model: Small) -> None:
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())


def renamed(model: Small) -> None:
    model.add_module("other", model._modules.pop("inner"))


def added(model: Small) -> None:
    model.add_module("other", nn.ReLU())


@pytest.mark.parametrize("change", [replaced, renamed, added])
def test_a_model_with_other_parts_is_not_the_one_that_was_bound(change: Callable[[Small], None]) -> None:
    model, binding = small_binding()
    assert binding.is_current()
    change(model)
    assert not binding.is_current()
    with pytest.raises(PlanError, match="were replaced"):
        binding.check()
