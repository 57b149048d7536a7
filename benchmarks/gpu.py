"""`python -m benchmarks.gpu`: the four ops of every GPU backend against the bandwidth of a copy.

Tensors have the shapes of real models; nothing but PyTorch is needed. A result that differs from the
reference's gets no number. Times are medians between CUDA events with the cache flushed before each call;
`graph` is the same call replayed from a CUDA graph, without the work of the host.

With `torch_pruning` at hand, importance and regularisation of ResNet-50 are timed against it on the same
GPU, and the regulariser against a training step.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.zoo import ZOO
from pat_fast.backends import ANY, BACKENDS, reference
from pat_fast.ops import NONE, Tile, TileTable, accumulator

Shape = tuple[int, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KEEP = 0.75
"""Share of rows and of columns that `channel_compact` keeps."""
RTOL = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def resnet50() -> list[Shape]:
    """All parameters, 25.6 million: most tensors are small."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in ZOO["resnet50"].build().parameters()]


def vit_l() -> list[Shape]:
    """ViT-L/16, 304 million."""
    block: list[Shape] = [(1024,)] * 4 + [(3072, 1024), (3072,), (1024, 1024), (1024,)]
    block += [(4096, 1024), (4096,), (1024, 4096), (1024,)]
    return [(1024, 3, 16, 16), (1024,), *block * 24, (1024,), (1024,), (1000, 1024), (1000,)]


def llama_1b() -> list[Shape]:
    """A Llama of 1.24 billion: grouped queries, 16 layers of width 2048, tied embeddings."""
    attention: list[Shape] = [(2048,), (2048, 2048), (512, 2048), (512, 2048), (2048, 2048)]
    block = [*attention, (2048,), (8192, 2048), (8192, 2048), (2048, 8192)]
    return [(128256, 2048), *block * 16, (2048,)]


def tiny() -> list[Shape]:
    """Runs anywhere in no time, to see that everything works."""
    return [(8, 3, 3, 3), (8,), (16, 8, 1, 1), (16,), (10, 16), (10,)]


MODELS = {"resnet50": resnet50, "vit_l": vit_l, "llama_1b": llama_1b, "tiny": tiny}


@dataclass(frozen=True)
class Row:
    """One op of one backend; times in ms, rates in GB/s (1e9 bytes). A problem instead of numbers."""

    model: str
    dtype: str
    op: str
    backend: str
    problem: str = ""
    ms: float | None = None
    graph_ms: float | None = None
    gbps: float | None = None
    share: float | None = None  # of the copy bandwidth
    graph_share: float | None = None


