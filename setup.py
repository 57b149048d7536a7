"""Builds ``pat_fast._C`` (C++) and ``pat_fast._CUDA``; everything else stands in ``pyproject.toml``.

``PAT_FAST_BUILD`` chooses: ``auto`` (default) builds what the compilers found here can build, and says in
one line what it left out; ``cpu`` builds the C++ extension alone and fails without a compiler; ``cuda``
builds both and fails without nvcc; ``none`` never builds. ``CUDACXX`` names another nvcc,
``PAT_FAST_CUDA_ARCHS`` ("80 90") the architectures to compile for, the last of them as PTX too.
``CXX`` and ``CXXFLAGS`` are honoured.
Neither PyTorch nor a GPU is needed to build.
"""

from __future__ import annotations

import os
import platform
import re
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
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")
# No math errno and no traps: what lets a select or a square root become a vector instruction.
MATH = ["-fno-math-errno", "-fno-trapping-math"]
COMMON = ["-std=c++17", "-O3", *MATH, "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-DNDEBUG"]
KERNEL = ["-Wno-unknown-pragmas"]
PROBE = """#include <Python.h>
#include <vector>
int probe() { return std::vector<int>(1)[0]; }
"""
VARIANTS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
CUDA_PROBE = """#include <cuda_runtime.h>
#include <vector>
__global__ void kernel(float* x) { x[threadIdx.x] = 1; }
void probe(std::vector<float>& x) { kernel<<<1, 1>>>(x.data()); }
"""
CUDA_ARCHS = "80 90"
CUDA_HOST = [f"csrc/cuda/{name}.cpp" for name in ("bindings", "work")]
CUDA_DEVICE = [f"csrc/cuda/{name}.cu" for name in ("reduce", "groups", "update", "compact", "device")]
CPU = [f"cpu/{name}" for name in ("engine", "groups", "compact", "plan", "isa")]
ENGINE = [f"csrc/{name}.cpp" for name in ("bindings", "known", *CPU)]


def mode() -> str:
    """Return ``PAT_FAST_BUILD``, checked."""
    value = os.environ.get("PAT_FAST_BUILD", "auto").strip().lower() or "auto"
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


