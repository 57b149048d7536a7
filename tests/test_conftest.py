"""What a run of the tests does where there is no GPU, or little else, and what it writes of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_right():
    pass

def test_wrong():
    assert 1 == 2, "first line\\nsecond line"

@pytest.mark.gpu
def test_gpu():
    pass
"""


def run(*arguments: str, code: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Pytest in a process that sees no GPU, after ``code``."""
    start = f"import sys, pytest\n{code}\nsys.exit(pytest.main(sys.argv[1:]))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", start, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "expected"),
    [
        (["-n1"], 1, {"test_gpu": ("skipped", "no CUDA device"), "test_right": ("passed", None),
                      "test_wrong": ("failed", "test_it.py:8: AssertionError: first line")}),
        (["-m", "gpu"], 1, {"test_gpu": ("error", "no CUDA device")}),
        (["-k", "none"], 5, {}),
    ],
)  # fmt: skip
def test_outcomes_are_written(
    arguments: list[str], exit_code: int, expected: dict[str, tuple[str, str | None]], tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    done = run("-p", "tests.conftest", "-c", os.devnull, "--rootdir=.", "--json=out.json", *arguments, cwd=tmp_path)
    assert done.returncode == exit_code, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["exit_code"] == exit_code
    assert sum(found["counts"].values()) == len(expected)
    assert {"cpu", "gpu", "versions"} <= found["machine"].keys()
    tests: dict[str, Any] = {test.pop("test").removeprefix("test_it.py::"): test for test in found["tests"]}
    assert tests.keys() == expected.keys()
    for name, (outcome, why) in expected.items():
        assert found["counts"][outcome] == 1
        assert tests[name]["outcome"] == outcome
        assert tests[name]["seconds"] >= 0
        assert why in tests[name]["why"] if why else tests[name]["why"] is None


WITHOUT = """
class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

MISSING = {
    "accelerate", "hypothesis", "lightning", "matplotlib", "onnx", "onnxruntime", "onnxscript", "onnxslim", "PIL",
    "scipy", "sklearn", "torchao", "torchvision", "transformers",
}
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.mark.slow
def test_what_needs_a_gpu_is_collected_where_little_is_installed(tmp_path: Path) -> None:
    """One module that cannot be imported would end ``make test-gpu`` before its first test."""
    arguments = "-p", "no:hypothesispytest", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", "-qq"
    bare, full = run(*arguments, code=WITHOUT), run(*arguments, f"--json={tmp_path / 'out.json'}")
    counted = [{line for line in done.stdout.splitlines() if line.startswith("tests/")} for done in (bare, full)]
    assert bare.returncode == full.returncode == 0, bare.stdout + bare.stderr
    assert counted[0] == counted[1]
    assert len(counted[0]) > 4
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == 0
