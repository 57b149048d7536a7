"""The example with Accelerate, started as a user starts it, on two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, environment


def launch(folder: Path, epochs: int) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["examples/accelerate_loop.py", "--cpu", "--folder", str(folder), "--epochs", str(epochs)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_prune_alike_and_go_on(tmp_path: Path) -> None:
    out = launch(tmp_path, 4)
    assert out.count("loss") == 4
    assert "channels 48 (50.0% of dense)" in out
    assert (tmp_path / "pruned.safetensors").exists()
    again = launch(tmp_path, 6)  # two more, from the file
    assert again.count("loss") == 2
    assert again.count("channels 48 (50.0% of dense)") == 2
