"""Builds the C++ extension ``pat_fast._C``; everything else stands in ``pyproject.toml``.

``PAT_FAST_BUILD`` chooses: ``auto`` (default) builds when a C++ compiler works and says so in one line
when none does; ``cpu`` fails without one; ``none`` never builds. PyTorch is not needed to build.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu")
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-DNDEBUG"]
# No math errno and no traps: what lets a select or a square root become a vector instruction.
KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
PROBE = """#include <Python.h>
#include <vector>
int probe() { return std::vector<int>(1)[0]; }
"""
VARIANTS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
ENGINE = ["csrc/bindings.cpp"] + [f"csrc/cpu/{name}.cpp" for name in ("engine", "compact", "plan", "isa")]


def mode() -> str:
    """Return ``PAT_FAST_BUILD``, checked."""
    value = os.environ.get("PAT_FAST_BUILD", "auto").strip().lower() or "auto"
    if value == "cuda":
        raise SystemExit("PAT_FAST_BUILD=cuda: pat_fast has no CUDA sources yet; use auto, cpu or none")
    if value not in MODES:
        raise SystemExit(f"PAT_FAST_BUILD: expected one of {', '.join(MODES)}; got {value!r}")
    return value


def variants() -> dict[str, list[str]]:
    """Return the instruction sets to compile for on this architecture, with their flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return VARIANTS if x86 else {"base": []}


class Toolchain:
    """A C++ compiler that was seen compiling a Python extension, and the flags that it takes."""

    def __init__(self, cxx: list[str]) -> None:
        import pybind11

        self.cxx = cxx
        self.include = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
        self.link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.works = self.compiles([])
        self.openmp = ["-fopenmp"] if self.works and self.compiles(["-fopenmp"]) else []

    def compiles(self, flags: list[str]) -> bool:
        """Return whether a small extension compiles and links with ``flags``."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(PROBE)
            output = str(source.with_suffix(".so"))
            command = [*self.cxx, "-std=c++17", "-fPIC", *self.include, *flags, str(source), *self.link]
            try:
                return (
                    subprocess.run([*command, "-o", output], capture_output=True, timeout=120).returncode == 0
                )
            except (OSError, subprocess.SubprocessError):
                return False


@cache
def toolchain() -> Toolchain | None:
    """Return the compiler named by ``CXX``, or the first that works, or None."""
    named = os.environ.get("CXX", "").split()
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for cxx in candidates:
        if shutil.which(cxx[0]):
            found = Toolchain(cxx)
            if found.works:
                return found
    return None


def native() -> bool:
    """Return whether to build the extension.

    Raises:
        SystemExit: ``PAT_FAST_BUILD=cpu`` and no compiler works.
    """
    wanted = mode()
    if wanted == "none":
        return False
    if toolchain() is not None:
        return True
    if wanted == "cpu":
        raise SystemExit(
            "PAT_FAST_BUILD=cpu: expected a C++17 compiler and Python's headers; got none that compiles an "
            "extension; set CXX, or install one (Debian: g++ and python3-dev)"
        )
    return False


class PatDistribution(Distribution):
    """Decides late whether there is an extension, so that a pure wheel is tagged as one."""

    def has_ext_modules(self) -> bool:
        return native()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if mode() == "auto" and not native():
            print("pat_fast: no working C++ compiler: installed without the C++ kernels, on plain PyTorch")


def ninja_file(tools: Toolchain, objects: Path, target: Path) -> str:
    """Return a build file that compiles every source with its own flags, in parallel."""

    def escaped(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    def quoted(words: list[str]) -> str:
        return " ".join(f"'{word}'" if " " in word else word for word in words).replace("$", "$$")

    lines = [
        f"rule cxx\n  command = {quoted(tools.cxx)} -MMD -MF $out.d $flags -c $in -o $out\n  deps = gcc\n"
        "  depfile = $out.d",
        f"rule link\n  command = {quoted([*tools.cxx, *tools.link, *tools.openmp])} $in -o $out",
    ]
    flags = {source: [*COMMON, *tools.include, *tools.openmp] for source in ENGINE}
    for name, isa in variants().items():
        simd = ["-fopenmp-simd"] if tools.openmp else []
        flags[f"csrc/cpu/kernels_{name}.cpp"] = [*COMMON, *KERNEL, *simd, *isa]
    outputs = []
    for source, words in flags.items():
        outputs.append(escaped(objects / (Path(source).stem + ".o")))
        lines.append(f"build {outputs[-1]}: cxx {escaped(ROOT / source)}\n  flags = {quoted(words)}")
    lines.append(f"build {escaped(target)}: link {' '.join(outputs)}\ndefault {escaped(target)}\n")
    return "\n".join(lines)


class BuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        tools = toolchain()
        assert tools is not None  # has_ext_modules() was true
        import ninja

        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(tools, objects, target))
        if subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects)]).returncode != 0:
            raise SystemExit(
                "pat_fast: the C++ kernels did not compile, see above; PAT_FAST_BUILD=none installs without"
            )


setup(
    distclass=PatDistribution,
    ext_modules=[Extension("pat_fast._C", sources=[])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
