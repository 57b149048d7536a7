"""The Triton kernels compile ahead of time for GPUs that are not there, and read in vectors when compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

A_REGISTER_OR_TWO = 16
"""Bytes of stack that do not matter: Triton 3.6 needs them for a few kernels, once per program."""


def compile_all(capability: int, cache: Path, *more: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.backends.aot", str(capability), *more],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def check(found: list[dict[str, Any]]) -> None:
    for kernel in found:
        label, moves = kernel["label"], kernel["moves"]
        assert kernel["bytes"] > 1000, label
        assert (kernel["stack"] or 0) <= A_REGISTER_OR_TWO, f"{label} spills registers"
        if not label.startswith("add"):
            wide = {move for move in moves if ".v4.b32" in move or ".v2.b64" in move}
            assert any(move.startswith("ld") for move in wide), (label, moves)
            if not label.startswith("reduce"):
                assert any(move.startswith("st") for move in wide), (label, moves)
    kinds = {kernel["label"].split()[0] for kernel in found}
    assert kinds == {"reduce", "add", "axpy", "scale", "copy"}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_and_moves_vectors(capability: int, tmp_path: Path) -> None:
    check(compile_all(capability, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_function_for_every_dtype_and_alignment(capability: int, tmp_path: Path) -> None:
    check(compile_all(capability, tmp_path, "thorough"))
