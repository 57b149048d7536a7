"""One family put to the test: build, plan, prune, run, compare. Every step leaves its trace in a :class:`Row`."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import pat_fast as pat
from benchmarks.reach.models import Family, build
from pat_fast.masks import Mask
from pat_fast.plan import Plan, bind
from pat_fast.plan.outputs import fixed_outputs
from pat_fast.surgery import prune

LEAST = 0.10  # a family counts as pruned if this share of its weights went, at a ratio of 0.3
TOLERANCE = 1e-5  # masked against pruned, relative to the largest output; float64, with norms often in float32
NEW_TOKENS = 3
OUTPUT = "is an output of the model"
PRUNED, ALONE, FAILED, UNBUILT, OUTSIDE = "pruned", "left alone", "failed", "does not build", "not asked"

Keep = NDArray[np.bool_]
Report = Callable[[str], None]


@dataclass
class Row:
    """What became of one family.

    Attributes:
        params: elements of all parameters, before; ``params_left`` after.
        weights: elements of the matrices and kernels of the layers that ran, without embedding tables and what is
            tied to them; ``weights_left`` after.
        free, channels: output channels of the layers that ran, those in the plan and all; without the model's
            own outputs.
        frozen: (reason without names, channels) of what the plan leaves alone.
        equal: whether the masked and the pruned model agree, in words.
        afresh: "=" if the plan foreseen for the pruned model is the one built for it afresh, or what differs.
    """

    family: str
    kind: str
    status: str = FAILED
    detail: str = ""
    params: int = 0
    params_left: int = 0
    weights: int = 0
    weights_left: int = 0
    free: int = 0
    channels: int = 0
    groups: int = 0
    frozen: list[tuple[str, str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    equal: str = ""
    afresh: str = ""
    trace: str = ""

    @property
    def gone(self) -> float:
        """Share of the weights that was removed."""
        return 1 - self.weights_left / self.weights if self.weights else 0.0


class Mismatch(Exception):
    """The pruned model runs, and does something else than it should."""


def probe(family: Family, ratio: float, report: Report) -> Row:
    """Put ``family`` to the test; errors end up in the row. ``report`` is told each step as it begins."""
    row = Row(family.name, family.kind)
    step = "build"

    def begin(name: str) -> None:
        nonlocal step
        step = name
        report(name)

    try:
        begin("build")
        model, inputs = build(family)
        begin("dense forward")
        ran, shapes = dense_run(model, inputs)
    except Exception as error:
        row.status, row.detail = UNBUILT, f"{step}: {_message(error)}"
        return row
    try:
        _prune_and_run(row, family, model, inputs, ran, shapes, ratio, begin)
    except Exception as error:
        row.status, row.detail = FAILED, f"{step}: {_message(error)}"
        row.trace = "".join(traceback.format_exception(_root(error))[-6:])
    return row


def _prune_and_run(
    row: Row,
    family: Family,
    model: nn.Module,
    inputs: dict[str, Any],
    ran: list[nn.Module],
    shapes: list[torch.Size],
    ratio: float,
    begin: Report,
) -> None:
    generates = family.generates and _can_generate(model, inputs)
    weights = matrices(model, ran)
    row.params, row.weights = _elements(model.parameters()), _elements(weights)
    begin("build_plan")
    start = time.perf_counter()
    plan = pat.build_plan(model, inputs)
    row.seconds = time.perf_counter() - start
    row.groups, row.notes = len(plan.groups), list(plan.notes)
    row.frozen = [(general(f.reason), f.layer, f.channels) for f in plan.frozen]
    row.free, row.channels = coverage(model, plan, ran)
    keep = keep_for(plan, ratio)
    begin("masked against pruned")
    row.equal = masked_equals_pruned(family, model, inputs, plan, keep)
    begin("prune")
    foreseen = prune(bind(plan, model), keep).plan
    row.params_left, row.weights_left = _elements(model.parameters()), _elements(weights)
    begin("forward and backward of the pruned model")
    if (after := dense_run(model, inputs)[1]) != shapes:
        raise Mismatch(f"outputs of shapes {_plain(after)}, before {_plain(shapes)}")
    begin("build_plan of the pruned model")
    row.afresh = difference(foreseen, pat.build_plan(model, inputs))
    if generates:
        begin("generate")
        generate(model, inputs)
    row.status = PRUNED if row.gone >= LEAST else ALONE
    if not generates and family.generates:
        row.notes.append("the dense model cannot generate")


def dense_run(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[nn.Module], list[torch.Size]]:
    """Forward and backward in training mode; the modules that ran and the shapes of the outputs."""
    ran: dict[int, nn.Module] = {}
    handles = [m.register_forward_hook(lambda m, *_: ran.setdefault(id(m), m) and None) for m in model.modules()]
    try:
        torch.manual_seed(0)
        outputs = fixed_outputs(model.train()(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    losses = [t.float().square().mean() for t in outputs if t.grad_fn is not None]
    torch.stack(losses).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.shape != parameter.shape:
            raise Mismatch(f"gradient of {name} has shape {_plain([parameter.grad.shape])}")
    model.zero_grad()
    return list(ran.values()), [t.shape for t in outputs]


def matrices(model: nn.Module, ran: list[nn.Module]) -> list[nn.Parameter]:
    """Parameters with two or more dimensions of the modules ``ran``, without embedding tables."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    own = {id(p): p for m in ran for p in m.parameters(recurse=False) if p.ndim >= 2}
    return [p for i, p in own.items() if i not in tables]


