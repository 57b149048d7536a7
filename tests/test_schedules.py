"""When pruning happens, and how much of the target is due: worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pat_fast.errors import ConfigError
from pat_fast.schedules import CURVES, Exponential, Milestones, OneCycle, Schedule, make_curve


def test_linear_rises_by_the_same_amount() -> None:
    schedule = Schedule("linear", start=5, end=10)
    assert [schedule.fraction(e) for e in range(12)] == pytest.approx([0] * 6 + [0.2, 0.4, 0.6, 0.8, 1, 1])


def test_cubic_removes_most_at_first() -> None:
    schedule = Schedule("cubic", start=0, end=4)
    expected = [0, 1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1, 1]
    assert [schedule.fraction(e) for e in range(6)] == pytest.approx(expected)


def test_constant_is_all_at_once_at_the_start() -> None:
    schedule = Schedule("constant", start=2, end=6)
    assert [schedule.fraction(e) for e in range(4)] == [0, 0, 1, 1]
    assert [e for e in range(8) if schedule.due(e)] == [2, 3, 4, 5, 6, 7]


def test_a_function_of_the_progress() -> None:
    seen = []
    schedule = Schedule(lambda t: seen.append(t) or t * t, start=2, end=6)
    seen.clear()  # it was tried
    assert [schedule.fraction(e) for e in (3, 4, 5, 6)] == [1 / 16, 1 / 4, 9 / 16, 1]
    assert seen == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("curve", list(CURVES))
def test_every_curve_stays_within_bounds_and_never_falls(curve: str) -> None:
    fractions = [Schedule(curve, 3, 40).fraction(e) for e in range(50)]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0


@pytest.mark.parametrize(
    ("start", "end", "interval", "due"),
    [
        (5, 50, 5, [10, 15, 20, 25, 30, 35, 40, 45, 50]),
        (0, 3, 1, [1, 2, 3]),
        (1, 9, 3, [4, 7, 9]),  # the end is met although it is not a multiple
        (2, 4, 10, [4]),
        (3, 3, 1, [3]),
    ],
)
def test_prunes_come_every_interval_and_at_the_end(start: int, end: int, interval: int, due: list[int]) -> None:
    schedule = Schedule("linear", start, end, interval)
    assert [e for e in range(end + 1) if schedule.due(e)] == due


def test_stages_follow_one_another() -> None:
    schedule = Schedule("linear", start=2, end=4)
    assert [schedule.stage(e, done=e >= 4) for e in range(6)] == ["regularize"] * 2 + ["prune"] * 2 + ["finetune"] * 2
    assert schedule.stage(3, done=True) == "finetune"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "liner"}, r"expected one of linear, cubic, constant, .* or a function, got 'liner'; .* 'linear'"),
        ({"curve": []}, r"schedule: expected one of .* or a function, got \[\]"),
        ({"curve": 3}, r"schedule: expected one of .* or a function, got 3"),
        ({"start": -1}, r"start_epoch: expected a whole number, at least 0, got -1"),
        ({"start": 5, "end": 4}, r"end_epoch: expected at least start_epoch \(5\), got 4"),
        ({"end": "9"}, r"end_epoch: expected a whole number, at least 0, got '9'"),
        ({"interval": 0}, r"interval: expected a whole number, at least 1, got 0"),
        ({"interval": 1.5}, r"interval: expected a whole number, at least 1, got 1.5"),
        ({"start": None}, r"start_epoch: expected a whole number, at least 0, got None"),
    ],
)
def test_bad_schedules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), None])
def test_a_curve_that_leaves_its_bounds(value: Any) -> None:
    """It is refused when the pruner is made, not when the training is half done."""
    with pytest.raises(ConfigError, match=rf"the curve must return a fraction in 0 .. 1, got {value} at epoch 7"):
        Schedule(lambda t: value if t > 0.6 else t, 0, 10)


@pytest.mark.parametrize("end", [10, 5000])
def test_a_curve_that_falls(end: int) -> None:
    expected = r"the curve must not fall, got 0.[23].* at epoch \d+ after 0.[67].*does not come"
    with pytest.raises(ConfigError, match=expected):
        Schedule(lambda t: t if t < 0.65 else t - 0.4, 0, end)
    Schedule(lambda t: math.floor(4 * t) / 4 - 1e-12 * t if t > 0.3 else 0.0, 0, end)  # steps, rounded


# The shapes of the curves


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cosine", [0.0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1.0]),
        ({"name": "polynomial", "power": 2}, [0.0, 7 / 16, 3 / 4, 15 / 16, 1.0]),
        ({"name": "polynomial", "power": 1}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"name": "exponential", "rate": 4 * math.log(2)}, [0.0, 8 / 15, 12 / 15, 14 / 15, 1.0]),
        ({"name": "exponential", "rate": -4 * math.log(2)}, [0.0, 1 / 15, 3 / 15, 7 / 15, 1.0]),
        ("milestones", [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"name": "milestones", "at": [0.3, 0.75]}, [0.0, 0.0, 0.5, 1.0, 1.0]),
        ({"name": "milestones", "at": [0.25, 1.0], "fractions": [0.9, 1.0]}, [0.0, 0.9, 0.9, 0.9, 1.0]),
    ],
)
def test_curves_by_hand(given: Any, expected: list[float]) -> None:
    schedule = Schedule(given, 10, 18, 1)
    assert [schedule.fraction(e) for e in (10, 12, 14, 16, 18)] == pytest.approx(expected)


def test_one_cycle_is_the_papers_but_for_its_start() -> None:
    paper = [(1 + math.exp(-14 + 5)) / (1 + math.exp(-14 * t + 5)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert [OneCycle()(t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(paper, abs=0.01)
    assert OneCycle()(0.0) == 0.0


def test_one_shot_prunes_once() -> None:
    for start, at in ((0, 1), (4, 4)):
        schedule = Schedule("one_shot", start, 50, 1)
        assert [e for e in range(60) if schedule.due(e)] == [at]
        assert (schedule.fraction(at - 1), schedule.fraction(at), schedule.end) == (0.0, 1.0, at)


def test_schedules_are_values() -> None:
    assert Schedule("cubic", 1, 5) == Schedule("cubic", 1, 5)
    assert make_curve("cubic") == make_curve({"name": "polynomial", "power": 3.0})
    with pytest.raises(AttributeError):
        Exponential().rate = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_curve({"name": "cubic", "powr": 3}), r"'cubic' has no option 'powr'; it has none"),
        (lambda: make_curve({"power": 3}), r"schedule: expected one of .* got None"),
        (lambda: make_curve(Milestones), r"schedule: expected one of .* got <class"),
        (lambda: Exponential(0), r"rate: expected a number other than 0"),
        (lambda: OneCycle(slope=0), r"slope: expected a number in \(0, 100\], got 0"),
        (lambda: Milestones(()), r"at: expected rising numbers in \(0, 1\]"),
        (lambda: Milestones((0.5, 0.2)), r"at: expected rising numbers"),
        (lambda: Milestones((0.5, 1.0), (0.5,)), r"fractions: expected 2 rising numbers in \(0, 1\], the last"),
    ],
)
def test_bad_curves(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_plot_has_a_line_for_each_prune() -> None:
    lines = Schedule("linear", 2, 10, 2).plot(0.5, width=8).splitlines()
    assert lines == [
        "epoch  share",
        "    2   0.0%",
        "    4  12.5%  ##",
        "    6  25.0%  ####",
        "    8  37.5%  ######",
        "   10  50.0%  ########",
    ]
    assert len(Schedule("linear", 0, 1000).plot(rows=20).splitlines()) == 21
