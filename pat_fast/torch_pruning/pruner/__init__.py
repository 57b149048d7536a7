"""Torch-Pruning's ``pruner``: its layer functions, and the pruners of :mod:`.algorithms`."""

from __future__ import annotations

from torch_pruning.pruner import *  # noqa: F403

from .algorithms import *  # noqa: F403
