"""Fixtures shared by all tests: the model zoo, and a thread count that does not depend on the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton looks at this when it is imported. Where there is no GPU its kernels are tested in its interpreter.
if not torch.cuda.device_count():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
