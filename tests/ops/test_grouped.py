"""What is done in one call where the backend can, against the same done with the four ops and vectors of PyTorch."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pat_fast.backends import cpu, known, shortcut
from pat_fast.criteria import GroupNorm
from pat_fast.errors import OpError, PatError
from pat_fast.ops import Tile, TileTable, channel_reduce, grouped
from pat_fast.ops.grouped import Grouping, Pushed
from pat_fast.plan import Binding, bind, build_plan
from pat_fast.regularizers import GroupNormRegularizer
from tests.helpers import Case
from tests.regularizers.helpers import grads, zero_grads

pytestmark = pytest.mark.skipif(shortcut("group_push", "cpu") is None, reason="the C++ kernels are not in use")
NETWORKS = ("resnet50", "densenet121", "vit_s16", "resnext50", "vgg16_bn", "mobilenet_v2", "unet", "text")
STRENGTH = 1e-2


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bound(name: str, dtype: torch.dtype = torch.float32) -> Binding:
    case = Case.build(name, torch.float32)
    plan = build_plan(case.model, case.inputs)
    return bind(plan, case.model.to(dtype))


def the_long_way(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(Binding, "at_once", lambda *_: None)
        return run()


def pushed(binding: Binding, **kwargs: Any) -> dict[str, Tensor]:
    zero_grads(binding.model)
    GroupNormRegularizer(STRENGTH).apply(binding, **kwargs)
    return grads(binding.model)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes the short way from now on, with groupings that are made then."""
    seen: list[str] = []

    def counting(name: str, device: str) -> Any:
        found = shortcut(name, device)

        def run(*arguments: Any) -> Any:
            assert found is not None
            result = found(*arguments)
            seen.append(name)
            return result

        return found if name == "grouping" else run

    monkeypatch.setattr(grouped, "shortcut", counting)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_totals_and_scores_are_the_same_to_the_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    binding = bound(name, dtype)
    with torch.no_grad():  # a group of zeros, and one that cannot be scored
        for group, value in zip(binding.plan.groups, (0.0, torch.nan), strict=False):
            for member, _ in group.members:
                binding.tensors[member].fill_(value)
    seen = calls(monkeypatch)
    for p in (1.0, 2.0, 3.0):
        criterion = GroupNorm(p)
        for score in (criterion.total, criterion.score):
            expected = the_long_way(monkeypatch, lambda score=score: score(binding))
            for _ in range(4):  # known tensors, too
                assert torch.equal(score(binding).nan_to_num(-1), expected.nan_to_num(-1))
    assert seen.count("channel_totals") == 24


