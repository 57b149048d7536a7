"""The package builds with a compiler, without one, and when told not to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# An editable install of the checkout would lend its extension to the wheel under test.
SHOW = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
import pat_fast.ops
from pat_fast.backends import describe
print({row["backend"] for row in describe()})
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a copy of the sources: a build writes beside them."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("csrc", "pat_fast"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PAT_FAST_BUILD", "PAT_FAST_BACKEND", "CXX")}
    return subprocess.run(
        command,
        cwd=cwd,
        env=clean | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def wheel(source: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    out = source.parent / "wheels"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    result = run(command, source, **variables)
    return result, sorted(out.glob("*.whl")) if out.exists() else []


def check_pure(path: Path, tmp_path: Path) -> None:
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "pat_fast/py.typed" in names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("csrc", "tests"))]
    shown = run([sys.executable, "-c", SHOW], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert shown.stdout.strip() == "{'reference'}"


def test_none_gives_a_pure_wheel_that_works(source: Path, tmp_path: Path) -> None:
    result, wheels = wheel(source, PAT_FAST_BUILD="none")
    assert len(wheels) == 1, result.stdout
    check_pure(wheels[0], tmp_path)


def test_auto_without_a_compiler_says_so_once(source: Path, tmp_path: Path) -> None:
    result, wheels = wheel(source, CXX="/nonexistent/c++")
    assert len(wheels) == 1, result.stdout
    assert len(re.findall("no working C\\+\\+ compiler", result.stdout)) == 1
    check_pure(wheels[0], tmp_path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PAT_FAST_BUILD": "cpu", "CXX": "/nonexistent/c++"}, "expected a C++17 compiler"),
        ({"PAT_FAST_BUILD": "cuda"}, "no CUDA sources yet"),
        ({"PAT_FAST_BUILD": "fast"}, "expected one of auto, none, cpu; got 'fast'"),
    ],
)
def test_what_cannot_be_built_fails_with_one_clear_line(
    source: Path, variables: dict[str, str], message: str
) -> None:
    result = run([sys.executable, "setup.py", "-q", "build"], source, **variables)
    assert result.returncode != 0
    assert message in result.stdout
    assert "Traceback" not in result.stdout


def test_the_sdist_holds_what_a_build_needs(source: Path) -> None:
    result = run([sys.executable, "setup.py", "-q", "sdist"], source, PAT_FAST_BUILD="none")
    assert result.returncode == 0, result.stdout
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {name.partition("/")[2] for name in files.getnames()}
    needed = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert needed | {"setup.py", "pyproject.toml", "LICENSE", "pat_fast/py.typed"} <= held


@pytest.mark.slow
def test_a_wheel_with_kernels(source: Path, tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    result, wheels = wheel(source, PAT_FAST_BUILD="cpu")
    assert len(wheels) == 1, result.stdout
    with zipfile.ZipFile(wheels[0]) as archive:
        assert any(re.match(r"pat_fast/_C\..*\.so", name) for name in archive.namelist())
        archive.extractall(tmp_path / "site")
    shown = run([sys.executable, "-c", SHOW], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "'cpu'" in shown.stdout
