"""The self-check finds wrong backends, whatever is wrong with them, and passes right ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from pat_fast.backends import cpu, reference, selfcheck

CPU = torch.device("cpu")


def compute(op: str) -> Any:
    return reference.OPS[op]


def no_column_sums(xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, *rest: Any) -> Tensor:
    without = tiles.clone()
    without[:, 9] = -1
    return compute("channel_reduce")(xs, ys, without, *rest)


def gaps_left_open(xs: Sequence[Tensor], ys: Sequence[Tensor], tiles: Tensor, slots: int, *rest: Any) -> Tensor:
    found = compute("channel_reduce")(xs, ys, tiles, slots, *rest)
    found[-1] = torch.nan
    return found


def half_sums(xs: Sequence[Tensor], *rest: Any) -> Tensor:
    return compute("channel_reduce")(xs, *rest).to(xs[0].dtype).float()


def wrong_for_bfloat16(ys: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, coef: Tensor) -> None:
    compute("channel_axpy_")(ys, xs, tiles, -coef if ys[0].dtype == torch.bfloat16 else coef)


def ieee_products(xs: Sequence[Tensor], tiles: Tensor, scale: Tensor) -> None:
    infinite = [x.isinf() for x in xs]
    compute("channel_scale_")(xs, tiles, scale)
    for x, where in zip(xs, infinite, strict=True):
        x[where] = torch.nan


def shifted(outs: Sequence[Tensor], xs: Sequence[Tensor], tiles: Tensor, out_tiles: Tensor, index: Tensor) -> None:
    compute("channel_compact")(outs, xs, tiles, out_tiles, index)
    outs[1].copy_(outs[1].roll(1))


def broken(*arguments: Any) -> None:
    raise OSError("no compiler\nsecond line")


@pytest.mark.parametrize(
    ("op", "wrong", "message"),
    [
        ("channel_reduce", no_column_sums, "channel_reduce of float32 differs .*sums: off by up to"),
        ("channel_reduce", gaps_left_open, "channel_reduce of float32 differs"),
        ("channel_reduce", half_sums, "channel_reduce of bfloat16 differs"),
        ("channel_axpy_", wrong_for_bfloat16, "channel_axpy_ of bfloat16 differs"),
        ("channel_scale_", ieee_products, r"channel_scale_ of float32 differs from the reference \(\(7, 5, 9\)"),
        ("channel_compact", shifted, r"channel_compact of float32 differs .*\(8, 4, 9\): not the same bits"),
        ("channel_compact", broken, r"channel_compact of float32 failed \(OSError: no compiler\)"),
    ],
)
def test_what_is_wrong_is_named(op: str, wrong: Any, message: str) -> None:
    found = selfcheck.difference(reference.OPS | {op: wrong}, CPU)
    assert found is not None
    assert re.search(message, found), found


def test_right_backends_pass() -> None:
    assert selfcheck.difference(reference.OPS, CPU) is None
    if cpu.unavailable() is None:
        assert selfcheck.difference(cpu.OPS | cpu.SHORTCUTS, CPU) is None
    assert selfcheck.difference({}, CPU) is None


def for_other_columns(ys: Any, *rest: Any) -> None:
    cpu.group_push(ys, *rest)
    changed = ys()[0][3]
    changed[:, 1] = changed[:, 0]


def twice(*arguments: Any) -> Tensor:
    return cpu.channel_totals(*arguments) * 2


def never_divided(xs: Any, known: Any, groups: Any, p: float, divided: bool) -> Tensor:
    return cpu.channel_totals(xs, known, groups, p, False)


@pytest.mark.skipif(not cpu.SHORTCUTS, reason="the C++ kernels are not there")
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("group_push", for_other_columns, "group_push of float32 differs from the reference ((40, 528, 1)"),
        ("channel_totals", twice, "channel_totals of float32 differs from the reference (sums: off by up to"),
        ("channel_totals", never_divided, "channel_totals of float32 differs from the reference (sums: off by up to"),
        ("channel_totals", broken, "channel_totals of float32 failed (OSError: no compiler)"),
    ],
)
def test_shortcuts_are_checked_too(name: str, wrong: Any, message: str) -> None:
    found = selfcheck.difference(cpu.OPS | cpu.SHORTCUTS | {name: wrong}, CPU)
    assert found is not None
    assert found.startswith(message)


def test_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    selfcheck.difference(reference.OPS, CPU)
    assert torch.equal(torch.get_rng_state(), before)


class Seeing(TorchFunctionMode):
    """A mode that does nothing but see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a profiler": torch.profiler.profile,
    "a profiler of all threads": lambda: torch.profiler.profile(
        experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    ),
    "a function mode": Seeing,
    "another default device": lambda: default_device("meta"),
    "fake tensors": FakeTensorMode,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.skipif(cpu.unavailable() is not None, reason="no C++ extension")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_what_surrounds_the_first_use_says_nothing_of_a_backend(name: str) -> None:
    with SURROUNDINGS[name]():
        right = selfcheck.difference(cpu.OPS | cpu.SHORTCUTS, CPU)
        wrong = selfcheck.difference(cpu.OPS | {"channel_axpy_": wrong_for_bfloat16}, CPU)
    assert right is None
    assert wrong is not None


def test_a_shortcut_that_nothing_would_call_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "is_reliable", lambda: False)
    untried = dict.fromkeys(("grouping", "channel_totals", "group_push"), broken)
    assert selfcheck.difference(cpu.OPS | untried, CPU) is None
