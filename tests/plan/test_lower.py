"""Plans of the zoo and of small networks with one difficulty each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune as unstructured
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models.attention import ViT
from pat_fast import PlanError, build_plan
from pat_fast.masks import Mask
from pat_fast.plan import Plan, bind
from pat_fast.plan.running import call
from pat_fast.surgery import prune
from tests.helpers import Case, Small, canonical, masked_copy, random_keep, small_inputs


def group(plan: Plan, root: str):
    return next(g for g in plan.groups if g.root == root)


def test_plan_predicted_after_prunes_equals_the_plan_lowered_afresh(case: Case) -> None:
    binding = bind(build_plan(case.model, case.inputs), case.model)
    for seed in range(3):
        keep = random_keep(binding.plan, seed)
        binding = prune(binding, keep)
        assert canonical(binding.plan) == canonical(build_plan(case.model, case.inputs))


def test_pruned_equals_masked_forward(case: Case) -> None:
    """The oracle of surgery, where no norm takes a statistic over the channels."""
    plan = build_plan(case.model, case.inputs)
    keep = random_keep(plan, 0)
    for g in plan.groups:
        if g.statistic:
            keep[g.start : g.stop] = True
    assert not keep.all() or all(g.statistic for g in plan.groups)
    expected = call(masked_copy(case.model.eval(), plan, keep), case.inputs)
    prune(bind(plan, case.model), keep)
    torch.testing.assert_close(call(case.model.eval(), case.inputs), expected, rtol=1e-9, atol=1e-9)


def test_pruned_model_trains(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    prune(bind(plan, case.model), random_keep(plan, 1))
    call(case.model.train(), case.inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in case.model.parameters())


def test_counts_are_those_of_the_model(case: Case) -> None:
    plan = build_plan(case.model, case.inputs)
    keep = random_keep(plan, 2)
    expected = plan.params(keep), plan.macs(keep)
    for counted in (plan.params(), plan.macs()), expected:
        # The counter knows the products of attention, but not the fused kernel for the CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            call(case.model.eval(), case.inputs)
        assert counted[0] == sum(p.numel() for p in case.model.parameters())
        assert counted[1] == counter.get_total_flops() // 2 // plan.batch
        if counted is not expected:
            prune(bind(plan, case.model), keep)


def test_groups_and_their_order_are_torch_prunings() -> None:
    """Where Torch-Pruning is right: same roots, same order, same members."""
    for name in ("resnet18", "resnet50", "vgg16_bn", "densenet121", "mobilenet_v2", "convnext_tiny", "unet"):
        case = Case.build(name, torch.float32)
        plan = build_plan(case.model, case.inputs)
        graph = tp.DependencyGraph().build_dependency(case.model, case.inputs, verbose=False)
        names = {module: n for n, module in case.model.named_modules()}
        ours = [g.root for g in plan.groups]
        frozen = {f.layer for f in plan.frozen}
        theirs = []
        for found in graph.get_all_groups():
            root = names[found[0].dep.target.module]
            if root in frozen:  # the classifier: Torch-Pruning leaves it to the user to protect it
                continue
            theirs.append(root)
            layers = {names.get(dep.target.module) for dep, _ in found} - {None}
            members = {n.rpartition(".")[0] for n, _ in group(plan, root).members}
            bare = {n for n, p in case.model.named_parameters() if n.rpartition(".")[0] in members}
            assert layers <= members | bare, root
        assert ours == theirs


def test_outputs_inputs_and_reasons_are_named() -> None:
    plan = build_plan(Small(), small_inputs())
    reasons = {f.layer: f.reason for f in plan.frozen}
    assert set(reasons) == {"head"}
    assert "output of the model" in reasons["head"]
    assert group(plan, "outer").layers == ("stem", "outer")
    text = plan.describe()
    assert "frozen head: 5 channels" in text
    assert "stem.weight dim 0" in text


def test_model_is_left_as_it_was() -> None:
    model = Small()
    model.inner.eval()
    model.head.weight.requires_grad_(False)
    model.train()
    model.inner.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    build_plan(model, small_inputs())
    assert model.training
    assert not model.inner.training
    assert not model.head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_buffers_that_change_in_eval_are_restored() -> None:
    class Counts(Small):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counts()
    build_plan(model, small_inputs())
    assert model.calls == 0


def test_failing_forward_says_which_inputs() -> None:
    with pytest.raises(PlanError, match=r"fails on the example inputs \(\(4, 5, 8, 8\)\)"):
        build_plan(Small(), torch.randn(4, 5, 8, 8))


class OneDifficulty(nn.Module):
    """conv -> `between` -> conv, so that what `between` does decides whether the first one can shrink."""

    def __init__(self, between, after: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.second = nn.Conv2d(after, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


MASK = torch.rand(8, 1, 1)


def pooled_channels(x: Tensor) -> Tensor:
    return nn.functional.max_pool1d(x.flatten(2).transpose(1, 2), 2).transpose(1, 2).unflatten(2, (8, 8))


GRID = torch.rand(4, 5, 5, 2, dtype=torch.float64) * 2 - 1
GAIN = torch.randn(8, 5, dtype=torch.complex128)
TOKENS = torch.randn(64, 64, 1, dtype=torch.float64)


def turned_in_pairs(x: Tensor) -> Tensor:
    """As rotary embeddings in complex numbers do it."""
    pairs = torch.view_as_complex(x.unflatten(1, (-1, 2)).movedim(2, -1).contiguous())
    return torch.view_as_real(pairs * 1j).movedim(-1, 2).flatten(1, 2)


def mixed_places(x: Tensor) -> Tensor:
    """A convolution over what are its channels, the places, that leaves ours alone."""
    return F.conv1d(x.flatten(2).mT, TOKENS.to(x.dtype)).mT.unflatten(2, (8, 8))


def written_places(x: Tensor) -> Tensor:
    rows = torch.tensor([2, 0])
    out = x.clone()
    out[rows] += x[rows] * 2
    out[torch.tensor([True, False, True, False])[: len(x)]] -= 1
    out[out < 0.1] = 0
    out[:, :, rows] = x[:, :, rows + 1]
    return out


# PyTorch tags most of them as element-wise, in place some, and which depends on its version.
ACTIVATIONS = [
    nn.LeakyReLU(), nn.GELU(), nn.LogSigmoid(), nn.PReLU(),
    *(kind(inplace=True) for kind in (
        nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU6, nn.RReLU, nn.SELU, nn.SiLU)),
    nn.Threshold(0.1, 0.0, inplace=True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("between", "after", "channels", "units"),
    [
        (lambda x: x * 2 + 1, 8, 8, 8),
        (lambda x: x.flip(1), 8, 8, 8),
        (lambda x: torch.cat([x, x], 1), 16, 8, 8),
        (lambda x: torch.cat([x, x.new_ones(4, 2, 8, 8)], 1), 10, 8, 8),
        (lambda x: x.repeat(1, 2, 1, 1), 16, 8, 8),
        (lambda x: torch.mul(*x.chunk(2, 1)), 4, 4, 4),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 8, 8, 4),
        (lambda x: nn.functional.glu(x, 1), 4, 4, 4),
        (lambda x: nn.functional.pixel_shuffle(x, 2), 2, 2, 2),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 8, 8, 8),
        (lambda x: x.transpose(1, 3).transpose(3, 1), 8, 8, 8),
        (lambda x: x.flatten(2).unflatten(2, (8, 8)), 8, 8, 8),
        (lambda x: nn.functional.pad(x, (1, 1, 1, 1)), 8, 8, 8),
        (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 2)), 11, 8, 8),
        (lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"), 8, 8, 8),
        (lambda x: nn.functional.max_pool2d(x, 2), 8, 8, 8),
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), 8, 8, 8),
        (lambda x: x / x.norm(dim=1, keepdim=True), 8, 8, 8),
        (lambda x: torch.stack([x, x], 0).sum(0), 8, 8, 8),
        (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), 8, 8, 8),
        (lambda x: torch.einsum("bchw->bhwc", x).permute(0, 3, 1, 2), 8, 8, 8),
        (lambda x: x[:, :, ::2, 1:], 8, 8, 8),
        (lambda x: x.add_(1).relu_(), 8, 8, 8),
        *((activation, 8, 8, 8) for activation in ACTIVATIONS),
        (lambda x: x.roll(1, 2), 8, 8, 8),
        (lambda x: x.cumsum(2).tril(), 8, 8, 8),
        (lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)), 8, 8, 8),
        (lambda x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), 32, 8, 8),
        (lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1), 8, 8, 8),
        (lambda x: F.grid_sample(x, GRID, align_corners=False), 8, 8, 8),
        (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 8, 8, 8),
        (lambda x: F.channel_shuffle(x, 2), 8, 8, 4),
        (lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * GAIN), 8, 8, 8),
        (turned_in_pairs, 8, 8, 4),
        (mixed_places, 8, 8, 8),
        (lambda x: x.as_strided((*x.shape[:3], 7, 2), (*x.stride(), 1)).amax(4), 8, 8, 8),
        (lambda x: torch.where((MASK > -1)[None, :1].expand(x.shape).contiguous(), x, x.new_zeros(())), 8, 8, 8),
        (written_places, 8, 8, 8),
        (lambda x: F.pad(x.unflatten(1, (-1, 4)), (0, 0, 0, 0, 1, 2))[:, :, 1:5].flatten(1, 2), 8, 8, 2),
        (lambda x: x * torch.cdist(x.flatten(2).mT, x[:, :, 0].mT).mean((1, 2))[:, None, None, None], 8, 8, 8),
        (lambda x: x + F.mse_loss(x, x.roll(1, 2), reduction="sum"), 8, 8, 8),
    ],
)  # fmt: skip
def test_what_lies_between_two_layers(between, after: int, channels: int, units: int) -> None:
    model = OneDifficulty(between, after).double()
    x = small_inputs(dtype=torch.float64)
    plan = build_plan(model, x)
    assert (plan.n_channels, plan.n_units) == (channels, units), plan.describe()
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    keep[plan.unit == plan.unit[1]] = False
    expected = masked_copy(model.eval(), plan, keep)(x)
    smaller = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert canonical(build_plan(model, x)) == canonical(smaller.plan)


@pytest.mark.parametrize(
    ("between", "after", "reason"),
    [
        (lambda x: x * MASK, 8, "meets a tensor of fixed size"),
        (lambda x: x + torch.ones(8, 1, 1), 8, "meets a tensor of fixed size"),
        (lambda x: x[:, :4], 4, "slice of the channels"),
        (lambda x: torch.cat(x.split([3, 5], 1)[::-1], 1), 8, "split into parts"),
        (lambda x: x.sort(1)[0], 8, "sorted along the channels"),
        (lambda x: x.index_select(1, torch.arange(7, -1, -1)), 8, "looked up by number"),
        (lambda x: x[:, 2:3].expand(-1, 8, -1, -1), 8, "slice of the channels"),
        (lambda x: x[:, 2].unsqueeze(1).expand(-1, 8, -1, -1), 8, "picked out by number"),
        (lambda x: x.roll(1, 1), 8, "rolled along the channels"),
        (pooled_channels, 4, "resampled"),
        (lambda x: torch.fft.fft(x, dim=1).real, 8, "transformed along the channels"),
        (lambda x: x.cumsum(1), 8, "summed up along the channels"),
        (lambda x: x.unfold(1, 2, 1).sum(4), 7, "gathered in windows"),
        (lambda x: x.as_strided((len(x), 7, 2, 8, 8), (512, 64, 64, 8, 1)).sum(2), 7, "strides written in the code"),
        (lambda x: x.as_strided((len(x), 8, 8, 8), (512, 64, 1, 8)), 8, "does not run when it is smaller"),
        (lambda x: x.renorm(2, 2, 1.0), 8, "no rule for this op"),
        (lambda x: nn.functional.layer_norm(x.transpose(1, 3), (8,)).transpose(1, 3), 8, "normalized_shape=[8]"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_frozen_by_name(between, after: int, reason: str) -> None:
    plan = build_plan(OneDifficulty(between, after), small_inputs())
    assert plan.n_channels == 0
    assert any(f.layer == "first" and reason in f.reason for f in plan.frozen), plan.frozen


def test_a_layer_whose_hook_makes_a_weight_in_ways_unknown_is_named() -> None:
    class Sorted(unstructured.BasePruningMethod):
        PRUNING_TYPE = "unstructured"

        def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
            return default_mask

        def apply_mask(self, module: nn.Module) -> Tensor:
            return module.weight_orig.flatten().sort()[0].view(module.weight_orig.shape)

    model = Small()
    Sorted.apply(model.inner, "weight")
    frozen = {f.layer: f.reason for f in build_plan(model, small_inputs()).frozen}
    assert frozen["inner"] == "its weight is made of weight_orig by a hook"


def test_a_mask_of_torch_prune_is_cut_with_its_weight() -> None:
    model = Small()
    for layer in (model.stem, model.inner, model.outer):
        unstructured.random_unstructured(layer, "weight", 0.3)
    model, x = model.double().eval(), small_inputs(dtype=torch.float64)
    model(x)
    plan = build_plan(model, x)
    assert {g.root for g in plan.groups} == {"outer.weight_orig", "inner.weight_orig"}
    keep = random_keep(plan, 0)
    binding = bind(plan, model)
    mask = Mask(binding)
    mask.set(torch.from_numpy(keep), [])
    expected = model(x).detach()
    prune(binding, keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert (model.inner.out_channels, model.inner.in_channels) == model.inner.weight_mask.shape[:2]
    unstructured.remove(model.inner, "weight")
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fixed", [False, True])
def test_of_channels_that_are_flattened_together_only_some_can_go(fixed: bool) -> None:
    """Each place of an outer product is of two channels; a layer behind it can follow one of them."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few, self.many = nn.Linear(5, 4), nn.Linear(5, 6)
            self.out = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            many = self.many(x) * torch.ones(6) if fixed else self.many(x)
            return self.out((self.few(x)[:, :, None] * many[:, None]).flatten(1).relu())

    model, x = Outer().double(), torch.randn(2, 5, dtype=torch.float64)
    plan = build_plan(model, x)
    assert [g.root for g in plan.groups] == (["few"] if fixed else ["many"])
    why = {f.layer: f.reason for f in plan.frozen}
    assert "flattened together" in why["few"] if not fixed else "fixed size" in why["many"]
    keep = np.arange(plan.n_channels) != 1
    expected = masked_copy(model.eval(), plan, keep)(x)
    prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_a_cycle_of_slices_and_concats_ends() -> None:
    """Rotary embeddings: what Torch-Pruning never finishes is frozen by name here."""

    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(8, 16)
            self.o = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            for _ in range(3):
                q = q + torch.cat([-q[..., 8:], q[..., :8]], -1)
            return self.o(q)

    plan = build_plan(Rotary(), torch.randn(2, 3, 8))
    assert [f.layer for f in plan.frozen if "slice" in f.reason] == ["q"]


