"""Which backend runs which op, the override, and what `pat-fast env` says about it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pat_fast import backends, env
from pat_fast.backends import cpu

WITHOUT_EXTENSION = "import sys; sys.modules['pat_fast._C'] = None; "
SHOW = (
    "import pat_fast.ops; from pat_fast.backends import describe; print({r['backend'] for r in describe()})"
)


def run(code: str, override: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != backends.ENV}
    if override is not None:
        environment[backends.ENV] = override
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_every_op_has_one_winner_everywhere() -> None:
    rows = backends.describe()
    keys = [(row["op"], row["device"]) for row in rows]
    assert len(keys) == len(set(keys)) == 4 * len(backends.DEVICES)
    assert {row["backend"] for row in rows if row["device"] == backends.ANY} == {"reference"}


@pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ extension is not built")
@pytest.mark.skipif(backends.ENV in os.environ, reason="a backend is forced")
def test_the_kernels_win_on_the_cpu() -> None:
    assert {row["backend"] for row in backends.describe() if row["device"] == "cpu"} == {"cpu"}


def test_the_override_forces_the_reference() -> None:
    found = run(SHOW, "reference")
    assert found.stdout.strip() == "{'reference'}", found.stderr


def test_an_unknown_override_is_refused_with_a_suggestion() -> None:
    found = run(SHOW, "cpuu")
    assert found.returncode != 0
    assert "BackendError: expected PAT_FAST_BACKEND to be one of cpu, reference; got 'cpuu'" in found.stderr
    assert "did you mean 'cpu'?" in found.stderr


def test_an_override_that_cannot_run_fails_loudly() -> None:
    found = run(WITHOUT_EXTENSION + SHOW, "cpu")
    assert found.returncode != 0
    assert "BackendError: expected PAT_FAST_BACKEND=cpu to run here" in found.stderr


def test_without_the_extension_the_reference_runs_and_says_why() -> None:
    code = WITHOUT_EXTENSION + "from pat_fast.env import render; print(render())"
    found = run(code)
    assert found.returncode == 0, found.stderr
    assert "not cpu: the C++ extension is not there" in found.stdout


def test_importing_the_ops_starts_neither_cuda_nor_a_compiler() -> None:
    code = (
        "import sys, subprocess, torch\n"
        "def no(*a, **k): raise AssertionError('a process was started')\n"
        "subprocess.Popen.__init__ = no\n"
        "import pat_fast.ops\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    found = run(code)
    assert found.returncode == 0, found.stderr


def test_env_reports_what_runs() -> None:
    report = env.report()
    assert report["versions"]["torch"]
    assert report["backends"] == backends.describe()
    assert report["extension"]["built"] == (cpu.unavailable() is None)
    text = env.render()
    assert "torch-pruning" in text
    assert "channel_reduce" in text
