"""Configurations of the pruner and of the training job: validated, versioned, and closed to unknown keys.

:func:`load_config` is the way in. Whatever is wrong with a configuration ends in one
:class:`~pat_fast.errors.ConfigError` that lists every problem as ``key.path: expected ..., got ...``.
Each field's ``description`` is the "expected" of that message and the field's documentation at once.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import ConfigError, did_you_mean

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
TARGET_NAMES = ("target_sparsity", "global_sparsity")
BUILT_IN_DATA = ("digits", "image_folder")
# Keys of the data section that have no meaning for a source, and are refused there.
FOREIGN_TO_DATA = {
    "digits": ("root", "channels", "mean", "std", "args"),
    "image_folder": ("args",),
    "factory": ("root", "size", "channels", "mean", "std", "test_fraction", "val_fraction", "split_seed"),
}


class _Section(BaseModel):
    # strict: a quoted number or a true where a number belongs is a mistake to report, not to convert.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _refuse(key: str, expected: str) -> PydanticCustomError:
    """A problem of one key that shows only beside another key; reported under ``key``."""
    return PydanticCustomError("pat_fast", "{expected}", {"key": key, "expected": expected})


def _refused(key: str, error: ConfigError) -> PydanticCustomError:
    """What a constructor said of the value of ``key``, or of something inside it."""
    return PydanticCustomError("pat_fast", "{text}", {"key": key, "text": str(error).removeprefix(f"{key}: ")})


class PruneConfig(_Section):
    """What to prune, how much and when: the keyword arguments of :class:`pat_fast.Pruner`."""

    version: Literal[1] = Field(default=1, description="the configuration version 1")
    target_sparsity: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        validation_alias=AliasChoices(*TARGET_NAMES),
        description="a number in [0, 1): the share of channels to remove",
    )
    schedule: str | dict[str, Any] = Field(
        default="linear",
        description="a schedule: a name such as 'linear' or 'cubic', or an object with 'name' and options",
    )
    unit: Literal["epoch", "step"] = Field(
        default="epoch", description="'epoch' or 'step': what start_epoch, end_epoch and interval count"
    )
    mode: Literal["prune", "mask"] = Field(
        default="prune",
        description="'prune' (shrink at every step) or 'mask' (hold at zero until finalize())",
    )
    ranking: Literal["global", "local"] = Field(
        default="global", description="'global' (across layers) or 'local' (the same share of each)"
    )
    start_epoch: int = Field(default=0, ge=0, description="an integer >= 0: the epoch after which pruning starts")
    end_epoch: int | None = Field(
        default=None, ge=0, description="an integer >= start_epoch (when the target is reached) or null"
    )
    interval: int = Field(default=1, ge=1, description="an integer >= 1: epochs from one prune to the next")
    target: dict[str, float] | None = Field(
        default=None,
        description="an object with one of 'channels', 'params', 'macs', instead of target_sparsity, or null",
    )
    mac_target: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="a number in (0, 1] (the share of MACs at which to stop) or null",
    )
    round_to: int | None = Field(
        default=None, ge=1, description="an integer >= 1 (channel counts stay multiples of it) or null"
    )
    min_channels: int = Field(default=1, ge=1, description="an integer >= 1: channels that every layer keeps")
    layers_to_prune: list[str] | None = Field(
        default=None, min_length=1, description="a list of one or more layer names, or null for every layer"
    )
    ignored_layers: list[str] | None = Field(default=None, description="a list of layer names, or null")
    importance: str | dict[str, Any] = Field(
        default="group_norm",
        description="a criterion: a name such as 'group_norm' or 'taylor', or an object with 'name' and options",
    )
    p: float | None = Field(
        default=None, gt=0, description="a number > 0 (the exponent of a magnitude) or null for the criterion's own"
    )
    regularizer: str | dict[str, Any] | None = Field(
        default="group_norm",
        description="'group_norm', 'bn_scale', 'growing', an object with 'name' and options, or null",
    )
    reg_strength: float = Field(default=1e-4, ge=0, description="a number >= 0: the strength of the regulariser")

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_the_target(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.keys() >= set(TARGET_NAMES):
            raise _refuse(
                "global_sparsity",
                "only one of target_sparsity and global_sparsity, which are two names of one setting; "
                f"got {data['target_sparsity']!r} and {data['global_sparsity']!r}",
            )
        return data

    @model_validator(mode="after")
    def _end_after_start(self) -> PruneConfig:
        if self.end_epoch is not None and self.end_epoch < self.start_epoch:
            raise _refuse("end_epoch", f"an integer >= start_epoch, which is {self.start_epoch}; got {self.end_epoch}")
        return self

    @model_validator(mode="after")
    def _parts_can_be_made(self) -> PruneConfig:
        from .arguments import make_regularizer
        from .criteria import make_criterion
        from .schedules import OneShot, make_curve
        from .selection import Limits
        from .targets import Goal, Target

        default = type(self).model_fields["target_sparsity"].default
        parts: list[tuple[tuple[str, ...], Callable[[], Any]]] = [
            (
                ("mac_target", "target"),
                lambda: Goal(Target.of(self.target, self.target_sparsity, default), self.mac_target, Limits()),
            ),
            (("regularizer",), lambda: make_regularizer(self.regularizer, self.reg_strength)),
            (("p", "importance"), lambda: make_criterion(self.importance, self.p)),
            (("schedule",), lambda: make_curve(self.schedule)),
        ]
        for keys, make in parts:
            try:
                made = make()
            except ConfigError as error:
                key = next((k for k in keys if str(error).startswith(f"{k}: ")), keys[-1])
                raise _refused(key, error) from None
        if isinstance(made, OneShot) and self.end_epoch not in (None, self.start_epoch):
            raise _refuse("end_epoch", f"null with 'one_shot', which prunes at start_epoch; got {self.end_epoch}")
        return self

    def pruner_kwargs(self) -> dict[str, Any]:
        """The keyword arguments of :class:`pat_fast.Pruner` that this configuration stands for."""
        return self.model_dump(exclude={"version"})


class ModelConfig(_Section):
    """The network: a callable that returns an ``nn.Module``, from ``[B, ...]`` to logits ``[B, classes]``."""

    factory: str = Field(description="'package.module:callable'")
    args: dict[str, Any] = Field(default_factory=dict, description="an object: keyword arguments of the factory")

    @model_validator(mode="after")
    def _factory_has_two_parts(self) -> ModelConfig:
        if not FACTORY.fullmatch(self.factory):
            raise _refuse("factory", f"'package.module:callable'; got {self.factory!r}")
        return self


class AugmentConfig(_Section):
    """Random changes of the training images, drawn anew for each batch."""

    shift: int = Field(default=0, ge=0, description="an integer >= 0: pixels an image may move along each axis")
    flip: bool = Field(default=False, description="true or false: mirror half of the images left to right")


class DataConfig(_Section):
    """The images and how they are split. ``args`` belongs to a factory, ``root`` to ``image_folder``."""

    name: str = Field(default="digits", description="'digits', 'image_folder' or 'package.module:factory'")
    root: str | None = Field(default=None, description="a folder with one sub-folder of images per class")
    size: int | None = Field(default=None, ge=4, description="an integer >= 4: height and width in pixels, or null")
    channels: Literal[1, 3] | None = Field(default=None, description="1 (grey) or 3 (colour), or null")
    mean: list[float] | None = Field(default=None, description="a list with one number per channel, or null")
    std: list[float] | None = Field(default=None, description="a list with one number per channel, or null")
    args: dict[str, Any] = Field(default_factory=dict, description="an object: keyword arguments of the factory")
    batch_size: int = Field(default=64, ge=1, description="an integer >= 1")
    test_fraction: float = Field(default=0.25, gt=0, lt=1, description="a number in (0, 1): the share held out")
    val_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="a number in [0, 1): the share that accuracy is followed on, or 0",
    )
    split_seed: int = Field(default=0, ge=0, description="an integer >= 0: the seed of the split")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="an object with 'shift' and 'flip'")
    workers: int = Field(default=0, ge=0, description="an integer >= 0: processes that load data")

    @model_validator(mode="after")
    def _keys_belong_to_the_source(self) -> DataConfig:
        if self.name not in BUILT_IN_DATA and not FACTORY.fullmatch(self.name):
            got = f"{self.name!r}{did_you_mean(self.name, BUILT_IN_DATA)}"
            raise _refuse("name", f"'digits', 'image_folder' or 'package.module:factory'; got {got}")
        if self.name == "image_folder" and not self.root:
            raise _refuse("root", "a folder with one sub-folder of images per class; got nothing")
        foreign = FOREIGN_TO_DATA.get(self.name, FOREIGN_TO_DATA["factory"])
        for key in foreign:
            value = getattr(self, key)
            # Equal to the default passes, so that a written-out configuration can be read again.
            if value != type(self).model_fields[key].get_default(call_default_factory=True):
                raise _refuse(key, f"no such key with the data {self.name!r}; got {value!r}")
        if self.test_fraction + self.val_fraction >= 1:
            raise _refuse(
                "val_fraction",
                "test_fraction + val_fraction below 1, so that something is left to train on; "
                f"got {self.test_fraction} + {self.val_fraction}",
            )
        return self

    @model_validator(mode="after")
    def _normalisation_fits(self) -> DataConfig:
        channels = self.channels or 3
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and len(value) != channels:
                raise _refuse(key, f"{channels} numbers, one per channel; got {value!r}")
        if self.std is not None and min(self.std) <= 0:
            raise _refuse("std", f"numbers above 0; got {self.std!r}")
        return self


class OptimizerConfig(_Section):
    """The optimizer; ``momentum`` and ``nesterov`` belong to SGD, ``betas`` to Adam and AdamW."""

    name: Literal["sgd", "adam", "adamw"] = Field(default="sgd", description="'sgd', 'adam' or 'adamw'")
    lr: float = Field(default=0.1, gt=0, description="a number > 0: the learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="a number >= 0")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="a number in [0, 1)")
    nesterov: bool = Field(default=False, description="true or false")
    betas: list[float] = Field(default=[0.9, 0.999], description="a list of two numbers in [0, 1)")

    @model_validator(mode="after")
    def _keys_belong_to_the_optimizer(self) -> OptimizerConfig:
        foreign = ("betas",) if self.name == "sgd" else ("momentum", "nesterov")
        for key in foreign:
            value = getattr(self, key)
            if value != type(self).model_fields[key].default:
                raise _refuse(key, f"no such key with the optimizer {self.name!r}; got {value!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise _refuse("betas", f"a list of two numbers in [0, 1); got {self.betas!r}")
        if self.nesterov and self.momentum == 0:
            raise _refuse("nesterov", "a momentum above 0 beside it; got momentum 0")
        return self

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the ``torch.optim`` class that ``name`` stands for."""
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.name == "sgd":
            return shared | {"momentum": self.momentum, "nesterov": self.nesterov}
        return shared | {"betas": tuple(self.betas)}


