"""Structured pruning of PyTorch models while they train."""

from __future__ import annotations

from typing import Any

from .errors import CheckpointError, ConfigError, ExportError, PatError, PlanError, SurgeryError
from .layers import register_layer
from .plan import Plan
from .proof import build_plan
from .pruner import Pruner
from .report import StepReport
from .surgery import register_state_layout

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ExportError",
    "PatError",
    "Plan",
    "PlanError",
    "Pruner",
    "Stability",
    "StepReport",
    "SurgeryError",
    "build_plan",
    "convert_qat",
    "export_onnx",
    "export_program",
    "load",
    "load_training",
    "prepare_qat",
    "register_layer",
    "register_state_layout",
    "save",
    "save_pretrained",
    "save_training",
]


# What these import (safetensors, ONNX, ...) a training step does not need; or an import of the package stays quicker.
_LATER = {
    "Stability": "stability",
    "convert_qat": "quantization",
    "export_onnx": "export",
    "export_program": "export",
    "load": "checkpoint",
    "load_training": "resume",
    "prepare_qat": "quantization",
    "save": "checkpoint",
    "save_pretrained": "pretrained",
    "save_training": "resume",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module 'pat_fast' has no attribute {name!r}")