def test_the_mean_of_a_group_of_many_channels_is_not_rounded_on_the_way() -> None:
    """Added up in single precision it is off by some 1e-5, and with it all of the group's scores beside others'."""
    weight = torch.rand(2**18, generator=torch.Generator().manual_seed(0))
    table = TileTable.from_tiles([weight], [Tile(0, 0, (len(weight), 1, 1), (1, 1, 1), 0)])
    grouping = Grouping.of(table, torch.arange(len(weight)), torch.tensor([len(weight)]))
    assert grouping is not None
    scores = grouped.channel_totals([weight], grouping, 1.0, True)
    assert scores is not None
    torch.testing.assert_close(scores.double(), weight.double() / weight.double().mean(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_push_is_that_of_the_four_ops(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = bound(name, dtype)
    seen = calls(monkeypatch)
    where = torch.rand(binding.plan.n_channels) < 0.7
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    for choice in (None, where):
        expected = the_long_way(monkeypatch, lambda choice=choice: pushed(binding, where=choice))
        for _ in range(4):
            got = pushed(binding, where=choice)
            assert list(got) == list(expected)
            for key, grad in got.items():
                torch.testing.assert_close(grad, expected[key], rtol=rtol, atol=1e-12, msg=key)
    assert seen.count("group_push") == 8
    assert any(g.any() for g in expected.values())


def large(threads: int) -> tuple[Tensor, list[Tensor]]:
    """Totals and gradients of two layers that take several threads."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(1500, 700, generator=generator), torch.randn(300, 1500, 3, 3, generator=generator)]
    ys = [torch.zeros_like(x) for x in xs]
    tiles = [Tile(0, 0, (1500, 700, 1), (700, 1, 1), 0, 1500), Tile(1, 0, (300, 1500, 9), (13500, 9, 1), 2200, 2500)]
    table = TileTable.from_tiles(xs, tiles)
    own, outer = torch.arange(1500), torch.arange(1500, 2500)
    grouping = Grouping.of(table, torch.cat([own, outer[:700], outer[700:], own]), torch.tensor([1500, 700, 300]))
    assert grouping is not None
    totals = grouped.channel_totals(xs, grouping, 2.0, True)
    assert totals is not None
    assert grouped.group_push(lambda: Pushed(ys, (0, 1), table), xs, grouping, 2.0, 16.0, 1e-2, None)
    expected = torch.cat([xs[0].square().sum(1) + xs[1].square().sum((0, 2, 3)), xs[0].square().sum(0)])
    means = torch.cat([part / part.mean() for part in (expected[:1500], expected[1500:])])
    torch.testing.assert_close(totals[:2200], means, rtol=1e-5, atol=0)
    return totals, ys


def test_large_layers_are_done_by_several_threads() -> None:
    totals, ys = large(1)
    assert all(y.any() for y in ys)
    for threads in (2, 3, 7):
        others, found = large(threads)
        assert torch.equal(others, totals)
        assert all(torch.equal(a, b) for a, b in zip(found, ys, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_group_that_cannot_be_scored_is_not_pushed(value: float) -> None:
    binding = bound("resnet50")
    group = binding.plan.groups[1]
    with torch.no_grad():
        binding.tensors[f"{group.root}.weight"][1] = value
    found = pushed(binding)
    gamma = GroupNormRegularizer().gamma(binding)
    assert not gamma[group.start : group.stop].any()
    others = [m for g in binding.plan.groups if g is not group for m, _ in g.members]
    alone = [m for m, _ in group.members if m not in others and binding.tensors[m].dim() == 1 and m in found]
    assert alone
    assert not any(found[m].any() for m in alone)


def test_what_watches_sees_the_four_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    binding = bound("resnet18")
    seen = calls(monkeypatch)
    for _ in range(4):
        GroupNorm().score(binding)
    assert seen == ["channel_totals"] * 4
    with Watch():
        GroupNorm().score(binding)
        pushed(binding)
    assert len(seen) == 4
    assert "pat_fast.channel_reduce.default" in names
    assert "pat_fast.channel_axpy_.default" in names


def test_a_mode_that_sees_functions_sees_the_four_ops() -> None:
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    binding = bound("resnet18")
    zero_grads(binding.model)
    for _ in range(4):
        expected = GroupNorm().score(binding)
        GroupNormRegularizer(STRENGTH).apply(binding)
    with Watch():
        assert torch.equal(GroupNorm().score(binding), expected)
        GroupNormRegularizer(STRENGTH).apply(binding)
    assert any("channel_reduce" in name for name in names)
    assert any("channel_axpy_" in name for name in names)


def test_without_gradients_nothing_is_read_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = bound("resnet18")
    seen = calls(monkeypatch)
    regularizer = GroupNormRegularizer(STRENGTH)
    for _ in range(3):
        regularizer.apply(binding)
    assert seen == []
    assert all(p.grad is None for p in binding.model.parameters())
    assert regularizer.steps == 3


def test_slots_of_empty_tiles_are_zero_whatever_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are made in memory that calls share."""
    broken = torch.full((90, 70), torch.nan)
    before = TileTable.from_tiles([broken], [Tile(0, 0, (90, 70, 1), (70, 1, 1), 0, 90)])
    others = Grouping.of(before, torch.arange(160), torch.tensor([160]))
    xs = [WEIGHT, torch.ones(5, 0)]
    table = TileTable.from_tiles(xs, [TILE, Tile(1, 0, (5, 0, 1), (1, 1, 1), 7, 12)], 14)
    grouping = Grouping.of(table, torch.arange(14), torch.tensor([14]))
    assert others is not None
    assert grouping is not None
    for _ in range(3):
        grouped.channel_totals([broken], others, 2.0, False)
        found = grouped.channel_totals(xs, grouping, 2.0, False)
        assert found is not None
        assert found.tolist() == [3] * 4 + [4] * 3 + [0] * 7


class Skip(nn.Module):
    """Beside its own channels, the last of all, a layer reads the network's input, which belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Conv2d(3, 8, 3, padding=1)
        self.both = nn.Conv2d(11, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.cat([self.own(x).relu(), x], 1))


def test_what_belongs_to_no_channel_is_not_pushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last channel there is other memory."""
    model = Skip()
    binding = bind(build_plan(model, (torch.randn(1, 3, 8, 8),)), model)
    expected = the_long_way(monkeypatch, lambda: pushed(binding))
    broken = torch.full((900, 700), torch.nan)
    channel_reduce([broken], TileTable.from_tiles([broken], [Tile(0, 0, (900, 700, 1), (700, 1, 1), 0, 900)]))
    found = pushed(binding)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-12)
    assert not found["both.weight"][:, 8:].any()
    assert found["both.weight"][:, :8].all()


def test_a_model_that_changes_its_dtype_is_scored_the_way_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 3))
    binding = bind(build_plan(model, (torch.randn(1, 3, 8, 8),)), model)
    seen = calls(monkeypatch)
    for short, dtype in enumerate((torch.float32, torch.complex64, torch.float64, torch.complex128, torch.bfloat16)):
        model.to(dtype)
        expected = the_long_way(monkeypatch, lambda: GroupNorm().score(binding))
        for _ in range(3):
            torch.testing.assert_close(GroupNorm().score(binding), expected)
        assert len(seen) == 3 * (short // 2 + 1)


def test_autograd_sees_that_gradients_have_changed() -> None:
    binding = bound("resnet18")
    zero_grads(binding.model)
    weight: Any = binding.tensors[f"{binding.plan.groups[0].root}.weight"]
    before = weight.grad._version
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert weight.grad._version == before + 1


WEIGHT, TILE = torch.ones(4, 3), Tile(0, 0, (4, 3, 1), (3, 1, 1), 0, 4)


@pytest.fixture
def table() -> TileTable:
    return TileTable.from_tiles([WEIGHT], [TILE])


@pytest.fixture
def grouping(table: TileTable) -> Grouping:
    found = Grouping.of(table, torch.arange(7), torch.tensor([4, 3]))
    assert found is not None
    return found


def test_the_caller_may_do_something_meanwhile() -> None:
    """While other threads read; what it raises comes out, from one thread too."""
    x = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    table = TileTable.from_tiles([x], [Tile(0, 0, (1000, 1000, 1), (1000, 1, 1), 0, 1000)])
    grouping = Grouping.of(table, torch.arange(2000), torch.tensor([1000, 1000]))
    assert grouping is not None
    expected = grouped.channel_totals([x], grouping, 2.0, True)
    assert expected is not None
    called: list[threading.Thread] = []

    def fails() -> None:
        raise PatError("meanwhile")

    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        called.clear()
        found = grouped.channel_totals(
            [x], grouping, 2.0, True, lambda: called.append(threading.current_thread())
        )
        assert called == [threading.current_thread()]
        assert found is not None
        assert torch.equal(found, expected)
        with pytest.raises(PatError, match="meanwhile"):
            grouped.channel_totals([x], grouping, 2.0, True, fails)
    with profiler.profile():  # someone watches: it takes the long way
        assert grouped.channel_totals([x], grouping, 2.0, True, fails) is None


def test_runs_end_with_their_side_and_where_channels_jump(table: TileTable) -> None:
    found = Grouping.of(table, torch.tensor([0, 1, 1, 2, 3, 5, 4]), torch.tensor([3, 2]))
    assert found is not None
    # Slots of channel 5, of which there are five, belong to none.
    assert found.runs.tolist() == [[0, 0, 2], [2, 1, 2], [4, 3, 1], [6, 4, 1]]
    totals = grouped.channel_totals([WEIGHT], found, 2.0, False)
    assert totals is not None
    assert totals.tolist() == [3, 6, 3, 4, 4]
    none_behind_the_last = Grouping.of(table, torch.tensor([0, 1, 2, 3, 4, 5, 5]), torch.tensor([3, 2]))
    assert none_behind_the_last is not None
    assert none_behind_the_last.runs.tolist() == [[0, 0, 4], [4, 4, 1]]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda found: pickle.loads(pickle.dumps(found))])
