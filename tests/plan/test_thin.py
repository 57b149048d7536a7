"""Layers with thin tensors standing in compute what they compute with the large ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pat_fast import PlanError
from pat_fast.plan.thin import POOL, Standing, Thin, Values, Wanted, fill

ROWS, COLUMNS = torch.tensor([70, 3, 41]), torch.tensor([5, 0, 77, 30])


def thin(shape: tuple[int, ...], small: tuple[int, ...], places: dict[int, Tensor], fill: float = 0.0) -> Thin:
    values = torch.randn(small, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return Thin(values, shape, places, None, fill)


def at_once(one: Thin) -> Tensor:
    """The large tensor as :func:`fill` makes it, between others."""
    twin = Thin(one.small, one.shape, one.places, one.columns, one.fill)
    fill([thin((5,), (5,), {}), twin, thin((7,), (5,), {0: torch.tensor([6, 1, 2, 5, 0])}, fill=1.0)])
    assert twin._full is not None
    return twin.full()


def test_the_large_tensor_has_the_small_one_at_its_places() -> None:
    one = thin((80, 90), (3, 4), {0: ROWS, 1: COLUMNS})
    full = one.full()
    assert torch.equal(at_once(one), full)
    assert full.shape == (80, 90)
    assert torch.equal(full[ROWS][:, COLUMNS], one.small)
    assert full.count_nonzero() == 12
    one = thin((9,), (2,), {0: torch.tensor([4, 1])}, fill=1.0)
    assert one.full().eq(1).sum() == 7
    assert torch.equal(at_once(one), one.full())


def test_blocks_of_a_grouped_convolution_have_their_own_columns() -> None:
    columns = torch.tensor([[1, 0], [2, 1]])
    one = Thin(torch.randn(4, 2, 1), (6, 3, 1), {0: torch.tensor([2, 0, 3, 5])}, columns, 0.0)
    full = one.full()
    assert torch.equal(at_once(one), full)
    for i, row in enumerate([2, 0, 3, 5]):
        assert torch.equal(full[row, columns[i // 2], 0], one.small[i, :, 0])
    assert full.count_nonzero() == 8


CASES: dict[str, Any] = {
    "linear": lambda w, b, x: F.linear(x, w, b),
    "linear by keyword": lambda w, b, x: F.linear(x, weight=w, bias=b),
    "linear without bias": lambda w, b, x: F.linear(x, w),
    "product": lambda w, b, x: x @ w.t() + b,
    "nested": lambda w, b, x: torch.cat([x @ w.T, torch.stack([b, b])]),
    "conv": lambda w, b, x: F.conv1d(x[..., None], w[..., None], b),
    "shape": lambda w, b, x: x.new_ones(w.shape) * w.size(0) + w,
}


@pytest.mark.parametrize("places", [{0: ROWS, 1: COLUMNS}, {0: ROWS}, {1: COLUMNS}, {}], ids=["both", "0", "1", "none"])
@pytest.mark.parametrize("name", list(CASES))
def test_functions_compute_with_what_stands_in(name: str, places: dict[int, Tensor]) -> None:
    weight, bias = nn.Parameter(torch.randn(80, 90)), nn.Parameter(torch.randn(80))
    small = (3 if 0 in places else 80, 4 if 1 in places else 90)
    w = thin((80, 90), small, places)
    b = thin((80,), small[:1], {0: ROWS} if 0 in places else {})
    x = torch.randn(2, 90, dtype=torch.float64)
    if name == "shape":
        x = torch.randn(1, 1, dtype=torch.float64)
    with Standing({id(weight): w, id(bias): b}), torch.no_grad():
        found = CASES[name](weight, bias, x)
    torch.testing.assert_close(found, CASES[name](w.full(), b.full(), x))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_compute_with_what_stands_in(kind: Any, groups: int) -> None:
    layer = kind(90 * groups, 80, 1, groups=groups).double()
    w = thin(tuple(layer.weight.shape), (3, 4, *layer.kernel_size), {0: ROWS, 1: COLUMNS})
    x = torch.randn(2, 90 * groups, *[3] * len(layer.kernel_size), dtype=torch.float64)
    with Standing({id(layer.weight): w}), torch.no_grad():
        found = layer(x)
    layer.weight.data = w.full()
    torch.testing.assert_close(found, layer(x))


@pytest.mark.parametrize("rows", [[3, 1, 79, 40], [79, 40, 3, 1], [3, 45, 2, 79], None])
def test_blocks_of_a_convolution_compute_with_what_stands_in(
    rows: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Conv2d(360, 80, 3, groups=2).double()
    columns, places = torch.tensor([[5, 0, 7], [2, 100, 179]]), {} if rows is None else {0: torch.tensor(rows)}
    small = torch.randn(80 if rows is None else 4, 3, 3, 3, dtype=torch.float64)
    w = Thin(small, tuple(layer.weight.shape), places, columns, 0.0)
    x = torch.randn(2, 360, 4, 4, dtype=torch.float64)
    layer.weight.data = Thin(small, w.shape, places, columns, 0.0).full()
    expected = layer(x)
    if rows in (None, [3, 1, 79, 40]):  # rows that leave their block are not for the small tensor
        monkeypatch.setattr(Thin, "full", lambda self: pytest.fail("the large tensor was made"))
    with Standing({id(layer.weight): w}), torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("places", [{1: COLUMNS}, {0: ROWS}, {}], ids=["1", "0", "none"])
def test_embeddings_compute_with_what_stands_in(places: dict[int, Tensor]) -> None:
    layer = nn.Embedding(80, 90)
    w = thin((80, 90), (3 if 0 in places else 80, 4 if 1 in places else 90), places)
    ids = torch.tensor([[1, 70], [3, 79]])
    bag = nn.EmbeddingBag.from_pretrained(layer.weight)
    for called, expected in ((layer, w.full()[ids]), (bag, w.full()[ids].mean(1))):
        with Standing({id(layer.weight): w, id(bag.weight): w}), torch.no_grad():
            found = called(ids)
        torch.testing.assert_close(found, expected)


NORMS: dict[str, Any] = {
    "layer": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
    "layer by keyword": lambda x, w, b: F.layer_norm(x, w.shape, weight=w, bias=b, eps=1e-3),
    "layer without bias": lambda x, w, b: torch.layer_norm(x, w.shape, w),
    "rms": lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-5),
    "group": lambda x, w, b: F.group_norm(x.movedim(-1, 1), 2, w, b).movedim(1, -1),
}


@pytest.mark.parametrize("name", list(NORMS))
def test_norms_take_the_statistics_of_what_there_is(name: str) -> None:
    weight, bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
    places = {0: torch.tensor([3, 0, 6, 5])}
    w, b = thin((8,), (4,), places), thin((8,), (4,), places)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    large = x.new_zeros(2, 5, 8).index_copy_(-1, places[0], x)
    with Standing({id(weight): w, id(bias): b}), torch.no_grad():
        found = NORMS[name](large, weight, bias)
    torch.testing.assert_close(found[..., places[0]], NORMS[name](x, w.small, b.small))
    assert found.count_nonzero() == 40


def test_channels_that_leave_their_block_of_a_group_norm_are_no_plan() -> None:
    weight = nn.Parameter(torch.randn(8))
    for places in ([3, 0, 6], [3, 0, 1, 5], [6, 5, 3, 0]):
        w = thin((8,), (len(places),), {0: torch.tensor(places)})
        with Standing({id(weight): w}), torch.no_grad(), pytest.raises(PlanError, match="block"):
            F.group_norm(torch.randn(2, 8, 3, dtype=torch.float64), 2, weight)


def test_values_differ_from_one_another() -> None:
    like = torch.zeros(0)
    wanted = [
        Wanted(like, (40, 5000), "a.weight", 5000),  # longer than the pool
        Wanted(like, (50,), "a.weight", 50),
        Wanted(like, (50,), "a.running_var", 50),
        Wanted(like.double(), (3, 2, 2), "b.weight", 4),
        Wanted(like, (5000, 40), "c.weight", 40, is_table=True),
    ]
    matrix, scale, variance, other, table = Values(0).of(wanted)
    assert matrix.numel() > POOL
    assert len(torch.unique(matrix, dim=0)) == 40
    assert matrix.std().item() == pytest.approx(5000**-0.5, rel=0.01)
    assert min(scale.min(), variance.min()) >= 0.5
    assert not torch.equal(scale, variance)
    assert (other.shape, other.dtype) == ((3, 2, 2), torch.float64)
    assert torch.unique(table, dim=0).shape == torch.unique(table, dim=1).shape == table.shape == (5000, 40)
    assert table.untyped_storage().nbytes() < 4 * 5100
