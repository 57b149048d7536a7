"""What a pruned model costs where it runs: latency and peak memory, dense against pruned, in several runtimes."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_choice
from ..errors import ConfigError, PatError, check
from ..export import export_onnx, leaves, runner
from ..measure import count_params
from ..optional import require
from ..quantization import convert_qat, prepare_qat
from . import machine as machines
from .clock import NOISY, Clock
from .models import find

RUNTIMES = ("eager", "channels_last", "compile", "onnxruntime", "int8")
"""``channels_last`` is eager mode, too: with images and weights in the layout that convolutions on a CPU read best."""
SIDES = ("dense", "pruned")
Run = Callable[[], object]


@dataclass(frozen=True)
class DeploySettings:
    """What to measure.

    Args:
        models: names, see :func:`pat_fast.bench.models.find`.
        runtimes: of ``RUNTIMES``.
        batches: batch sizes.
        macs: share of the MACs that the pruned model keeps.
        round_to: widths of the pruned model are multiples of this, ``"auto"``: of what this machine computes best.
        inputs, args, small, rounds: as for the other measurements.
    """

    models: tuple[str, ...]
    runtimes: tuple[str, ...] = RUNTIMES
    batches: tuple[int, ...] = (1, 8)
    macs: float = 0.5
    round_to: int | str = "auto"
    inputs: tuple[Tensor, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 15
    small: bool = False

    def check(self) -> None:
        """Raise ConfigError for what cannot be measured."""
        for name in self.runtimes:
            check_choice("--runtimes", name, RUNTIMES)
        if not self.models:
            raise ConfigError("MODEL: expected a model to deploy, got none; name one, such as resnet50")
        check("--macs", self.macs, lambda v: 0.0 < v < 1.0, "a number in (0, 1)")
        check("--rounds", self.rounds, lambda v: v >= 1, "an integer >= 1")
        for batch in self.batches:
            check("--batch", batch, lambda v: v >= 1, "an integer >= 1")
        if not Path("/proc/self/clear_refs").exists():
            raise ConfigError("--deploy: expected Linux, whose /proc tells the peak of memory")
        if {"onnxruntime", "int8"} & set(self.runtimes):
            require("onnxruntime", "onnx", "--deploy")
        if "int8" in self.runtimes:
            require("torchao.quantization.pt2e", "qat", "--deploy: int8")


@dataclass(frozen=True)
class DeployRow:
    """One model in one runtime at one batch size; of each side the median wall time, its spread, the least processor
    time (all threads together), the first call (a warm-up, which is not counted) and the peak memory of a run above
    what the process held before the model was loaded. ``disturbed`` says what ran beside the timing, or is empty."""

    model: str
    runtime: str
    batch: int
    ms: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    cpu_ms: dict[str, float] = field(default_factory=dict)
    first_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    disturbed: str = ""
    problem: str = ""

    def ratio(self, of: str) -> float:
        """How many times faster, or smaller, the pruned model is."""
        values = getattr(self, of)
        return float(values["dense"] / values["pruned"])


@dataclass(frozen=True)
class DeployResult:
    """Everything that was measured, and on what."""

    machine: dict[str, Any]
    cost: dict[str, dict[str, Any]]
    rows: tuple[DeployRow, ...]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps({"format": 1, **asdict(self)}, indent=2) + "\n")

    @property
    def is_right(self) -> bool:
        return not any(row.problem for row in self.rows)


def deploy(settings: DeploySettings, tell: Callable[[str], None] = lambda line: None) -> DeployResult:
    """Prune each model once, to ``settings.macs``, and measure it beside the dense one.

    Raises:
        ConfigError: a setting is wrong, or a model cannot be built.
    """
    settings.check()
    machine = machines.describe(torch.device("cpu"))
    rows: list[DeployRow] = []
    cost = {}
    clock = Clock(torch.device("cpu"), settings.rounds, cold=False)  # a model that serves runs again and again
    for name in settings.models:
        found = find(name, settings.inputs, settings.args, settings.small)
        if found.build is None:
            raise ConfigError(f"MODEL: expected a network, got {name}, which is a list of shapes alone")
        network, inputs = found.build()
        models, cost[name] = twins(network.eval(), inputs, settings)
        tell(f"{name}: {cost[name]['macs_left']:.1%} of the MACs left")
        with tempfile.TemporaryDirectory() as folder:
            for runtime in settings.runtimes:
                for batch in settings.batches:
                    rows.append(_row(name, runtime, models, _batch(inputs, batch), clock, Path(folder)))
                    tell(f"{name} {runtime} batch {batch}: {rows[-1].problem or 'done'}")
    return DeployResult(machine, cost, tuple(rows))


def twins(dense: nn.Module, inputs: Sequence[Tensor], settings: DeploySettings) -> tuple[dict[str, nn.Module], dict]:
    """The dense model and one pruned in one shot, and what both count."""
    from ..pruner import Pruner

    pruned = copy.deepcopy(dense)
    pruner = Pruner(
        pruned,
        target={"macs": settings.macs},
        schedule="one_shot",
        end_epoch=1,
        round_to=settings.round_to,
        regularizer=None,
        example_inputs=tuple(inputs),
        optimizer=torch.optim.SGD(pruned.parameters(), 0.1),
    )
    report = pruner.step()
    pruner.close()
    for p in (*dense.parameters(), *pruned.parameters()):
        p.requires_grad_(False)
        p.grad = None
    cost = {
        "params": {"dense": count_params(dense), "pruned": count_params(pruned)},
        "macs": {"dense": report.macs[0], "pruned": report.macs[1]},
        "macs_left": report.macs[1] / report.macs[0],
        "round_to": settings.round_to,
    }
    return {"dense": dense, "pruned": pruned.eval()}, cost


def _row(
    name: str, runtime: str, models: dict[str, nn.Module], inputs: list[Tensor], clock: Clock, folder: Path
) -> DeployRow:
    row = DeployRow(name, runtime, len(inputs[0]))
    runs: dict[str, Run] = {}
    try:
        for side in SIDES:
            path = folder / f"{side}-{runtime}.onnx"
            if runtime in ("onnxruntime", "int8"):
                _write(path, runtime, models[side], inputs)
            before = _resident()[0]
            start = time.perf_counter()
            runs[side] = _made(runtime, models[side], inputs, path)
            with torch.inference_mode():
                runs[side]()
                row.first_ms[side] = (time.perf_counter() - start) * 1e3
                row.peak_mib[side] = _peak(runs[side]) - before
        watch = machines.Watch()
        with torch.inference_mode():
            wall = clock.compare({side: (lambda run=run: run) for side, run in runs.items()})  # type: ignore[misc]
            for side, sample in wall.items():
                row.ms[side], row.spread[side] = sample.ms, sample.spread
                row.cpu_ms[side] = _processor_ms(runs[side], clock.rounds)
        row = replace(row, disturbed=watch.seen())
    except Exception as error:  # one runtime that fails is a finding, not the end of the run
        if not isinstance(error, (PatError, RuntimeError, OSError)):
            raise
        return DeployRow(name, runtime, len(inputs[0]), problem=f"{type(error).__name__}: {str(error)[:300]}")
    return row


def _made(runtime: str, model: nn.Module, inputs: list[Tensor], path: Path) -> Run:
    """A function that runs ``model`` in ``runtime`` on ``inputs``."""
    if runtime in ("eager", "channels_last"):
        own, given = copy.deepcopy(model), inputs
        if runtime == "channels_last":
            own = own.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            given = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
        return lambda: own(*given)
    if runtime == "compile":
        compiled = torch.compile(copy.deepcopy(model), dynamic=False)
        return lambda: compiled(*inputs)
    run = runner(str(path), threads=torch.get_num_threads())
    return lambda: leaves(run(inputs))


def _write(path: Path, runtime: str, model: nn.Module, inputs: list[Tensor]) -> None:
    """The ONNX file that ``runtime`` runs, once for all batch sizes; onnxruntime is loaded by then.

    Integers come as :func:`pat_fast.prepare_qat` makes them, with the ranges of ``inputs`` and no training: enough for
    their latency, not for their accuracy.
    """
    if path.exists():
        return
    if runtime == "onnxruntime":
        export_onnx(model, tuple(inputs), path, exporter="torchscript", tolerance=1e-3)
        return
    prepared = prepare_qat(model, tuple(inputs))
    with torch.no_grad():
        prepared(*inputs)
    export_onnx(convert_qat(prepared), tuple(inputs), path)


def _batch(inputs: Sequence[Tensor], size: int) -> list[Tensor]:
    return [x[torch.arange(size) % len(x)].contiguous() for x in inputs]


def _processor_ms(run: Run, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def _resident() -> tuple[float, float]:
    """Memory that the process holds now and held at most, in MiB; what is free goes back to the system first."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    return _status()


