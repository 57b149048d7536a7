"""Removing channels from a live model: weights, gradients, buffers, optimizer state, module attributes."""

from .optimizer import register_state_layout
from .prune import prepare, prune

__all__ = ["prepare", "prune", "register_state_layout"]