def test_a_copy_stands_on_memory_of_its_own(table: TileTable, duplicate: Callable[[Grouping], Grouping]) -> None:
    first = Grouping.of(table, torch.arange(7), torch.tensor([4, 3]))
    assert first is not None
    second = duplicate(first)
    expected = grouped.channel_totals([WEIGHT], first, 2.0, True)
    first.runs.zero_()
    found = grouped.channel_totals([WEIGHT], second, 2.0, True)
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (torch.arange(6), "each of 7 slots"),
        (torch.arange(7, dtype=torch.int32), "int64"),
        (torch.arange(7) - 1, r"channels in \[0, 7\]"),
        (torch.arange(7) + 2, r"channels in \[0, 7\]"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(table: TileTable, channels: Tensor, message: str) -> None:
    with pytest.raises(OpError, match=message):
        Grouping.of(table, channels, torch.tensor([4, 3]))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(3, 4), "shapes and strides"),
        (torch.zeros(3, 4).t(), "shapes and strides"),
        (torch.zeros(4, 3, dtype=torch.float64), "the dtype"),
        (WEIGHT, "share no memory"),
    ],
)
def test_ys_that_do_not_fit_are_refused(table: TileTable, grouping: Grouping, y: Tensor, message: str) -> None:
    with pytest.raises(OpError, match=message):
        grouped.group_push(lambda: Pushed([y], (0,), None), [WEIGHT], grouping, 2.0, 16.0, 1.0, None)
    if y.dtype == WEIGHT.dtype:
        with pytest.raises(OpError):
            grouped.group_push(lambda: Pushed([y], (0,), table), [WEIGHT], grouping, 2.0, 16.0, 1.0, None)