def _status() -> tuple[float, float]:
    text = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) / 1024, int(found["VmHWM"]) / 1024


def _peak(run: Run) -> float:
    """The most memory that the process holds during a run, in MiB."""
    _resident()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: from now on the peak counts anew
    run()
    return _status()[1]


HEADER = (
    *("model", "runtime", "batch", "dense ms", "pruned ms", "spread", "faster"),
    *("dense CPU ms", "pruned CPU ms", "faster", "first call ms", "peak MiB", "smaller"),
)


def render(result: DeployResult) -> str:
    """The result as aligned text."""
    lines: list[tuple[str, ...]] = [HEADER]
    for row in result.rows:
        start = (row.model, row.runtime, str(row.batch))
        if row.problem:
            lines.append((*start, f"no numbers: {row.problem}", *[""] * 9))
            continue
        noisy = "!" if max(row.spread.values()) > NOISY else ""
        lines.append(
            (
                *start,
                *(f"{row.ms[side]:.2f}" for side in SIDES),
                " / ".join(f"{row.spread[side]:.0%}" for side in SIDES) + noisy,
                f"{row.ratio('ms'):.2f}x{noisy}",
                *(f"{row.cpu_ms[side]:.2f}" for side in SIDES),
                f"{row.ratio('cpu_ms'):.2f}x",
                " / ".join(f"{row.first_ms[side]:.0f}" for side in SIDES),
                " / ".join(f"{row.peak_mib[side]:.1f}" for side in SIDES),
                f"{row.ratio('peak_mib'):.2f}x" if row.peak_mib["pruned"] > 0 else "",
            )
        )
    widths = [max(len(c[i]) for c in lines if c[4] or i < 3) for i in range(len(HEADER))]
    out = [_where(result.machine)]
    for name, cost in result.cost.items():
        counts = ", ".join(f"{k} {v['dense']:,} -> {v['pruned']:,}" for k, v in cost.items() if isinstance(v, dict))
        out.append(f"{name}: {counts} ({cost['macs_left']:.1%}), round_to={cost['round_to']}")
    out += ["", *("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)]
    if any(row.spread and max(row.spread.values()) > NOISY for row in result.rows):
        out.append(f"!  noise: quartiles more than {NOISY:.0%} of the median apart; the processor time stands")
    for row in result.rows:
        if row.disturbed:
            of = f"{row.model} {row.runtime} batch {row.batch}"
            out.append(f"disturbed, do not quote the wall times of {of}: {row.disturbed}")
    return "\n".join(out)


def _where(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return f"{machine['cpu']}, cores {machine['cores']}, threads {machine['threads']}, {versions}"