class SchedulerConfig(_Section):
    """The learning rate over the run, as a factor on the optimizer's ``lr``; updated at every batch."""

    name: Literal["none", "cosine", "step"] = Field(default="cosine", description="'none', 'cosine' or 'step'")
    warmup_epochs: float = Field(default=0.0, ge=0, description="a number >= 0: epochs of linear rise from zero")
    final_factor: float = Field(
        default=0.0, ge=0, le=1, description="a number in [0, 1]: the factor at which cosine ends"
    )
    milestones: list[int] = Field(default=[], description="a list of epochs at which step multiplies by gamma")
    gamma: float = Field(default=0.1, gt=0, le=1, description="a number in (0, 1]")

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> SchedulerConfig:
        if self.name == "step" and not self.milestones:
            raise _refuse("milestones", "one or more epochs with the scheduler 'step'; got []")
        return self


class TrainConfig(_Section):
    """One run of ``pat-fast train``."""

    version: Literal[1] = Field(default=1, description="the configuration version 1")
    name: str = Field(default="run", pattern=r"^[\w.-]+$", description="a name of letters, digits, '.', '_' and '-'")
    title: str | None = Field(default=None, description="a line of text for the plot and the table, or null")
    model: ModelConfig = Field(description="an object with 'factory' and 'args'")
    data: DataConfig = Field(default_factory=DataConfig, description="an object with 'name' and its options")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="an object with 'name', 'lr' and the optimizer's options"
    )
    scheduler: SchedulerConfig = Field(
        default_factory=SchedulerConfig, description="an object with 'name' and the scheduler's options"
    )
    epochs: int = Field(ge=1, description="an integer >= 1")
    seed: int = Field(default=0, ge=0, description="an integer >= 0")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="'auto', 'cpu' or 'cuda'")
    threads: int | None = Field(default=None, ge=1, description="an integer >= 1: CPU threads, or null")
    pruning: PruneConfig | None = Field(default=None, description="an object (a pruning configuration) or null")
    dense_twin: bool = Field(default=True, description="true or false: also train the same network without pruning")
    latency_batch: int | None = Field(
        default=None, ge=1, description="an integer >= 1: images per measured forward, or null for batch_size"
    )
    output_dir: str = Field(default="runs", min_length=1, description="the folder that run folders are made in")


