"""Which backend runs which op, the override, and what `pat-fast env` says about it."""

from __future__ import annotations

import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pat_fast import backends, env
from pat_fast.backends import Backend, cpu, cuda, reference, triton
from pat_fast.cli import app
from pat_fast.errors import BackendError

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


@pytest.mark.parametrize(("named", "device"), [("cpu", "cuda"), ("triton", "cpu"), ("cuda", "cpu")])
def test_what_an_override_leaves_to_the_reference_says_so(
    named: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [replace(b, probe=lambda device: None, checked=False, named_devices=()) for b in backends.BACKENDS]
    monkeypatch.setattr(backends, "BACKENDS", tuple(runs))
    monkeypatch.setenv(backends.ENV, named)
    select = backends.select.__wrapped__  # what is chosen so is not to be kept
    why = {"cuda": "not cuda: {0}; not triton: {0}", "cpu": "not cpu: {0}"}[device].format(f"{backends.ENV}={named}")
    assert {(choice.backend, choice.why) for choice in select(device)} == {("reference", why)}
    assert {choice.why for choice in select(backends.ANY)} == {"first that serves this device"}


def test_an_unknown_override_is_refused_with_a_suggestion() -> None:
    found = run(SHOW, "cpuu")
    assert found.returncode != 0
    assert "BackendError: expected PAT_FAST_BACKEND to be one of cuda, cpu, " in found.stderr
    assert "did you mean 'cpu'" in found.stderr


def test_env_says_in_one_line_that_an_override_fails_its_check(
    fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(channel_scale_=lambda xs, tiles, scale: None)
    monkeypatch.setenv(backends.ENV, "fake")
    found = CliRunner().invoke(app, ["env"])
    assert found.exit_code == 2
    assert found.stderr.startswith("error: expected PAT_FAST_BACKEND=fake to agree with the reference on cpu; got: ")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("start", ["-m pat_fast", "-Bm pat_fast", "-mpat_fast", "-m pat_fast.cli"])
def test_the_command_says_in_one_line_that_an_override_is_unknown(start: str) -> None:
    environment = os.environ | {backends.ENV: "cpuu"}
    line = [sys.executable, *start.split(), "env"]
    found = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: expected PAT_FAST_BACKEND to be one of")
    assert found.stderr.count("\n") == 1


def test_another_program_with_such_an_argument_is_not_the_command() -> None:
    line = [sys.executable, "-c", "import pat_fast", "-m", "pat_fast"]
    found = subprocess.run(line, capture_output=True, text=True, env=os.environ | {backends.ENV: "cpuu"}, check=False)
    assert "BackendError: expected PAT_FAST_BACKEND" in found.stderr


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


def test_triton_on_the_cpu_only_in_its_interpreter_and_only_by_name() -> None:
    if triton.unavailable("cpu") == "Triton is not installed":
        pytest.skip("Triton is not installed")
    code = "import os; os.environ.pop('TRITON_INTERPRET', None); "
    if not torch.cuda.device_count():
        found = run(code + SHOW, "triton")
        assert "expected PAT_FAST_BACKEND=triton to run here; got: PyTorch sees no CUDA device" in found.stderr
    found = run("import os; os.environ['TRITON_INTERPRET'] = '1'; " + SHOW)
    assert "triton" not in found.stdout, found.stderr


@pytest.mark.parametrize(
    ("version", "message"), [("3.5.1", "Triton 3.5.1 is older than 3.6"), (None, "Triton is not installed")]
)
def test_triton_says_why_it_cannot_run(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        if version is None:
            raise triton.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(triton.importlib.metadata, "version", find)
    assert triton.unavailable("cuda") == triton.unavailable("cpu") == message


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put a backend of some ops, to be checked before use, in front of the reference on the CPU."""
    monkeypatch.delenv(backends.ENV, raising=False)

    def install(**changed: Any) -> None:
        module = types.ModuleType("fake_backend")
        module.OPS = reference.OPS | changed
        monkeypatch.setitem(sys.modules, "fake_backend", module)
        made = Backend("fake", "fake_backend", ("cpu",), lambda device: None, checked=True)
        monkeypatch.setattr(backends, "BACKENDS", (made, backends.BACKENDS[-1]))
        backends.select.cache_clear()

    yield install
    backends.select.cache_clear()


def test_a_backend_that_agrees_is_used(fake: Callable[..., None]) -> None:
    fake()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {choice.backend for choice in backends.select("cpu")} == {"fake"}


def test_a_backend_that_differs_is_passed_over_with_one_warning(fake: Callable[..., None]) -> None:
    def wrong(*arguments: Any) -> torch.Tensor:
        return reference.channel_reduce(*arguments) * 1.01

    fake(channel_reduce=wrong)
    with pytest.warns(RuntimeWarning, match="does not use its fake kernels on cpu: channel_reduce of float32") as seen:
        choices = backends.select("cpu")
    assert len(seen) == 1
    assert {choice.backend for choice in choices} == {"reference"}
    assert all("not fake: channel_reduce of float32 differs from the reference" in choice.why for choice in choices)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cpu") is choices


def test_a_backend_that_differs_and_was_asked_for_is_an_error(
    fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(channel_scale_=lambda xs, tiles, scale: None)
    monkeypatch.setenv(backends.ENV, "fake")
    with pytest.raises(BackendError, match="PAT_FAST_BACKEND=fake to agree with the reference on cpu; got: chan"):
        backends.select("cpu")


def test_a_late_choice_is_made_at_the_first_call_and_kept(
    fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(*arguments: Any) -> torch.Tensor:
        calls.append("fake")
        return reference.channel_reduce(*arguments)

    fake(channel_reduce=noting)
    monkeypatch.setattr(backends, "LATE", ("cpu",))
    backends._winner.cache_clear()
    run = backends.runner("channel_reduce", "cpu")
    assert not calls
    arguments = ([torch.ones(3)], [], torch.tensor([[0, 0, 3, 1, 1, 1, 1, 1, 0, -1]]), 3, "pow", 2.0)
    assert run(*arguments).tolist() == [1, 1, 1]
    checked = len(calls)
    run(*arguments)
    assert len(calls) == checked + 1
    backends._winner.cache_clear()


def test_env_reports_what_runs() -> None:
    report = env.report()
    assert report["versions"]["torch"]
    assert report["backends"] == backends.describe()
    assert report["extension"]["built"] == (cpu.unavailable() is None)
    assert report["cuda_extension"]["built"] == (cuda.missing() is None)
    text = env.render()
    assert "torch-pruning" in text
    assert "channel_reduce" in text


def test_env_shows_what_the_cuda_extension_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    details = {"archs": "sm_80,compute_80", "runtime": "13.0", "devices": 2}
    monkeypatch.setattr(cuda, "missing", lambda: None)
    monkeypatch.setattr(cuda, "details", lambda: details)
    assert env.report()["cuda_extension"] == {"built": True, "why": None, **details}
    assert "yes, for sm_80,compute_80, CUDA 13.0; it sees 2 devices" in env.render()
    monkeypatch.setattr(cuda, "missing", lambda: "no compiler was there")
    assert "CUDA extension  no: no compiler was there" in env.render()
