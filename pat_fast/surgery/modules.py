"""The sizes that layers keep as attributes, and the shapes of their tensors that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from torch import nn

from ..plan import recurrent
from ..plan.bind import Binding
from ..plan.types import Kept, Width

Change = tuple[Any, str, Any]  # module (or an object that it keeps), attribute, new value
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SizeRule:
    """The attributes of a kind of layer that are sizes, and what they say of its tensors.

    ``from_tensor(module, local, shape, groups)`` are the attributes that follow from its tensor ``local`` having that
    shape; ``shape(module, attributes, local)`` is the shape of tensor ``local``, None if they do not tell.
    """

    attributes: tuple[str, ...]
    from_tensor: Callable[[Any, str, Shape, int], dict[str, Any]]
    shape: Callable[[Any, dict[str, Any], str], Shape | None]


def _conv_sizes(module: Any, local: str, shape: Shape, groups: int) -> dict[str, Any]:
    if local != "weight":
        return {}
    if module.transposed:
        return {"in_channels": shape[0], "out_channels": shape[1] * groups, "groups": groups}
    return {"in_channels": shape[1] * groups, "out_channels": shape[0], "groups": groups}


def _conv_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    c_in, c_out, groups = sizes["in_channels"], sizes["out_channels"], sizes["groups"]
    if local == "bias":
        return (c_out,)
    pair = (c_in, c_out // groups) if module.transposed else (c_out, c_in // groups)
    return (*pair, *module.kernel_size) if local == "weight" else None


def _linear_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    shapes = {"weight": (sizes["out_features"], sizes["in_features"]), "bias": (sizes["out_features"],)}
    return shapes.get(local)


def _vector_shape(attribute: str) -> Callable[[Any, dict[str, Any], str], Shape | None]:
    def shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
        vectors = ("weight", "bias", "running_mean", "running_var")
        return (sizes[attribute],) if local in vectors else None

    return shape


def _nothing(module: Any, local: str, shape: Shape, groups: int) -> dict[str, Any]:
    return {}  # normalisation layers follow their plan's widths: they may have no weight


def _dimensions(**of: tuple[str, int]) -> Callable[[Any, str, Shape, int], dict[str, Any]]:
    """Attributes that are each the size of a dimension of a tensor."""

    def sizes(module: Any, local: str, shape: Shape, groups: int) -> dict[str, Any]:
        return {attribute: shape[dim] for attribute, (name, dim) in of.items() if name == local}

    return sizes


def _recurrent_sizes(module: Any, local: str, shape: Shape, groups: int) -> dict[str, Any]:
    if local == "weight_ih_l0":
        return {"input_size": shape[1], "hidden_size": shape[0] // recurrent.gates(module)}
    return {"proj_size": shape[0]} if local == "weight_hr_l0" else {}


def _recurrent_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    kind, _, place = local.partition("_l")
    rows = sizes["hidden_size"] * recurrent.gates(module)
    out = sizes["proj_size"] or sizes["hidden_size"]
    enters = out * (1 + module.bidirectional) if place.partition("_")[0] != "0" else sizes["input_size"]
    shapes = {
        "weight_ih": (rows, enters),
        "weight_hh": (rows, out),
        "weight_hr": (out, sizes["hidden_size"]),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
    }
    return shapes.get(kind)


def _cell_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    rows = module.weight_ih.shape[0] // module.hidden_size * sizes["hidden_size"]
    shapes = {"weight_ih": (rows, sizes["input_size"]), "weight_hh": (rows, sizes["hidden_size"])}
    return shapes.get(local, (rows,) if local.startswith("bias_") else None)


SIZES: dict[type[nn.Module], SizeRule] = {
    nn.modules.conv._ConvNd: SizeRule(("in_channels", "out_channels", "groups"), _conv_sizes, _conv_shape),
    nn.Linear: SizeRule(
        ("in_features", "out_features"),
        _dimensions(in_features=("weight", 1), out_features=("weight", 0)),
        _linear_shape,
    ),
    nn.Embedding: SizeRule(
        ("num_embeddings", "embedding_dim"),
        _dimensions(num_embeddings=("weight", 0), embedding_dim=("weight", 1)),
        lambda module, sizes, local: (sizes["num_embeddings"], sizes["embedding_dim"]) if local == "weight" else None,
    ),
    nn.RNNBase: SizeRule(("input_size", "hidden_size", "proj_size"), _recurrent_sizes, _recurrent_shape),
    nn.RNNCellBase: SizeRule(
        ("input_size", "hidden_size"),
        _dimensions(input_size=("weight_ih", 1), hidden_size=("weight_hh", 1)),
        _cell_shape,
    ),
    nn.PReLU: SizeRule(
        ("num_parameters",), _dimensions(num_parameters=("weight", 0)), _vector_shape("num_parameters")
    ),
    nn.modules.batchnorm._NormBase: SizeRule(("num_features",), _nothing, _vector_shape("num_features")),
    nn.GroupNorm: SizeRule(("num_channels",), _nothing, _vector_shape("num_channels")),
    nn.LayerNorm: SizeRule(
        ("normalized_shape",), _nothing, lambda module, sizes, local: tuple(sizes["normalized_shape"])
    ),
    nn.RMSNorm: SizeRule(
        ("normalized_shape",), _nothing, lambda module, sizes, local: tuple(sizes["normalized_shape"])
    ),
}


def register_sizes(kind: type[nn.Module], sizes: dict[str, tuple[str, int]]) -> None:
    """Say that attributes of modules of ``kind`` are the sizes of (tensor, dimension)."""

    def shape(module: Any, values: dict[str, Any], local: str) -> Shape | None:
        known = {dim: values[attribute] for attribute, (name, dim) in sizes.items() if name == local}
        ndim = getattr(module, local).ndim
        return tuple(known[d] for d in range(ndim)) if len(known) == ndim else None

    SIZES[kind] = SizeRule(tuple(sizes), _dimensions(**sizes), shape)


def rule_of(module: nn.Module) -> SizeRule | None:
    return next((SIZES[kind] for kind in type(module).__mro__ if kind in SIZES), None)


def sizes(module: nn.Module) -> dict[str, Any]:
    """The sizes that ``module`` keeps as attributes; empty for a kind of layer that keeps none."""
    rule = rule_of(module)
    return {} if rule is None else {name: getattr(module, name) for name in rule.attributes}


def attribute_changes(binding: Binding, kept: Kept, model: nn.Module) -> list[Change]:
    """What the modules of ``model`` (or a copy) must say of themselves when ``kept`` of the channels are left."""
    plan = binding.plan
    if kept.vectors is not plan.vectors:
        kept = Kept(kept.keep, plan.vectors)
    modules = binding.modules if model is binding.model else dict(model.named_modules(remove_duplicate=False))
    sizes, groups = plan.shapes.left(kept)
    changed = (sizes != plan.shapes.sizes).any(1).tolist()
    shapes, blocks = plan.shapes.tuples(sizes), groups.tolist()
    changes: list[Change] = []
    for number, path, local, rule in tabulate(binding).tensors:
        if changed[number]:
            module = modules[path]
            values = rule.from_tensor(module, local, shapes[number], blocks[number])
            changes += [(module, name, value) for name, value in values.items() if getattr(module, name) != value]
    counts, place = kept.counts.tolist(), plan.vectors.number
    widths = [(modules[w.module], w, counts[place[id(w.channels)]]) for w in plan.widths]
    return changes + [c for c in attributes_from_widths(widths) if getattr(c[0], c[1]) != c[2]]


@dataclass(frozen=True)
class Ruled:
    """Where the modules of a binding keep sizes.

    Attributes:
        tensors: (tensor of the plan, module, name in it, rule) wherever a size follows from a tensor.
        unruled: modules and attributes of the plan's widths that no rule knows.
        rules: that were known then; others may be registered since.
    """

    tensors: list[tuple[int, str, str, SizeRule]]
    unruled: list[tuple[nn.Module, str]]
    rules: dict[type[nn.Module], SizeRule]


def tabulate(binding: Binding, before: Binding | None = None) -> Ruled:
    """Where the modules of ``binding`` keep sizes; it follows from what is known of the binding ``before`` a prune."""
    found: Ruled | None = binding.derived.get("ruled")
    if found is not None and found.rules != SIZES:
        found = binding.derived["ruled"] = _tabulate(binding)
    if found is None:
        found = _tabulate(binding) if before is None else _follow(tabulate(before), binding)
        binding.derived["ruled"] = found
    return found


def _tabulate(binding: Binding) -> Ruled:
    found = Ruled([], [], dict(SIZES))
    for number, tensor in enumerate(binding.plan.tensors):
        for name in binding.aliases(tensor.name):
            path, _, local = as_published(name).rpartition(".")
            module = binding.modules[path]
            rule = rule_of(module)
            if rule is not None and rule.from_tensor is _conv_sizes and module.groups > tensor.groups == 1:
                continue  # the weight of a grouped convolution is computed from this one: the plan's widths tell
            if rule is not None and rule.from_tensor is not _nothing:
                found.tensors.append((number, path, local, rule))
    for width in binding.plan.widths:
        rule = rule_of(binding.modules[width.module])
        if rule is None or width.attribute not in rule.attributes:
            found.unruled.append((binding.modules[width.module], width.attribute))
    return found


def _follow(before: Ruled, binding: Binding) -> Ruled:
    rows = binding.plan.shapes.rows
    number = dict(zip(rows.tolist(), range(len(rows)), strict=True))
    return Ruled([(number[i], *rest) for i, *rest in before.tensors if i in number], before.unruled, before.rules)


def as_published(name: str) -> str:
    """The weight that a parametrization, or a weight norm's hook, makes of tensor ``name``, if that has its shape."""
    path, _, local = name.rpartition(".")
    if local in ("original", "original1"):
        return f".{path}".replace(".parametrizations.", ".", 1)[1:]
    return name.removesuffix("_v") if local == "weight_v" else name


