"""Packages that only some features need: imported where they are used, missed with a word on what to install."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from .errors import PatError


class MissingPackage(PatError, ImportError):
    """A feature needs a package that is not installed."""


def require(module: str, extra: str, what: str) -> Any:
    """Import ``module``, which ``what`` needs and ``pip install 'pat-fast[extra]'`` brings.

    Raises:
        MissingPackage: it is not installed, or does not import.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what a package says about its own optional parts, at its import
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{what}: expected {module.partition('.')[0]} to be installed, got: {error}; "
            f"pip install 'pat-fast[{extra}]'"
        ) from error
    finally:
        logging.disable(before)
