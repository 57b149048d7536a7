"""Latency over width: which numbers of channels a 3x3 convolution runs well at, the reason for ``round_to="auto"``.

    python -m benchmarks.width_curve [--json FILE] [--plot FILE]

Eager PyTorch and onnxruntime on one thread; processor time, the least of many runs, so other work on the machine
matters little. A convolution of as many inputs as outputs, 14x14, batch 1. A width that is worth having is one below
which nothing gets faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from pat_fast.export import export_onnx, runner

WIDTHS = tuple(range(48, 81))
ROUNDS, REPEATS = 30, 10


def least_ms(run: Callable[[], object]) -> float:
    """Processor time of a call, in milliseconds."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(REPEATS):
            run()
        best = min(best, time.process_time() - start)
    return 1e3 * best / REPEATS


def measure(widths: Sequence[int]) -> dict[str, list[float]]:
    """Milliseconds in each runtime, for each width."""
    found: dict[str, list[float]] = {"eager": [], "onnxruntime": []}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for width in widths:
            model, x = nn.Conv2d(width, width, 3, padding=1).eval(), torch.randn(1, width, 14, 14)
            found["eager"].append(least_ms(lambda model=model, x=x: model(x)))
            path = Path(folder) / f"{width}.onnx"
            with torch.inference_mode(False):
                export_onnx(model, torch.randn(1, width, 14, 14), path, exporter="torchscript", simplify=False)
            run = runner(str(path), threads=1)
            found["onnxruntime"].append(least_ms(lambda run=run, x=x: run([x])))
    return found


def table(widths: Sequence[int], found: dict[str, list[float]]) -> str:
    """Milliseconds a width and runtime, and microseconds per million MACs: a good width has few."""
    lines = ["| width | eager ms | us per MMAC | onnxruntime ms | us per MMAC |", "|---|---|---|---|---|"]
    for i, width in enumerate(widths):
        macs = width * width * 9 * 14 * 14 / 1e6
        cells = [f"{found[r][i]:.4f} | {1e3 * found[r][i] / macs:.1f}" for r in ("eager", "onnxruntime")]
        lines.append(f"| {width} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def draw(widths: Sequence[int], found: dict[str, list[float]], path: Path) -> None:
    """The curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in found.items():
        axes.plot(widths, values, marker=".", label=name)
    axes.set_xlabel("channels")
    axes.set_ylabel("ms of processor time")
    axes.set_title("3x3 convolution at 14x14, one thread", loc="left")
    axes.set_xticks([w for w in widths if w % 8 == 0])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    found = measure(WIDTHS)
    print(table(WIDTHS, found))
    if given.json:
        given.json.write_text(json.dumps({"widths": WIDTHS, "ms": found}, indent=2) + "\n")
    if given.plot:
        draw(WIDTHS, found, given.plot)


if __name__ == "__main__":
    main()