def attributes_from_shape(module: nn.Module, local: str, shape: Shape, groups: int) -> list[Change]:
    """What ``module`` must say of itself when its tensor ``local`` has this shape.

    The same values as Torch-Pruning's own layer pruners set, wherever those are right.
    """
    rule = rule_of(module)
    values = {} if rule is None else rule.from_tensor(module, local, shape, groups)
    return [(module, name, value) for name, value in values.items() if getattr(module, name) != value]


def attributes_from_widths(widths: Iterable[tuple[nn.Module, Width, int]]) -> list[Change]:
    """What modules must say of themselves: for each width, how many of the channels that it counts remain.

    An attribute that is only told, and would have to be several numbers at once, stays.
    """
    values: dict[tuple[int, str, int | None], tuple[Any, set[int]]] = {}
    for module, width, left in widths:
        holder: Any = module
        name = width.attribute
        if "." in name:
            *path, name = name.split(".")
            holder = reduce(getattr, path, module)
        key = id(holder), name, width.index
        if key in values:
            values[key][1].add(left // width.per)
        else:
            values[key] = holder, {left // width.per}
    changes: dict[tuple[int, str], Change] = {}
    for (number, name, index), (holder, value) in values.items():
        if len(value) > 1:
            continue
        new: Any = min(value)
        if index is not None:
            now = changes[number, name][2] if (number, name) in changes else getattr(holder, name)
            entries = list(now)
            entries[index] = new
            new = type(now)(entries)
        changes[number, name] = (holder, name, new)
    return list(changes.values())


def apply_changes(changes: list[Change], undo: list[Change]) -> None:
    """Set the attributes; what they were is appended to ``undo`` first."""
    for module, name, value in changes:
        now = getattr(module, name)
        undo.append((module, name, now))
        # nn.Module's own way takes long to find that a number is neither a tensor nor a module.
        plain = type(module).__setattr__ is nn.Module.__setattr__ and name in vars(module)
        if plain and not hasattr(type(module), name):
            module.__dict__[name] = value
        elif now != value:  # an attribute that refused its new value need not take its old one
            setattr(module, name, value)
