"""The sizes that layers keep as attributes, and the shapes of their tensors that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from ..errors import PlanError
from ..plan import recurrent
from ..plan.named import Named
from ..plan.types import IndexArray, Kept, Width

Change = tuple[Any, str, Any]  # module (or an object that it keeps), attribute, new value
Shape = tuple[int, ...]


class Source(NamedTuple):
    """Where a size stands: in dimension ``dim`` of a tensor, nowhere (1) if that is None.

    It is that, times the groups of the convolution if ``grouped``, divided by ``per``.
    """

    dim: int | None
    grouped: bool = False
    per: int = 1


@dataclass(frozen=True)
class SizeRule:
    """The attributes of a kind of layer that are sizes, and what they say of its tensors.

    ``sources(module, local)`` says which attributes follow from its tensor ``local``, and how;
    ``shape(module, attributes, local)`` is the shape of that tensor, None if they do not tell.
    """

    attributes: tuple[str, ...]
    sources: Callable[[Any, str], dict[str, Source]]
    shape: Callable[[Any, dict[str, Any], str], Shape | None]

    def from_tensor(self, module: nn.Module, local: str, shape: Shape, groups: int) -> dict[str, int]:
        """The attributes that follow from the tensor ``local`` of ``module`` having that shape."""
        return {
            name: (1 if s.dim is None else shape[s.dim]) * (groups if s.grouped else 1) // s.per
            for name, s in self.sources(module, local).items()
        }


def _conv_sources(module: Any, local: str) -> dict[str, Source]:
    return {} if local != "weight" else _TRANSPOSED if module.transposed else _CONV


_CONV = {"in_channels": Source(1, grouped=True), "out_channels": Source(0), "groups": Source(None, grouped=True)}
_TRANSPOSED = {"out_channels": Source(1, grouped=True), "in_channels": Source(0), "groups": Source(None, grouped=True)}


def _conv_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    c_in, c_out, groups = sizes["in_channels"], sizes["out_channels"], sizes["groups"]
    if local == "bias":
        return (c_out,)
    pair = (c_in, c_out // groups) if module.transposed else (c_out, c_in // groups)
    return (*pair, *module.kernel_size) if local == "weight" else None


def _linear_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    shapes = {"weight": (sizes["out_features"], sizes["in_features"]), "bias": (sizes["out_features"],)}
    return shapes.get(local)


def _bilinear_shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
    out = sizes["out_features"]
    return {"weight": (out, sizes["in1_features"], sizes["in2_features"]), "bias": (out,)}.get(local)


def _vector_shape(attribute: str) -> Callable[[Any, dict[str, Any], str], Shape | None]:
    def shape(module: Any, sizes: dict[str, Any], local: str) -> Shape | None:
        vectors = ("weight", "bias", "running_mean", "running_var")
        return (sizes[attribute],) if local in vectors else None

    return shape


def _nothing(module: Any, local: str) -> dict[str, Source]:
    return {}  # normalisation layers follow their plan's widths: they may have no weight


def _dimensions(**of: tuple[str, int]) -> Callable[[Any, str], dict[str, Source]]:
    """Attributes that are each the size of a dimension of a tensor."""

    by_tensor: dict[str, dict[str, Source]] = {}
    for attribute, (name, dim) in of.items():
        by_tensor.setdefault(name, {})[attribute] = Source(dim)

    def sources(module: Any, local: str) -> dict[str, Source]:
        return by_tensor.get(local, {})

    return sources


def _recurrent_sources(module: Any, local: str) -> dict[str, Source]:
    if local == "weight_ih_l0":
        return {"input_size": Source(1), "hidden_size": Source(0, per=recurrent.gates(module))}
    return {"proj_size": Source(0)} if local == "weight_hr_l0" else {}


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


_TABLE = SizeRule(
    ("num_embeddings", "embedding_dim"),
    _dimensions(num_embeddings=("weight", 0), embedding_dim=("weight", 1)),
    lambda module, sizes, local: (sizes["num_embeddings"], sizes["embedding_dim"]) if local == "weight" else None,
)
SIZES: dict[type[nn.Module], SizeRule] = {
    nn.modules.conv._ConvNd: SizeRule(("in_channels", "out_channels", "groups"), _conv_sources, _conv_shape),
    nn.Linear: SizeRule(
        ("in_features", "out_features"),
        _dimensions(in_features=("weight", 1), out_features=("weight", 0)),
        _linear_shape,
    ),
    nn.Bilinear: SizeRule(
        ("in1_features", "in2_features", "out_features"),
        _dimensions(out_features=("weight", 0), in1_features=("weight", 1), in2_features=("weight", 2)),
        _bilinear_shape,
    ),
    nn.Embedding: _TABLE,
    nn.EmbeddingBag: _TABLE,
    nn.RNNBase: SizeRule(("input_size", "hidden_size", "proj_size"), _recurrent_sources, _recurrent_shape),
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


_SAID: dict[type[nn.Module], dict[str, tuple[str, int]]] = {}  # by users, of their layers


def register_sizes(kind: type[nn.Module], sizes: dict[str, tuple[str, int]]) -> None:
    """Say that attributes of modules of ``kind`` are the sizes of (tensor, dimension)."""

    def shape(module: Any, values: dict[str, Any], local: str) -> Shape | None:
        known = {dim: values[attribute] for attribute, (name, dim) in sizes.items() if name == local}
        ndim = getattr(module, local).ndim
        return tuple(known[d] for d in range(ndim)) if len(known) == ndim else None

    SIZES[kind] = SizeRule(tuple(sizes), _dimensions(**sizes), shape)
    _SAID[kind] = sizes


def check_registered(model: nn.Module) -> None:
    """Raise :class:`PlanError` where a layer does not have the sizes that ``register_layer`` said it has.

    A name that is spelt wrong would leave an attribute as it was, and the layer would say a wrong size.
    """
    for name, module in model.named_modules() if _SAID else ():
        sizes = next((_SAID[kind] for kind in type(module).__mro__ if kind in _SAID), {})
        for attribute, (parameter, dim) in sizes.items():
            tensor, size = getattr(module, parameter, None), getattr(module, attribute, None)
            if not isinstance(tensor, Tensor) or dim >= tensor.dim() or size != tensor.shape[dim]:
                of = f"of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
                raise PlanError(
                    f"{name or 'the model'}: register_layer said of {type(module).__name__} that {attribute!r} is "
                    f"dimension {dim} of {parameter!r}; got {attribute} = {size!r} and {parameter} {of}"
                )


def rule_of(module: nn.Module) -> SizeRule | None:
    return next((SIZES[kind] for kind in type(module).__mro__ if kind in SIZES), None)


def sizes(module: nn.Module) -> dict[str, Any]:
    """The sizes that ``module`` keeps as attributes; empty for a kind of layer that keeps none."""
    rule = rule_of(module)
    return {} if rule is None else {name: getattr(module, name) for name in rule.attributes}


def attribute_changes(binding: Named, kept: Kept, model: nn.Module) -> list[Change]:
    """What the modules of ``model`` (or a copy) must say of themselves when ``kept`` of the channels are left."""
    plan = binding.plan
    if kept.vectors is not plan.vectors:
        kept = Kept(kept.keep, plan.vectors)
    table, own = tabulate(binding), model is binding.model
    modules = binding.modules if own else dict(model.named_modules(remove_duplicate=False))
    holders = table.holders if own else [modules[path] for path in table.paths]
    sizes, groups = plan.shapes.left(kept)
    values = table.values(sizes, groups, kept.counts)
    wanted = values.tolist()
    changes = [(holders[i], table.attributes[i], wanted[i]) for i in np.flatnonzero(values != table.now).tolist()]
    counts, place = kept.counts, plan.vectors.number
    rest = [plan.widths[i] for i in table.rest]
    widths = [(modules[w.module], w, int(counts[place[id(w.channels)]])) for w in rest]
    changes += [c for c in attributes_from_widths(widths) if getattr(c[0], c[1]) != c[2]]
    # What a forward has left there has the channels that there were: it is made anew by the next.
    left = [(modules[path], name, vars(modules[path]).get(name)) for path, name in plan.remembered]
    return changes + [(module, name, type(value)()) for module, name, value in left if value]


@dataclass(frozen=True)
class Ruled:
    """Where the modules of a binding keep sizes.

    Attributes:
        tensors: (tensor of the plan, module, attribute, source) wherever a size follows from a tensor.
        unruled: modules and attributes of the plan's widths that no rule knows.
        rules: that were known then; others may be registered since.
        paths, holders, attributes: the modules that keep a size, and where: first those that follow from a tensor, then
            those that follow from the channels of a width.
        now: what these sizes are in the plan.
        rest: places of the widths that one attribute shares, or that stand in a tuple or in an object of a module.
    """

    tensors: list[tuple[int, str, str, Source]]
    unruled: list[tuple[nn.Module, str]]
    rules: dict[type[nn.Module], SizeRule]
    paths: list[str]
    holders: list[nn.Module]
    attributes: list[str]
    now: IndexArray
    rest: list[int]
    _sources: IndexArray  # of each size that follows from a tensor: which, dimension (or -1), grouped, per
    _widths: IndexArray  # of each that follows from a width: its vector, per

    @classmethod
    def of(
        cls,
        binding: Named,
        tensors: list[tuple[int, str, str, Source]],
        unruled: list[tuple[nn.Module, str]],
        rules: dict[type[nn.Module], SizeRule],
    ) -> Ruled:
        """Put what follows from tensors and from the plan's widths side by side."""
        plan, place = binding.plan, binding.plan.vectors.number
        times = Counter((w.module, w.attribute) for w in plan.widths)
        plain = [w.index is None and "." not in w.attribute and times[w.module, w.attribute] == 1 for w in plan.widths]
        single = [w for w, yes in zip(plan.widths, plain, strict=True) if yes]
        paths = [path for _, path, _, _ in tensors] + [w.module for w in single]
        sources = [(i, -1 if s.dim is None else s.dim, s.grouped, s.per) for i, _, _, s in tensors]
        widths = [(place[id(w.channels)], w.per) for w in single]
        made = cls(
            tensors,
            unruled,
            rules,
            paths,
            [binding.modules[path] for path in paths],
            [name for _, _, name, _ in tensors] + [w.attribute for w in single],
            np.zeros(len(paths), dtype=np.int64),
            [i for i, yes in enumerate(plain) if not yes],
            np.array(sources, dtype=np.int64).reshape(len(sources), 4),
            np.array(widths, dtype=np.int64).reshape(len(widths), 2),
        )
        made.now[:] = made.values(plan.shapes.sizes, plan.shapes.groups, plan.vectors.lengths)
        return made

    def values(self, sizes: IndexArray, groups: IndexArray, counts: IndexArray) -> IndexArray:
        """The attributes, of tensors of ``sizes [T, D]`` and ``groups [T]`` and vectors of ``counts [V]``."""
        number, dim, grouped, per = self._sources.T
        size = np.where(dim < 0, 1, sizes[number, dim])  # dimension -1 is looked up and not used
        vector, share = self._widths.T
        return np.concatenate([size * np.where(grouped, groups[number], 1) // per, counts[vector] // share])


def tabulate(binding: Named, before: Named | None = None) -> Ruled:
    """Where the modules of ``binding`` keep sizes; it follows from what is known of the binding ``before`` a prune."""
    found: Ruled | None = binding.derived.get("ruled")
    if found is not None and found.rules != SIZES:
        found = binding.derived["ruled"] = _tabulate(binding)
    if found is None:
        found = _tabulate(binding) if before is None else _follow(tabulate(before), binding)
        binding.derived["ruled"] = found
    return found


def _tabulate(binding: Named) -> Ruled:
    tensors: list[tuple[int, str, str, Source]] = []
    unruled: list[tuple[nn.Module, str]] = []
    rules: dict[type[nn.Module], SizeRule | None] = {}
    for number, tensor in enumerate(binding.plan.tensors):
        for name in binding.aliases(tensor.name):
            published = as_published(name) if tensor.is_parameter else name  # spectral norm's weight_v is a vector
            path, _, local = published.rpartition(".")
            module = binding.modules[path]
            if type(module) not in rules:
                rules[type(module)] = rule_of(module)
            rule = rules[type(module)]
            if rule is None or rule.sources is _nothing:
                continue
            if rule.sources is _conv_sources and module.groups > tensor.groups == 1:
                continue  # the weight of a grouped convolution is computed from this one: the plan's widths tell
            tensors += [(number, path, name, source) for name, source in rule.sources(module, local).items()]
    for width in binding.plan.widths:
        rule = rule_of(binding.modules[width.module])
        if rule is None or width.attribute not in rule.attributes:
            unruled.append((binding.modules[width.module], width.attribute))
    return Ruled.of(binding, tensors, unruled, dict(SIZES))


def _follow(before: Ruled, binding: Named) -> Ruled:
    rows = binding.plan.shapes.rows
    number = dict(zip(rows.tolist(), range(len(rows)), strict=True))
    tensors = [(number[i], *rest) for i, *rest in before.tensors if i in number]
    return Ruled.of(binding, tensors, before.unruled, before.rules)


def as_published(name: str) -> str:
    """The weight that a parametrization or a hook makes of the parameter ``name``, if that has its shape."""
    if not name.endswith(("original", "original1", "weight_v", "weight_orig")):
        return name
    path, _, local = name.rpartition(".")
    if local in ("original", "original1"):
        return f".{path}".replace(".parametrizations.", ".", 1)[1:]
    return name.removesuffix("_v").removesuffix("_orig") if local in ("weight_v", "weight_orig") else name


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
    plain: dict[tuple[type, str], bool] = {}
    for module, name, value in changes:
        key = type(module), name
        if key not in plain:
            # nn.Module's own way takes long to find that a number is neither a tensor nor a module.
            plain[key] = key[0].__setattr__ is nn.Module.__setattr__ and not hasattr(*key)
        held = module.__dict__
        if plain[key] and name in held:
            undo.append((module, name, held[name]))
            held[name] = value
            continue
        now = getattr(module, name)
        undo.append((module, name, now))
        if now != value:  # an attribute that refused its new value need not take its old one
            setattr(module, name, value)
