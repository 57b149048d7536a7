"""Timing: medians, spread, turns, and the kinds of bandwidth."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import pytest
import torch

from pat_fast.bench.bandwidth import Bandwidth
from pat_fast.bench.clock import Clock, Sample


def test_the_median_and_the_spread_of_a_sample() -> None:
    sample = Sample((5.0, 1.0, 2.0, 3.0, 4.0))
    assert sample.ms == 3.0
    assert sample.spread == pytest.approx((4.5 - 1.5) / 3)
    assert sample.is_noisy
    assert Sample((1.0, 1.2)).spread == pytest.approx(0.2 / 1.1)
    assert not Sample((1.0, 1.01, 1.02, 1.0, 1.0)).is_noisy


def test_sides_take_turns_and_are_prepared_before_every_run() -> None:
    seen: list[str] = []

    def side(name: str) -> Callable[[], Callable[[], None]]:
        def prepare() -> Callable[[], None]:
            seen.append(f"prepare {name}")
            return lambda: seen.append(name)

        return prepare

    found = Clock(torch.device("cpu"), rounds=3, mebibytes=1).compare({"a": side("a"), "b": side("b")})
    order = ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert seen == [word for name in order for word in (f"prepare {name}", name)]
    assert {name: len(sample.times) for name, sample in found.items()} == {"a": 3, "b": 3}


def test_a_warm_clock_calls_once_untimed_before() -> None:
    calls: list[float] = []

    def prepare() -> Callable[[], None]:
        return lambda: (calls.append(1.0), time.sleep(0.03 if len(calls) % 2 else 0.0))[1]

    clock = Clock(torch.device("cpu"), rounds=4, mebibytes=1, cold=False)
    assert clock.compare({"a": prepare})["a"].ms < 20  # every first call, which takes longer, is not timed
    assert len(calls) == 2 * (1 + 4)


def test_caches_are_emptied_by_reading() -> None:
    """What was written would have to be brought back to memory in the timed call."""
    clock = Clock(torch.device("cpu"), rounds=1, mebibytes=1)
    clock.evict()
    assert clock._buffer._version == 0
    assert (clock._buffer == 1).all()


def test_times_are_milliseconds_of_the_call_alone() -> None:
    clock = Clock(torch.device("cpu"), rounds=2, mebibytes=1)
    assert 20 <= clock.sample(lambda: time.sleep(0.02)).ms < 500

    def prepare() -> Callable[[], None]:
        time.sleep(0.05)
        return lambda: None

    assert clock.compare({"": prepare})[""].ms < 40


def test_what_a_call_returns_outlives_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letting go of what is new is no part of making it."""
    clock, ends = Clock(torch.device("cpu"), rounds=2, mebibytes=1), list[bool]()
    made: list[weakref.ref[torch.Tensor]] = []

    def run() -> torch.Tensor:
        tensor = torch.ones(1)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Clock, "_wait", lambda self: ends.append(bool(made) and made[-1]() is not None))
    clock.compare({"": lambda: run})
    assert ends == [False, True] * 3
    assert made[-1]() is None


def test_every_kind_of_traffic_gets_the_best_rate_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"), rounds=1, mebibytes=1)
    times = iter(range(1, 1000))
    monkeypatch.setattr(clock, "best", lambda run, rounds: float(next(times)))
    bandwidth = Bandwidth(clock, mebibytes=1)
    n = 2**20
    assert bandwidth.rates["copy"] == pytest.approx(2 * n / 1 / 1e6)
    assert bandwidth.rates["read"] == pytest.approx(n / 2 / 1e6)
    assert bandwidth.winners["read"] == "torch.sum"
    before = dict(bandwidth.rates)
    bandwidth.probe()  # slower by now
    assert bandwidth.rates == before
    assert [bandwidth.kind(t) for t in ("read", "copy", "scale", "axpy", "other")] == [
        "read", "copy", "scale", "axpy", "copy",
    ]  # fmt: skip
