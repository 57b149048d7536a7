"""A real training with the Trainer of Transformers, and one that is resumed from a checkpoint."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import pat_fast as pat
from pat_fast.integrations.transformers import PruningCallback
from tests.training import same, weights


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (16, 10), generator=generator)
    return [{"input_ids": t, "attention_mask": torch.ones_like(t), "labels": int(t[0] % 2)} for t in tokens]


def train(folder: Path, resume: Path | None = None, late: bool = False, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    callback = PruningCallback(0.5, start_epoch=1, end_epoch=3, verify=False, resume_from=resume, **options)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=4, per_device_train_batch_size=8, save_strategy="epoch", report_to=[],
        disable_tqdm=True, use_cpu=True, logging_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, arguments, train_dataset=examples(), callbacks=[] if late else [callback])
        if late:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, callback


@pytest.mark.slow
def test_a_training_prunes_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model, callback = train(tmp_path / "whole")
    left = [r.channels[1] for r in callback.reports]
    assert left[0] == callback.reports[0].dense_channels
    assert left[1] > left[2] == left[3]
    assert model.bert.encoder.layer[0].intermediate.dense.out_features < 24
    resumed, second = train(tmp_path / "resumed", tmp_path / "whole/checkpoint-4")
    assert [r.channels[1] for r in second.reports] == left[2:]
    assert same(weights(resumed), weights(model))


@pytest.mark.slow
def test_a_training_that_was_over_may_be_resumed(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "whole")
    resumed, again = train(tmp_path / "resumed", tmp_path / "whole/checkpoint-8")
    assert again.reports == []
    assert same(weights(resumed), weights(model))


@pytest.mark.slow
def test_checkpoints_that_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(pat.CheckpointError, match="cannot read"):
        train(tmp_path, tmp_path / "nothing")
    train(tmp_path / "whole")
    renamed = tmp_path / "renamed"  # as Transformers 5 writes the weights of a ViT: its trainer passes over them
    shutil.copytree(tmp_path / "whole/checkpoint-4", renamed)
    file = renamed / "model.safetensors"
    save_file({name.replace(".encoder.layer.", ".layers."): t for name, t in load_file(file).items()}, file)
    with pytest.raises(pat.CheckpointError, match=r"lacks 'bert.encoder.layer.0.*which its trainer does not load"):
        train(tmp_path / "again", renamed)
    with pytest.raises(Exception, match=r"add_callback is too late|size mismatch"):
        train(tmp_path / "late", tmp_path / "whole/checkpoint-4", late=True)