def test_a_bare_parameter_that_is_multiplied_is_a_layer_of_its_own_name() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.kernel = nn.Parameter(torch.randn(6, 5))
            self.last = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) @ self.kernel)

    plan = build_plan(Odd(), torch.randn(3, 4))
    assert {g.root: g.channels for g in plan.groups} == {"first": 6, "kernel": 5}
    assert ("kernel", 0) in plan.groups[[g.root for g in plan.groups].index("first")].members


def test_attention_modules_stay_whole() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 6, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            x = x + self.attention(x, x, x)[0]
            return self.mlp(self.lstm(x)[0])

    model = Closed()
    ids = torch.randint(0, 11, (2, 5))
    plan = build_plan(model, ids)
    assert [g.root for g in plan.groups] == ["mlp.0", "lstm.weight_ih_l0"]
    prune(bind(plan, model), np.arange(16) % 10 < 6)
    assert (model.attention.embed_dim, model.lstm.hidden_size) == (8, 6)
    assert model(ids).shape == (2, 5, 3)


def test_a_layer_used_twice_and_tied_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.twice = nn.Linear(6, 6)
            self.out = nn.Linear(6, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.twice(self.twice(self.embed(ids)).relu()))

    model = Shared()
    ids = torch.arange(6).reshape(2, 3)
    plan = build_plan(model, ids)
    assert plan.n_channels == 6
    prune(bind(plan, model), np.array([True, False, True, True, False, True]))
    assert model.out.weight is model.embed.weight
    assert (model.out.in_features, model.embed.embedding_dim, model.twice.out_features) == (4, 4, 4)
    assert model(ids).shape == (2, 3, 7)


