"""Forwards that leave nothing behind, and calls of modules that go another way for a while."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pat_fast.plan.running import Still, calls_made_by, runs_one_op


def test_calls_of_the_modules_alone_go_another_way() -> None:
    model, other, x = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2), torch.ones(1, 2)
    model[0].compile(backend="eager")
    before = [vars(m).copy() for m in model.modules()]
    seen: list[nn.Module] = []

    def way(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(module)
        return module._call_impl(*args, **kwargs)

    with calls_made_by(model.modules(), way):
        model(other(x))
        copied = copy.deepcopy(model)
    copied(model(x))
    assert seen == [model, model[0]]
    with pytest.raises(ZeroDivisionError), calls_made_by(model.modules(), lambda *_: 1 / 0):
        model(x)
    assert [vars(m) for m in model.modules()] == before


def test_which_layers_run_one_op() -> None:
    class Own(nn.Linear):
        """Code of its own."""

    hooked, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert all(map(runs_one_op, (nn.Linear(2, 2), nn.ReLU(), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Dropout())))
    others = (
        Own(2, 2),
        hooked,
        replaced,
        nn.Sequential(),
        nn.MultiheadAttention(4, 2),
        nn.LSTM(2, 2),
        nn.Unflatten(1, (2, 2)),
    )
    assert not any(map(runs_one_op, others))


def test_a_model_runs_twice_from_what_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.kept, self.empty = {"seen": 0}, []  # type: ignore[var-annotated]
            self.register_buffer("sum", torch.zeros(1))

        def forward(self) -> int:
            self.seen += 1
            self.kept["seen"] += 1
            self.empty.append(1)
            self.new = 1
            self.sum += 1
            return self.seen

    model = Counting()
    still = Still(model)
    for _ in range(2):
        with still.running():
            assert model() == 1
            assert (model.sum.item(), model.training) == (1, False)
        assert (model.seen, model.sum.item(), model.training) == (0, 0, True)
        assert (model.kept, model.empty, hasattr(model, "new")) == ({"seen": 0}, [], False)


def test_buffers_that_were_written_to_hold_what_they_held_whatever_kind_they_are() -> None:
    model = nn.Module()
    given = {
        "vector": torch.randn(3), "turned": torch.randn(2, 3).T, "number": torch.tensor(2.5), "same": torch.randn(2, 2),
        "count": torch.tensor(4), "counts": torch.arange(3), "mask": torch.tensor([True, False]),
        "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip
    for name, value in given.items():
        model.register_buffer(name, value.clone())
    buffers = dict(model.named_buffers())
    still = Still(model)
    with still.running():
        for name in given.keys() - {"same", "sparse"}:
            buffers[name].zero_()
    assert model.same._version == 0  # it was not written to
    for name, value in given.items():
        assert getattr(model, name) is buffers[name]
        assert torch.equal(buffers[name].to_dense(), value.to_dense()), name
