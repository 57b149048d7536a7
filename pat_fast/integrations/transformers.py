"""A callback for the Trainer of Transformers: ``Trainer(..., callbacks=[PruningCallback(0.5, end_epoch=3)])``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..distributed import unwrapped
from ..errors import CheckpointError, ConfigError
from ..pruner import Pruner
from ..report import StepReport
from ..resume import fit, load_training, read_training, save_training

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ConfigError("Transformers is not installed: pip install 'pat-fast[transformers]'") from error

FILE = "pruning.pt"  # in the trainer's checkpoint folders


class PruningCallback(TrainerCallback):
    """Prunes the trainer's model while it trains: :meth:`Pruner.step` at the end of every epoch.

    In each of the trainer's checkpoints it writes ``pruning.pt``, its state and the shapes that pruning left. The
    trainer loads a checkpoint's weights before it calls anybody, so to go on from the dense definition name the
    checkpoint to the callback, too, and pass it to ``Trainer(callbacks=[...])``::

        callback = PruningCallback(0.5, end_epoch=3, resume_from=checkpoint)
        Trainer(model, callbacks=[callback], ...).train(resume_from_checkpoint=checkpoint)

    Args:
        target_sparsity: as for :class:`pat_fast.Pruner`.
        resume_from: folder of the checkpoint to go on from.
        options: all other arguments of :class:`pat_fast.Pruner`. With ``unit="step"`` pruning is counted in optimizer
            steps.
    Raises:
        CheckpointError: (from ``Trainer(...)``) there is no such checkpoint, or it is of another model; (from
            ``train``) its weights have other names than the model's, as Transformers 5 writes ViT's, so that the
            trainer passed over them.
    """

    def __init__(
        self, target_sparsity: float = 0.5, *, resume_from: str | Path | None = None, **options: Any
    ) -> None:
        self.pruner: Pruner | None = None
        self.reports: list[StepReport] = []
        self._resume_from = None if resume_from is None else Path(resume_from) / FILE
        self._shaped = False
        self._options = {"target_sparsity": target_sparsity, **options}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the model the shape of the checkpoint, before the trainer loads its values."""
        if self._resume_from is not None:
            saved = read_training(self._resume_from)["parts"]["pruner"]
            fit(unwrapped(kwargs["model"]), saved["structure"], str(self._resume_from))
            self._shaped = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the pruner."""
        if self._resume_from is not None and not self._shaped:
            raise ConfigError("resume_from: pass the callback to Trainer(callbacks=[...]); add_callback is too late")
        if self.pruner is None:
            self.pruner = Pruner(unwrapped(kwargs["model"]), **self._options)
            if self._resume_from is not None:
                _check_names(self.pruner.model, self._resume_from.with_name("model.safetensors"))
                load_training(self._resume_from, pruner=self.pruner)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epoch, and prune if the schedule says so."""
        assert self.pruner is not None
        self.reports.append(self.pruner.step())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the pruner's state beside what the trainer has saved."""
        if self.pruner is not None and self.pruner.is_ready and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_training(folder / FILE, pruner=self.pruner)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove what is only masked when pruning is over."""
        if self.pruner is not None and self.pruner.done and self.pruner.is_ready:  # a run that was over had no forward
            self.pruner.finalize()


def _check_names(model: nn.Module, file: Path) -> None:
    """Raise :class:`CheckpointError` if ``file`` is there and does not name each parameter by one of its names."""
    if not file.exists():
        return
    with safe_open(file, "pt") as saved:
        there = set(saved.keys())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    missing = [own[0] for own in names.values() if not there.intersection(own)]
    if missing:
        raise CheckpointError(
            f"{file} lacks {missing[0]!r} ({len(missing)} missing): Transformers writes weights of "
            f"{type(model).__name__} under other names, which its trainer does not load; go on in a loop of your own, "
            "with pat.load_training"
        )
