"""Removing channels from a live model: weights, gradients, buffers, optimizer state, module attributes."""

from .optimizer import register_state_layout
from .prune import Held, Smaller, prepare, prune, prune_checked

__all__ = ["Held", "Smaller", "prepare", "prune", "prune_checked", "register_state_layout"]
