"""A Lightning callback: ``Trainer(callbacks=[PruningCallback(0.5, end_epoch=20)])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError
from ..pruner import Pruner
from ..report import StepReport

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ConfigError("Lightning is not installed: pip install 'pat-fast[lightning]'") from error


class PruningCallback(Callback):
    """Prunes a Lightning module while it trains: :meth:`Pruner.step` at the end of every training epoch.

    Its state, and the shapes that pruning left, go into Lightning's checkpoints, so ``trainer.fit(model,
    ckpt_path=...)`` goes on from the dense definition. Under ``strategy="ddp"`` all ranks prune alike. Channels, MACs
    and parameters that are left are logged as ``pruning/channels``, ``pruning/macs`` and ``pruning/params``.

    Args:
        target_sparsity: as for :class:`pat_fast.Pruner`.
        module: name of the submodule to prune; by default the module itself if it has a ``forward``, else its only
            child with parameters.
        options: all other arguments of :class:`pat_fast.Pruner`. ``example_inputs`` is ``example_input_array`` where
            the module has one, else the inputs of the first forward.
    Raises:
        ConfigError: (when the fit begins) ``module`` names nothing, or is needed.
    """

    def __init__(self, target_sparsity: float = 0.5, *, module: str | None = None, **options: Any) -> None:
        self.pruner: Pruner | None = None
        self.reports: list[StepReport] = []
        self._module = module
        self._options = {"target_sparsity": target_sparsity, **options}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the pruner, and let checkpoints give the model its shape before its values."""
        if stage != "fit":
            return
        if self.pruner is None:
            options = dict(self._options)
            module = self._find(pl_module)
            if module is pl_module and getattr(pl_module, "example_input_array", None) is not None:
                options.setdefault("example_inputs", pl_module.example_input_array)
            self.pruner = Pruner(module, **options)
        load = pl_module.on_load_checkpoint

        def shape_first(checkpoint: dict[str, Any]) -> None:
            self.load_state_dict(checkpoint.get("callbacks", {}).get(self.state_key, {}))
            load(checkpoint)

        pl_module.on_load_checkpoint = shape_first

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own hook back."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Count the epoch, and prune if the schedule says so."""
        assert self.pruner is not None
        report = self.pruner.step()
        self.reports.append(report)
        left = {"channels": report.channels, "macs": report.macs, "params": report.params}
        pl_module.log_dict({f"pruning/{name}": float(after) for name, (_, after) in left.items()}, rank_zero_only=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove what is only masked when pruning is over."""
        if self.pruner is not None and self.pruner.done and self.pruner.is_ready:  # a run that was over had no forward
            self.pruner.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state; empty before the first forward."""
        return self.pruner.state_dict() if self.pruner is not None and self.pruner.is_ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Shrink the model to what was saved, and go on from there."""
        if self.pruner is not None and state_dict:
            self.pruner.load_state_dict(state_dict)

    def _find(self, pl_module: Any) -> nn.Module:
        if self._module is not None:
            found = dict(pl_module.named_modules()).get(self._module)
            if found is None:
                raise ConfigError(f"module: {type(pl_module).__name__} has no submodule {self._module!r}")
            return found
        if type(pl_module).forward.__module__.split(".")[0] not in ("lightning", "pytorch_lightning"):
            return pl_module
        children = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1:
            raise ConfigError(
                f"module: expected the name of the submodule to prune, since {type(pl_module).__name__} has no forward "
                f"and {len(children)} children with parameters ({', '.join(children)})"
            )
        return getattr(pl_module, children[0])
