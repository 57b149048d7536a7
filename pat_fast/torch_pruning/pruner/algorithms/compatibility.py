"""Older names of :class:`BasePruner`."""

from __future__ import annotations

from .base_pruner import BasePruner

MetaPruner = BasePruner
MagnitudePruner = BasePruner
