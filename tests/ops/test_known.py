"""Tensors that were checked before: recognised without another look, and never wrongly.

By the C++ extension, and without it by Dynamo's guard.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pat_fast import ops
from pat_fast.backends import known
from pat_fast.errors import OpError
from pat_fast.ops import Tile, TileTable, functional

TILE = Tile(0, 0, (4, 3, 1), (3, 1, 1), 0, 4)


@pytest.fixture(autouse=True, params=["C++", "guard"])
def likes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "guard":
        monkeypatch.setattr(known, "_C", None)
    elif known._C is None:
        pytest.skip("the C++ extension is not there")
    forget = known.is_reliable.cache_clear
    forget()
    yield request.param
    forget()


@pytest.fixture
def weights() -> list[Tensor]:
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]


@pytest.fixture
def table(weights: list[Tensor]) -> TileTable:
    return TileTable.from_tiles(weights, [TILE, Tile(1, 0, (5, 1, 1), (1, 1, 1), 7)])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went to a kernel past the dispatcher."""
    seen: list[str] = []
    found = functional.implementation

    def counting(op: str, device: str) -> Callable[..., Any]:
        seen.append(op)
        return found(op, device)

    monkeypatch.setattr(functional, "implementation", counting)
    return seen


def meet(weights: Sequence[Tensor], table: TileTable) -> None:
    for _ in range(2):
        ops.channel_reduce(weights, table)
        ops.channel_axpy_([torch.zeros_like(w) for w in weights], weights, table, torch.ones(12))


def test_this_torch_has_what_serves() -> None:
    assert known.is_reliable()


MADE: dict[str, Callable[[], Tensor]] = {
    "a number": lambda: torch.tensor(1.0),
    "a vector": lambda: torch.ones(3),
    "a matrix": lambda: torch.ones(3, 2),
    "turned": lambda: torch.ones(2, 3).t(),
    "six dimensions": lambda: torch.ones(1, 2, 1, 2, 1, 2),
    "six others": lambda: torch.ones(2, 1, 2, 1, 2, 1),
    "no rows": lambda: torch.ones(0, 2),
    "no columns": lambda: torch.ones(3, 0),
    "a parameter": lambda: nn.Parameter(torch.ones(3)),
    "every other": lambda: torch.ones(6)[::2],
    "one again and again": lambda: torch.ones(1).expand(3),
    "double": lambda: torch.ones(3, dtype=torch.float64),
    "half": lambda: torch.ones(3, dtype=torch.float16),
    "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
    "whole": lambda: torch.ones(3, dtype=torch.int64),
    "bits": lambda: torch.ones(3, dtype=torch.bool),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "eight bits": lambda: torch.ones(3, dtype=torch.float8_e4m3fn),
}
ODD: dict[str, Callable[[], Any]] = {
    "on meta": lambda: torch.ones(3, device="meta"),
    "negated": lambda: torch._neg_view(torch.ones(3)),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "made up": lambda: torch._efficientzerotensor((3,)),
    "part of what is made up": lambda: torch._efficientzerotensor((4,))[1:],
    "freed": lambda: freed(torch.ones(3)),
    "part of what is freed": lambda: freed(torch.ones(9)[5:8]),
    "sparse": lambda: torch.ones(3).to_sparse(),
    "quantized": lambda: torch._empty_affine_quantized(3, scale=1.0, zero_point=0, dtype=torch.qint8),
    "a subclass": lambda: torch.ones(3).as_subclass(Another),
    "no tensor": lambda: None,
    "an array": lambda: torch.ones(3).numpy(),
}


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


class Another(Tensor):
    """No plain tensor."""


@pytest.mark.parametrize("name", MADE)
def test_a_tensor_is_recognised_by_all_that_it_is(name: str) -> None:
    rest = [torch.ones(n) for n in range(1, 40)]  # more than are looked at in one go
    for at in (0, 20, 39):
        found = known.remembered([*rest[:at], MADE[name](), *rest[at:]])
        assert found is not None
        for other, make in MADE.items():
            assert found.matches([*rest[:at], make(), *rest[at:]]) is (other == name)
            assert found.matches((*rest[:at], make(), *rest[at:])) is (other == name)
        assert not any(found.matches([*rest[:at], make(), *rest[at:]]) for make in ODD.values())
        assert not found.matches(rest)
        assert not found.matches([*rest, *rest])


@pytest.mark.parametrize("name", [n for n in ODD if n not in ("no tensor", "an array")])
def test_what_is_no_plain_tensor_is_not_remembered(name: str) -> None:
    assert known.remembered([torch.ones(2), ODD[name]()]) is None


