"""Fixtures shared by all tests: the model zoo, and a thread count that does not depend on the machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import Case, zoo_names


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=zoo_names())
def case(request: pytest.FixtureRequest) -> Case:
    """Every small model of the zoo, in float64 with random parameters and buffers."""
    return Case.build(request.param)