class Another(Tensor):
    """No plain tensor."""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_tensor_that_others_are_read_before_is_looked_at_too(threads: int) -> None:
    """One that does not fit stops the call: an error, or the long way; neither changes anything."""
    torch.set_num_threads(threads)
    n = 90  # more than are looked at in one go
    xs = [torch.randn(40, 30, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    table = TileTable.from_tiles(xs, [Tile(i, 0, (40, 30, 1), (30, 1, 1), 70 * i, 70 * i + 40) for i in range(n)])
    grouping = Grouping.of(table, torch.arange(70 * n), torch.tensor([70] * n))
    assert grouping is not None
    called: list[int] = []

    def totals(tensors: list[Tensor]) -> Tensor | None:
        return grouped.channel_totals(tensors, grouping, 2.0, True, lambda: called.append(1))

    def push(ys: list[Tensor], tensors: list[Tensor]) -> bool:
        return grouped.group_push(lambda: Pushed(ys, range(n), table), tensors, grouping, 2.0, 16.0, 1.0, None)

    first = totals(xs)
    for _ in range(3):  # looked at, remembered, recognised
        found = totals(xs)
        assert first is not None
        assert found is not None
        assert torch.equal(first, found)
    called.clear()
    for at in (0, 40, 80, 89):
        wrong = [*xs[:at], torch.randn(30, 40).t(), *xs[at + 1 :]]
        odd = [*xs[:at], torch.randn(40, 30).as_subclass(Another), *xs[at + 1 :]]
        ys = [torch.zeros(40, 30) for _ in xs]
        with pytest.raises(OpError, match=rf"xs\[{at}\]"):
            totals(wrong)
        with pytest.raises(OpError, match=rf"xs\[{at}\]"):
            push(ys, wrong)
        assert totals(odd) is None
        assert not push(ys, odd)
        own = [*ys[:at], xs[at], *ys[at + 1 :]]
        with pytest.raises(OpError, match="share no memory"):
            push(own, xs)
        assert not any(y.any() for y in ys)
    assert not called
    with pytest.raises(OpError):
        totals(xs[:-1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: setattr(x, "data", torch._neg_view(torch.ones(40, 30))), "lazily negated"),
        (lambda x: setattr(x, "data", torch.ones(30, 40).t()), "of shape"),
        (lambda x: setattr(x, "data", torch.ones(40, 30, dtype=torch.float64)), "of torch.float"),
        (lambda x: x.untyped_storage().resize_(0), "to have memory"),
    ],
)
@pytest.mark.parametrize("at", [0, 60, 89])
def test_a_known_tensor_that_changes_is_seen(
    threads: int, at: int, change: Callable[[Tensor], None], message: str
) -> None:
    torch.set_num_threads(threads)
    xs = [torch.ones(40, 30) for _ in range(90)]
    ys = [torch.zeros(40, 30) for _ in xs]
    table = TileTable.from_tiles(xs, [Tile(i, 0, (40, 30, 1), (30, 1, 1), 70 * i, 70 * i + 40) for i in range(90)])
    grouping = Grouping.of(table, torch.arange(70 * 90), torch.tensor([70] * 90))
    assert grouping is not None
    for _ in range(3):
        found = grouped.channel_totals(xs, grouping, 2.0, True)
        assert found is not None
        assert grouped.group_push(lambda: Pushed(ys, range(90), table), xs, grouping, 2.0, 16.0, 1.0, None)
    change(xs[at])
    before = [y.clone() for y in ys]
    for _ in range(2):
        with pytest.raises(OpError, match=message):
            grouped.channel_totals(xs, grouping, 2.0, True)
        with pytest.raises(OpError, match=message):
            grouped.group_push(lambda: Pushed(ys, range(90), table), xs, grouping, 2.0, 16.0, 1.0, None)
    assert all(map(torch.equal, ys, before))


class Pair:
    """Two weights and a table over them, pushed so often that their gradients are recognised."""

    def __init__(self) -> None:
        self.xs = [torch.ones(4, 6), torch.ones(5, 6)]
        rows = [Tile(0, 0, (4, 6, 1), (6, 1, 1), 0, 4), Tile(1, 0, (5, 6, 1), (6, 1, 1), 10, 15)]
        self.table = TileTable.from_tiles(self.xs, rows)
        self.places = (0, 1)
        grouping = Grouping.of(self.table, torch.arange(21), torch.tensor([21]))
        assert grouping is not None
        self.grouping = grouping
        for _ in range(3):
            assert self.push([torch.zeros_like(x) for x in self.xs])

    def push(self, ys: list[Tensor], places: tuple[int, ...] | None = None) -> bool:
        pushed = Pushed(ys, self.places if places is None else places, self.table)
        return grouped.group_push(lambda: pushed, self.xs, self.grouping, 2.0, 1.0, 1.0, None)


def test_gradients_that_passed_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    monkeypatch.setattr(grouped, "_look", None)
    ys = [torch.zeros(4, 6), torch.zeros(5, 6)]
    assert pair.push(ys)
    assert all((y == 2).all() for y in ys)
    with pytest.raises(TypeError):  # others are looked at
        pair.push(ys, (*pair.places,))


def _odd_gradients() -> dict[str, Callable[[Pair], tuple[list[Tensor], str | None]]]:
    around = torch.zeros(60)
    return {
        "one twice": lambda pair: ([around[:24].view(4, 6), around[12:42].view(5, 6)], "share no memory"),
        "its weight": lambda pair: ([torch.zeros(4, 6), pair.xs[1]], "share no memory"),
        "another's weight": lambda pair: ([pair.xs[1][:4], torch.zeros(5, 6)], "share no memory"),
        "too few": lambda pair: ([torch.zeros(4, 6)], "a place for each"),
        "another shape": lambda pair: ([torch.zeros(5, 6), torch.zeros(5, 6)], "of shape"),
        "other strides": lambda pair: ([torch.zeros(6, 4).t(), torch.zeros(5, 6)], "strides"),
        "another dtype": lambda pair: ([torch.zeros(4, 6), torch.zeros(5, 6).double()], "of torch.float32"),
        "all of another dtype": lambda pair: ([torch.zeros(4, 6).half(), torch.zeros(5, 6).half()], None),
        "negated": lambda pair: ([torch.zeros(4, 6), torch._neg_view(torch.zeros(5, 6))], "lazily negated"),
        "of another class": lambda pair: ([torch.zeros(4, 6), torch.zeros(5, 6).as_subclass(Another)], None),
        "freed": lambda pair: ([torch.zeros(4, 6), _freed(torch.zeros(5, 6))], "to have memory"),
    }


def _freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", _odd_gradients())
def test_gradients_that_are_not_as_before_are_looked_at(name: str) -> None:
    pair = Pair()
    ys, message = _odd_gradients()[name](pair)
    before = [x.clone() for x in pair.xs]
    for _ in range(2):
        if message is None:
            assert not pair.push(ys)
        else:
            with pytest.raises(OpError, match=message):
                pair.push(ys)
    assert all(map(torch.equal, pair.xs, before))
    assert name == "freed" or not any(y.any() for y in ys if not any(y.data_ptr() == x.data_ptr() for x in pair.xs))
    ys = [torch.zeros(4, 6), torch.zeros(5, 6)]
    assert pair.push(ys)
    assert all((y == 2).all() for y in ys)


def test_gradients_may_lie_in_the_gaps_of_others() -> None:
    """Such as those of the halves of a weight that is split by columns."""
    whole, grad = torch.ones(4, 12), torch.zeros(4, 12)
    xs, ys = list(whole.split(6, dim=1)), list(grad.split(6, dim=1))
    table = TileTable.from_tiles(xs, [Tile(i, 0, (4, 6, 1), (12, 1, 1), 10 * i, 10 * i + 4) for i in range(2)])
    grouping, pushed = Grouping.of(table, torch.arange(20), torch.tensor([20])), Pushed(ys, (0, 1), table)
    assert grouping is not None
    for n in range(1, 5):
        assert grouped.group_push(lambda: pushed, xs, grouping, 2.0, 1.0, 1.0, None)
        assert (grad == 2 * n).all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("missing", [False, True])
def test_gradients_that_overlap_are_refused_on_every_way(
    long: bool, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 4, 1))
    binding = bind(build_plan(model, (torch.randn(1, 3, 8, 8),)), model)
    zero_grads(model)
    memory = torch.zeros(60)
    model[1].weight.grad, model[2].weight.grad = memory[:40].view(5, 8, 1, 1), memory[39:59].view(4, 5, 1, 1)
    if missing:
        model[0].weight.grad = None
    run = lambda: GroupNormRegularizer(STRENGTH).apply(binding)  # noqa: E731
    with pytest.raises(OpError, match="share no memory"):
        the_long_way(monkeypatch, run) if long else run()
    assert not memory.any()


