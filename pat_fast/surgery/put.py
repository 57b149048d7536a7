"""Other data for a tensor, in place, whatever autograd still knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, increment_version

from ..errors import SurgeryError

Blanks = dict[tuple[torch.device, torch.dtype], Tensor]


def set_tensor(
    tensor: Tensor, data: Tensor, grad: Tensor | None, blank: Tensor | None = None, node: Any = None
) -> None:
    """Give ``tensor`` other data and another gradient, in place: the object and its hooks stay.

    While an earlier output or loss is alive, autograd keeps the tensor's gradient accumulator, which
    remembers the old shape and would refuse the next backward. Assigning data of another dtype in between
    makes autograd drop it. A backward of that earlier loss is refused: its graph holds the new data in the place of
    what it was computed from. ``blank`` is an empty tensor of another dtype on ``data``'s device and ``node`` the
    accumulator, if they are at hand.
    """
    if tensor.grad is not None:
        tensor.grad = None
    if not is_alone(tensor):
        (get_gradient_edge(tensor).node if node is None else node).register_prehook(refuse_backward)
        increment_version(tensor)
        tensor.data = blank_like(data) if blank is None else blank
    tensor.data = data
    if grad is not None:
        tensor.grad = grad


def is_alone(tensor: Tensor) -> bool:
    """Whether autograd surely has no gradient accumulator of ``tensor``, which would refer to it."""
    return not tensor.requires_grad or (_tells_uses() and tensor._use_count() == 1)  # type: ignore[attr-defined]


@cache
def _tells_uses() -> bool:
    """Whether this PyTorch says how many refer to a tensor (not to its Python object), and accumulators are of them."""
    with torch.inference_mode(False), torch.enable_grad():
        tensor: Any = nn.Parameter(torch.zeros(1))
        try:
            before = tensor._use_count()
            edge = get_gradient_edge(tensor)
            during = tensor._use_count()
            del edge
            return bool(before == 1 < during)
        except AttributeError:
            return False


class _Touch(torch.autograd.Function):
    """Has all of its inputs' gradient accumulators as its neighbours."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)


def accumulators(tensors: Sequence[Tensor]) -> dict[int, Any]:
    """The gradient accumulators of leaves that require a gradient, by the leaf's ``id``, in one go."""
    if not tensors:
        return {}
    with torch.enable_grad():
        touched: Any = _Touch.apply(*tensors)
    return {id(t): node for t, (node, _) in zip(tensors, touched.grad_fn.next_functions, strict=True)}


def blank_like(data: Tensor) -> Tensor:
    """An empty tensor of another dtype on the same device."""
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    return torch.empty(0, dtype=other, device=data.device)


def refuse_backward(*_: object) -> None:
    """A hook in the graph of a loss that must not be backpropagated any more.

    Raises:
        SurgeryError: always.
    """
    raise SurgeryError(
        "backward of a loss that was computed before the model was pruned: expected it before the prune, or a new "
        "forward after it; call step() of the pruner between the optimizer's step and the next forward"
    )
