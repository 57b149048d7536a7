"""A whole training that is saved after each epoch: ``python -m tests.resuming FOLDER CASE [KILL]``.

Goes on from ``FOLDER/training.pt`` if that is there. With KILL, the process ends itself, with SIGKILL, in the middle of
that epoch. At the end ``FOLDER/result.json`` holds a hash of everything that has a state, and all losses.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import pat_fast as pat
from tests.helpers import Small

EPOCHS = 6
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "told": {"importance": "activation", "regularizer": "growing", "example_inputs": torch.ones(2, 3, 8, 8)},
    "taylor": {"importance": "taylor"},
    "hessian": {"importance": "hessian", "unit": "step", "interval": 3, "end_epoch": 14},
    "masks": {"mode": "mask"},
}


class Dropping(Small):
    """Random numbers in the forward, channels_last weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def main(folder: Path, case: str, kill: int | None) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, 8)
    data = DataLoader(TensorDataset(x, torch.arange(40) % 5), batch_size=8, shuffle=True)
    model: nn.Module = Dropping().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pruner = pat.Pruner(model, 0.5, verify=False, **{"start_epoch": 1, "end_epoch": 4, **CASES[case]})
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=EPOCHS * len(data))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
    parts = {
        "model": model, "optimizer": optimizer, "pruner": pruner, "scheduler": scheduler, "scaler": scaler, "ema": ema,
    }  # fmt: skip
    losses: list[float] = []
    first = 0
    if (folder / "training.pt").exists():
        found = pat.load_training(folder / "training.pt", **parts)
        first, losses = found["epoch"], found["losses"]
    for epoch in range(first, EPOCHS):
        for number, (inputs, target) in enumerate(data):
            if epoch == kill and number == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(inputs), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            if [p.shape for p in ema.parameters()] != [p.shape for p in model.parameters()]:
                ema.module, ema.n_averaged[()] = copy.deepcopy(model), 0  # the average begins anew
            ema.update_parameters(model)
            losses.append(loss.item())
        pruner.step()
        pat.save_training(folder / "training.pt", **parts, extra={"epoch": epoch + 1, "losses": losses})
    hashes = {name: digest(part.state_dict()) for name, part in parts.items()}
    widths = [p.shape[0] for p in model.parameters()]
    result = {"hashes": hashes, "losses": losses, "widths": widths, "random": torch.rand(1).item()}
    (folder / "result.json").write_text(json.dumps(result))


def digest(state: Any) -> str:
    found = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}{value.stride()}".encode())
            found.update(value.detach().flatten().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                found.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, (list, tuple)):
            for one in value:
                take(one)
        else:
            found.update(repr(value).encode())

    take(state)
    return found.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