def test_what_is_surely_apart(likes: str) -> None:
    """The guard does not see where tensors are."""
    memory = torch.zeros(40)
    a, b = known.Known([memory[:6], memory[:4]]), known.Known([memory[:5], memory[:0]])

    def are_apart(*at: int) -> bool:
        starts = [memory[i:] for i in at]
        return a.are_apart([starts[0][:6], starts[1][:4]], b, [starts[2][:5], starts[3][:0]])

    assert are_apart(0, 6, 10, 12) == (likes == "C++")
    assert are_apart(15, 11, 6, 7) == (likes == "C++")
    for reaching in ((0, 5, 10, 12), (0, 6, 9, 12), (10, 20, 9, 12), (10, 20, 10, 12), (0, 0, 10, 12), (20, 10, 22, 0)):
        assert not are_apart(*reaching)
    one = known.Known([memory[:6].double()])
    assert not one.are_apart([memory[:6].double()], b, [memory[:5], memory[:0]])
    assert not a.are_apart([memory[:6]], b, [memory[10:15], memory[:0]])
    assert not a.are_apart([memory[:6], torch._neg_view(memory[6:10])], b, [memory[10:15], memory[:0]])
    assert not a.are_apart([memory[:6], memory[6:10]], b, [memory[10:15]])


def test_tensors_that_were_recognised_may_be_gone_when_they_are_asked_for() -> None:
    tensors = [torch.zeros(4, 3) for _ in range(50)]
    found = known.Known(tensors)
    assert found.matches(tensors)
    del tensors
    found.likes.expect()
    assert found.matches([torch.zeros(4, 3) for _ in range(50)])


@pytest.mark.parametrize("offset", [0, 7])
@pytest.mark.parametrize("met", [False, True])
def test_one_whose_memory_is_not_there_is_refused(offset: int, met: bool) -> None:
    """As FSDP's is between uses. Read past all checks it would end the process."""
    xs = [torch.ones(99)[offset : offset + 12].view(4, 3), torch.ones(5)]
    table = TileTable.from_tiles(xs, [TILE, Tile(1, 0, (5, 1, 1), (1, 1, 1), 7)])
    for _ in range(3 * met):
        ops.channel_reduce(xs, table)
    made_up = torch._efficientzerotensor((8, 3))
    for x in (freed(xs[0]), made_up[:4], made_up[4:]):
        for _ in range(2):
            with pytest.raises(OpError, match=r"xs\[0\] to have memory"):
                ops.channel_reduce([x, xs[1]], table)
            with pytest.raises(OpError, match=r"xs\[0\] to have memory"):
                ops.channel_scale_([x, xs[1]], table, torch.ones(12))
            with pytest.raises(OpError, match=r"xs\[0\] to have memory"):
                ops.channel_compact([torch.ones(4, 3), torch.ones(5)], [x, xs[1]], table, table, torch.zeros(0).int())


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


class PassingFunctions(TorchFunctionMode):
    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("watch", [torch.profiler.profile, Passing, PassingFunctions])
@pytest.mark.parametrize("gone", [lambda: freed(torch.ones(4, 3)), lambda: torch._efficientzerotensor((4, 3))])
def test_it_is_so_whoever_watches(watch: Callable[[], Any], gone: Callable[[], Tensor]) -> None:
    xs = [torch.ones(4, 3)]
    table = TileTable.from_tiles(xs, [TILE])
    for _ in range(3):
        ops.channel_reduce(xs, table)
    with watch(), pytest.raises(OpError, match=r"xs\[0\] to have memory"):
        ops.channel_reduce([gone()], table)


@pytest.mark.parametrize("made", [lambda v: freed(v), lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype)])
def test_a_vector_whose_memory_is_not_there_is_refused(made: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4, 3)
    table = TileTable.from_tiles([x], [TILE])
    quarter = Tile(0, 0, (2, 2, 1), (2, 1, 1), 0, 2)
    half = TileTable.from_tiles([torch.zeros(2, 2)], [quarter], slots=4, shared_slots=True)
    with pytest.raises(OpError, match="coef to have memory"):
        ops.channel_axpy_([torch.zeros(4, 3)], [x], table, made(torch.ones(7)))
    with pytest.raises(OpError, match="scale to have memory"):
        ops.channel_scale_([x], table, made(torch.ones(7)))
    with pytest.raises(OpError, match="index to have memory"):
        ops.channel_compact([torch.zeros(2, 2)], [x], table, half, made(torch.tensor([0, 1, 0, 1], dtype=torch.int32)))
    assert (x == 1).all()


def test_wrappers_of_a_transform_have_none_and_are_let_through() -> None:
    x = torch.randn(4, 3)
    table = TileTable.from_tiles([x], [TILE])
    sums = ops.channel_reduce([x], table)
    gradient = torch.func.grad(lambda x: (x * ops.channel_reduce([x], table)[:4, None]).sum())(x)
    torch.testing.assert_close(gradient, sums[:4, None].expand(4, 3))


