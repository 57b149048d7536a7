"""Shared by the pytest-benchmark suites: subjects, the bandwidth of this run, the closing table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.cases import CASES, MODELS, Subject
from benchmarks.common import Bandwidth, Evictor, Row, measure, table, with_share

ROWS = pytest.StashKey[list[Row]]()
RATES = pytest.StashKey[Bandwidth]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="3 rounds: a glance, not a result")
    parser.addoption("--small", action="store_true", help="the zoo's small models: checks that it all works")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("pat_fast against Torch-Pruning")
        bandwidth = config.stash[RATES]
        terminalreporter.write_line(table(with_share(row, bandwidth) for row in config.stash[ROWS]))
        terminalreporter.write_line(f"bandwidth: {bandwidth}")


@pytest.fixture(scope="session")
def bandwidth(request: pytest.FixtureRequest) -> Bandwidth:
    request.config.stash[RATES] = Bandwidth()
    return request.config.stash[RATES]


@pytest.fixture(scope="session", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param, small=request.config.getoption("--small"))


@pytest.fixture
def compare_with_tp(
    benchmark: Any, subject: Subject, bandwidth: Bandwidth, request: pytest.FixtureRequest
) -> Callable[[str], Row]:
    """Measure one operation against Torch-Pruning, then let pytest-benchmark time pat_fast's side."""

    def run(op: str) -> Row:
        rounds = 3 if request.config.getoption("--quick") else 15
        case = CASES[op](subject)
        row = measure(case, bandwidth, rounds)
        request.config.stash[ROWS].append(row)
        assert not row.problem, row.problem
        evict = Evictor()

        def prepare() -> tuple[tuple[object], dict[str, object]]:
            timed = case.ours()
            evict()
            return (timed,), {}

        benchmark.group = op
        benchmark.extra_info.update(asdict(row))
        benchmark.pedantic(
            lambda timed: timed(), setup=prepare, rounds=max(3, rounds // (3 if case.slow else 1))
        )
        return row

    return run
