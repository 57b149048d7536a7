"""What a regulariser must know of the optimizer that is about to step: learning rates, and the loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ..errors import ConfigError
from ..plan.bind import Binding


def learning_rates(optimizers: Iterable[Optimizer]) -> dict[int, float]:
    """The learning rate of every parameter that the optimizers hold, by its ``id``.

    Raises:
        ConfigError: an optimizer has no learning rate.
    """
    found: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "lr" not in group:
                raise ConfigError(
                    f"regularizer: expected a learning rate, which decoupled and proximal ones go by; "
                    f"{type(optimizer).__name__} has none; use one that adds to gradients"
                )
            rate = float(group["lr"])
            found.update((id(p), rate) for p in group["params"])
    return found


def at_weights(
    regularizer: object,
    when: str,
    binding: Binding,
    optimizer: Optimizer | None,
    known: Callable[[], Sequence[Optimizer]],
    where: Tensor,
) -> None:
    """Let a regulariser that changes weights do so, ``"before_step"`` or ``"after_step"``.

    Args:
        optimizer: the one that steps; None for all that are ``known``.
        where: bool ``[N]``, the channels to push.
    Raises:
        ConfigError: no optimizer is known, or one has no learning rate.
    """
    act = getattr(regularizer, when, None)
    if act is None or (when == "before_step" and not getattr(regularizer, "decoupled", True)):
        return
    optimizers = known() if optimizer is None else [optimizer]
    if not optimizers:
        raise ConfigError("regularizer: expected an optimizer, whose learning rate it goes by; pass optimizer=")
    act(binding, binding.known(learning_rates(optimizers)), where)


def loss_scale(scaler: GradScaler, optimizer: Optimizer | None, at_weights: bool) -> float | None:
    """The scale that is still in the gradients: 1 after ``unscale_``; None if the optimizer's step will be skipped.

    Args:
        at_weights: whether the regulariser changes weights, which a step that is skipped must not.
    Raises:
        ConfigError: no optimizer; or the gradients are scaled, so that it is not known yet whether they overflowed.
    """
    if not scaler.is_enabled():
        return 1.0
    if optimizer is None:
        raise ConfigError("regularize: expected optimizer= beside a GradScaler, which has a state for each of them")
    state: dict[str, Any] = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is not OptState.READY:
        return None if any(bool(found) for found in state["found_inf_per_device"].values()) else 1.0
    if at_weights:
        raise ConfigError(
            "regularize: expected gradients without a loss scale, since this regulariser changes the weights and must "
            "not where a step is skipped for an overflow; call scaler.unscale_(optimizer) first"
        )
    return float(scaler.get_scale())
