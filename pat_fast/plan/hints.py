"""What can be done about channels that a plan leaves alone, by the reason that it gives."""

from __future__ import annotations

# Part of a reason -> what helps; the first that fits is shown.
_HINTS = {
    "no rule for this op": "pat.register_layer(type, forward=...) can say in PyTorch ops what the layer computes",
    "is an output of the model": "what reads the model's outputs expects this size",
    "no output of this forward": "give example inputs (longer ones, say) with which the model uses it",
    "is looked up by number": "rows of a table (tokens, positions, experts), or channels that an index names",
    "taken by number": "keep the bound as an integer attribute of the module (self.size) and slice by that",
    "is split into parts": "keep the sizes as integer attributes of the module (self.sizes) and split by these",
    "picked out by number": "an index written in the code stands for one channel; which one would change",
    "does not run when it is smaller": "make the size an attribute of the module, or take it from a shape",
    "computes without these channels": "a number in the code depends on this size: take that from an attribute or a "
    "shape, without int()",
    "takes part in a value": "give the value (a scale, say) an attribute of its own, computed in __init__",
    "also sizes something": "give each of the two sizes an attribute of its own",
    "meets a tensor of fixed size": "make that tensor from the other's shape (x.new_zeros(x.shape)), or a parameter",
    "is not made by a layer": "comes from the model's inputs or from an op above that is named",
    "is in ignored_layers": "take it out of ignored_layers",
    "not in layers_to_prune": "add it, or a module around it, to layers_to_prune",
    "shares its channels with": "the layers that it is summed or coupled with stay too: free those",
    "could not be followed": "pat.register_layer(type, forward=...) can say in other ops what the layer computes",
    "more than two prunable": "split the tensor into several parameters",
    "is shared by all heads": "one vector for each head could go with its head",
    "whose sizes are tied": "nn.Linear and scaled_dot_product_attention in its place can be pruned",
}


def hint(reason: str) -> str:
    """What helps against ``reason``; empty if nothing is known to."""
    return next((text for part, text in _HINTS.items() if part in reason), "")
