"""Where in the model's code something happens."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from types import FrameType

import numpy as np
import torch

_LIBRARIES = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, np.__file__, Path(__file__).parent))


@cache
def _is_the_models(file: str) -> bool:
    return not file.startswith((*_LIBRARIES, "<")) and "torch_pruning" not in file


def line_of_the_model() -> str:
    """Where the forward is: the innermost line of code that is neither PyTorch's nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_the_models(name):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
