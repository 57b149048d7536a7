"""Reading a configuration, and saying what is wrong with it: every problem as ``key.path: expected ..., got ...``."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import ConfigError, did_you_mean

TARGET_NAMES = ("target_sparsity", "global_sparsity")


class Section(BaseModel):
    # strict: a quoted number or a true where a number belongs is a mistake to report, not to convert.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def refuse(key: str, expected: str) -> PydanticCustomError:
    """A problem of one key that shows only beside another key; reported under ``key``."""
    return PydanticCustomError("pat_fast", "{expected}", {"key": key, "expected": expected})


def refused(key: str, error: ConfigError) -> PydanticCustomError:
    """What a constructor said of the value of ``key``, or of something inside it."""
    return PydanticCustomError("pat_fast", "{text}", {"key": key, "text": str(error).removeprefix(f"{key}: ")})


Config = TypeVar("Config", bound=Section)


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
    elif not isinstance(source, (str, Path)):
        raise ConfigError(f"configuration: expected a path or a dict, got {type(source).__name__}")
    else:
        data, where = _read_json(Path(source)), str(source)
    for key, value in (overrides or {}).items():
        data = _with_override(data, key.split("."), value, key)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        # A value that may be of several types is one problem, not one for each of them.
        found = (_whole(item, cls, data) for item in error.errors(include_url=False))
        problems = dict.fromkeys(_describe(item, cls) for item in found)
        raise ConfigError(_headline(list(problems), where)) from None


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


def _whole(error: ErrorDetails, cls: type[BaseModel], data: Any) -> ErrorDetails:
    """``error``, at the key itself where its value may be of several types; pydantic names each of these."""
    for end in range(1, len(error["loc"])):
        field = _field_at(cls, error["loc"][:end])
        types = [t for t in get_args(field.annotation) if t is not type(None)] if field else []
        if len(types) > 1 and error["type"] != "pat_fast":
            value = data
            for part in error["loc"][:end]:
                value = value[part]
            return {**error, "loc": error["loc"][:end], "input": value, "type": "union"}
    return error


def _describe(error: ErrorDetails, cls: type[BaseModel]) -> str:
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
