"""Starting the ranks of a test as a user does, with torchrun, and reading what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """One thread a process: the models are too small for two."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}


def torchrun(
    case: str, folder: Path, ranks: int = 2, seconds: float = 240, worker: str = "worker", fails: bool = False
) -> list[Any]:
    """What the function ``case`` of the worker returned on each rank, None where a rank has ended before."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", f"tests.distributed.{worker}", case, str(folder)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert fails or done.returncode == 0, done.stderr[-6000:]
    files = [folder / f"{case}-{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]
