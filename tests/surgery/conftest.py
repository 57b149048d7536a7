"""Fixtures of the tests of surgery."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from pat_fast.surgery import optimizer as layouts


@pytest.fixture
def one_thread_and_the_usual_layouts() -> Iterator[None]:
    """What a test registers of the state of optimizers is gone after it."""
    torch.set_num_threads(1)
    usual = copy.copy(layouts._LAYOUTS)
    yield
    layouts._LAYOUTS.clear()
    layouts._LAYOUTS.update(usual)
