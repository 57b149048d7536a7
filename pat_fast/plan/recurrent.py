"""Recurrent layers (``nn.RNN``, ``nn.LSTM``, ``nn.GRU``): what they compute, for the trace, without their loop.

A device runs them as one op or as thousands, by its own choice. The trace gets :func:`stand_in` in their place: one
step that sees all times at once, fed with what it puts out itself. Labels, shapes and multiply-accumulates are those
of the layer, values are not.

Hidden units that are at zero stay there (their gates see zeros alone), so masked equals pruned, from a first state
of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from .labels import IntArray, Slots
from .running import Still
from .trace import EQUIVALENTS, Leaf

KINDS = (nn.RNN, nn.LSTM, nn.GRU)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is a recurrent layer that computes by PyTorch's forward, with weights as they are."""
    if not isinstance(module, KINDS):
        return False
    names = [name for names in module._all_weights for name in names]
    return type(module).forward in {kind.forward for kind in KINDS} and set(names) <= module._parameters.keys()


def recurrent_layers(still: Still) -> list[tuple[str, nn.RNNBase]]:
    """The recurrent layers of a model that can be followed, by name."""
    return [(name, m) for name, m in still.of(nn.RNNBase) if isinstance(m, nn.RNNBase) and is_plain(m)]


def gates(module: nn.RNNBase) -> int:
    """How many rows of the weights a hidden unit has."""
    return _GATES[module.mode]


def weight_or_bias(owner: nn.Module, local: str) -> str:
    """What the tensor ``local`` of ``owner`` is: ``"weight"``, ``"bias"`` or another name.

    What a hook makes a weight of counts as the weight: what is masked or divided by a norm, and the lengths of a weight
    norm, which are those of its outputs.
    """
    if isinstance(owner, RECURRENT):
        return local.partition("_")[0]
    return "weight" if local in ("weight_orig", "weight_g") else local


def couple_layers(module: nn.RNNBase, path: str, leaves: dict[str, Leaf], slots: Slots) -> None:
    """All layers and directions have one number of hidden units: the j-th of each goes, or none."""
    for local, blocks in (("weight_ih", gates(module)), ("weight_hr", 1)):
        found = [leaves.get(f"{path}.{local}{suffix}" if path else f"{local}{suffix}") for suffix in _suffixes(module)]
        of_layers: list[IntArray] = [leaf.axes[0] for leaf in found if leaf is not None and 0 in leaf.axes]
        for one, other in pairwise(of_layers):
            size = len(one) // blocks
            slots.couple(one[:size], other[:size])


def _suffixes(module: nn.RNNBase) -> Iterator[str]:
    for layer in range(module.num_layers):
        for direction in ("", "_reverse")[: 1 + module.bidirectional]:
            yield f"_l{layer}{direction}"


def stand_in(module: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
    """``module(input, hx)`` for the trace."""
    if not is_plain(module):
        return type(module).forward(module, *args, **kwargs)
    return _run(module, *args, **kwargs)


def _run(module: nn.RNNBase, input: Any, hx: Any = None) -> tuple[Any, Any]:
    packed = isinstance(input, PackedSequence)
    x: Tensor = input.data if packed else input
    first: tuple[Any, ...]  # the first time of all examples, or of what is packed the first examples
    if packed:
        first = (slice(int(input.batch_sizes[0])),)
    else:
        first = (slice(None), 0) if module.batch_first and x.ndim == 3 else (0,)
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    ends: list[tuple[Tensor, ...]] = []
    suffixes = _suffixes(module)
    for _ in range(module.num_layers):
        outs = []
        for _ in range(1 + module.bidirectional):
            # Of a state that is given one example serves: labels do not depend on which.
            given = [s[len(ends)][..., :1, :] if s.ndim == 3 else s[len(ends)] for s in states]
            out, *cell = _step(module, next(suffixes), x, given)
            outs.append(out)
            ends.append(tuple(t[first] for t in (out, *cell)))
        x = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
    last = tuple(torch.stack(values) for values in zip(*ends, strict=True))
    return input._replace(data=x) if packed else x, last if len(last) > 1 else last[0]


def _step(module: nn.RNNBase, suffix: str, x: Tensor, given: list[Tensor]) -> list[Tensor]:
    """What one layer puts out in one direction, and its cells' state if it is an LSTM."""
    w_ih, w_hh = (getattr(module, f"weight_{kind}{suffix}") for kind in ("ih", "hh"))
    b_ih, b_hh = (getattr(module, f"bias_{kind}{suffix}") if module.bias else None for kind in ("ih", "hh"))
    entering = F.linear(x, w_ih, b_ih)
    if module.mode == "LSTM":
        i, f, g, o = entering.chunk(4, -1)
        cell = i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        w_hr = getattr(module, f"weight_hr{suffix}") if module.proj_size else None
        if w_hr is not None:
            hidden = F.linear(hidden, w_hr)
        if given:
            hidden, cell = hidden + given[0], cell + given[1]
        i, f, g, o = (entering + F.linear(hidden, w_hh, b_hh)).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        out = o.sigmoid() * cell.tanh()
        return [out if w_hr is None else hidden, cell]  # the product by w_hr is to be counted once
    if module.mode == "GRU":
        _, z, n = entering.chunk(3, -1)
        hidden = (1 - z.sigmoid()) * n.tanh()
        hidden = hidden + given[0] if given else hidden
        r, z, n = entering.chunk(3, -1)
        r_h, z_h, n_h = F.linear(hidden, w_hh, b_hh).chunk(3, -1)
        z = (z + z_h).sigmoid()
        return [(1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * hidden]
    act = torch.relu if module.mode == "RNN_RELU" else torch.tanh
    hidden = act(entering)
    hidden = hidden + given[0] if given else hidden
    return [act(entering + F.linear(hidden, w_hh, b_hh))]


EQUIVALENTS.update(dict.fromkeys(KINDS, stand_in))

_PACK = torch._VF._pack_padded_sequence
_UNPACK = torch._VF._pad_packed_sequence


class Packing(TorchFunctionMode):
    """Sequences are packed and unpacked by looking up where each entry goes: labels follow that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _PACK:
            return _packed(*args, **(kwargs or {}))
        return (_unpacked if func is _UNPACK else func)(*args, **(kwargs or {}))


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    places = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[:2])
    order, sizes = _PACK(places, lengths, batch_first)
    return x.flatten(0, 1)[order], sizes


def _unpacked(
    data: Tensor, sizes: Tensor, batch_first: bool, padding: float, total_length: int
) -> tuple[Tensor, Tensor]:
    places, lengths = _UNPACK(torch.arange(len(data), device=data.device), sizes, batch_first, -1, total_length)
    out = data[places.clamp(min=0)]
    return out.masked_fill((places < 0).reshape(*places.shape, *[1] * (out.ndim - 2)), padding), lengths