def coverage(model: nn.Module, plan: Plan, ran: list[nn.Module]) -> tuple[int, int]:
    """Output channels of the layers ``ran``: those in the plan, and all but the model's own outputs."""
    names = {id(p): n for n, p in model.named_parameters()}
    of_axis = {(t.name, a.dim): int((a.channels >= 0).sum()) for t, a in plan.axes()}
    fixed: dict[str, int] = {}
    for f in plan.frozen:
        if f.reason.startswith(OUTPUT):
            fixed[f.layer] = max(fixed.get(f.layer, 0), f.channels)
    paths = {id(m): n for n, m in model.named_modules()}
    free = total = 0
    for module in ran:
        dim = _output_dim(module)
        if dim is None:
            continue
        weight = module.get_parameter("weight")
        free += of_axis.get((names.get(id(weight), ""), dim), 0)
        total += max(weight.shape[dim] - fixed.get(paths[id(module)], 0), 0)
    return free, total


def _output_dim(module: nn.Module) -> int | None:
    if isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Embedding | Conv1D):
        return 1
    return 0 if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) else None


def keep_for(plan: Plan, ratio: float, seed: int = 0) -> Keep:
    """Without ``ratio`` of the units of every group, chosen at random; what must stay, stays.

    Two units of coupled channels stay: of one head a plan lowered afresh sees no heads.
    """
    rng = np.random.default_rng(seed)
    kept = np.ones(plan.n_units, dtype=np.bool_)
    for group in plan.groups:
        units = np.unique(plan.unit[group.start : group.stop])
        spare = len(units) - max(plan.least_units(group), 1 if len(units) == group.channels else min(len(units), 2))
        step = plan.unit_step(group)
        kept[rng.permutation(units)[: min(round(ratio * len(units)), spare) // step * step]] = False
    for tensor, axis in plan.axes():
        units = np.unique(plan.unit[axis.channels[axis.channels >= 0]])
        keep = kept[plan.unit]
        left = int(((axis.channels < 0) | keep[axis.channels]).sum())
        if left < plan.least(tensor, axis):
            kept[units] = True
    return kept[plan.unit]


def masked_equals_pruned(family: Family, model: nn.Module, inputs: dict[str, Any], plan: Plan, keep: Keep) -> str:
    """Compare in float64, with only those groups pruned over which no norm takes a statistic.

    Raises:
        Mismatch: the outputs differ.
    """
    keep = keep.copy()
    for group in plan.groups:
        if group.statistic:
            keep[group.start : group.stop] = True
    if keep.all():
        return "nothing to compare"
    masked, pruned = _twin(family, model).double(), _twin(family, model).double()
    inputs = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    try:  # before anything is pruned: BigBird settles on another attention in its first forward
        _outputs(masked, inputs), _outputs(pruned, inputs)
    except RuntimeError as error:
        return f"not in float64: {_message(error)}"
    prune(bind(plan, pruned), keep)
    Mask(bind(plan, masked)).set(torch.from_numpy(keep), [])
    worst = 0.0
    for one, two in zip(_outputs(masked, inputs), _outputs(pruned, inputs), strict=True):
        if one.shape != two.shape:
            raise Mismatch(f"outputs of shapes {_plain([one.shape, two.shape])}")
        if one.is_floating_point() and one.numel():
            worst = max(worst, float((one - two).abs().max() / one.abs().max().clamp_min(1e-30)))
    if not worst <= TOLERANCE:
        raise Mismatch(f"differ by {worst:.1e} of the largest output")
    return f"{worst:.0e}"


def difference(foreseen: Plan, afresh: Plan) -> str:
    """Where two plans of one model differ, in words; "=" if they do not."""
    one, two = ({g.root: g for g in plan.groups} for plan in (foreseen, afresh))
    for words, roots in (("lacks", one.keys() - two.keys()), ("adds", two.keys() - one.keys())):
        if roots:
            return f"{words} {len(roots)} of {len(one)} groups: {min(roots)}"
    for root, group in one.items():
        if group != two[root]:
            return f"group {root} differs"
    axes = [{(t.name, t.shape, a.dim): a.channels.tolist() for t, a in p.axes()} for p in (foreseen, afresh)]
    for key in sorted(axes[0].keys() | axes[1].keys()):
        if axes[0].get(key) != axes[1].get(key):
            return f"{key[0]} dim {key[2]} differs"
    return "=" if foreseen.unit.tolist() == afresh.unit.tolist() else "units differ"


def _twin(family: Family, model: nn.Module) -> nn.Module:
    """Another model of this shape; not a copy, which some models do not allow after a forward.

    Its weights are those of ``model`` and noise: fresh ones (biases of 0, layer scales of 1e-6) hide mistakes.
    """
    twin = build(family)[0].eval()
    twin.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            fan_in = max(p.numel() // max(len(p), 1), 1) if p.ndim > 1 else 0
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.5 / fan_in**0.5 if fan_in else 0.2)
    if isinstance(twin, PreTrainedModel):
        twin.set_experts_implementation("eager")  # the fused one has no float64
    return twin


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return fixed_outputs(model(**inputs))


def generate(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Continue the inputs greedily; raises what the model raises, and if there are no new tokens."""
    ids = inputs["input_ids"]
    more = {k: v for k, v in inputs.items() if k != "input_ids"}
    mask = torch.ones_like(ids)
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    out: Any = model.eval().generate(ids, attention_mask=mask, do_sample=False, **lengths, **more)  # type: ignore
    if out.shape[-1] < ids.shape[-1] + NEW_TOKENS:
        raise Mismatch(f"generate gives {tuple(out.shape)} for inputs of shape {tuple(ids.shape)}")


def _can_generate(model: nn.Module, inputs: dict[str, Any]) -> bool:
    try:
        generate(model, inputs)
    except Exception:
        return False
    return True


def general(reason: str) -> str:
    """A plan's reason without names of layers and sizes, so that reasons of all families can be counted."""
    reason = re.sub(r" in [\w.]+\)$", ")", reason)
    reason = re.sub(r"[\w.]*\.(\w+) is multiplied", r"\1 is multiplied", reason)
    reason = re.sub(r"(belongs to \w+) [\w.]+,", r"\1,", reason)
    reason = re.sub(r"[\w.]+\.(\w+) has more than", r"\1 has more than", reason)
    reason = re.sub(r"\[[-\d, ()*xX]*\]", "[..]", reason)
    return re.sub(r"\d+", "#", reason)


def _root(error: BaseException) -> BaseException:
    """What an error was raised from, in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _elements(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)


def _plain(shapes: list[torch.Size]) -> str:
    return ", ".join(str(tuple(s)) for s in shapes)


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
