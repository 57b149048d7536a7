"""Latency from measured layers: what a forward takes on this machine, for any widths of the layers, without running it.

``layers`` says which layers a model has and runs one of any width; ``table`` measures them at a grid of widths and
keeps that in a cache on disk; ``model`` adds them up and corrects the sum by whole models that were measured.
"""

from __future__ import annotations

from .model import LatencyModel
from .table import Tables

__all__ = ["LatencyModel", "Tables"]
