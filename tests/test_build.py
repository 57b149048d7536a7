"""The package builds with a compiler, without one, and when told not to."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

VARIABLES = ("PAT_FAST_BUILD", "PAT_FAST_BACKEND", "PAT_FAST_CUDA_ARCHS", "CXX", "CUDACXX")
ROOT = Path(__file__).resolve().parents[1]
FATBIN = struct.pack("<I", 0xBA55ED50)
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
    clean = {k: v for k, v in os.environ.items() if k not in VARIABLES}
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
        ({"PAT_FAST_BUILD": "cuda", "CXX": "/nonexistent/c++"}, "expected a C++17 compiler"),
        ({"PAT_FAST_BUILD": "cuda", "CUDACXX": "/nonexistent/nvcc"}, "no /nonexistent/nvcc on PATH"),
        ({"PAT_FAST_BUILD": "cuda", "CUDACXX": "false"}, "false does not compile"),
        ({"PAT_FAST_BUILD": "cuda", "CUDACXX": "true", "PAT_FAST_CUDA_ARCHS": "all"}, "names no architecture"),
        ({"PAT_FAST_BUILD": "fast"}, "expected one of auto, none, cpu, cuda; got 'fast'"),
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


LOAD_CUDA = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_CUDA", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not torch.cuda.is_initialized()
print(module.archs(), module.device_count() == torch.cuda.device_count())
"""


def code_in(binary: bytes) -> set[tuple[str, int]]:
    """Return the code in all fatbins of ``binary``: ("sass" or "ptx", architecture)."""
    found, at = set(), binary.find(FATBIN)
    while at >= 0:
        _, header, size = struct.unpack_from("<HHQ", binary, at + 4)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", binary, entry)
            (arch,) = struct.unpack_from("<I", binary, entry + 28)
            found.add(({1: "ptx", 2: "sass"}[kind], arch))
            entry += entry_header + entry_size
        at = binary.find(FATBIN, end)
    return found


IN_PLACE = sorted((ROOT / "pat_fast").glob("_CUDA*.so"))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


def check_cuda(built: Path, cwd: Path) -> None:
    """Code for both architectures and PTX, and it can be imported where there is no driver."""
    assert {("sass", 80), ("sass", 90), ("ptx", 90)} <= code_in(built.read_bytes())
    shown = run([sys.executable, "-c", LOAD_CUDA, str(built)], cwd)
    assert shown.stdout.split() == ["sm_80,sm_90,compute_90", "True"]


@pytest.mark.skipif(not IN_PLACE, reason="the CUDA extension is not built in place")
@pytest.mark.skipif("PAT_FAST_CUDA_ARCHS" in os.environ, reason="built for other architectures")
def test_the_cuda_extension_that_is_here_imports_without_a_gpu(tmp_path: Path) -> None:
    check_cuda(IN_PLACE[0], tmp_path)


@pytest.mark.slow
@needs_nvcc
def test_the_cuda_sources_compile(source: Path) -> None:
    # Everything but the C++ kernels, which other tests build: half the time.
    script = source / "setup.py"
    script.write_text(script.read_text().replace('Extension("pat_fast._C", sources=[]), ', ""))
    result = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], source, PAT_FAST_BUILD="cuda")
    assert result.returncode == 0, result.stdout
    (built,) = (source / "pat_fast").glob("_CUDA*.so")
    check_cuda(built, source)


@needs_nvcc
def test_auto_does_without_cuda_sources_that_do_not_compile(source: Path) -> None:
    script = source / "setup.py"
    script.write_text(script.read_text().replace('Extension("pat_fast._C", sources=[]), ', ""))
    for path in (source / "csrc/cuda").iterdir():
        path.write_text("#error broken\n")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = run(command, source)
    assert result.returncode == 0, result.stdout
    assert "installed without the CUDA kernels: they did not compile" in result.stdout
    assert not list((source / "pat_fast").glob("*.so"))
    result = run(command, source, PAT_FAST_BUILD="cuda")
    assert result.returncode != 0
    assert "pat_fast._CUDA did not compile" in result.stdout


def test_auto_without_nvcc_says_so_once(source: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    script = source / "setup.py"
    script.write_text(script.read_text().replace('Extension("pat_fast._C", sources=[]), ', ""))
    result = run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], source, CUDACXX="/nonexistent/nvcc"
    )
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("without the CUDA kernels: no /nonexistent/nvcc on PATH") == 1