class Nvcc:
    """A CUDA compiler, whether it was seen compiling for the wanted architectures, and why not."""

    def __init__(self) -> None:
        named = os.environ.get("CUDACXX", "").split() or ["nvcc"]
        # nvcc asks its host compiler for its version: a launcher such as ccache cannot answer.
        host = os.environ.get("CXX", "").split()
        self.command = [*named, "-ccbin", host[0]] if len(host) == 1 else named
        wanted = os.environ.get("PAT_FAST_CUDA_ARCHS", "") or CUDA_ARCHS
        self.archs = sorted(re.findall(r"\d+[af]?", wanted), key=lambda arch: int(arch.rstrip("af")))
        self.problem = "" if self.archs else f"PAT_FAST_CUDA_ARCHS={wanted!r} names no architecture, such as 90"
        if not shutil.which(named[0]):
            self.problem = f"no {named[0]} on PATH; set CUDACXX"
        elif not self.problem:
            self.problem = self._why_not()

    def flags(self) -> list[str]:
        """Return what every CUDA source is compiled with."""
        codes = [f"arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        codes.append(f"arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        named = ",".join([f"sm_{arch}" for arch in self.archs] + [f"compute_{self.archs[-1]}"])
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f'-DPAT_CUDA_ARCHS=\\"{named}\\"']
        return flags + [word for code in codes for word in ("-gencode", code)]

    def _why_not(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.write_text(CUDA_PROBE)
            command = [*self.command, *self.flags(), "-c", str(source), "-o", str(source.with_suffix(".o"))]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
            except (OSError, subprocess.SubprocessError) as error:
                return str(error)
            lines = done.stdout.strip().splitlines() or ["it said nothing"]
            return f"{self.command[0]} does not compile: {lines[-1]}" if done.returncode else ""


@cache
def nvcc() -> Nvcc:
    """Return the CUDA compiler, tried once."""
    return Nvcc()


def native() -> bool:
    """Return whether to build the C++ extension.

    Raises:
        SystemExit: ``PAT_FAST_BUILD`` is ``cpu`` or ``cuda`` and no compiler works.
    """
    wanted = mode()
    if wanted == "none":
        return False
    if toolchain() is not None:
        return True
    if wanted in ("cpu", "cuda"):
        raise SystemExit(
            f"PAT_FAST_BUILD={wanted}: expected a C++17 compiler and Python's headers; got none that compiles an "
            "extension; set CXX, or install one (Debian: g++ and python3-dev)"
        )
    return False


def cuda() -> bool:
    """Return whether to build the CUDA extension, saying so if it is left out.

    Raises:
        SystemExit: ``PAT_FAST_BUILD=cuda`` and nvcc does not work.
    """
    if mode() not in ("auto", "cuda"):
        return False
    problem = nvcc().problem
    if problem and mode() == "cuda":
        raise SystemExit(f"PAT_FAST_BUILD=cuda: expected nvcc of CUDA 12 or later; got: {problem}")
    if problem:
        print(f"pat_fast: installed without the CUDA kernels: {problem}")
    return not problem


class PatDistribution(Distribution):
    """Decides late whether there is an extension, so that a pure wheel is tagged as one."""

    def has_ext_modules(self) -> bool:
        return native()


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if mode() == "auto" and not native():
            print("pat_fast: no working C++ compiler: installed without the C++ kernels, on plain PyTorch")


def ninja_file(name: str, tools: Toolchain, objects: Path, target: Path) -> str:
    """Return a build file that compiles every source of an extension with its own flags, in parallel."""

    def escaped(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    def quoted(words: list[str]) -> str:
        return " ".join(f"'{word}'" if " " in word else word for word in words).replace("$", "$$")

    flags: dict[str, list[str]] = {}
    extra = os.environ.get("CXXFLAGS", "").split()
    if name == "pat_fast._CUDA":
        compilers = {".cpp": tools.cxx, ".cu": nvcc().command}
        link = [*nvcc().command, "-shared", "-cudart", "static"]
        flags |= {source: [*COMMON, *tools.include] for source in CUDA_HOST}
        flags |= {source: nvcc().flags() for source in CUDA_DEVICE}
    else:
        compilers = {".cpp": tools.cxx}
        link = [*tools.cxx, *tools.link, *tools.openmp]
        flags |= {source: [*COMMON, *tools.include, *tools.openmp] for source in ENGINE}
        simd = ["-fopenmp-simd"] if tools.openmp else []
        for isa, words in variants().items():
            flags[f"csrc/cpu/kernels_{isa}.cpp"] = [*COMMON, *KERNEL, *simd, *words]
    lines = [
        f"rule compile{kind}\n  command = {quoted(command)} -{'MMD' if kind == '.cpp' else 'MD'} -MF $out.d $flags "
        f"{quoted(extra if kind == '.cpp' else [])} -c $in -o $out\n  deps = gcc\n  depfile = $out.d"
        for kind, command in compilers.items()
    ]
    lines.append(f"rule link\n  command = {quoted(link)} $in -o $out")
    outputs = []
    for source, words in flags.items():
        path = Path(source)
        outputs.append(escaped(objects / (path.stem + ".o")))
        lines.append(
            f"build {outputs[-1]}: compile{path.suffix} {escaped(ROOT / path)}\n  flags = {quoted(words)}"
        )
    lines.append(f"build {escaped(target)}: link {' '.join(outputs)}\ndefault {escaped(target)}\n")
    return "\n".join(lines)


class BuildExt(build_ext):
    def run(self) -> None:
        if native() and not cuda():
            self.extensions = [ext for ext in self.extensions if ext.name != "pat_fast._CUDA"]
        super().run()

    def build_extension(self, ext: Extension) -> None:
        tools = toolchain()
        assert tools is not None  # has_ext_modules() was true
        import ninja

        objects = Path(self.build_temp).resolve() / ext.name.rpartition(".")[2]
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_file(ext.name, tools, objects, target))
        if subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects)]).returncode == 0:
            return
        if ext.name == "pat_fast._CUDA" and mode() == "auto":
            ext.optional = True
            raise CompileError("installed without the CUDA kernels: they did not compile, see above")
        raise SystemExit(
            f"pat_fast: the sources of {ext.name} did not compile, see above; PAT_FAST_BUILD=none installs without"
        )


setup(
    distclass=PatDistribution,
    ext_modules=[Extension("pat_fast._C", sources=[]), Extension("pat_fast._CUDA", sources=[])],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
