"""Measures what was asked for: kernels against the memory's bandwidth, operations against Torch-Pruning too."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends as dispatch
from ..backends import Backend
from ..errors import ConfigError, check, did_you_mean
from . import machine as machines
from .bandwidth import Bandwidth
from .clock import Clock, Prepare
from .kernels import COPIES, MOST, VARIANTS, Kernels
from .models import Model, find, usual
from .results import Mismatch, Result, Row
from .steps import STEPS, Step, ready, training_step_ms
from .subject import Subject

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
LAYOUTS = ("contiguous", "channels_last")
TRAINING = "training"
OPS = (*VARIANTS, *STEPS, TRAINING)
ALL = "all"
EXACT = ("float32", "float64")
"""Dtypes in which Torch-Pruning adds up as precisely as we do, so that results can be equal."""
QUICK_ROUNDS = 3

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        models: names, see :func:`pat_fast.bench.models.find`; a few usual ones by default.
        ops: of ``OPS``, or "all"; all but "training" by default.
        backends: names; all that run on the device by default.
        dtypes: float32 by default, on a GPU bfloat16 as well.
        layouts: memory formats of convolutions.
        inputs, args: of the networks that factories make.
        rounds: timed calls of each function.
        small: the zoo's small models.
        batch: of the training step.
        mebibytes: size of the buffers that bandwidth is measured on and caches are emptied with.
    """

    models: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    device: str = "cpu"
    layouts: tuple[str, ...] = LAYOUTS[:1]
    inputs: tuple[Tensor, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 15
    small: bool = False
    batch: int | None = None
    mebibytes: int | None = None

    def resolved(self) -> Settings:
        """The settings with defaults filled in.

        Raises:
            ConfigError: something is unknown, or not to be had here.
        """
        kind = device_of(self.device).type
        for option, given, known in (
            ("--ops", self.ops, (*OPS, ALL)),
            ("--dtypes", self.dtypes, tuple(DTYPES)),
            ("--layouts", self.layouts, LAYOUTS),
            ("--backends", self.backends, tuple(b.name for b in dispatch.BACKENDS)),
        ):
            for name in given:
                if name not in known:
                    near = did_you_mean(name, known)
                    raise ConfigError(f"{option}: expected names out of {', '.join(known)}; got {name!r}{near}")
        check("--rounds", self.rounds, lambda v: v >= 1, "an integer >= 1")
        check("--batch", self.batch, lambda v: v is None or v >= 1, "an integer >= 1")
        ops = OPS if ALL in self.ops else self.ops or tuple(op for op in OPS if op != TRAINING)
        if self.batch is not None and TRAINING not in ops:
            raise ConfigError(f"--batch: expected {TRAINING} in --ops beside it, or --deploy, got neither")
        return replace(
            self,
            models=self.models or usual(kind),
            ops=ops,
            dtypes=self.dtypes or (("float32", "bfloat16") if kind == "cuda" else ("float32",)),
        )

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON has them; of inputs the shapes."""
        plain = {name: getattr(self, name) for name in ("device", "rounds", "small", "batch", "mebibytes")}
        lists = {name: list(getattr(self, name)) for name in ("models", "ops", "backends", "dtypes", "layouts")}
        return {**lists, **plain, "inputs": [list(x.shape) for x in self.inputs], "args": dict(self.args)}


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: it is unknown, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: expected cpu, cuda or cuda:0, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {name!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        here = f"{count} CUDA devices" if device.type == "cuda" else "one CPU, which is cpu"
        raise ConfigError(f"--device: expected a device that PyTorch can use, got {name!r} and {here}")
    return device


def available(device: str, named: Collection[str]) -> tuple[list[Backend], list[str]]:
    """The backends to measure on a device type, and what is left out and why.

    Raises:
        ConfigError: a named one cannot run there.
    """
    found, notes = [], []
    for backend in dispatch.BACKENDS:
        if named and backend.name not in named:
            continue
        serves = backend.serves(device, backend.name in named)
        why = backend.probe(device) if serves else f"it does not serve {device}"
        if why is None:
            found.append(backend)
        elif named:
            raise ConfigError(f"--backends: expected backends that run on {device}, got {backend.name}: {why}")
        elif serves:
            notes.append(f"not measured: {backend.name}: {why}")
    return found, notes


class Bench:
    """One run: its clock, its bandwidth, its rows so far."""

    def __init__(self, settings: Settings, tell: Tell) -> None:
        self.settings = settings.resolved()
        self.device = device_of(settings.device)
        # Before anything else: what it says of the load must not be our own.
        self.machine = machines.describe(self.device)
        self._watch = machines.Watch()
        self.backends, self.notes = available(self.device.type, settings.backends)
        self.models = [find(n, settings.inputs, settings.args, settings.small) for n in self.settings.models]
        self.clock = Clock(self.device, settings.rounds, settings.mebibytes)
        self.bandwidth = Bandwidth(self.clock, settings.mebibytes)
        self._tell = tell

    def run(self) -> Result:
        """Measure everything.

        Raises:
            ConfigError: there is nothing to measure.
        """
        rows = [row for model in self.models for row in self._model(model)]
        if not rows:
            raise ConfigError(f"expected something to measure, got nothing: {'; '.join(self.notes)}")
        rows = [row.held_against(self.bandwidth) for row in rows]
        self._watch.note(self.machine)
        disturbed = [machines.busy(self.machine)] if machines.busy(self.machine) else []
        noisy = sum(row.is_noisy for row in rows)
        disturbed += [f"{noisy} of {len(rows)} rows are noisy"] if noisy else []
        disturbed += [f"{self.settings.rounds} rounds: a glance"] if self.settings.rounds <= QUICK_ROUNDS else []
        self.notes += [self.bandwidth.drift()] if self.bandwidth.drift() else []
        notes = tuple(dict.fromkeys(self.notes))
        rates = self.bandwidth.rates
        return Result(self.machine, self.settings.as_json(), rates, tuple(rows), tuple(disturbed), notes)

    def _model(self, model: Model) -> Iterator[Row]:
        layouts = self.settings.layouts if model.is_convolutional() else LAYOUTS[:1]
        left = set(self.settings.layouts) - set(layouts)
        if left:
            why = "most of its parameters are no weights of 2-d convolutions"
            self.notes.append(f"not measured: {', '.join(left)} of {model.name}, but {LAYOUTS[0]}: {why}")
        for layout in layouts:
            for dtype in self.settings.dtypes:
                row = Row(model.name, "", dtype, "", layout)
                yield from self._kernels(model, row)
                yield from self._steps(model, row)

    def _kernels(self, model: Model, like: Row) -> Iterator[Row]:
        calls = [call for op in self.settings.ops for call in VARIANTS.get(op, ())]
        if not calls:
            return
        try:
            case = Kernels(model.shapes(), DTYPES[like.dtype], self.device, like.layout == "channels_last")
        except Exception as error:  # too little memory, say
            yield self._told(replace(like, op=calls[0], problem=f"{type(error).__name__}: {error}"))
            return
        if "channel_compact fresh" in calls and COPIES * case.bytes > MOST:
            size = f"{COPIES * case.bytes / 1e9:.1f} GB"
            self.notes.append(f"not measured: channel_compact fresh of {model.name}: four copies are {size}")
            calls = [call for call in calls if call != "channel_compact fresh"]
        for backend in self.backends:
            for call in calls:
                row = replace(like, op=call, backend=backend.name)
                try:
                    yield self._kernel(row, case, backend)
                except Mismatch as problem:
                    yield self._told(replace(row, problem=str(problem), differs=True))
                except Exception as error:  # a backend that fails is a finding, not the end of the run
                    yield self._told(replace(row, problem=f"{type(error).__name__}: {error}"))

    def _kernel(self, row: Row, case: Kernels, backend: Backend) -> Row:
        case.check(row.op, backend.ops())
        call = case.call(row.op, backend.ops())
        self.bandwidth.probe()
        row = replace(row, traffic=call.traffic)
        if self.clock.is_cuda and call.rival is None:
            sample = self.clock.sample(call.run)
            # The reference is the oracle; as a baseline, its eager time is enough.
            graph = self.clock.replayed(call.run) if dispatch.ANY not in backend.devices else None
            return self._told(row.timed(sample, call.moved, graph=graph))
        moved = {call.traffic: call.moved, **({"read": call.along} if call.along else {})}
        sides = self._beside_plain(moved, {"ours": ready(call.run)})
        if call.rival is not None:
            rival, run = call.rival
            sides[rival] = ready(run)
        found = self.clock.compare(sides)
        if call.rival is not None:
            ms = found[rival].ms
            extra = {f"{rival} ms": ms, f"times {rival}": ms / found["ours"].ms}
            if "plain" in found:
                extra["most"] = ms / found["plain"].ms
            row = replace(row, extra=extra)
        return self._told(row.timed(found["ours"], call.moved, found.get("plain")))

    def _beside_plain(self, moved: Mapping[str, int], sides: dict[str, Prepare]) -> dict[str, Prepare]:
        """``sides`` to compare, and a plain pass over the bytes that are moved, where there is one."""
        plain = self.bandwidth.plain(moved)
        return sides if plain is None else {**sides, "plain": ready(plain)}

    def _steps(self, model: Model, like: Row) -> Iterator[Row]:
        wanted = [op for op in self.settings.ops if op not in VARIANTS]
        reason = self._why_no_steps(model, like.dtype) if wanted else ""
        if reason:
            self.notes.append(f"not measured: {', '.join(wanted)} of {model.name} in {like.dtype}: {reason}")
        if reason or not wanted or model.build is None:
            return
        like = replace(like, backend=self.in_use())
        try:
            network, inputs = model.build()
            last = like.layout == "channels_last"
            subject = Subject(model.name, network, inputs, self.device, DTYPES[like.dtype], channels_last=last)
        except Exception as error:
            yield self._told(replace(like, op=wanted[0], problem=f"{type(error).__name__}: {error}"))
            return
        left = subject.unmatched if subject.matches else []
        if left:
            self.notes.append(f"groups of Torch-Pruning that the plan of {model.name} has otherwise: {', '.join(left)}")
        for op in wanted:
            row = replace(like, op=op)
            try:
                yield self._training(row, subject) if op == TRAINING else self.step(row, STEPS[op](subject))
            except Exception as error:
                yield self._told(replace(row, problem=f"{type(error).__name__}: {error}"))

    def in_use(self) -> str:
        """The backend that runs the ops of an operation."""
        return "+".join(dict.fromkeys(choice.backend for choice in dispatch.select(self.device.type)))

    def _why_no_steps(self, model: Model, dtype: str) -> str:
        if model.build is None:
            return "it is a list of shapes alone"
        if importlib.util.find_spec("torch_pruning") is None:
            return "torch_pruning is not installed"
        if dtype not in EXACT:
            return "Torch-Pruning does not add up in float32"
        used = self.in_use()
        if self.settings.backends and used not in self.settings.backends:
            return f"they run the {used} kernels, which --backends leaves out; {dispatch.ENV} chooses others"
        return ""

    def step(self, row: Row, step: Step) -> Row:
        """Measure an operation; Torch-Pruning beside it if both come to the same result."""
        row = replace(row, traffic=step.traffic, groups=step.groups, no_ratio=step.unmatchable)
        if not row.no_ratio:
            try:
                step.check()
            except Mismatch as problem:
                row = replace(row, no_ratio=str(problem), differs=True)
            except Exception as error:  # it fails on some layers
                row = replace(row, no_ratio=f"{type(error).__name__}: {error}")
        moved = step.moved()
        self.bandwidth.probe()
        sides = {"ours": step.ours} if row.no_ratio else {"theirs": step.theirs, "ours": step.ours}
        found = self.clock.compare(self._beside_plain(moved, sides), self.rounds(step))
        row = row.timed(found["ours"], sum(moved.values()), found.get("plain"))
        return self._told(row.against(found["theirs"]) if "theirs" in found else row)

    def rounds(self, step: Step) -> int:
        """Timed runs of an operation."""
        return max(QUICK_ROUNDS, self.clock.rounds // 3) if step.slow else self.clock.rounds

    def _training(self, row: Row, subject: Subject) -> Row:
        """The regulariser alone, and what it adds to a training step: a GPU may still be busy with the step."""
        own = STEPS["regularize"](subject)
        row = replace(row, traffic=own.traffic).timed(
            self.clock.compare({"": own.ours})[""], sum(own.moved().values())
        )
        step_ms, with_ms, batch = training_step_ms(subject, self.clock, self.settings.batch)
        assert row.ms is not None
        extra = {"step_ms": step_ms, "batch": float(batch), "share_of_step": row.ms / step_ms}
        extra["added_share"] = with_ms / step_ms - 1
        return self._told(replace(row, extra=extra))

    def _told(self, row: Row) -> Row:
        self._tell(f"{row.name} {row.dtype} {row.op} {row.backend}: {row.problem or 'done'}")
        return row


def run(settings: Settings, tell: Tell = lambda line: None) -> Result:
    """Measure what ``settings`` say; ``tell`` hears of every row.

    Raises:
        ConfigError: a setting is wrong, or there is nothing to measure.
    """
    return Bench(settings, tell).run()


def names(given: Sequence[str], option: str) -> tuple[str, ...]:
    """Names given apart or with commas between them, each once.

    Raises:
        ConfigError: something was given, but no name.
    """
    found = tuple(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    if given and not found:
        raise ConfigError(f"{option}: expected names, got {' '.join(map(repr, given))}")
    return found


def check_models(given: Sequence[str]) -> None:
    """Refuse, as models, what an option takes: a shell hands on ``--ops a b`` as the option's ``a`` and a model ``b``.

    Raises:
        ConfigError: it names the option, and how to write it.
    """
    options: dict[str, Collection[str]] = {
        "--ops": (*OPS, ALL),
        "--backends": [backend.name for backend in dispatch.BACKENDS],
        "--dtypes": DTYPES,
        "--layouts": LAYOUTS,
    }
    for option, known in options.items():
        found = [name for name in given if name in known]
        if found:
            raise ConfigError(
                f"MODEL: expected models, got {', '.join(found)}, for which there is {option}; an option takes one "
                f"word: put commas without spaces between its values, as in {option} A,{found[0]}"
            )
