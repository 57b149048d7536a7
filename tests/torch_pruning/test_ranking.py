"""Thresholds, ties, caps and rounding, on scores alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pat_fast.torch_pruning.engine.ranking import Field, choose, choose_heads, nearest, rounded

Group = dict[str, Any]


def candidate(scores: Any, scope: str = "all", ratio: float = 0.5, **more: Any) -> Group:
    scores = np.asarray(scores, dtype=np.float32)
    known = {"width": len(scores), "least": 1, "multiple": 1, "cap": 0}
    return {"scores": scores, "scope": scope, "ratio": ratio, **known, **more}


def run(*groups: Group, round_to: int | None = None, initial: dict[str, int] | None = None) -> list[list[int]]:
    field = Field.of([("layer", g["scope"], len(g["scores"]), g["width"], g["least"], g["multiple"]) for g in groups])
    scores = np.concatenate([g["scores"] for g in groups])
    caps, ratios = np.array([g["cap"] for g in groups]), {g["scope"]: g["ratio"] for g in reversed(groups)}
    gone, going = choose(field, scores, caps, ratios, {} if initial is None else initial, round_to)
    found = [np.flatnonzero(own).tolist() for own in np.split(gone, field.starts[1:-1])]
    assert going.tolist() == [len(own) for own in found]
    return found


def test_the_least_important_of_a_scope_go() -> None:
    assert run(candidate([1, 5, 2, 6]), candidate([3, 4, 8, 7])) == [[0, 2], [0, 1]]
    assert run(candidate([1, 2, 3, 4], "a"), candidate([10, 20, 30, 40], "b", 0.25)) == [[0, 1], [0]]


def test_what_is_gone_already_counts() -> None:
    initial = {"all": 8}
    assert run(candidate([1, 5, 2, 6, 9, 9]), initial=initial) == [[0, 2]]
    assert initial == {"all": 8}


def test_scopes_need_not_stand_side_by_side() -> None:
    groups = [candidate([1, 2, 3, 4], "a"), candidate([5, 6, 7, 8], "b"), candidate([2.5, 9, 9, 9], "a")]
    assert run(*groups) == [[0, 1, 2], [0, 1], [0]]


def test_ties_are_shared_by_the_groups() -> None:
    assert [len(g) for g in run(candidate([1.0] * 4), candidate([1.0] * 8))] == [2, 4]


def test_a_rounding_error_does_not_take_a_whole_group() -> None:
    assert [len(g) for g in run(candidate([1.0 - 1e-7] * 4), candidate([1.0] * 4))] == [2, 2]


def test_a_group_that_would_be_gone_is_left_and_named() -> None:
    with pytest.warns(UserWarning, match="layer: all of its channels are among the least important"):
        assert run(candidate([1, 2]), candidate([10, 20, 30, 40], ratio=0.5)) == [[], [0]]


def test_scores_that_are_no_numbers_stay() -> None:
    assert run(candidate([np.nan, 2, 1, np.nan])) == [[1, 2]]


def test_a_cap_hands_its_share_to_others() -> None:
    assert run(candidate([1, 2, 3, 4], cap=3), candidate([10, 20, 30, 40])) == [[0], [0, 1, 2]]


def test_least() -> None:
    assert run(candidate([1, 2, 3, 4], ratio=0.75, least=2)) == [[0, 1]]


@pytest.mark.parametrize(
    ("units", "left", "least", "width", "round_to", "expected"),
    [
        (16, 11, 1, 16, 8, 8),  # down
        (12, 6, 1, 12, 8, 8),  # but not to nothing
        (6, 3, 1, 6, 8, 6),  # no multiple fits
        (8, 6, 1, 32, 8, 6),  # four channels a unit: two units are a multiple
        (8, 5, 1, 32, 8, 4),
        (9, 4, 3, 9, 2, 4),
        (9, 3, 3, 9, 2, 4),  # down would be less than must stay
    ],
)
def test_rounded(units: int, left: int, least: int, width: int, round_to: int, expected: int) -> None:
    assert rounded(units, left, least, width, round_to) == expected


@pytest.mark.parametrize(
    ("units", "left", "least", "width", "multiple", "expected"),
    [
        (24, 11, 1, 24, 8, 8),
        (24, 13, 1, 24, 8, 16),  # nearer, though it is up
        (24, 2, 1, 24, 8, 8),  # not to nothing
        (24, 10, 9, 24, 8, 16),  # down would be less than must stay
        (8, 5, 1, 32, 8, 4),  # four channels a unit
        (6, 3, 1, 6, 8, 6),  # no multiple fits
    ],
)
def test_nearest(units: int, left: int, least: int, width: int, multiple: int, expected: int) -> None:
    assert nearest(units, left, least, width, multiple) == expected


@pytest.mark.parametrize(("round_to", "left"), [(None, 16), (3, 24)])
def test_a_kernel_that_needs_a_multiple_gets_it(round_to: int | None, left: int) -> None:
    (gone,) = run(candidate(list(range(32)), ratio=0.4, multiple=8), round_to=round_to)
    assert gone == list(range(32 - left))


def test_heads() -> None:
    scores = [np.array([3.0, 1.0, 2.0]), np.array([1.0, 2.0])]
    assert [g.tolist() for g in choose_heads(scores, [2, 0])] == [[False, True, True], [False, False]]
    assert [g.tolist() for g in choose_heads(scores, [3, 1])] == [[False] * 3, [True, False]]