Config = TypeVar("Config", bound=_Section)


def load_config(
    source: str | Path | Mapping[str, Any], cls: type[Config], *, overrides: Mapping[str, Any] | None = None
) -> Config:
    """Read and validate a configuration.

    Args:
        source: a path to a JSON file, or the configuration as a mapping (which is not changed).
        cls: :class:`PruneConfig` or :class:`TrainConfig`.
        overrides: values that replace those of ``source``, by dotted key (``"pruning.p": 1``).

    Raises:
        ConfigError: the file is missing, unreadable or not JSON, or the configuration is not valid.
            Every problem is listed.
    """
    if isinstance(source, Mapping):
        data, where = dict(source), ""
    else:
        data, where = _read_json(Path(source)), str(source)
    for key, value in (overrides or {}).items():
        data = _with_override(data, key.split("."), value, key)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = [_describe(item, cls, data) for item in error.errors(include_url=False)]
        raise ConfigError(_headline(problems, where)) from None


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Turn ``["optimizer.lr=0.05", "data.name=digits"]`` into a dict; values are JSON, or else plain text.

    Raises:
        ConfigError: an item has no ``=`` or no key.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set: expected key=value, such as optimizer.lr=0.05, got {item!r}")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _near_files(path)
        raise ConfigError(f"{path}: expected a JSON configuration file, got no such file{near}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a JSON configuration file, got a folder") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected JSON text in UTF-8, got other bytes") from None
    except OSError as error:
        raise ConfigError(f"{path}: expected a readable file, got {error.strerror or error}") from None
    try:
        data = json.loads(text, object_pairs_hook=_no_key_twice)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: expected JSON, got: {error.msg}"
        ) from None
    except _KeyTwice as error:
        raise ConfigError(f"{path}: expected each key once, got {error} twice in one object") from None
    except RecursionError:
        raise ConfigError(f"{path}: expected a configuration, got JSON nested too deeply") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object {{...}}, got {_short(data)}")
    return data


