"""Models as files that run elsewhere: ONNX, ``torch.export`` programs and AOTInductor packages.

What is written has a free batch size, and was run and compared with PyTorch before it is at its place.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .checkpoint import write_whole
from .errors import ExportError, check, check_model
from .measure import evaluating
from .optional import require
from .structure import describe

METADATA = "pat_fast"
LARGEST = 2**31 - 2**20  # bytes of weights that an ONNX file, a protobuf message, can hold
Runner = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from PyTorch.

    Attributes:
        max_error: the largest absolute difference of an output, over all batch sizes tried.
        relative_error: the same, of the largest absolute output.
        batches: the batch sizes that were compared.
        simplified: whether the graph was simplified (ONNX).
        needs_vnni: whether its integer products can overflow on x86 without VNNI (quantized ONNX): two of them, an
            unsigned and a signed byte each, are added in 16 signed bits there.
    """

    path: Path
    format: str
    bytes: int
    max_error: float
    relative_error: float
    batches: tuple[int, ...]
    simplified: bool = False
    needs_vnni: bool = False

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        simple = ", simplified" if self.simplified else ""
        vnni = "; may be wrong on x86 without VNNI (weights of more than 7 bits)" if self.needs_vnni else ""
        return (
            f"{self.path}: {self.format}{simple}, {self.bytes / 1e6:.2f} MB; largest difference from PyTorch "
            f"{self.max_error:.2e} ({self.relative_error:.2e} of the largest output) at batch sizes {sizes}{vnni}"
        )


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    exporter: str = "dynamo",
    opset: int = 18,
    simplify: bool = True,
    tolerance: float = 1e-4,
    config: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write ``model`` as ONNX with a free batch size, and prove in onnxruntime that it computes what PyTorch does.

    The file's metadata holds, under ``pat_fast``, the structure that a checkpoint has: sizes, channels that are left,
    versions, ``config`` and ``metrics``.

    Args:
        example_inputs: a tensor, a tuple of tensors or a dict of them; dimension 0 is the batch.
        exporter: ``"dynamo"`` (``torch.export``; needs onnxscript) or ``"torchscript"`` (tracing).
        simplify: let onnxslim simplify the graph; what comes out is kept only if its results are the same.
        tolerance: the largest difference from PyTorch, as a share of the largest absolute output (or of 1), above
            which nothing is written. In a model of :func:`pat_fast.convert_qat` a value on the edge between two
            integers may fall to either side, so there the mean difference must be below a tenth of the outputs'
            standard deviation, with onnxruntime's integer kernels and without.
    Raises:
        MissingPackage: onnx, onnxruntime or, for ``"dynamo"``, onnxscript is not installed.
        ExportError: the model cannot be exported, or the file computes something else.
    """
    check_model(model)
    _check_tolerance(tolerance)
    check("exporter", exporter, lambda v: v in ("dynamo", "torchscript"), "'dynamo' or 'torchscript'")
    onnx = require("onnx", "onnx", "export_onnx")
    require("onnxruntime", "onnx", "export_onnx")
    if exporter == "dynamo":
        require("onnxscript", "onnx", "export_onnx")
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > LARGEST:
        raise ExportError(f"export_onnx: expected at most 2 GB of weights, got {size / 1e9:.1f} GB; use export_program")
    case = Case(model, example_inputs)
    written = _in_onnx(case, exporter, opset)
    simplified = False
    if simplify:
        written, simplified = _simplified(written, case)
    entry = written.metadata_props.add()
    entry.key, entry.value = METADATA, describe(model, {}, config or {}, metrics or {}).to_json()
    content = written.SerializeToString()
    onnx.checker.check_model(content)
    quantized = any(node.op_type == "DequantizeLinear" for node in written.graph.node)
    with _failures("loading what was exported in onnxruntime"):
        run = runner(content)
    error, share = _compared(case, run, math.inf if quantized else tolerance)
    if quantized:
        for optimize in (False, True):
            _check_integers(case, runner(content, optimize=optimize), optimize)
    write_whole(Path(path), lambda temporary: temporary.write_bytes(content), ExportError)
    kind = f"ONNX ({exporter}{', quantized' if quantized else ''})"
    return ExportReport(Path(path), kind, len(content), error, share, case.batches, simplified, _overflows(written))


def export_program(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    format: str = "export",
    tolerance: float = 1e-4,
) -> ExportReport:
    """Write ``model`` for PyTorch without its Python code, with a free batch size, and compare what is read back.

    Args:
        format: ``"export"``, a program of ``torch.export`` (read it with ``torch.export.load(path).module()``), or
            ``"aot_inductor"``, compiled for this kind of machine (``torch._inductor.aoti_load_package(path)``; needs
            a C++ compiler). Either takes the model's own arguments. The structure lies in the former as
            ``pat_fast.json``.
        example_inputs, tolerance: see :func:`export_onnx`.
    Raises:
        ExportError: the model cannot be exported or compiled, or the file computes something else.
    """
    check_model(model)
    _check_tolerance(tolerance)
    check("format", format, lambda v: v in ("export", "aot_inductor"), "'export' or 'aot_inductor'")
    case = Case(model, example_inputs)
    program = case.program()
    result: list[tuple[float, float]] = []
    text = describe(model, {}, {}, {}).to_json()

    def write(temporary: Path) -> None:
        with _failures(f"export_program ({format})"), quietly():
            if format == "export":
                torch.export.save(program, str(temporary), extra_files={"pat_fast.json": text})
                run: Callable[..., Any] = torch.export.load(str(temporary)).module()
            else:
                from torch._inductor import aoti_compile_and_package, aoti_load_package

                aoti_compile_and_package(program, package_path=str(temporary))
                run = aoti_load_package(str(temporary))
        result.append(_compared(case, lambda xs: leaves(run(*case.args(list(xs)), **case.kwargs(list(xs)))), tolerance))

    path = Path(path)
    if path.suffix != ".pt2":
        raise ExportError(f"export_program: expected a path that ends in .pt2, got {path}")
    write_whole(path, write, ExportError)
    return ExportReport(path, format, path.stat().st_size, *result[0], case.batches)


def _check_tolerance(value: float) -> None:
    check("tolerance", value, lambda v: v >= 0, "a number, at least 0")


# Inputs and outputs


class Case:
    """A model with inputs of several batch sizes, and its outputs for them.

    Attributes:
        names: of the inputs.
        outputs: names of the outputs.
        batched: for each input, whether its dimension 0 is the batch.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model = model
        self.by_name = isinstance(example_inputs, Mapping)
        if self.by_name:
            self.names, given = list(example_inputs), list(example_inputs.values())
        else:
            given = list(example_inputs) if isinstance(example_inputs, Sequence) else [example_inputs]
            self.names = [f"input_{i}" for i in range(len(given))] if len(given) > 1 else ["input"]
        if not given or not all(isinstance(x, Tensor) and x.ndim for x in given):
            raise ExportError("example_inputs: expected a tensor, or a tuple or dict of tensors with a batch dimension")
        self.batched = [len(x) == len(given[0]) for x in given]
        # torch.export takes a size of one for a constant.
        pairs = zip(given, self.batched, strict=True)
        self.example = [torch.cat([x, x]) if b and len(x) == 1 else x for x, b in pairs]
        self.inputs = [self.example, self._batch(1), self._batch(2 * len(self.example[0]) + 1)]
        with evaluating(model):
            found = self.call(self.example)
            self.expected = [leaves(self.call(inputs)) for inputs in self.inputs]
        self.outputs = output_names(found, len(self.expected[0]))

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(len(inputs[0]) for inputs in self.inputs)

    def _batch(self, size: int) -> list[Tensor]:
        """Inputs of another batch size: rows of the example, rolled so that they differ."""
        out = []
        for x, batched in zip(self.example, self.batched, strict=True):
            if batched:
                rows = [x[i % len(x)] for i in range(size)]
                x = torch.stack([r.roll(i // len(x), -1) if r.ndim else r for i, r in enumerate(rows)])
            out.append(x)
        return out

    def args(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return () if self.by_name else tuple(inputs)

    def kwargs(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.names, inputs, strict=True)) if self.by_name else {}

    def call(self, inputs: list[Tensor]) -> Any:
        try:
            return self.model(*self.args(inputs), **self.kwargs(inputs))
        except Exception as error:
            shapes = [tuple(x.shape) for x in inputs]
            raise ExportError(
                f"the model cannot be run on inputs of shapes {shapes}: {type(error).__name__}: {error}; "
                "example_inputs must have the batch first"
            ) from error

    def program(self, *, training: bool = False) -> torch.export.ExportedProgram:
        """The model exported with a free batch size, in eval mode or, to be trained on, in training mode."""
        batch = torch.export.Dim("batch", min=1)
        free: list[Any] = [{0: batch} if b else None for b in self.batched]
        shapes: Any = dict(zip(self.names, free, strict=True)) if self.by_name else tuple(free)
        with _failures("torch.export"), evaluating(self.model), quietly():
            if training:
                self.model.train()
            with torch.set_grad_enabled(training):
                return torch.export.export(
                    self.model, self.args(self.example), self.kwargs(self.example), dynamic_shapes=shapes
                )


class _Plain(nn.Module):
    """A model whose outputs are a tuple of tensors, and whose inputs come in order."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model
        self._names = case.names if case.by_name else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self._names is None:
            return tuple(leaves(self.model(*inputs)))
        return tuple(leaves(self.model(**dict(zip(self._names, inputs, strict=True)))))


def leaves(output: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def output_names(output: Any, count: int) -> list[str]:
    """Names for them: the keys of a mapping that holds nothing but tensors, else numbers."""
    if isinstance(output, Mapping):
        names = [str(k) for k, v in output.items() if isinstance(v, Tensor)]
        if len(names) == count:
            return names
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


# ONNX


def _in_onnx(case: Case, exporter: str, opset: int) -> Any:
    """The model in ONNX, by one of PyTorch's exporters."""
    import onnx

    plain = _Plain(case)
    options: dict[str, Any] = {"input_names": case.names, "output_names": case.outputs, "opset_version": opset}
    quantized = isinstance(case.model, torch.fx.GraphModule) and "quantized_decomposed" in case.model.code
    if quantized and exporter != "dynamo":
        raise ExportError(f"export_onnx: expected exporter='dynamo' for a model of convert_qat, got {exporter!r}")
    with _failures(f"export_onnx ({exporter})"), evaluating(plain), quietly():
        if exporter == "dynamo":
            batch = torch.export.Dim("batch", min=1)
            shapes = (tuple({0: batch} if b else None for b in case.batched),)  # of *inputs
            options |= {"dynamo": True, "dynamic_shapes": shapes, "verbose": False}
            made = torch.onnx.export(plain, tuple(case.example), **options)
            assert made is not None
            return made.model_proto
        axes = {n: {0: "batch"} for n, b in zip(case.names, case.batched, strict=True) if b}
        axes |= {n: {0: "batch"} for n, y in zip(case.outputs, case.expected[0], strict=True) if _follows(case, n)}
        file: Any = io.BytesIO()
        torch.onnx.export(plain, tuple(case.example), file, dynamo=False, dynamic_axes=axes, **options)
        return onnx.load_from_string(file.getvalue())


def _follows(case: Case, name: str) -> bool:
    """Whether dimension 0 of an output is the batch."""
    number = case.outputs.index(name)
    sizes = [len(y[number]) if y[number].ndim else -1 for y in case.expected]
    return sizes == list(case.batches)


def _simplified(written: Any, case: Case) -> tuple[Any, bool]:
    """The graph simplified, if that changes nothing that can be seen."""
    try:
        slim = require("onnxslim", "onnx", "export_onnx(simplify=True)").slim
    except ImportError:
        return written, False
    try:
        simple = slim(copy.deepcopy(written))
        before, after = runner(written.SerializeToString()), runner(simple.SerializeToString())
        for inputs in case.inputs:
            for one, two in zip(before(inputs), after(inputs), strict=True):
                if one.shape != two.shape or float((one - two).abs().max()) > 1e-6 * max(1.0, float(one.abs().max())):
                    return written, False
    except Exception:  # a simplifier that fails is no reason to have no file
        return written, False
    return simple, True


def runner(content: bytes | str, *, optimize: bool = True, threads: int = 0) -> Runner:
    """A function that runs an ONNX model (its bytes or path) in onnxruntime on the CPU.

    Args:
        optimize: with onnxruntime's graph optimisations.
        threads: 0 leaves the number to onnxruntime.
    """
    ort = require("onnxruntime", "onnx", "running ONNX")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


# Proof


def _compared(case: Case, run: Runner, tolerance: float) -> tuple[float, float]:
    """The largest difference from PyTorch, absolute and as a share of the largest output.

    Raises:
        ExportError: it is more than ``tolerance``.
    """
    worst, share = 0.0, 0.0
    for inputs, expected in zip(case.inputs, case.expected, strict=True):
        with _failures(f"running what was exported at batch size {len(inputs[0])}"), torch.no_grad():
            found = run(inputs)
        for name, one, two in zip(case.outputs, found, expected, strict=True):
            two = two.detach().cpu()
            if one.shape != two.shape:
                raise ExportError(f"{name}: expected shape {tuple(two.shape)}, got {tuple(one.shape)} after export")
            if not two.numel():
                continue
            apart = float((one.detach().cpu().double() - two.double()).abs().max())
            largest = max(1.0, float(two.double().abs().max()))
            worst, share = max(worst, apart), max(share, apart / largest)
            if not apart <= tolerance * largest:
                raise ExportError(
                    f"{name}: expected PyTorch's results within {tolerance:g} of the largest output ({largest:.3g}), "
                    f"got a difference of {apart:.3g} at batch size {len(inputs[0])}; nothing was written"
                )
    return worst, share


def _check_integers(case: Case, run: Runner, optimized: bool) -> None:
    """Integers fall to either side of an edge, as a matter of rounding; a wrong scale, or sums that saturate, are far
    off everywhere."""
    why = "nothing was written"
    if optimized:
        why = "integer kernels saturate on this processor; prepare with weight_bits=7"
    for inputs, expected in zip(case.inputs, case.expected, strict=True):
        for name, one, two in zip(case.outputs, run(inputs), expected, strict=True):
            apart, spread = float((one - two).abs().mean()), float(two.std(correction=0))
            if apart > 0.1 * spread + 1e-6:
                raise ExportError(
                    f"{name}: expected PyTorch's results within a tenth of their standard deviation {spread:.3g}, "
                    f"got a mean difference of {apart:.3g}: {why}"
                )


def _overflows(written: Any) -> bool:
    """Whether a pair of products of any two weights of an output and the largest byte leaves 16 signed bits."""
    from onnx import numpy_helper

    stored = {t.name: t for t in written.graph.initializer}
    for node in written.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        values = numpy_helper.to_array(stored[node.input[0]])
        if values.dtype != np.int8 or values.ndim < 2:
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        rows = np.sort(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).astype(np.int64), 1)
        if 255 * rows[:, -2:].sum(1).max() >= 2**15 or 255 * rows[:, :2].sum(1).min() < -(2**15):
            return True
    return False


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ExportError(f"{what} failed: {type(error).__name__}: {lines[0]}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' warnings and chatter, none of which is about the model."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what fails is raised
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
