"""Recurrent layers: hidden units leave all their gates, layers and directions; what is pruned equals what is masked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import pat_fast as pat
from pat_fast.errors import PlanError
from pat_fast.plan import Plan, bind
from pat_fast.plan.lower import build_plan as lower
from pat_fast.rehearsal import rehearse
from pat_fast.surgery import prune
from tests.helpers import canonical, masked_copy, random_keep

KINDS = (nn.LSTM, nn.GRU, nn.RNN)
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    """[B, T, 6] -> [B, T, 3], through a recurrent layer of 10 inputs and 8 hidden units."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(6, 10)
        self.rnn = kind(10, 8, batch_first=True, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.hidden = nn.Linear(directions * (self.rnn.proj_size or 8), 12)
        self.head = nn.Linear(12, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.run(self.enter(x))).relu())

    def run(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class FirstState(Net):
    """With first states that the code makes."""

    def run(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(self.rnn.num_layers, len(x), self.rnn.hidden_size)
        return self.rnn(x, (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else zeros)[0]


class LastState(Net):
    """Of which the last states of both directions are read."""

    def run(self, x: Tensor) -> Tensor:
        last = self.rnn(x)[1]
        last = last[0] if isinstance(last, tuple) else last
        return torch.cat([last[-2], last[-1]], -1)


class Packed(Net):
    """On sequences of several lengths."""

    def run(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([5, 3, 4]), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class TimeFirst(Net):
    """In the other layout, one sequence after the other."""

    def run(self, x: Tensor) -> Tensor:
        self.rnn.batch_first = False
        return torch.stack([self.rnn(sequence)[0] for sequence in x])


class Cells(Net):
    """A loop over a cell."""

    def __init__(self, kind: type[nn.RNNBase], cell: type[nn.RNNCellBase]) -> None:
        super().__init__(kind)
        self.rnn = cell(10, 8).double()  # type: ignore[assignment]

    def run(self, x: Tensor) -> Tensor:
        state, out = None, []
        for t in range(x.shape[1]):
            state = self.rnn(x[:, t], state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)


class Translator(nn.Module):
    """A decoder that starts from the encoder's last state: one width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.decoder = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(x.flip(1), self.encoder(x)[1])[0])


def networks() -> list[Any]:
    found = []
    for kind in KINDS:
        name = kind.__name__
        for options in ({}, {"bias": False}, {"num_layers": 2, "bidirectional": True}):
            found.append(pytest.param(lambda k=kind, o=options: Net(k, **o), id=f"{name}-{options}"))
        found.append(pytest.param(lambda k=kind: FirstState(k, num_layers=2), id=f"{name}-first state"))
        found.append(pytest.param(lambda k=kind: LastState(k, bidirectional=True), id=f"{name}-last state"))
        found.append(pytest.param(lambda k=kind: Packed(k, num_layers=2), id=f"{name}-packed"))
        found.append(pytest.param(lambda k=kind: TimeFirst(k), id=f"{name}-time first"))
        cell = getattr(nn, f"{name}Cell")
        found.append(pytest.param(lambda k=kind, c=cell: Cells(k, c), id=cell.__name__))
    found.append(pytest.param(lambda: Net(nn.RNN, nonlinearity="relu"), id="RNN-relu"))
    for options in ({"proj_size": 5}, {"proj_size": 7, "num_layers": 2}):
        for both in (False, True):
            name = f"LSTM-{options}-{both}"
            found.append(pytest.param(lambda o=options, b=both: Net(nn.LSTM, bidirectional=b, **o), id=name))
    found.append(pytest.param(Translator, id="encoder and decoder"))
    return found


def widths(plan: Plan) -> dict[str, int]:
    """Units of each group, by the module that its root is in."""
    return {g.root.partition(".")[0]: len(set(plan.unit[g.start : g.stop].tolist())) for g in plan.groups}


@pytest.mark.parametrize("make", networks())
def test_pruned_equals_masked_and_the_plan_foresees_it(make: Any) -> None:
    model = make()
    plan = lower(model, X)
    expected = {"rnn": 8, "enter": 10, "hidden": 12} if isinstance(model, Net) else {"decoder": 8}
    if getattr(getattr(model, "rnn", None), "proj_size", 0):
        expected["rnn"] = model.rnn.proj_size  # whose root comes last
    assert widths(plan) == expected
    assert rehearse(plan, model, X)
    assert [g.root for g in pat.build_plan(model, X).groups] == [g.root for g in plan.groups]
    keep = random_keep(plan, 1)
    masked = masked_copy(model, plan, keep)
    binding = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(X), masked(X), rtol=1e-12, atol=1e-12)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert canonical(binding.plan) == canonical(lower(model, X))


def test_attributes_and_multiply_accumulates() -> None:
    model = Net(nn.LSTM, num_layers=2, bidirectional=True)
    plan = lower(model, X)
    steps = 5  # of each example
    of_rnn = sum(4 * 8 * (i + 8) for i in (10, 10, 16, 16))
    assert plan.macs() == steps * (6 * 10 + of_rnn + 16 * 12 + 12 * 3)
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    for root, count in (("rnn", 3), ("enter", 4)):
        group = next(g for g in plan.groups if g.root.startswith(root))
        units = list(dict.fromkeys(plan.unit[group.start : group.stop].tolist()))
        keep &= ~np.isin(plan.unit, units[:count])
    prune(bind(plan, model), keep)
    assert (model.rnn.input_size, model.rnn.hidden_size, model.hidden.in_features) == (6, 5, 10)
    assert model.rnn.weight_hh_l1_reverse.shape == (20, 5)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))


def test_what_computes_by_itself_stays_whole() -> None:
    class Own(nn.LSTM):
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            out, state = super().forward(x, hx)
            return out + 1, state

    normed = Net(nn.GRU)
    weight_norm(normed.rnn, "weight_hh_l0")
    for model in (Net(Own), normed):
        plan = pat.build_plan(model, X)
        assert widths(plan) == {"hidden": 12}
        assert any("whose sizes are tied" in f.reason for f in plan.frozen)
        pruner = pat.Pruner(model, 0.5, example_inputs=X, end_epoch=1)
        pruner.step()
        assert model(X).shape == (3, 5, 3)


def test_a_training_masked_and_pruned_goes_alike() -> None:
    def train(mode: str) -> tuple[nn.Module, list[float]]:
        model = Net(nn.LSTM, num_layers=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        pruner = pat.Pruner(model, 0.4, mode=mode, end_epoch=3, example_inputs=X, optimizer=optimizer)
        losses = []
        for _ in range(4):
            for _ in range(2):
                loss = (model(X) - X[..., :3]).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            pruner.step()
        pruner.finalize()
        return model, losses

    pruned, losses = train("prune")
    masked, expected = train("mask")
    assert pruned.rnn.hidden_size == masked.rnn.hidden_size < 8
    assert losses == pytest.approx(expected, rel=1e-9)
    for (name, p), q in zip(pruned.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)


def without(plan: Plan, count: dict[str, int]) -> np.ndarray:
    """Keep all but the first units of the groups of these roots."""
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    for group in plan.groups:
        keep[group.start : group.start + count.get(group.root, 0)] = False
    return keep


HIDDEN, PROJECTION = "rnn.weight_ih_l0", "rnn.weight_hr_l0"
PROJECTED = [{"proj_size": 5}, {"proj_size": 5, "num_layers": 2, "bidirectional": True}]


@pytest.mark.parametrize("options", PROJECTED)
def test_hidden_units_stay_more_than_their_projection(options: Any) -> None:
    """PyTorch takes equal sizes for no projection, and refuses fewer hidden units."""
    for hidden, projection, possible in ((2, 0, True), (3, 0, False), (5, 2, False), (4, 2, True), (6, 4, True)):
        model = Net(nn.LSTM, **options)
        plan = pat.build_plan(model, X)
        assert "at least 6 units stay: hidden_size must stay above proj_size: PyTorch takes" in plan.describe()
        assert [g.statistic for g in plan.groups] == [None] * len(plan.groups)  # a projection takes none
        keep = without(plan, {HIDDEN: hidden, PROJECTION: projection})
        masked = masked_copy(model, plan, keep)
        if possible:
            binding = prune(bind(plan, model), keep)
            assert (model.rnn.hidden_size, model.rnn.proj_size) == (8 - hidden, 5 - projection)
            assert canonical(binding.plan) == canonical(lower(model, X))
            torch.testing.assert_close(model(X), masked(X), rtol=1e-12, atol=1e-12)
        else:
            expected = model(X)
            with pytest.raises(PlanError, match=rf"at least {6 - projection} must stay \(hidden_size must stay above"):
                prune(bind(plan, model), keep)
            assert (model.rnn.hidden_size, model.rnn.proj_size) == (8, 5)
            assert torch.equal(model(X), expected)


@pytest.mark.parametrize("options", PROJECTED)
def test_a_pruner_keeps_more_hidden_units_than_their_projection(options: Any) -> None:
    def sizes(mode: str) -> list[Any]:
        model = Net(nn.LSTM, **options)
        with torch.no_grad():  # the hidden units matter least
            for name, p in model.rnn.named_parameters():
                p *= 1e-3 if name.startswith(("weight_ih", "weight_hr")) else 1
        pruner = pat.Pruner(model, 0.8, mode=mode, end_epoch=4, example_inputs=X, schedule="linear")
        found = []
        for _ in range(5):
            found.append(sorted(pruner.step().changed))
            assert model(X).isfinite().all()
        pruner.finalize()
        assert model(X).isfinite().all()
        assert 8 > model.rnn.hidden_size > model.rnn.proj_size < 5
        return [*found, (model.rnn.hidden_size, model.rnn.proj_size)]

    assert sizes("prune") == sizes("mask")


def test_a_projection_in_one_group_with_its_hidden_units_stays() -> None:
    class Started(Net):
        """From first states of one layer."""

        def __init__(self) -> None:
            super().__init__(nn.LSTM, proj_size=5)
            self.start = nn.Linear(10, 13).double()

        def run(self, x: Tensor) -> Tensor:
            h, c = self.start(x[:, 0]).split([self.rnn.proj_size, self.rnn.hidden_size], -1)
            return self.rnn(x, (h[None].contiguous(), c[None].contiguous()))[0]

    plan = pat.build_plan(Started(), X)
    assert widths(plan) == {"enter": 10, "hidden": 12}
    assert any(f.layer == "start" and "hidden_size must stay above" in f.reason for f in plan.frozen)


def test_a_pruned_one_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Net(nn.LSTM, proj_size=5, num_layers=2, bidirectional=True)
    pat.Pruner(model, 0.5, example_inputs=X, end_epoch=1).step()
    pat.save(model, tmp_path / "model.safetensors")
    loaded = Net(nn.LSTM, proj_size=5, num_layers=2, bidirectional=True)
    pat.load(tmp_path / "model.safetensors", loaded)
    assert loaded.rnn.hidden_size == model.rnn.hidden_size < 8
    assert torch.equal(loaded(X), model(X))
