"""What a result was measured on, and whether something else ran beside it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from ..env import report

BUSY = 0.5
"""A load average above this before the start means that somebody else uses the cores."""


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, instruction set, GPU, versions, load average and date, as JSON has them."""
    env = report()
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "platform": env["platform"],
        "python": env["python"],
        "versions": env["versions"],
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": env["threads"],
        "isa": env["extension"]["isa"],
        "load": _load(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gigabytes": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return found


def busy(machine: dict[str, Any]) -> str:
    """Say what else ran on ``machine`` when it was described, or ""."""
    load = machine["load"]
    return "" if load is None or load <= BUSY else f"load average {load:.1f} before the start"


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
