"""Shared by the pytest-benchmark suites: subjects, the bandwidth of this run, the closing table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.cases import MODELS, Subject
from pat_fast.bench import Row, table
from pat_fast.bench.run import QUICK_ROUNDS, Bench, Settings
from pat_fast.bench.steps import STEPS, Step

ROWS = pytest.StashKey[list[Row]]()
BENCH = pytest.StashKey[Bench]()
Measure = Callable[[str, Step], Row]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="3 rounds: a glance, not a result")
    parser.addoption("--small", action="store_true", help="the zoo's small models: checks that it all works")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[ROWS]:
        terminalreporter.section("pat_fast against Torch-Pruning")
        bandwidth = config.stash[BENCH].bandwidth
        terminalreporter.write_line(table(row.held_against(bandwidth) for row in config.stash[ROWS]))
        terminalreporter.write_line(f"bandwidth: {bandwidth}")


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    rounds = QUICK_ROUNDS if request.config.getoption("--quick") else 15
    request.config.stash[BENCH] = Bench(Settings(models=("tiny",), rounds=rounds), lambda line: None)
    return request.config.stash[BENCH]


@pytest.fixture(scope="session", params=MODELS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param, small=request.config.getoption("--small"))


@pytest.fixture
def measure(benchmark: Any, bench: Bench, request: pytest.FixtureRequest) -> Measure:
    """Measure an operation against Torch-Pruning, then let pytest-benchmark time pat_fast's side."""

    def run(model: str, step: Step) -> Row:
        row = bench.step(Row(model, step.op, "float32", bench.in_use()), step)
        request.config.stash[ROWS].append(row)
        assert row.ratio is not None, row.no_ratio

        def prepare() -> tuple[tuple[object], dict[str, object]]:
            timed = step.ours()
            bench.clock.evict()
            return (timed,), {}

        benchmark.group = step.op
        benchmark.extra_info.update(asdict(row.held_against(bench.bandwidth)))
        benchmark.pedantic(lambda timed: timed(), setup=prepare, rounds=bench.rounds(step))
        return row

    return run


@pytest.fixture
def compare_with_tp(subject: Subject, measure: Measure) -> Callable[[str], Row]:
    return lambda op: measure(subject.name, STEPS[op](subject))
