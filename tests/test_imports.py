"""Parts import one another in one direction only, and `import pat_fast` is cheap."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pat_fast
from pat_fast.optional import require

PACKAGE = Path(pat_fast.__file__).parent

# What a part may use, directly or through others. config -> Pruner -> Plan -> ops -> surgery -> report.
OPS = {"errors", "backends", "ops"}
PLAN = OPS | {"plan"}
SOLVED = PLAN | {"latency", "limits", "rounding", "selection", "surgery"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "schedules": {"errors"},
    "config": SOLVED
    | {"arguments", "cost", "criteria", "masks", "modes", "reading", "regularizers", "report", "schedules"}
    | {"stability", "surgery", "targets"},
    "reading": {"errors"},
    "rounding": set(),
    "report": {"errors"},
    "backends": {"errors"},
    "ops": OPS,
    "plan": PLAN,
    "selection": PLAN,
    "limits": PLAN | {"rounding", "selection"},
    "latency": PLAN | {"rounding", "surgery"},
    "targets": SOLVED | {"report"},
    "cost": PLAN,
    "criteria": PLAN | {"cost"},
    "regularizers": PLAN | {"cost", "criteria"},
    "surgery": PLAN,
    "masks": PLAN | {"surgery"},
    "structure": PLAN | {"surgery"},
    "checkpoint": PLAN | {"structure", "surgery"},
    "pretrained": {"errors"},
    "distributed": PLAN | {"cost", "criteria", "discovery", "regularizers", "surgery"},
    "modes": PLAN | {"masks", "schedules", "surgery"},
    "optional": {"errors"},
    "export": PLAN | {"checkpoint", "measure", "optional", "structure", "surgery"},
    "quantization": PLAN
    | {"checkpoint", "export", "integer", "layers", "masks", "measure", "optional", "structure", "surgery"},
    "integer": set(),
    "dry_run": PLAN | {"masks", "surgery"},
    "rehearsal": PLAN | {"surgery"},
    "proof": PLAN | {"dry_run", "masks", "rehearsal", "surgery", "turns"},
    "turns": set(),
    "discovery": PLAN | {"surgery"},
    "measure": set(),
    "models": set(),
}
# The user's side, which nothing below it may know.
ON_TOP = {
    "train": {"cli"},
    "cli": {"__main__"},
    "runs": {"cli"},
    "bench": {"cli"},
    "integrations": {"integrations"},
    "runlog": {"train", "plotting"},
}


def part(module: str) -> str:
    """The part that a module belongs to: ``pat_fast.plan.types`` to ``plan``; the package itself to ``pat_fast``."""
    return module.split(".")[1] if "." in module else module


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        names = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imported(path: Path, module: str, known: set[str]) -> Iterator[str]:
    """Everything that a file imports, inside functions too, but not what only a type checker sees."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if inner in known else origin


@cache
def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """For each module of the package, what it imports."""
    known = modules(package)
    return {name: set(imported(path, name, set(known))) for name, path in known.items()}


def reached(start: str) -> set[str]:
    """Parts of the package that a part uses, directly or through others."""
    edges = {n: {t for t in targets if t.split(".")[0] == "pat_fast"} for n, targets in graph().items()}
    todo = [n for n in edges if part(n) == start]
    seen: set[str] = set()
    while todo:
        for target in edges[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return {part(t) for t in seen} - {start}


@pytest.mark.parametrize("name", list(ALLOWED))
def test_one_direction(name: str) -> None:
    assert any(part(module) == name for module in graph())
    assert reached(name) <= ALLOWED[name]


def test_nothing_below_knows_the_users_side() -> None:
    for module, targets in graph().items():
        for name, users in ON_TOP.items():
            if part(module) not in users | {name}:
                assert name not in {part(t) for t in targets if t.startswith("pat_fast.")}, module


def test_only_the_plan_the_pruners_graph_and_the_benchmark_use_torch_pruning() -> None:
    users = {module for module, targets in graph().items() if any(t.split(".")[0] == "torch_pruning" for t in targets)}
    assert {part(module) for module in users} <= {"plan", "pruner", "torch_pruning", "bench"}
    assert users


def test_the_package_does_not_import_its_tests_or_benchmarks() -> None:
    for module, targets in graph().items():
        assert not {t.split(".")[0] for t in targets} & {"tests", "benchmarks", "pytest"}, module


def test_the_test_sees_every_kind_of_import(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("from . import a\nfrom .sub import thing")
    (package / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .never import x\nelse:\n    import other.one\n"
        "def f():\n    from .sub import b\n    from pkg.sub.b import name\n    import pkg.sub.c as d\n"
    )
    (package / "sub" / "__init__.py").write_text("from ..a import f\nfrom .b import name")
    (package / "sub" / "b.py").write_text("from .. import a\nfrom . import c")
    (package / "sub" / "c.py").write_text("")
    found = graph(package)
    assert found["pkg"] == {"pkg.a", "pkg.sub"}
    assert found["pkg.a"] == {"typing", "other.one", "pkg.sub.b", "pkg.sub.c"}
    assert found["pkg.sub"] == {"pkg.a", "pkg.sub.b"}
    assert found["pkg.sub.b"] == {"pkg.a", "pkg.sub.c"}


HEAVY = (
    "matplotlib", "pydantic", "rich", "safetensors", "scipy", "sklearn", "torch_pruning", "torchvision",
    "transformers", "triton", "typer", "torch.utils.cpp_extension",
    "onnx", "onnxruntime", "onnxscript", "onnxslim", "torchao",
)  # fmt: skip

IMPORT = """
import json, os, sys, time
import torch
before = set(sys.modules)
started = []
sys.addaudithook(lambda event, args: started.append(event) if event in ("subprocess.Popen", "os.system") else None)
results = []
for _ in range(6):  # each in a process of its own, which has torch already
    reading, writing = os.pipe()
    if os.fork() == 0:
        start = time.process_time()
        import pat_fast
        seconds = time.process_time() - start
        new = sorted(set(sys.modules) - before)
        os.write(writing, json.dumps([seconds, new, started, torch.cuda.is_initialized()]).encode())
        os._exit(0)
    os.close(writing)
    results.append(json.loads(os.fdopen(reading, "rb").read()))
    os.wait()
print(json.dumps(results))
"""


def test_import_is_lean(tmp_path: Path) -> None:
    """Under 150 ms of processor time on top of torch (byte code cached), and nothing heavy comes along."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)
    for _, new, started, cuda in results:
        assert "pat_fast.pruner" in new
        assert not [m for m in new if m in HEAVY or m.split(".")[0] in HEAVY]
        assert not started
        assert not cuda
    assert min(seconds for seconds, *_ in results) < 0.150


def test_what_an_optional_package_logs_at_its_import_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "chatty_package.py").write_text("import logging\nlogging.getLogger('chatty').warning('no GPU part')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert require("chatty_package", "none", "a test").__name__ == "chatty_package"
    assert not caplog.records
    logging.getLogger("chatty").warning("later it may speak")
    assert [r.getMessage() for r in caplog.records] == ["later it may speak"]


def test_trainers_take_less_than_150_lines_each() -> None:
    files = [PACKAGE / "integrations/lightning.py", PACKAGE / "integrations/transformers.py"]
    for file in (*files, PACKAGE.parent / "examples/accelerate_loop.py"):
        assert len(file.read_text().splitlines()) < 150, file