@pytest.mark.parametrize("where", [torch.ones(6, dtype=torch.bool), torch.ones(7)])
def test_a_choice_of_channels_that_does_not_fit_goes_the_long_way(
    table: TileTable, grouping: Grouping, where: Tensor
) -> None:
    y = torch.zeros(4, 3)
    assert not grouped.group_push(lambda: Pushed([y], (0,), table), [WEIGHT], grouping, 2.0, 16.0, 1.0, where)
    assert not y.any()


@pytest.mark.parametrize("places", [(1, 0), (0, 0), (-1, 0), (0, 2), (0,)])
def test_places_that_are_not_in_order_are_refused(places: tuple[int, ...]) -> None:
    xs, ys = [torch.ones(4, 4), torch.ones(4, 4)], [torch.zeros(4, 4), torch.zeros(4, 4)]
    table = TileTable.from_tiles(xs, [Tile(i, 0, (4, 4, 1), (4, 1, 1), 8 * i, 8 * i + 4) for i in range(2)])
    grouping = Grouping.of(table, torch.arange(16), torch.tensor([16]))
    assert grouping is not None
    for of in (table, None):
        with pytest.raises(OpError, match="place"):
            grouped.group_push(lambda of=of: Pushed(ys, places, of), xs, grouping, 2.0, 16.0, 1.0, None)
    assert not any(y.any() for y in ys)


