"""What PyTorch keeps of a model elsewhere, made from its weights or for their shapes."""

from __future__ import annotations

import sys

import torch


def forget_compiled() -> None:
    """Drop compiled code and cached casts, after a prune.

    Compiled code guards on shapes, so each prune makes PyTorch compile anew; after
    ``torch._dynamo.config.recompile_limit`` (8) versions of a function it would run it in eager mode for good, with
    one line in the log. No version for other shapes is of use again. What else the process has compiled is compiled
    anew, too, when it next runs: compiled code does not say which models are in it.

    Autocast keeps the weights that it has cast until its context ends, by their identity, which a prune does not
    change.
    """
    torch.clear_autocast_cache()
    dynamo = sys.modules.get("torch._dynamo.convert_frame")  # nothing is compiled where it was not imported
    if dynamo is not None and dynamo.input_codes.seen:
        torch.compiler.reset()
