"""A real fit with the Lightning callback, and one that is resumed from a checkpoint."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pat_fast as pat
from pat_fast.integrations.lightning import PruningCallback
from tests.distributed.launch import ROOT, environment
from tests.helpers import Small
from tests.training import same, weights


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def training_step(self, batch: Any, number: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 5), batch_size=8)
    model = Classifier()
    callback = PruningCallback(0.5, schedule="linear", start_epoch=1, end_epoch=4, verify=False, **options)
    files = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=[callback, files], logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=resume, weights_only=True if resume else None)
    return model, callback, trainer


def test_a_fit_prunes_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model, callback, trainer = fit(tmp_path / "whole", 5)
    left = [r.channels[1] for r in callback.reports]
    assert left[0] == 28 > left[1] > left[2] > left[3] == left[4] == 14
    assert model.net.inner.weight.shape[0] + model.net.stem.weight.shape[0] == 14
    assert trainer.callback_metrics["pruning/channels"] == 14
    assert all(p.shape == s["exp_avg"].shape for p, s in trainer.optimizers[0].state.items())
    resumed, second, _ = fit(tmp_path / "resumed", 5, tmp_path / "whole/epoch=2.ckpt")
    assert [r.channels[1] for r in second.reports] == left[3:]
    assert same(weights(resumed), weights(model))
    assert "on_load_checkpoint" not in vars(resumed)


@pytest.mark.slow
def test_two_ranks_prune_alike(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.integrations.lightning_ranks", str(tmp_path)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert first.startswith("[28, 23, 18, 14, 14]")


def test_which_module_is_pruned() -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(2, 2)

    class Called(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Two()
    assert PruningCallback(module="net")._find(module) is module.net
    with pytest.raises(pat.ConfigError, match=r"2 children with parameters \(net, other\)"):
        PruningCallback()._find(module)
    with pytest.raises(pat.ConfigError, match="has no submodule 'nothing'"):
        PruningCallback(module="nothing")._find(module)
    called = Called()
    assert PruningCallback()._find(called) is called
    assert PruningCallback().state_dict() == {}
