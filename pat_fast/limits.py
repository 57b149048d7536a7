"""What the user says about single layers: which are ranked together, own ratios, maxima, multiples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from .errors import ConfigError, check, check_count, did_you_mean
from .plan.bind import Binding
from .plan.types import Group, Plan
from .rounding import fast_multiple, multiple_for
from .selection import Limits

RANKINGS = ("global", "local", "isomorphic")
Ranking = str | Sequence[Sequence[str]]
RoundTo = int | str | Mapping[str, int] | None
Ratios = Mapping[str, float]


class Rules:
    """The limits as a user says them; :meth:`limits` says what they are for the groups of a plan.

    Args:
        ranking: ``"global"``: one budget for all channels together; ``"local"``: the same share of each group;
            ``"isomorphic"``: the same share of each set of groups that are made alike (as many tensors of the same
            kinds of layers), ranked together (Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024,
            https://arxiv.org/abs/2407.04616); or lists of layer names: each list is ranked together and gives the same
            share, and so does the rest.
        round_to: channels that a group keeps are a multiple of this; of the least common multiple of what it says of
            the types of the group's layers (``{"Conv2d": 8, "Linear": 16}``); or ``"auto"``: see
            :func:`pat_fast.rounding.fast_multiple`.
        min_channels: units that every group keeps.
        layer_ratios: ``{name: share of the channels to remove}`` in place of the target's; a name covers everything
            under it, the longest that fits counts.
        max_ratio: the largest share of its channels that a group may lose, or ``{name: share}``; of several names
            that cover a group the smallest share counts.
    Raises:
        ConfigError: a value is out of range or of the wrong type.
    """

    def __init__(
        self,
        ranking: Ranking = "global",
        round_to: RoundTo = None,
        min_channels: int = 1,
        layer_ratios: Ratios | None = None,
        max_ratio: float | Ratios = 1.0,
    ) -> None:
        self.scopes = _scopes(ranking)
        self.ranking = ranking if isinstance(ranking, str) else "global"
        check_count("min_channels", min_channels, 1)
        self.min_channels = min_channels
        if isinstance(round_to, str):
            what = "a whole number, at least 1, 'auto', or a number for each type of layer"
            check("round_to", round_to, lambda v: v == "auto", what)
        elif isinstance(round_to, Mapping):
            for kind, multiple in round_to.items():
                check_count(f"round_to: {kind}", multiple, 1)
        elif round_to is not None:
            check_count("round_to", round_to, 1)
        self.round_to = round_to
        self.layer_ratios = _shares("layer_ratios", layer_ratios or {}, lambda v: 0 <= v < 1, "[0, 1)")
        self.max_ratio = 1.0
        self.max_ratios: dict[str, float] = {}
        if isinstance(max_ratio, Mapping):
            self.max_ratios = _shares("max_ratio", max_ratio, lambda v: 0 <= v <= 1, "[0, 1]")
        else:
            _share("max_ratio", max_ratio, lambda v: 0 <= v <= 1, "[0, 1], or one per layer")
            self.max_ratio = float(max_ratio)

    def known(self, model: nn.Module) -> Rules:
        """Itself, if every name is one of ``model``.

        Raises:
            ConfigError: a name matches no layer, a type no module.
        """
        names = [name for name, _ in model.named_modules() if name]
        for argument, given in (
            ("ranking", [name for scope in self.scopes for name in scope]),
            ("layer_ratios", self.layer_ratios),
            ("max_ratio", self.max_ratios),
        ):
            for name in given:
                if name not in names:
                    hint = did_you_mean(name, names)
                    raise ConfigError(
                        f"{argument}: {name!r} matches no layer of the model{hint} (layers are named as in "
                        "model.named_modules())"
                    )
        if isinstance(self.round_to, Mapping):
            kinds = sorted({type(m).__name__ for m in model.modules()})
            for kind in self.round_to:
                if kind not in kinds:
                    hint = did_you_mean(kind, kinds) or f"; it has {', '.join(kinds)}"
                    raise ConfigError(f"round_to: the model has no layer of type {kind!r}{hint}")
        return self

    def limits(self, binding: Binding) -> Limits:
        """For the groups of ``binding.plan``, which is the dense model's.

        Raises:
            ConfigError: layers that share their channels are given different scopes or ratios.
        """
        groups = binding.plan.groups
        return Limits(
            ranking="local" if self.ranking == "local" else "global",
            round_to=int(self.round_to) if isinstance(self.round_to, Integral) else 1,
            min_channels=self.min_channels,
            scopes=self._scopes_of(binding),
            steps=self._steps(binding),
            least={g.root: n for g in groups if (n := self._least(g)) > 0},
        )

    def ratios(self, plan: Plan) -> dict[str, float]:
        """The shares that groups of ``plan`` are to lose, by their roots, where the user says so."""
        found = ((g.root, _agreed("layer_ratios", g, self.layer_ratios)) for g in plan.groups)
        return {root: ratio for root, ratio in found if ratio is not None}

    def note(self, binding: Binding) -> str | None:
        """What ``round_to="auto"`` comes to, for the report."""
        if self.round_to != "auto":
            return None
        widest, least, why = fast_multiple(*_kind(binding))
        steps = [multiple_for(g.channels, widest, least) for g in binding.plan.groups]
        found = ", ".join(f"{step} in {count} groups" for step, count in sorted(Counter(steps).items()))
        return f"round_to: auto keeps multiples of {found} ({why})"

    def _least(self, group: Group) -> int:
        """Channels that ``max_ratio`` leaves a group."""
        own = [ratio for name, ratio in self.max_ratios.items() if any(_covers(name, x) for x in group.layers)]
        return group.channels - math.floor(group.channels * min([self.max_ratio, *own]) + 1e-9)

    def _steps(self, binding: Binding) -> dict[str, int]:
        groups = binding.plan.groups
        if self.round_to == "auto":
            widest, least, _ = fast_multiple(*_kind(binding))
            return {g.root: multiple_for(g.channels, widest, least) for g in groups}
        if not isinstance(self.round_to, Mapping):
            return {}
        steps = {}
        for group in groups:
            kinds = {type(owner).__name__ for name, _ in group.members for owner, _ in binding.owners(name)}
            steps[group.root] = math.lcm(*(int(n) for kind, n in self.round_to.items() if kind in kinds))
        return steps

    def _scopes_of(self, binding: Binding) -> dict[str, str]:
        groups = binding.plan.groups
        found = {g.root: g.root for g in groups if _agreed("layer_ratios", g, self.layer_ratios) is not None}
        if self.ranking == "isomorphic":
            first: dict[tuple[Any, ...], str] = {}
            kinds = {g.root: first.setdefault(_structure(binding, g), f"like {g.root}") for g in groups}
            return kinds | found
        numbers = {name: i for i, scope in enumerate(self.scopes) for name in scope}
        own = {g.root: _agreed("ranking", g, numbers) for g in groups}
        return {root: f"scope {number}" for root, number in own.items() if number is not None} | found


def _structure(binding: Binding, group: Group) -> tuple[Any, ...]:
    """The kinds of a group's members, sorted: equal for groups that are made alike."""
    kinds = []
    for name, dim in group.members:
        owner, local = binding.owner(name)
        kinds.append((f"{type(owner).__module__}.{type(owner).__qualname__}", local, dim))
    return tuple(sorted(kinds))


def _kind(binding: Binding) -> tuple[Any, Any]:
    """Device and dtype of the model's weights."""
    tensor = next(t for t in binding.tensors.values() if t.is_floating_point())
    return tensor.device, tensor.dtype


def _covers(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _agreed(argument: str, group: Group, given: Mapping[str, Any]) -> Any:
    """What ``given`` says of all layers that make a group's channels; None if it says nothing of any of them.

    Raises:
        ConfigError: it says different things of them.
    """
    if not given:
        return None
    said = {}
    for layer in group.layers:
        name = max((n for n in given if _covers(n, layer)), key=len, default=None)
        said[layer] = None if name is None else given[name]
    if len(set(said.values())) > 1:
        one = next(layer for layer in said if said[layer] is not None)
        other = next(layer for layer in said if said[layer] != said[one])
        raise ConfigError(
            f"{argument}: {one} and {other} share their channels, so both must be given the same; got "
            f"{said[one]!r} and {'nothing' if said[other] is None else repr(said[other])}"
        )
    return next(iter(said.values()), None)


def _scopes(ranking: Any) -> list[list[str]]:
    """The lists of a ranking by lists; raises :class:`ConfigError` if it is neither a name nor such lists."""
    expected = f"ranking: expected one of {', '.join(RANKINGS)}, or lists of layer names that are ranked together"
    if isinstance(ranking, str):
        if ranking not in RANKINGS:
            raise ConfigError(f"{expected}, got {ranking!r}{did_you_mean(ranking, RANKINGS)}")
        return []
    if not isinstance(ranking, Iterable):
        raise ConfigError(f"{expected}, got {ranking!r}")
    scopes = [list(s) if isinstance(s, Iterable) and not isinstance(s, str) else [s] for s in ranking]
    names = [name for scope in scopes for name in scope]
    if not names or not all(scopes) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{expected}, got {ranking!r}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(f"ranking: expected each layer in one list, got {twice[0]!r} in several")
    return scopes


def _share(name: str, value: Any, holds: Any, interval: str) -> None:
    check(name, value, holds, f"a number in {interval}")


def _shares(argument: str, given: Any, holds: Any, interval: str) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{argument}: expected a number in {interval} for each layer name, got {given!r}")
    for name, value in given.items():
        _share(f"{argument}: {name}", value, holds, interval)
    return {str(name): float(value) for name, value in given.items()}
