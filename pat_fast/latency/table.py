"""Tables of measured layers, kept on disk for each machine, PyTorch and number of threads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..rounding import fast_multiple
from .layers import Layer, Spec, Widths, runnable

log = logging.getLogger("pat_fast")
VERSION = 1
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of a layer's width, measured
LEAST_RUNS, SECONDS = 7, 0.004  # per point
clock = time.perf_counter  # a benchmark may set another


def cache_folder() -> Path:
    """``$PAT_FAST_CACHE``, else ``$XDG_CACHE_HOME/pat_fast``, else ``~/.cache/pat_fast``."""
    own = os.environ.get("PAT_FAST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pat_fast"


def machine(device: torch.device) -> dict[str, Any]:
    """What a measured time depends on beside the layer."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {
        "device": _processor() if device.type == "cpu" else device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def fastest(run: Callable[[], object], device: torch.device, seconds: float = SECONDS, runs: int = LEAST_RUNS) -> float:
    """Milliseconds of the fastest of several runs: what it takes when nothing disturbs it."""
    if device.type == "cuda":
        return _fastest_on_gpu(run, device, runs)
    for _ in range(2):
        run()
    best, done, deadline = float("inf"), 0, clock() + seconds
    while done < runs or (clock() < deadline and done < 100 * runs):
        start = clock()
        run()
        best, done = min(best, clock() - start), done + 1
    return 1e3 * best


def _fastest_on_gpu(run: Callable[[], object], device: torch.device, runs: int) -> float:
    """By the device's own clock, several calls in a row: a call of a layer is queued behind the one before it."""
    times, calls = [], 10
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        for _ in range(runs):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
    return min(times)


class Grid:
    """Milliseconds of a layer over a grid of its widths.

    Args:
        axes: the widths that were measured along each axis, ascending.
        steps: widths count as the next multiple of this (what a vectorised kernel pads to), no more than the last.
        ms: of every point.
    """

    def __init__(self, axes: Sequence[Sequence[int]], steps: Widths, ms: NDArray[np.float64]) -> None:
        self.axes = [np.asarray(axis, dtype=np.float64) for axis in axes]
        self.steps = steps
        self.ms = ms
        for axis in range(ms.ndim):  # what is wider is not faster: the rest is noise, and a target needs an order
            self.ms = np.maximum.accumulate(self.ms, axis=axis)

    def __call__(self, widths: Widths) -> float:
        """Milliseconds at ``widths``, linear between the points."""
        values = self.ms
        for axis, step, width in zip(self.axes, self.steps, widths, strict=True):
            padded = min(-(-width // step) * step, axis[-1])
            at = int(np.clip(np.searchsorted(axis, padded, side="left"), 1, max(len(axis) - 1, 1)))
            if len(axis) == 1 or padded <= axis[0]:
                values = values[0]
                continue
            share = (padded - axis[at - 1]) / (axis[at] - axis[at - 1])
            values = values[at - 1] + share * (values[at] - values[at - 1])
        return float(values)


class Tables:
    """Measured layers of one device; from the cache where they were measured before.

    A cache that cannot be read or written is passed over with a warning.

    Args:
        device: to measure on.
        folder: of the cache; None for :func:`cache_folder`.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        about = machine(device)
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (cache_folder() if folder is None else folder) / "latency" / f"{name}.json"
        self._about = about
        self.measured = 0  # points that were not in the cache

    def grids(
        self, layers: Iterable[Layer], free: Callable[[Layer], Sequence[bool]]
    ) -> dict[tuple[Spec, Widths], Grid]:
        """A grid for each kind of layer, by its spec and its widths.

        Args:
            free: which widths of a layer can shrink; the others are measured as they are.
        """
        known = self._read()
        new: dict[str, dict[str, float]] = {}
        found: dict[tuple[Spec, Widths], Grid] = {}
        for layer in layers:
            widths = layer.widths(layer.shape)
            steps, axes = self._axes(layer, widths, free(layer))
            key = json.dumps(layer.spec)
            old = found.get((layer.spec, widths))
            if old is not None and all(len(a) >= len(b) for a, b in zip(old.axes, axes, strict=True)):
                continue
            points = known.setdefault(key, {})
            for point in product(*axes):
                name = "x".join(map(str, point))
                if name not in points:
                    points[name] = new.setdefault(key, {})[name] = self._measure(layer.spec, point)
            ms = np.array([points["x".join(map(str, p))] for p in product(*axes)]).reshape([len(a) for a in axes])
            found[layer.spec, widths] = Grid(axes, steps, ms)
        if new:
            self._write(new)
        return found

    def _axes(self, layer: Layer, widths: Widths, free: Sequence[bool]) -> tuple[Widths, list[list[int]]]:
        widest = fast_multiple(self.device, getattr(torch, dict(layer.spec)["dtype"]))[0]
        steps, axes = [], []
        for width, grain, yes in zip(widths, layer.grains(), free, strict=True):
            # A convolution's channels are padded to whole vectors; what a matrix product adds is in proportion.
            step = widest if layer.kind.startswith("Conv") and width > widest and self.device.type == "cpu" else 1
            step = step * grain // np.gcd(step, grain)
            points = {min(-(-int(width * share) // step) * step or step, width) for share in SHARES} if yes else {width}
            steps.append(int(step))
            axes.append(sorted(int(point) for point in points))
        return tuple(steps), axes

    def _measure(self, spec: Spec, widths: Widths) -> float:
        self.measured += 1
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            return fastest(runnable(spec, widths, self.device), self.device)

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["version"] != VERSION or data["machine"] != self._about:
                return {}
            layers = {key: {name: float(ms) for name, ms in points.items()} for key, points in data["layers"].items()}
            if not all(0 < ms < float("inf") for points in layers.values() for ms in points.values()):
                raise ValueError("a time that is not above 0")
            return layers
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("pat_fast: %s cannot be read (%s); its layers are measured anew", self.path, error)
            return {}

    def _write(self, new: dict[str, dict[str, float]]) -> None:
        """Add to the file; another process may have written since it was read. Replaced as a whole, never half."""
        layers = self._read()
        for key, points in new.items():
            layers.setdefault(key, {}).update(points)
        data = {"version": VERSION, "machine": self._about, "layers": layers}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                temporary = Path(file.name)
                try:
                    json.dump(data, file)
                    file.close()
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            log.warning("pat_fast: %s cannot be written (%s); layers will be measured again", self.path, error)
