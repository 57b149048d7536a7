"""register_layer: layers that the trace cannot see into."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pat_fast as pat
from pat_fast.plan import bind
from pat_fast.plan.trace import EQUIVALENTS
from pat_fast.surgery import prepare, prune
from pat_fast.surgery.modules import SIZES
from tests.helpers import masked_copy, random_keep


def _attend(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Fused(torch.autograd.Function):
    """Stands for a kernel of somebody's own."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.heads = heads
        return torch.ops.pat_fast_tests.fused_attention(qkv, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (qkv,) = ctx.saved_tensors
        with torch.enable_grad():
            again = qkv.detach().requires_grad_()
            return torch.autograd.grad(_attend(again, ctx.heads), again, grads)[0], None


@torch.library.custom_op("pat_fast_tests::fused_attention", mutates_args=())
def fused_attention(qkv: Tensor, heads: int) -> Tensor:
    return _attend(qkv, heads).contiguous()


@fused_attention.register_fake
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


class FusedAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed_dim, self.heads = width, heads
        self.qkv = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.out = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Fused.apply(F.linear(x, self.qkv), self.heads), self.out)


def in_pytorch(module: Any, x: Tensor) -> Tensor:
    qkv = F.linear(x, module.qkv)
    q, k, v = qkv.view(*qkv.shape[:2], 3, module.heads, -1).permute(2, 0, 3, 1, 4)
    return F.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), module.out)


@pytest.fixture
def registry() -> Iterator[None]:
    known, sizes = dict(EQUIVALENTS), dict(SIZES)
    yield
    for now, before in ((EQUIVALENTS, known), (SIZES, sizes)):
        now.clear()
        now.update(before)  # type: ignore[call-overload]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), FusedAttention(12, 4), nn.Linear(12, 3)).double()


X = torch.randn(2, 5, 6, dtype=torch.float64)


def test_a_kernel_of_its_own_is_opaque_and_says_how_to_open_it(registry: None) -> None:
    plan = pat.build_plan(network(), X)
    assert any(f.layer == "1.qkv" and "no rule" in f.reason and "fused_attention" in f.reason for f in plan.frozen)
    assert "register_layer" in plan.describe()


def test_a_registered_layer_loses_heads_and_width(registry: None) -> None:
    pat.register_layer(FusedAttention, forward=in_pytorch, sizes={"embed_dim": ("qkv", 1)})
    model = network()
    attention: Any = model[1]
    plan = pat.build_plan(model, X)
    assert [f.layer for f in plan.frozen] == ["2"]
    keep = random_keep(plan, 0, 0.4)
    twin = masked_copy(model, plan, keep)
    prune(bind(plan, model), keep)
    assert "forward" not in vars(attention)
    assert attention.heads < 4
    assert attention.embed_dim == attention.qkv.shape[1] < 12
    torch.testing.assert_close(model(X), twin(X), rtol=1e-9, atol=1e-9)


def test_what_register_layer_refuses() -> None:
    with pytest.raises(pat.PlanError, match="class of modules"):
        pat.register_layer("Conv1D", sizes={"nf": ("weight", 1)})  # type: ignore[arg-type]
    with pytest.raises(pat.PlanError, match="forward="):
        pat.register_layer(nn.Linear)
    with pytest.raises(pat.PlanError, match="parameter name, dimension"):
        pat.register_layer(nn.Linear, sizes={"nf": "weight"})  # type: ignore[dict-item]
    with pytest.raises(pat.PlanError, match="parameter name, dimension"):
        pat.register_layer(nn.Linear, sizes={"nf": ("weight", -1)})
    with pytest.raises(pat.PlanError, match=r"forward: expected a function of the module, got 'F\.linear'"):
        pat.register_layer(nn.Linear, forward="F.linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"embed_dmi": ("qkv", 1)}, "got embed_dmi = None and qkv of shape"),
        ({"embed_dim": ("qvk", 1)}, "got embed_dim = 12 and qvk None"),
        ({"embed_dim": ("qkv", 2)}, "is dimension 2 of 'qkv'"),
        ({"embed_dim": ("qkv", 0)}, r"got embed_dim = 12 and qkv of shape \(36, 12\)"),
    ],
)
def test_sizes_that_a_layer_does_not_have_are_refused(sizes: Any, message: str) -> None:
    """A name that is spelt wrong would leave the attribute as it was, without a word."""

    class Mine(FusedAttention):
        pass

    pat.register_layer(Mine, sizes=sizes)
    model = nn.Sequential(nn.Linear(5, 12), Mine(12, 4), nn.Linear(12, 3))
    try:
        with pytest.raises(pat.PlanError, match=rf"^1: register_layer said of Mine .*{message}"):
            pat.build_plan(model, torch.randn(2, 7, 5))
    finally:
        SIZES.pop(Mine, None)


def test_sizes_that_are_registered_after_a_binding_are_followed() -> None:
    class Counted(nn.Linear):
        """Keeps a third size, of which nothing is known at first."""

        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__(n_in, n_out)
            self.width = n_out

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Counted(8, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = pat.build_plan(model, torch.randn(2, 4))
    binding = bind(plan, model)
    prepare(binding)
    try:
        pat.register_layer(
            Counted,
            sizes={"in_features": ("weight", 1), "out_features": ("weight", 0), "width": ("weight", 0)},
        )
        prune(binding, random_keep(plan, 1, 0.5))
    finally:
        SIZES.pop(Counted, None)
    assert model[2].width == model[2].out_features == len(model[2].weight) < 6
