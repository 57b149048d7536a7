"""Attention whose queries share keys and values: one for all heads, or one for each group of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.plan import bind, build_plan
from pat_fast.plan.verify import verify
from pat_fast.surgery import prune
from tests.helpers import canonical, masked_copy, random_keep

sdpa = F.scaled_dot_product_attention


class Attention(nn.Module):
    """``how`` makes [B, T, heads * dim] of x [B, T, 10]: four heads of six queries, ``kv`` of keys and values."""

    def __init__(self, how: Callable[[Attention, Tensor], Tensor], kv: int = 1) -> None:
        super().__init__()
        self.how, self.heads, self.dim, self.kv, self.times = how, 4, 6, kv, 4 // kv
        self.enter = nn.Linear(5, 10)
        self.q, self.k, self.v = nn.Linear(10, 24, bias=False), nn.Linear(10, 6 * kv), nn.Linear(10, 6 * kv)
        self.o, self.leave = nn.Linear(24, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x).relu()
        return self.leave(x + self.o(self.how(self, x)))

    def queries(self, x: Tensor) -> Tensor:
        """[B, heads, T, dim]"""
        return self.q(x).view(*x.shape[:2], self.heads, self.dim).transpose(1, 2)

    def pair(self, x: Tensor) -> list[Tensor]:
        """Keys and values: [B, kv, T, dim]."""
        return [layer(x).view(*x.shape[:2], self.kv, self.dim).transpose(1, 2) for layer in (self.k, self.v)]


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def by_hand(m: Attention, x: Tensor) -> Tensor:
    k, v = m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
    return joined((m.queries(x) @ k.mT * m.dim**-0.5).softmax(-1) @ v)


def expanded(m: Attention, x: Tensor) -> Tensor:
    k, v = (t.unsqueeze(1).expand(-1, m.heads, -1, -1) for t in (m.k(x), m.v(x)))
    return sdpa(m.queries(x), k, v).transpose(1, 2).reshape(*x.shape[:2], m.heads * m.dim)


def expanded_as_queries(m: Attention, x: Tensor) -> Tensor:
    q = m.queries(x)
    return joined(sdpa(q, *(t.unsqueeze(1).expand_as(q) for t in (m.k(x), m.v(x)))))


def broadcast(m: Attention, x: Tensor) -> Tensor:
    return joined(sdpa(m.queries(x), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)))


def by_sdpa(m: Attention, x: Tensor) -> Tensor:
    return joined(sdpa(m.queries(x), *m.pair(x), enable_gqa=True))


def by_einsum(m: Attention, x: Tensor) -> Tensor:
    weights = (torch.einsum("bhqd,bkd->bhqk", m.queries(x), m.k(x)) * m.dim**-0.5).softmax(-1)
    return joined(torch.einsum("bhqk,bkd->bhqd", weights, m.v(x)))


def folded(m: Attention, x: Tensor) -> Tensor:
    q = m.queries(x).reshape(len(x), -1, m.dim)
    y = torch.bmm(torch.bmm(q, m.k(x).mT).softmax(-1), m.v(x))
    return joined(y.view(len(x), m.heads, x.shape[1], m.dim))


def repeated(m: Attention, x: Tensor) -> Tensor:
    return joined(sdpa(m.queries(x), *(t.repeat(1, m.times, 1, 1) for t in m.pair(x))))


def interleaved(m: Attention, x: Tensor) -> Tensor:
    k, v = m.pair(x)
    return joined(sdpa(m.queries(x), k.repeat_interleave(m.times, 1), torch.repeat_interleave(v, m.times, dim=1)))


def reckoned(m: Attention, x: Tensor) -> Tensor:
    q = m.queries(x)
    return joined(sdpa(q, *(t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in m.pair(x))))


def viewed(m: Attention, x: Tensor) -> Tensor:
    """As in Llama."""
    pair = (
        t[:, :, None].expand(len(x), m.kv, m.times, x.shape[1], m.dim).reshape(len(x), -1, x.shape[1], m.dim)
        for t in m.pair(x)
    )
    return joined(sdpa(m.queries(x), *pair))


def grouped(m: Attention, x: Tensor) -> Tensor:
    q = m.q(x).view(*x.shape[:2], m.kv, m.times, m.dim).permute(0, 2, 3, 1, 4)
    k, v = (t.unsqueeze(2) for t in m.pair(x))
    return ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1)


def rotated(m: Attention, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])[:, None] * torch.tensor([0.1, 0.2, 0.3] * 2, dtype=x.dtype)

    def turn(t: Tensor) -> Tensor:
        one, two = t.chunk(2, -1)
        return t * places.cos() + torch.cat([-two, one], -1) * places.sin()

    k, v = m.k(x).unsqueeze(1), m.v(x).unsqueeze(1)
    return joined((turn(m.queries(x)) @ turn(k).mT).softmax(-1) @ v)


def masked(m: Attention, x: Tensor) -> Tensor:
    """A mask for every head, written out before heads and examples are one dimension."""
    t = x.shape[1]
    allowed = torch.ones(len(x), t, t, dtype=torch.bool).tril()
    bias = torch.zeros(t, t, dtype=x.dtype).masked_fill(~allowed[0], -1.0).repeat(len(x), m.heads, 1, 1)
    q, k, v = (t.expand(-1, m.heads, -1, -1).flatten(0, 1) for t in (m.queries(x), *m.pair(x)))
    scores = (q @ k.mT).masked_fill(~allowed.repeat_interleave(m.heads, dim=0), -9.0) + bias.flatten(0, 1)
    scores = scores + (allowed[:, None].expand(-1, m.heads, -1, -1).flatten(0, 1) * 2.0)
    return joined((scores.softmax(-1) @ v).unflatten(0, (len(x), -1)))


WAYS = [by_hand, expanded, expanded_as_queries, broadcast, by_einsum, folded, rotated, masked]
EITHER = [by_sdpa, repeated, interleaved, reckoned, viewed, grouped]


@pytest.mark.parametrize(("how", "kv"), [*((w, 1) for w in WAYS), *((w, kv) for w in EITHER for kv in (1, 2))])
def test_whole_heads_of_queries_go(how: Callable[[Attention, Tensor], Tensor], kv: int) -> None:
    torch.manual_seed(0)
    model, x = Attention(how, kv).double().eval(), torch.randn(2, 7, 5, dtype=torch.float64)
    plan = build_plan(model, x)
    root = "q" if kv == 1 else "v"
    heads = next(g for g in plan.groups if g.root == root)
    assert len(set(plan.unit[heads.start : heads.stop].tolist())) == (4 if kv == 1 else 2)
    assert {name for name, _ in heads.members} >= {"q.weight", "o.weight"}
    assert verify(plan, model, x).wrong == ()
    if kv == 1:
        why = {f.layer: f.reason for f in plan.frozen}
        assert "shared by all heads" in why["k"] or how is rotated, why
        assert "flattened together" in why["v"], why
    keep = random_keep(plan, 0, 0.5)
    keep[heads.start : heads.stop] = plan.unit[heads.start : heads.stop] != plan.unit[heads.start]
    expected = masked_copy(model, plan, keep)(x)
    smaller = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    left = 3 if kv == 1 else 2
    assert (model.q.out_features, model.o.in_features) == (left * 6, left * 6)
    assert (model.k.out_features, model.v.out_features) == (6, 6)
    if kv == 1:  # of two, one is left: of one head a plan lowered afresh sees none
        assert canonical(build_plan(model, x)) == canonical(smaller.plan)


def test_nothing_may_be_repeated() -> None:
    def none(m: Attention, x: Tensor) -> Tensor:
        return by_hand(m, torch.cat([x, x[:, :0].repeat_interleave(m.heads, 1), x[:, :0].repeat(1, m.times, 1)], 1))

    plan = build_plan(Attention(none), torch.randn(2, 7, 5))
    assert "heads" in {w.attribute for w in plan.widths}


def test_numbers_of_heads_follow() -> None:
    for how, counts in ((expanded, "heads"), (repeated, "times"), (interleaved, "times"), (viewed, "times")):
        model, x = Attention(how), torch.randn(2, 7, 5)
        plan = build_plan(model, x)
        assert counts in {w.attribute for w in plan.widths}, how
        assert "heads" in {w.attribute for w in plan.widths}, how


def test_a_number_of_heads_in_the_code_holds_them() -> None:
    def four(m: Attention, x: Tensor) -> Tensor:
        k, v = (t.unsqueeze(1).expand(-1, 4, -1, -1) for t in (m.k(x), m.v(x)))
        return joined(sdpa(m.queries(x), k, v))

    why = {f.layer: f.reason for f in pat.build_plan(Attention(four), torch.randn(2, 7, 5)).frozen}
    assert "does not run when it is smaller" in why["q"]


def test_what_is_repeated_for_something_else_shrinks_with_nothing() -> None:
    """One vector for all tokens, put beside each of them."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.all, self.out = nn.Linear(5, 6), nn.Linear(5, 7), nn.Linear(13, 3)

        def forward(self, x: Tensor) -> Tensor:
            one = self.one(x.mean(1)).unsqueeze(1).expand(-1, x.shape[1], -1)
            return self.out(torch.cat([one, self.all(x)], -1).relu())

    torch.manual_seed(0)
    model, x = Beside().double(), torch.randn(2, 4, 5, dtype=torch.float64)
    plan = build_plan(model, x)
    assert {g.root: g.channels for g in plan.groups} == {"one": 6, "all": 7}
    assert plan.n_units == 13
    keep = random_keep(plan, 0)
    expected = masked_copy(model, plan, keep)(x)
    smaller = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert canonical(build_plan(model, x)) == canonical(smaller.plan)
