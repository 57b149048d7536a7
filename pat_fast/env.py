"""What ``pat-fast env`` prints: versions, devices, the C++ extension, and which backend runs which op."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from pat_fast import backends
from pat_fast.backends import cpu, cuda

PACKAGES = ("pat-fast", "torch", "torch-pruning", "numpy", "safetensors", "triton")


def report() -> dict[str, Any]:
    """Return versions, threads, the extension's state and the backend of each (op, device type).

    Keys: ``python``, ``platform``, ``versions`` (package -> version or None), ``threads``, ``gpus`` (a list of
    ``name``, ``capability``, ``gigabytes``), ``extension`` (``built``, ``why``, ``isa``, ``isas``, ``openmp``),
    ``cuda_extension`` (``built``, ``why``, ``archs``, ``runtime``, ``devices``), ``override``
    (``PAT_FAST_BACKEND`` or None) and ``backends`` (a list of ``device``, ``op``, ``backend``, ``why``). On a machine
    with a GPU this starts CUDA and tries the GPU backends out.
    """
    why = cpu.unavailable()
    extension: dict[str, Any] = {"built": why is None, "why": why, "isa": None, "isas": [], "openmp": False}
    if why is None:
        extension |= cpu.details()
    why = cuda.missing()
    cuda_extension: dict[str, Any] = {"built": why is None, "why": why, "archs": None, "runtime": None, "devices": 0}
    if why is None:
        cuda_extension |= cuda.details()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "extension": extension,
        "cuda_extension": cuda_extension,
        "override": os.environ.get(backends.ENV) or None,
        "backends": backends.describe(),
    }


def render() -> str:
    """Return :func:`report` as lines of text."""
    found = report()
    extension = found["extension"]
    built = "no"
    if extension["built"]:
        built = f"yes, {extension['isa']} (can run: {', '.join(extension['isas'])})"
        built += "" if extension["openmp"] else ", without OpenMP: one thread"
    lines = [("python", f"{found['python']} on {found['platform']}")]
    lines += [(name, version or "not installed") for name, version in found["versions"].items()]
    lines.append(("threads", str(found["threads"])))
    lines += [("GPU", f"{g['name']}, sm_{g['capability']}, {g['gigabytes']:.0f} GiB") for g in found["gpus"]]
    lines.append(("C++ extension", built))
    if extension["why"]:
        lines.append(("", extension["why"]))
    lines.append(("CUDA extension", _cuda_line(found["cuda_extension"])))
    if found["override"]:
        lines.append((backends.ENV, found["override"]))
    # One line for each device and backend, not for each op.
    for device in dict.fromkeys(row["device"] for row in found["backends"]):
        rows = [row for row in found["backends"] if row["device"] == device]
        for backend, why in dict.fromkeys((row["backend"], row["why"]) for row in rows):
            names = ", ".join(row["op"] for row in rows if row["backend"] == backend)
            where = "elsewhere" if device == backends.ANY else f"on {device}"
            lines.append((where, f"{backend} ({why}): {names}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _cuda_line(extension: dict[str, Any]) -> str:
    if not extension["built"]:
        return f"no: {extension['why']}"
    return f"yes, for {extension['archs']}, CUDA {extension['runtime']}; it sees {extension['devices']} devices"


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}{properties.minor}"
        gigabytes = properties.total_memory / 2**30
        found.append({"name": properties.name, "capability": capability, "gigabytes": gigabytes})
    return found


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the build, which its wheel on PyPI leaves out of its name
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