def test_an_address_may_be_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that is loaded at a fixed address: whether there is memory is asked then."""
    monkeypatch.setattr(known, "LOW", 2**62)
    assert known.is_plain(torch.ones(3))
    assert known.is_plain(torch.ones(0))
    assert not known.is_plain(freed(torch.ones(9)[5:8]))


def test_what_is_found_out_does_not_depend_on_when() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert known.is_reliable()
    finally:
        torch.set_default_dtype(torch.float32)


def test_from_the_third_time_on_the_kernel_is_called_at_once(
    weights: list[Tensor], table: TileTable, called: list[str]
) -> None:
    expected = ops.channel_reduce(weights, table)
    ops.channel_reduce(weights, table)
    assert not called
    meet(weights, table)
    called.clear()
    grads = [torch.zeros_like(w) for w in weights]
    assert torch.equal(ops.channel_reduce(weights, table), expected)
    ops.channel_axpy_(grads, weights, table, torch.ones(12))
    ops.channel_scale_(weights, table, torch.ones(12))
    assert called == ["channel_reduce", "channel_axpy_", "channel_scale_"]
    assert torch.equal(grads[0], 2 * weights[0])
    assert grads[0]._version == 1  # of autograd
    assert table.fits(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: torch.zeros(4, 3, dtype=torch.float64), r"xs\[1\] of torch.float64"),
        (lambda w: torch.zeros(3, 4).t(), r"strides \(3, 1\)"),
        (lambda w: torch.zeros(3, 3), r"of shape \(4, 3\)"),
        (lambda w: torch.zeros(4, 3, device="meta"), "on meta, as its companions"),
        (lambda w: torch._neg_view(torch.zeros(4, 3)), "lazily negated"),
    ],
)
def test_what_changed_is_seen(
    weights: list[Tensor], table: TileTable, change: Callable[[Tensor], Tensor], message: str
) -> None:
    meet(weights, table)
    with pytest.raises(OpError, match=message):
        ops.channel_reduce([change(weights[0]), weights[1]], table)
    weights[0].data = change(weights[0]) if change(weights[0]).device.type == "cpu" else torch.zeros(2, 2)
    with pytest.raises(OpError):
        ops.channel_reduce(weights, table)


def test_lists_that_are_known_apart_are_still_held_against_each_other(
    weights: list[Tensor], table: TileTable
) -> None:
    meet(weights, table)
    double = [w.detach().double() for w in weights]
    for _ in range(3):
        ops.channel_reduce(double, table)  # known as "xs" from here on; "ys" are known in single precision
    with pytest.raises(OpError, match=r"ys\[0\] of torch.float64"):
        ops.channel_reduce(double, table, [torch.zeros_like(w) for w in weights], f="mul")


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


class Heard(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, Heard])
def test_who_wants_to_see_ops_sees_them(weights: list[Tensor], table: TileTable, mode: Any) -> None:
    meet(weights, table)
    with mode() as seen:
        ops.channel_reduce(weights, table)
    assert "pat_fast.channel_reduce.default" in seen.ops


def test_fake_mode_and_a_profiler_see_them_too(weights: list[Tensor], table: TileTable, called: list[str]) -> None:
    meet(weights, table)
    called.clear()
    with torch.profiler.profile() as profile:
        ops.channel_reduce(weights, table)
    assert "pat_fast::channel_reduce" in {event.key for event in profile.key_averages()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        ops.channel_reduce(weights, table)
    assert not called


def test_a_lazily_negated_vector_goes_through_the_dispatcher(weights: list[Tensor], table: TileTable) -> None:
    meet(weights, table)
    grads = [torch.zeros_like(w) for w in weights]
    ops.channel_axpy_(grads, weights, table, torch._neg_view(torch.ones(12)))
    assert torch.equal(grads[0], -2 * weights[0])


@pytest.mark.parametrize("other", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_a_copied_table_looks_for_itself(
    weights: list[Tensor], table: TileTable, other: Callable[[Any], Any], called: list[str]
) -> None:
    meet(weights, table)
    called.clear()
    twin = other(table)
    assert torch.equal(ops.channel_reduce(weights, twin), ops.channel_reduce(weights, table))
    assert called == ["channel_reduce"]
    with pytest.raises(OpError, match="of shape"):
        ops.channel_reduce([weights[0][:2], weights[1]], twin)


def test_without_the_guard_all_is_as_before(
    weights: list[Tensor], table: TileTable, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known, "is_reliable", lambda: False)
    meet(weights, table)
    meet(weights, table)
    assert not called
    assert table.known == {"xs": None, "ys": None}


def test_tensors_that_come_to_overlap_are_refused(weights: list[Tensor], table: TileTable) -> None:
    meet(weights, table)
    grads = [torch.zeros_like(w) for w in weights]
    ops.channel_axpy_(grads, weights, table, torch.ones(12))
    ops.channel_axpy_(grads, weights, table, torch.ones(12))
    with pytest.raises(OpError, match="share no memory"):
        ops.channel_axpy_([weights[0].data, grads[1]], weights, table, torch.ones(12))
