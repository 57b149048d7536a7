"""What a result was measured on, and whether something else ran beside it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from ..env import report

BUSY = 0.1
"""More than this of a core's time for other processes, or lost to other machines, and the numbers are not to be quoted.

The kernel's own threads take some hundredths."""
LOADED = 0.5
"""Where nobody counts the time of all processes: the load average above which the cores are not ours. It decays slowly,
so it also speaks of what has ended."""
STAT = Path("/proc/stat")


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


class Watch:
    """What others use of the cores, from its making on."""

    def __init__(self) -> None:
        self._start = _seconds()

    def seen(self) -> str:
        """Say what else ran since, or ""."""
        machine = {"load": _load()}
        self.note(machine)
        return busy(machine)

    def note(self, machine: dict[str, Any]) -> None:
        """Write ``others`` and ``stolen`` into a description: cores in use on average, None if unknown."""
        now = _seconds()
        machine["others"] = machine["stolen"] = None
        if now is not None and self._start is not None:
            wall, everything, stolen, own = (b - a for a, b in zip(self._start, now, strict=True))
            if wall > 0:
                machine["others"] = round(max(0.0, everything - own) / wall, 3)
                machine["stolen"] = round(stolen / wall, 3)


def busy(machine: dict[str, Any]) -> str:
    """Say what else ran on ``machine``, or ""; :meth:`Watch.note` has seen it."""
    if machine.get("others") is None:
        load = machine["load"]
        return "" if load is None or load <= LOADED else f"load average {load:.1f} before the start"
    found = [
        f"{machine[key]:.2f} cores {what}"
        for key, what in (("others", "used by other processes"), ("stolen", "lost to other machines"))
        if machine[key] > BUSY
    ]
    return " and ".join(found)


def _seconds() -> tuple[float, float, float, float] | None:
    """By the clock, of all processes on all cores, lost to the hypervisor, and of this process and its children."""
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()
        ticks = [int(field) for field in fields[1:9]]
    except (OSError, ValueError):
        return None
    if len(ticks) < 8:
        return None
    user, nice, system, _, _, irq, softirq, steal = ticks
    hertz = os.sysconf("SC_CLK_TCK")
    return time.monotonic(), (user + nice + system + irq + softirq) / hertz, steal / hertz, sum(os.times()[:4])


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