@pytest.mark.parametrize("sizes", [torch.tensor([-4, 11]), torch.tensor(7), torch.tensor([[4, 3]])])
def test_sizes_that_are_none_are_refused(table: TileTable, sizes: Tensor) -> None:
    with pytest.raises(OpError, match="sizes of groups"):
        Grouping.of(table, torch.arange(7), sizes)


def test_the_default_device_and_dtype_are_others() -> None:
    binding = bound("resnet18")
    with torch.device("meta"):
        first = GroupNorm().score(binding)
    torch.set_default_dtype(torch.float64)
    try:
        second = GroupNorm().score(binding)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.dtype == second.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(first, GroupNorm().score(binding))


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_read_is_kept_until_it_is(threads: int) -> None:
    torch.set_num_threads(threads)
    xs = [torch.ones(900, 700) for _ in range(3)]
    table = TileTable.from_tiles(xs, [Tile(i, 0, (900, 700, 1), (700, 1, 1), 900 * i) for i in range(3)])
    grouping = Grouping.of(table, torch.arange(2700), torch.tensor([2700]))
    assert grouping is not None
    for _ in range(3):
        given = list(xs)
        found = grouped.channel_totals(given, grouping, 2.0, False, given.clear)
        assert found is not None
        assert (found == 700).all()
        assert not given


