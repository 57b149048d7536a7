"""``pat-fast bench``: the kernels against the memory's bandwidth, pruning against Torch-Pruning, on this machine.

One core measures for the command, for ``benchmarks/`` and on GPUs: :mod:`.clock` times calls from cold caches,
:mod:`.bandwidth` finds what the memory delivers in the same run, :mod:`.kernels` and :mod:`.steps` compare a result
with its oracle before it is timed. Nothing here is imported by the rest of the package.
"""

from __future__ import annotations

from .results import Mismatch, Result, Row, check_writable, render, table, writing
from .run import OPS, Settings, run

__all__ = ["OPS", "Mismatch", "Result", "Row", "Settings", "check_writable", "render", "run", "table", "writing"]
