"""Objects named in a configuration or on the command line as ``package.module:callable``."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, did_you_mean, in_a_line


def find_callable(name: str, key: str) -> Callable[..., Any]:
    """Import the callable ``package.module:attribute``; the working directory is searched as well.

    Args:
        key: where the name was given, for the error messages.

    Raises:
        ConfigError: there is no such module or attribute, it is not callable, or its module fails to import.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"{key}: expected 'package.module:callable', got {name!r}")
    with _working_directory_on_path():
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{key}: expected a module {module_name!r}, got: {error}") from error
        except (Exception, SystemExit) as error:
            said = in_a_line(error)
            raise ConfigError(f"{key}: expected the module {module_name!r} to import, got {said}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [known for known in dir(found) if not known.startswith("_")])
            raise ConfigError(f"{key}: expected {part!r} in {module_name!r}, got no such name{near}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key}: expected {name!r} to be callable, got {type(found).__name__}")
    return found


def call_factory(name: str, args: Mapping[str, Any], key: str) -> Any:
    """Call ``package.module:callable`` with ``args``.

    Raises:
        ConfigError: as :func:`find_callable`, or the call itself fails.
    """
    factory = find_callable(name, key)
    try:
        with _working_directory_on_path():
            return factory(**args)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in args.items())
        raise ConfigError(f"{key}: expected {name}({given}) to succeed, got {in_a_line(error)}") from error


def build_model(name: str, args: Mapping[str, Any], key: str = "model") -> nn.Module:
    """Call a factory that returns a network.

    ``transformers:vit``, with a model type of Transformers for a callable, is a network of that type with random
    weights; ``args`` are fields of its configuration then.

    Raises:
        ConfigError: as :func:`call_factory`, or what comes back is not an ``nn.Module``.
    """
    module, _, kind = name.partition(":")
    if module == "transformers" and kind and kind == kind.lower():
        model = call_factory(f"{__name__}:of_transformers", {"model_type": kind, **args}, key)
    else:
        model = call_factory(name, args, key)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}: expected {name} to return a torch.nn.Module, got {type(model).__name__}")
    return model


def of_transformers(model_type: str, **fields: Any) -> Any:
    """A network of Transformers, without a head, from its configuration.

    Raises:
        ConfigError: Transformers is not installed, or has no such type; the weights would not fit into memory.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
    except ImportError as error:
        raise ConfigError(f"transformers:{model_type}: expected Transformers to be installed, got: {error}") from None
    if model_type not in CONFIG_MAPPING:
        near = did_you_mean(model_type, CONFIG_MAPPING)
        raise ConfigError(f"transformers:{model_type}: expected a model type of Transformers, got {model_type!r}{near}")
    config = AutoConfig.for_model(model_type, **fields)
    _check_memory(f"transformers:{model_type}", lambda: AutoModel.from_config(config))
    return AutoModel.from_config(config)


def _check_memory(name: str, build: Callable[[], nn.Module]) -> None:
    """Refuse a network that is larger than this machine's memory: it would be killed without a word."""
    try:
        with torch.device("meta"):
            twin = build()
    except Exception:  # of a kind that computes with its tensors when it is made
        return
    size, memory = sum(t.nbytes for t in (*twin.parameters(), *twin.buffers())), _memory()
    if size > 0.9 * memory:
        raise ConfigError(
            f"{name}: expected a network that fits into memory, got one whose weights take {size / 2**30:.0f} of "
            f'{memory / 2**30:.0f} GiB; give it a smaller configuration: --args \'{{"num_hidden_layers": 2}}\', say'
        )


def _memory() -> float:
    """Bytes of memory that this machine has, as far as it says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return math.inf


def default_inputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Example inputs for a network of which none are known: 16 tokens if it says that it reads such, else an image.

    Channels and size of the image are those of the network's ``config``, if it has one that says them.
    """
    if getattr(model, "main_input_name", "") == "input_ids":
        return (torch.zeros(1, 16, dtype=torch.int64),)
    config = getattr(model, "config", None)
    channels, size = (getattr(config, name, None) for name in ("num_channels", "image_size"))
    sizes = size if isinstance(size, (list, tuple)) else [size] * 2
    shape = (1, channels or 3, *(s or 224 for s in sizes))
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    # An installed command, unlike `python -m`, does not search the directory it is started in.
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
