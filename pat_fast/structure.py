"""What a checkpoint says of a model beside its tensors: versioned JSON, checked before anything of it is used."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError
from .surgery.modules import sizes
from .surgery.record import KEY, Record, note_sizes, of, records

FORMAT = 2
DEEPEST = 64  # objects and lists inside each other
OLDER = (1,)  # sizes and aliases alone


@dataclass(frozen=True)
class Structure:
    """The structure of a saved model.

    Attributes:
        model: the name of its class.
        modules: for each module with sizes, attribute path (``"in_channels"``, ``"config.hidden_size"``) -> value.
        aliases: further names of a tensor -> the name under which it is stored.
        channels: root layer of a group -> ``{"of": dense number, "kept": the dense channels that are left}``.
        provenance: versions, date, number of prunes, and channels, parameters and MACs of the dense model.
        config, metrics: the user's own.
    """

    model: str
    modules: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The structure as text.

        Raises:
            CheckpointError: a config or a metric is no JSON (NaN is not, either).
        """
        try:
            text = json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False)
            _parsed(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"config and metrics: expected what JSON can hold, got: {error}") from None
        return text

    def summary(self) -> str:
        """A few lines for people: what it is, where it comes from, what is left of each group."""
        origin = self.provenance
        lines = [f"{self.model}, {len(self.modules)} layers with sizes"]
        if origin.get("created"):
            made = ", ".join(f"{name} {origin.get(name, '?')}" for name in ("pat_fast", "torch"))
            lines.append(f"saved {origin['created']} by {made}; pruned {origin.get('prunes', 0)} times")
        if origin.get("dense"):
            lines.append("dense: " + ", ".join(f"{value:,} {name}" for name, value in origin["dense"].items()))
        for root, entry in self.channels.items():
            lines.append(f"  {root}: {len(entry['kept'])} of {entry['of']} channels")
        for name, values in (("config", self.config), ("metrics", self.metrics)):
            lines += [f"{name}: {json.dumps(values)}"] if values else []
        # Whoever made the file may have put the terminal's own commands into it.
        return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)

    @classmethod
    def from_json(cls, text: str, where: str) -> Structure:
        """Read what :meth:`to_json`, of this version or an older one, wrote.

        Raises:
            CheckpointError: it is damaged, or of a format that is not known here.
        """
        try:
            found = _parsed(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read {where}: {error}") from error
        number = found.get("format") if isinstance(found, dict) else type(found).__name__
        if type(number) is not int or number not in (FORMAT, *OLDER):
            raise CheckpointError(
                f"{where}: expected format 1 or {FORMAT}, got {number!r}; a newer pat_fast may read it"
            )
        if number == 1:
            found = {"channels": {}, "provenance": {}, "config": {}, "metrics": {}, **found}
        for key in ("modules", "aliases", "channels", "provenance", "config", "metrics"):
            if not isinstance(found.get(key), dict):
                raise CheckpointError(f"{where}: the structure lacks {key!r}; the file is damaged")
        _check_channels(found["channels"], where)
        dense, prunes = found["provenance"].get("dense", {}), found["provenance"].get("prunes", 0)
        if not isinstance(dense, dict) or not all(type(n) is int and 0 <= n < 2**63 for n in (prunes, *dense.values())):
            raise CheckpointError(f"{where}: the provenance does not count; the file is damaged")
        fields = {key: found[key] for key in cls.__dataclass_fields__ if key != "model"}
        return cls(str(found.get("model", "")), **fields)


def _parsed(text: str) -> Any:
    """JSON, strictly: no NaN, no key twice, nothing nested so deeply that writing it again could fail.

    Raises:
        ValueError: it is not.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one object")
        return found

    found = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
    level = [found]
    for _ in range(DEEPEST):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return found
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _check_channels(channels: dict[str, Any], where: str) -> None:
    for root, entry in channels.items():
        total, kept = (entry.get("of"), entry.get("kept")) if isinstance(entry, dict) else (None, None)
        good = type(total) is int and isinstance(kept, list) and all(type(c) is int and 0 <= c < total for c in kept)
        if not good or any(a >= b for a, b in itertools.pairwise(kept or ())):
            raise CheckpointError(f"{where}: the kept channels of {root!r} are no channels; the file is damaged")


def describe(
    model: nn.Module, aliases: Mapping[str, str], config: Mapping[str, Any], metrics: Mapping[str, Any]
) -> Structure:
    """The structure of ``model`` as it is."""
    modules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        found = sizes(module)
        found.update({path: get(module, path) for path in vars(module).get(KEY, {}).get("sizes", ())})
        if found:
            modules[name] = found
    channels: dict[str, dict[str, Any]] = {}
    dense: dict[str, int] = {}
    prunes = 0
    for name, record in records(model):
        channels.update({join(name, root): entry for root, entry in record.get("channels", {}).items()})
        dense = dense or record.get("dense", {})
        prunes += record.get("prunes", 0)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    provenance = {**versions(), "created": now, "prunes": prunes, "dense": dense}
    return Structure(
        type(model).__qualname__, modules, dict(aliases), channels, provenance, dict(config), dict(metrics)
    )


def remember(model: nn.Module, structure: Structure) -> None:
    """Write on ``model`` what surgery had written on the saved one, so that pruning and saving go on from there."""
    modules = dict(model.named_modules())
    for name, found in structure.modules.items():
        own = set(sizes(modules[name]))
        note_sizes(modules[name], [path for path in found if path not in own])
    record: Record = {"channels": structure.channels} if structure.channels else {}
    for key in ("prunes", "dense"):
        if structure.provenance.get(key):
            record[key] = structure.provenance[key]
    if record:
        of(model).update(record)


def versions() -> dict[str, str]:
    """The versions that something was made with."""
    try:
        own = version("pat-fast")
    except PackageNotFoundError:  # a checkout that is not installed
        own = "unknown"
    return {"pat_fast": own, "torch": torch.__version__}


def join(prefix: str, name: str) -> str:
    """The name of something of submodule ``prefix``, from the root's point of view."""
    return f"{prefix}.{name}" if prefix else name


def get(module: nn.Module, path: str) -> Any:
    """The attribute that ``path``, with dots, names."""
    return reduce(getattr, path.split("."), module)


def holder(module: nn.Module, path: str) -> tuple[Any, str] | None:
    """The object whose own attribute ``path`` names, and its name there; None if there is none.

    Only what lies in objects' own dictionaries is followed: a file must not get at methods or classes.
    """
    *parts, name = path.split(".")
    found: Any = module
    for part in parts:
        found = getattr(found, "__dict__", {}).get(part)
    inside = getattr(found, "__dict__", {})
    return (found, name) if name in inside and not name.startswith("__") else None


def is_pruned(value: Any, own: Any) -> bool:
    """Whether ``value``, as JSON has it, can be what a prune made of the size ``own``: positive and no larger."""
    if isinstance(own, (tuple, list)):
        same = isinstance(value, list) and len(value) == len(own)
        return same and all(_is_smaller(v, o) for v, o in zip(value, own, strict=True))
    return _is_smaller(value, own) and type(own) is int


def _is_smaller(value: Any, own: Any) -> bool:
    if type(value) is not type(own):
        return False
    return value == own or (type(own) is int and 0 < value <= own)


def like(value: Any, own: Any) -> Any:
    """``value``, as JSON has it, in the type of ``own``."""
    return type(own)(value) if isinstance(own, (tuple, list)) else value
