"""Normalisers over all groups at once against the formulas, group by group in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pat_fast import ConfigError
from pat_fast.criteria import Segments, normalize
from pat_fast.criteria.normalizers import EPSILON

SIZES = (1, 7, 2, 30)


def segments(alive: Tensor | None = None) -> Segments:
    return Segments(torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES)), len(SIZES), alive)


def slow_lamp(x: list[float]) -> list[float]:
    return [v / sum(w for j, w in enumerate(x) if (w, j) >= (v, i)) for i, v in enumerate(x)]


def slow_gaussian(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / max(len(x) - 1, 1))
    return [(v - mean) / (std + EPSILON) for v in x]


FORMULAS: dict[Any, Callable[[list[float]], list[float]]] = {
    "sum": lambda x: [v / sum(x) for v in x],
    "mean": lambda x: [v * len(x) / sum(x) for v in x],
    "max": lambda x: [v / max(x) for v in x],
    "standarization": lambda x: [(v - min(x)) / (max(x) - min(x) + EPSILON) for v in x],
    "gaussian": slow_gaussian,
    "sentinel_0.5": lambda x: [v / (sorted(x)[int(0.5 * len(x))] + EPSILON) for v in x],
    "sentinel_0.0": lambda x: [v / (min(x) + EPSILON) for v in x],
    "lamp": slow_lamp,
    None: lambda x: x,
}


@pytest.mark.parametrize("scale", [1.0, 1e-12])
@pytest.mark.parametrize("how", FORMULAS)
def test_formulas(how: Any, scale: float) -> None:
    x = torch.rand(sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[8:] = x[8:] * scale  # groups of very different size do not disturb one another
    found = normalize(x, segments(), how)
    expected = [v for part in x.split(SIZES) for v in FORMULAS[how](part.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert normalize(x.float(), segments(), how).dtype == torch.float32


@pytest.mark.parametrize("how", [h for h in FORMULAS if h is not None])
def test_the_masked_take_no_part(how: str) -> None:
    x = torch.rand(sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alive = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) > 0.3
    alive[0] = True
    found = normalize(x, segments(alive), how)[alive]
    expected: list[float] = []
    for part, mask in zip(x.split(SIZES), alive.split(SIZES), strict=True):
        if mask.any():
            expected += FORMULAS[how](part[mask].tolist())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", [h for h in FORMULAS if h is not None])
def test_zeros_and_nan_stay_in_their_group(how: str) -> None:
    x = torch.rand(sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = normalize(x, segments(), how)
    zeros = x.clone()
    zeros[1:8] = 0
    assert (normalize(zeros, segments(), how)[1:8] == 0).all()
    bad = x.clone()
    bad[9] = torch.nan
    found = normalize(bad, segments(), how)
    torch.testing.assert_close(found[:8], clean[:8])
    torch.testing.assert_close(found[10:], clean[10:])


def test_equal_scores_are_ranked_in_their_order() -> None:
    found = normalize(torch.ones(4, dtype=torch.float64), Segments.one(4, torch.device("cpu")), "lamp")
    torch.testing.assert_close(found, torch.tensor([1 / 4, 1 / 3, 1 / 2, 1.0], dtype=torch.float64))


def test_functions_are_called_with_each_group() -> None:
    seen: list[int] = []

    def double(part: Tensor) -> Tensor:
        seen.append(len(part))
        return 2 * part

    x = torch.rand(sum(SIZES))
    torch.testing.assert_close(normalize(x, segments(), double), 2 * x)
    assert tuple(seen) == SIZES
    with pytest.raises(ConfigError, match=r"to a tensor \(1,\), got shape \(\)"):
        normalize(x, segments(), lambda part: part.sum())


@pytest.mark.parametrize("how", ["mena", "lamp_0.5", "sentinel", "sentinel_1", "sentinel_x", 3])
def test_unknown_normalizers(how: Any) -> None:
    with pytest.raises(ConfigError, match="normalizer: expected"):
        normalize(torch.ones(3), Segments.one(3, torch.device("cpu")), how)


def test_nothing_at_all() -> None:
    assert normalize(torch.zeros(0), Segments(torch.zeros(0, dtype=torch.int64), 0), "lamp").shape == (0,)
