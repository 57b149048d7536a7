"""What a step says of itself."""

from __future__ import annotations

import dataclasses

import pytest

import pat_fast as pat
from tests.helpers import Small, small_inputs

REPORT = pat.StepReport(
    step=3,
    epoch=3,
    stage="prune",
    ratio=0.25,
    channels=(1000, 750),
    params=(20_000, 12_000),
    macs=(5_000_000, 2_500_000),
    dense_channels=1000,
    dense_params=40_000,
    dense_macs=10_000_000,
    changed=(("conv1", 64, 48),),
    frozen=(("head", "is an output of the model"),),
    notes=("a note", "another"),
)


def test_a_report_reads_well() -> None:
    assert str(REPORT).splitlines() == [
        "epoch 3 [prune] channels 1,000 -> 750 (75.0% of dense), parameters 20,000 -> 12,000 (30.0% of dense), "
        "MACs 5,000,000 -> 2,500,000 (25.0% of dense)",
        "  a note",
        "  another",
    ]


def test_what_did_not_move_is_said_once() -> None:
    still = dataclasses.replace(REPORT, channels=(750, 750), params=(9, 9), macs=(7, 7), notes=())
    assert str(still) == (
        "epoch 3 [prune] channels 750 (75.0% of dense), parameters 9 (0.0% of dense), MACs 7 (0.0% of dense)"
    )


def test_sparsity_is_the_share_that_is_gone() -> None:
    assert REPORT.sparsity == 0.25
    nothing = dataclasses.replace(REPORT, channels=(0, 0), dense_channels=0, dense_params=0, dense_macs=0)
    assert nothing.sparsity == 0.0
    assert "channels 0 (-)" in str(nothing)


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        REPORT.epoch = 4  # type: ignore[misc]


def test_a_real_report_counts_the_model() -> None:
    model = Small()
    dense = sum(p.numel() for p in model.parameters())
    pruner = pat.Pruner(model, 0.5, "linear", end_epoch=2, example_inputs=small_inputs())
    first, second = pruner.step(), pruner.step()
    assert (first.channels, second.channels) == ((28, 21), (21, 14))
    assert first.params[0] == first.dense_params == dense
    assert second.params == (first.params[1], sum(p.numel() for p in model.parameters()))
    assert second.macs[0] == first.macs[1] > second.macs[1]
    assert (first.ratio, second.ratio, second.sparsity) == (0.25, 0.5, 0.5)
    assert (first.stage, second.stage) == ("prune", "finetune")
    before = {"inner": 16, "outer": 12}
    for report in (first, second):
        assert sum(a - b for _, a, b in report.changed) == 7
        for name, old, new in report.changed:
            assert before[name] == old > new
            before[name] = new
    assert before == {"inner": model.inner.out_channels, "outer": model.stem.out_channels}
    assert dict(second.frozen)["head"].startswith("is an output of the model")
