"""The tensors in what a model returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fixed_outputs(out: Any) -> list[Tensor]:
    """The tensors of what a model returned that must keep their shapes.

    All of them, except by-products for another call of the same model, which may be as wide as the model is: caches,
    and hidden states and the like that come with logits (of a ``ModelOutput``, say).
    """
    if isinstance(out, dict):
        beside = _BY_PRODUCTS if any(str(k).endswith("logits") for k in out) else ()
        out = [
            v for k, v in out.items()
            if not any(part in str(k) for part in beside) and not type(v).__name__.endswith("Cache")
        ]  # fmt: skip
    return output_tensors(out)


# Parts of the names that Transformers gives them.
_BY_PRODUCTS = ("state", "attentions", "past_key_values", "cache", "mems", "model_output", "encoder_outputs")


def output_tensors(out: Any) -> list[Tensor]:
    """All tensors in what a model returned: nested lists, tuples, dicts and attributes of objects are searched."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for v in out.values() for t in output_tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in output_tensors(v)]
    if hasattr(out, "__dict__") and not isinstance(out, type):
        return [t for v in vars(out).values() for t in output_tensors(v)]
    return []
