"""A fit on two ranks, each with its own data: ``python -m tests.integrations.lightning_ranks FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import lightning.pytorch as lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from pat_fast.integrations.lightning import PruningCallback
from tests.integrations.test_lightning import Classifier

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 3, 8, 8), torch.arange(32) % 5), batch_size=8)
    model = Classifier()
    options = {"start_epoch": 1, "end_epoch": 4, "schedule": "linear", "importance": "activation"}
    callback = PruningCallback(0.5, verify=False, **options)
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    left = [report.channels[1] for report in callback.reports]
    (Path(sys.argv[1]) / f"{trainer.global_rank}.txt").write_text(f"{left} {total!r}")