def test_keep_is_checked() -> None:
    plan = build_plan(Small(), small_inputs())
    with pytest.raises(PlanError, match="bool vector with one entry for each"):
        plan.check_keep(np.ones(3, dtype=np.bool_))
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    inner = group(plan, "inner")
    keep[inner.start : inner.stop] = False
    with pytest.raises(PlanError, match="group inner: keep leaves 0 of 16 units"):
        plan.check_keep(keep)


def test_half_a_unit_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    plan = build_plan(model, small_inputs())
    assert plan.n_units == 4
    keep = np.ones(8, dtype=np.bool_)
    keep[0] = False
    with pytest.raises(PlanError, match="channels of a unit are kept or removed together"):
        plan.check_keep(keep)


def test_the_last_head_stays_whole() -> None:
    """One of four heads may be left. What is predicted keeps it; a plan lowered afresh sees no heads in its view."""
    model = ViT(image=8, patch=2, dim=16, depth=1, num_heads=4, head_dim=6, hidden=12, num_classes=3).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plan = build_plan(model, x)
    heads = group(plan, "blocks.0.attn.v")
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    keep[heads.start : heads.stop] = plan.unit[heads.start : heads.stop] == plan.unit[heads.stop - 1]
    twin = masked_copy(model, plan, keep)
    smaller = prune(bind(plan, model), keep).plan
    assert model.blocks[0].attn.q.out_features == 6
    torch.testing.assert_close(model(x), twin(x), rtol=1e-9, atol=1e-9)
    assert smaller.lone() == {"blocks.0.attn.v": 12}
    assert [f.reason for f in smaller.frozen if f.layer == "blocks.0.attn.v"] == ["one unit is left"]
    keep[heads.start : heads.stop] = False
    with pytest.raises(PlanError, match="keep leaves 0 of 4 units; at least 1 must stay"):
        plan.check_keep(keep)