class Clock:
    """Times calls on a device, each with a cold cache."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.cuda = device.type == "cuda"
        self.flush = torch.empty(2**28 if self.cuda else 2**20, dtype=torch.float32, device=device)

    def ms(self, run: Callable[[], object]) -> float:
        """Return the median time of one call."""
        for _ in range(3):
            run()
        times = []
        for _ in range(self.rounds):
            # While the device clears this, the host gets ahead of it.
            self.flush.zero_()
            times.append(self._events(run) if self.cuda else self._wall(run))
        return statistics.median(times)

    def wall_ms(self, run: Callable[[], object], rounds: int) -> float:
        """Return the median time that one call and all that it started take, seen from the host."""
        run()
        return statistics.median(self._wall(run) for _ in range(rounds))

    def _events(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _wall(self, run: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def graph_ms(self, run: Callable[[], object]) -> float | None:
        """Return the median time of one replay of ``run`` captured in a CUDA graph; None if that fails."""
        if not self.cuda:
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            print(f"not captured: {error}", file=sys.stderr)
            return None
        return self.ms(graph.replay)

    def copy_gbps(self) -> float:
        """Return the rate of a device-to-device copy, bytes read and bytes written."""
        source = self.flush[: len(self.flush) // 2]
        target = self.flush[len(self.flush) // 2 :]
        moved = 2 * source.numel() * source.element_size()
        return moved / self.ms(lambda: target.copy_(source)) / 1e6


class Case:
    """Tensors of a model's shapes, their tables, and the calls to time.

    Args:
        channels_last: lay out convolutions so.
    """

    def __init__(self, shapes: Iterable[Shape], dtype: torch.dtype, device: torch.device, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.generator = torch.Generator(device).manual_seed(0)
        self.xs = [self._new(shape, dtype, device) for shape in shapes]
        self.ys = [torch.empty_like(x).normal_(generator=self.generator) for x in self.xs]
        self.bytes = sum(x.numel() * x.element_size() for x in self.xs)
        tiles, slots = _tiles(self.xs)
        self.table = TileTable.from_tiles(self.xs, tiles, slots)
        self.coef = torch.rand(slots, device=device, generator=self.generator, dtype=accumulator(dtype)) * 1e-3
        # Near 1, so that values stay in range over thousands of calls; not 1, which would not be work.
        self.scale = 1 + (self.coef - 5e-4) * 0.2
        self._cut(device)

    def _new(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        if self.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return x.normal_(generator=self.generator)

    def _cut(self, device: torch.device) -> None:
        """Destinations of a compaction that keeps `KEEP` of the rows and columns of every matrix."""
        lists: list[Tensor] = []
        cuts, at = [], 0
        for x in self.xs:
            starts, left = [], []
            for length in x.shape[:2]:
                kept = torch.randperm(length, generator=torch.Generator().manual_seed(length))
                lists.append(kept[: math.ceil(length * KEEP)].sort().values)
                starts.append(at)
                left.append(len(lists[-1]))
                at += left[-1]
            out = torch.empty([*left, *x.shape[2:]], dtype=x.dtype, device=device)
            if self.channels_last and x.dim() == 4:
                out = out.to(memory_format=torch.channels_last)
            cuts.append((out, starts))
        self.outs = [out for out, _ in cuts]
        plain, _ = _tiles(self.outs)
        tiles = [
            replace(tile, row=starts[0], col=starts[1] if len(starts) > 1 else NONE)
            for tile, (_, starts) in zip(plain, cuts, strict=True)
        ]
        self.index = torch.cat(lists).to(device, torch.int32)
        self.out_table = TileTable.from_tiles(self.outs, tiles, at, shared_slots=True)

    def calls(self, backend: dict[str, Callable[..., Any]]) -> dict[str, tuple[float, Callable[[], Any], list[Tensor]]]:
        """Return, for each op, the bytes that any implementation must move, the call, and what it writes."""
        tiles, slots = self.table.table, self.table.slots
        reduce, axpy = backend["channel_reduce"], backend["channel_axpy_"]
        scale, compact = backend["channel_scale_"], backend["channel_compact"]
        kept = sum(out.numel() * out.element_size() for out in self.outs)
        return {
            "channel_reduce": (self.bytes, lambda: reduce(self.xs, [], tiles, slots, "pow", 2.0), []),
            "channel_reduce mul": (2 * self.bytes, lambda: reduce(self.xs, self.ys, tiles, slots, "mul", 2.0), []),
            "channel_axpy_": (3 * self.bytes, lambda: axpy(self.ys, self.xs, tiles, self.coef), self.ys),
            "channel_scale_": (2 * self.bytes, lambda: scale(self.ys, tiles, self.scale), self.ys),
            "channel_compact": (
                2 * kept,
                lambda: compact(self.outs, self.xs, tiles, self.out_table.table, self.index),
                self.outs,
            ),
        }

    def problem(self, op: str, backend: dict[str, Callable[..., Any]]) -> str:
        """Return how the op's result differs from the reference's, or ""."""
        before = [y.clone() for y in self.ys]
        results: list[list[Tensor]] = []
        for ops in (backend, reference.OPS):
            _, run, written = self.calls(ops)[op]
            for x in self.outs:
                x.fill_(float("nan"))
            returned = run()
            results.append([returned] if returned is not None else [x.clone() for x in written])
            for y, old in zip(self.ys, before, strict=True):
                y.copy_(old)
        rtol = RTOL[torch.float32 if op.startswith("channel_reduce") else self.xs[0].dtype]
        if op == "channel_compact":
            rtol = 0.0
        for got, want in zip(*results, strict=True):
            # Sums of products cancel: measured against the largest sum.
            atol = rtol * (1.0 if op != "channel_reduce mul" else float(want.abs().max()))
            if not torch.allclose(got, want, rtol=rtol, atol=atol):
                worst = float((got.float() - want.float()).abs().max())
                return f"differs from the reference by up to {worst:.1e} in a tensor of shape {list(want.shape)}"
        return ""


def _tiles(xs: Sequence[Tensor]) -> tuple[list[Tile], int]:
    tiles, slot = [], 0
    for number, x in enumerate(xs):
        if x.dim() == 1:
            tiles.append(Tile(number, 0, (len(x), 1, 1), (1, 1, 1), slot))
            slot += len(x)
            continue
        r, c = x.shape[:2]
        kernel = math.prod(x.shape[2:])
        strides = (x.stride(0), x.stride(1), x.stride(-1) if x.dim() > 2 else 1)
        tiles.append(Tile(number, 0, (r, c, kernel), strides, slot, slot + r))
        slot += r + c
    return tiles, slot


def measure(model: str, dtype: str, clock: Clock, channels_last: bool) -> list[Row]:
    """Return a row for every op of every backend that serves the device."""
    case = Case(MODELS[model](), DTYPES[dtype], clock.device, channels_last)
    name = f"{model} channels_last" if channels_last else model
    rows = []
    for backend in BACKENDS:
        served = clock.device.type in backend.devices
        if not served and ANY not in backend.devices:
            continue
        why = backend.probe(clock.device.type)
        if why is not None:
            rows.append(Row(name, dtype, "all", backend.name, f"not available: {why}"))
            continue
        functions = importlib.import_module(backend.module).OPS
        for op in case.calls(functions):
            row = Row(name, dtype, op, backend.name)
            try:
                rows.append(_measured(row, case, functions, clock, graph=served))
            except Exception as error:  # a backend that fails is a finding, not the end of the run
                rows.append(replace(row, problem=f"{type(error).__name__}: {error}"))
    return rows


def _measured(row: Row, case: Case, functions: dict[str, Callable[..., Any]], clock: Clock, graph: bool) -> Row:
    problem = case.problem(row.op, functions)
    if problem:
        return replace(row, problem=problem)
    moved, run, _ = case.calls(functions)[row.op]
    copy, ms = clock.copy_gbps(), clock.ms(run)
    # The reference is the oracle; as a baseline, its eager time is enough.
    graph_ms = clock.graph_ms(run) if graph else None
    rate = moved / ms / 1e6
    graph_share = moved / graph_ms / 1e6 / copy if graph_ms else None
    return replace(row, ms=ms, graph_ms=graph_ms, gbps=rate, share=rate / copy, graph_share=graph_share)


def against_torch_pruning(clock: Clock, rounds: int = 5) -> list[dict[str, Any]]:
    """Time importance and regularisation of ResNet-50 for pat_fast and Torch-Pruning, after comparing them."""
    from benchmarks.cases import CASES, Subject
    from benchmarks.common import Mismatch
    from pat_fast.plan import bind

    subject = Subject("resnet50", small=not clock.cuda)
    subject.model.to(clock.device)
    subject.inputs = tuple(x.to(clock.device) for x in subject.inputs)
    subject.binding = bind(subject.plan, subject.model)
    rows = []
    for op in ("importance", "regularize"):
        case = CASES[op](subject)
        try:
            case.check()
        except Mismatch as problem:
            rows.append({"op": op, "model": "resnet50", "problem": str(problem)})
            continue
        theirs, ours = clock.wall_ms(case.tp(), rounds), clock.wall_ms(case.ours(), 4 * rounds)
        row = {"op": op, "model": "resnet50", "groups": case.groups, "tp_ms": theirs, "ours_ms": ours}
        rows.append(row | {"ratio": theirs / ours})
    return rows


def beside_training(clock: Clock, batch: int = 256) -> list[dict[str, float]]:
    """Time the regulariser and a training step of ResNet-50 (channels_last, bf16 autocast)."""
    from pat_fast.plan import bind, build_plan
    from pat_fast.regularizers import GroupNormRegularizer

    small = not clock.cuda
    entry = ZOO["resnet50"]
    model = entry.small() if small else entry.build()
    plan = build_plan(model, entry.example(small))
    model = model.train().to(clock.device, memory_format=torch.channels_last)
    images = entry.example(small)[0].to(clock.device)
    images = images[:1].expand(2 if small else batch, *images.shape[1:])
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(clock.device.type, torch.bfloat16):
            loss = model(images).float().square().mean()
        loss.backward()
        optimizer.step()

    step_ms = clock.wall_ms(step, 10)
    regularizer, binding = GroupNormRegularizer(strength=1e-4), bind(plan, model)
    own_ms = clock.wall_ms(lambda: regularizer.apply(binding), 20)
    return [{"batch": len(images), "step_ms": step_ms, "regularizer_ms": own_ms, "share": own_ms / step_ms}]


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "triton", "torch_pruning", "pat_fast"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory_gb": properties.total_memory / 1e9, "multiprocessors": properties.multi_processor_count}
        found["cuda"] = torch.version.cuda
    return found | {"date": time.strftime("%Y-%m-%d", time.gmtime())}


def table(rows: Iterable[Row]) -> str:
    lines = [f"{'model':24}{'dtype':10}{'op':20}{'backend':11}{'ms':>9}{'graph':>9}{'GB/s':>8}{'share':>7}{'graph':>7}"]
    for row in rows:
        start = f"{row.model:24}{row.dtype:10}{row.op:20}{row.backend:11}"
        if row.ms is None or row.gbps is None or row.share is None:
            lines.append(start + row.problem)
            continue
        graph = f"{row.graph_ms:9.3f}" if row.graph_ms is not None else f"{'-':>9}"
        graph_share = f"{row.graph_share:7.0%}" if row.graph_share is not None else f"{'-':>7}"
        lines.append(f"{start}{row.ms:9.3f}{graph}{row.gbps:8.0f}{row.share:7.0%}{graph_share}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if a result differs from the reference's, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=["resnet50", "vit_l", "llama_1b"])
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each op (default 20)")
    parser.add_argument("--device", default="cuda", help="cpu: shows that all works; numbers mean nothing")
    parser.add_argument("--only-ops", action="store_true", help="no comparison with Torch-Pruning or training")
    parser.add_argument("--json", type=Path, help="also write everything here")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: expected a CUDA device; got none that PyTorch can use", file=sys.stderr)
        return 2
    clock = Clock(device, args.rounds)
    result: dict[str, Any] = {"machine": machine(device), "copy_gbps": clock.copy_gbps()}
    rows: list[Row] = []
    for model in args.models:
        for dtype in args.dtypes:
            for channels_last in (False, True) if model == "resnet50" else (False,):
                rows += measure(model, dtype, clock, channels_last)
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"copy: {result['copy_gbps']:.0f} GB/s\n{table(rows)}")
    result["rows"] = [asdict(row) for row in rows]
    _write(args.json, result)
    if not args.only_ops and importlib.util.find_spec("torch_pruning"):
        for key, extra in (("torch_pruning", against_torch_pruning), ("training", beside_training)):
            try:
                result[key] = extra(clock)
            except Exception as error:  # what was measured so far is worth keeping
                result[key] = [{"problem": f"{type(error).__name__}: {error}"}]
        print(json.dumps({key: result[key] for key in ("torch_pruning", "training")}, indent=1))
        _write(args.json, result)
    failed = [row for row in rows if row.problem and not row.problem.startswith("not available")]
    extras = [*result.get("torch_pruning", ()), *result.get("training", ())]
    return int(bool(failed or [row for row in extras if "problem" in row]))


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
