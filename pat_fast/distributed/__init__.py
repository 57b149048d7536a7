"""Pruning where several processes train one model: they agree on what goes, and shrink together."""

from .ddp import unwrapped
from .peers import Peers

__all__ = ["Peers", "unwrapped"]
