"""What all tests share: the model zoo, a thread count of their own, what is done where there is no GPU."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Triton looks at this when it is imported. Where there is no GPU its kernels are tested in its interpreter.
if not torch.cuda.device_count():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import results
from tests.helpers import Case, zoo_names


def pytest_addoption(parser: pytest.Parser) -> None:
    # As --json=FILE: before pytest has read this, it would take a FILE that stands alone for tests to run.
    parser.addoption("--json", type=Path, metavar="FILE", help="write each test's outcome, and the machine, to FILE")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--json")
    if path is not None and not hasattr(session.config, "workerinput"):  # not in each process of xdist
        results.write(path, session.config.pluginmanager.getplugin("terminalreporter").stats, exitstatus)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a GPU, what needs one is skipped; what was asked for by ``-m gpu`` fails."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.device_count():
        if "gpu" in item.config.getoption("-m"):
            pytest.fail("no CUDA device", pytrace=False)
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _same_every_time() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _light_garbage() -> Iterator[None]:
    """For what collects garbage before each call that it times: what is here already is not looked at again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=zoo_names())
def case(request: pytest.FixtureRequest) -> Case:
    """Every small model of the zoo, in float64 with random parameters and buffers."""
    return Case.build(request.param)