def test_lists_of_another_length_do_not_spoil_a_table(table: TileTable, grouping: Grouping) -> None:
    xs = [WEIGHT]
    for _ in range(3):
        grouped.channel_totals(xs, grouping, 2.0, True)
    table.known["xs"] = known.Known([torch.ones(1), torch.ones(2)])
    found = grouped.channel_totals(xs, grouping, 2.0, False)
    assert found is not None
    assert found.tolist() == [3] * 4 + [4] * 3


def test_a_frozen_weight_may_be_expanded() -> None:
    """Its tiles name elements again and again, but it is not to change."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1))
    binding = bind(build_plan(model, (torch.randn(1, 3, 8, 8),)), model)
    model[1].weight.data = torch.ones(1).expand(5, 8, 1, 1)
    model[1].weight.requires_grad_(False)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    GroupNormRegularizer(STRENGTH).apply(binding)
    assert model[0].weight.grad.any()


def test_slots_that_tiles_share_are_refused() -> None:
    table = TileTable.from_tiles([WEIGHT, WEIGHT], [TILE, replace(TILE, tensor=1)], shared_slots=True)
    with pytest.raises(OpError, match="slots of their own"):
        Grouping.of(table, torch.arange(7), torch.tensor([4, 3]))


def test_a_tensor_without_tiles_takes_no_place() -> None:
    """As many ys as there are tiles, but not theirs."""
    xs = [torch.ones(4, 4), torch.ones(4, 4), torch.ones(2, 2)]
    tiles = [Tile(i, 0, (4, 4, 1), (4, 1, 1), 8 * i, 8 * i + 4) for i in range(2)]
    table = TileTable.from_tiles(xs, tiles)
    grouping = Grouping.of(table, torch.arange(16) % 4, torch.tensor([4]))
    assert grouping is not None
    first, around = torch.zeros(4, 4), torch.zeros(64)
    ys = [first, around[:4].view(2, 2)]
    assert grouped.group_push(lambda: Pushed(ys, (0, 2), None), xs, grouping, 2.0, 1.0, 1.0, None)
    assert (first == 2).all()
    assert not around.any()


def test_what_is_written_is_kept_until_it_is(grouping: Grouping, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may let go of a gradient meanwhile."""
    alive = []

    class Native:
        @staticmethod
        def push(targets: Callable[[], list[int]], *rest: Any) -> bool:
            targets()
            alive.append(made[0]() is not None)
            return True

    def make() -> Pushed:
        y = torch.zeros(4, 3)
        made.append(weakref.ref(y))
        return Pushed([y], (0,), None)

    made: list[weakref.ref[Tensor]] = []
    monkeypatch.setattr(cpu, "_C", Native)
    assert grouped.group_push(make, [WEIGHT], grouping, 2.0, 16.0, 1.0, None)
    assert alive == [True]
    assert made[0]() is None


def test_it_is_the_winners_shortcut() -> None:
    assert shortcut("group_push", "cpu") is cpu.group_push
    assert shortcut("nothing", "cpu") is None