class _KeyTwice(ValueError):
    pass


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(repr(name) for name in names if names.count(name) > 1))
    return data


def _near_files(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix == ".json"]
    except OSError:
        return ""
    return did_you_mean(path.name, names)


def _with_override(data: dict[str, Any], keys: list[str], value: Any, full: str) -> dict[str, Any]:
    head, *rest = keys
    if not rest:
        # Overriding one of a setting's two names replaces the other, rather than contradicting it.
        replaced = TARGET_NAMES if head in TARGET_NAMES else ()
        return {**{name: old for name, old in data.items() if name not in replaced}, head: value}
    inner = data.get(head)
    if inner is not None and not isinstance(inner, Mapping):
        raise ConfigError(f"{full}: expected {head!r} to be an object that can hold it, got {_short(inner)}")
    return {**data, head: _with_override(dict(inner or {}), rest, value, full)}


def _headline(problems: list[str], where: str) -> str:
    if len(problems) == 1:
        return f"{where}: {problems[0]}" if where else problems[0]
    head = f"{len(problems)} problems in {where or 'the configuration'}:"
    return "\n  ".join([head, *problems])


def _describe(error: ErrorDetails, cls: type[BaseModel], data: Any) -> str:
    """One problem as ``key.path: expected ..., got ...``."""
    loc = error["loc"]
    if error["type"] == "pat_fast":
        context = error.get("ctx", {})
        where = _path((*loc, context["key"]))
        return f"{where}: {context['text']}" if "text" in context else f"{where}: expected {context['expected']}"
    if error["type"] == "extra_forbidden":
        known = list(_keys(_model_at(cls, loc[:-1])))
        hint = did_you_mean(str(loc[-1]), known) or f"; known keys are {', '.join(known)}"
        return f"{_path(loc)}: unknown key, got {_short(error['input'])}{hint}"
    field = _field_at(cls, loc)
    expected = (field.description if field else None) or error["msg"].removeprefix("Input should be ")
    if error["type"] == "missing":
        return f"{_path(loc)}: expected {expected}, got nothing (the key is required)"
    hint = ""
    if error["type"] == "literal_error" and field is not None and isinstance(error["input"], str):
        hint = did_you_mean(error["input"], [c for c in _choices(field.annotation) if isinstance(c, str)])
    return f"{_path(loc)}: expected {expected}, got {_short(error['input'])}{hint}"


def _path(loc: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.lstrip(".") or "configuration"


def _short(value: Any) -> str:
    # JSON's own words for what a JSON file said.
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.validation_alias, AliasChoices):
            yield from (str(choice) for choice in field.validation_alias.choices)
        else:
            yield name


def _field_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> FieldInfo | None:
    """The innermost field that ``loc`` leads into, or None."""
    found: FieldInfo | None = None
    model: type[BaseModel] | None = cls
    for part in loc:
        if model is None:
            break
        inside = model
        found = next((f for name, f in inside.model_fields.items() if part in (name, *_aliases(f))), None)
        model = _inner_model(found.annotation) if found else None
    return found


def _model_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    field = _field_at(cls, loc) if loc else None
    return (_inner_model(field.annotation) if field else None) or cls


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _choices(annotation: Any) -> Iterator[Any]:
    for arg in get_args(annotation):
        if get_args(arg):
            yield from _choices(arg)
        else:
            yield arg