def test_the_last_channel_of_every_block_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    plan = build_plan(model, small_inputs())
    smaller = prune(bind(plan, model), plan.unit == 2).plan
    assert smaller.lone() == {"0": 2}
    assert not smaller.groups
    assert not build_plan(model, small_inputs()).groups


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_heads_that_are_normalised_one_by_one_go_as_a_whole(kind: type[nn.Module]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(6, 16, bias=False) for _ in range(3))
            self.q_norm, self.k_norm, self.out = kind(4), kind(4), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
            return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    plan = build_plan(model, x)
    assert plan.n_units == 4
    keep = plan.unit != plan.unit[0]
    expected = masked_copy(model, plan, keep)(x)
    smaller = prune(bind(plan, model), keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert (model.q.out_features, model.q_norm.normalized_shape) == (12, (4,))
    assert canonical(build_plan(model, x)) == canonical(smaller.plan)


def test_beside_logits_hidden_states_may_shrink_and_boxes_may_not() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes, self.boxes = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.body(x).relu()
            return {"logits": self.classes(x), "pred_boxes": self.boxes(x), "last_hidden_state": x}

    plan = build_plan(Detector(), torch.randn(5, 6))
    assert [g.root for g in plan.groups] == ["body"]
    assert {f.layer for f in plan.frozen} == {"classes", "boxes"}
