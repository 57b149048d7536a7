"""Removing channels from a live model: weights, gradients, buffers, optimizer state, module attributes."""

from .optimizer import register_state_layout
from .prune import prune

__all__ = ["prune", "register_state_layout"]
