"""Current transformers: whole heads, grouped queries, rotary embeddings, windows, tied embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pat_fast as pat
from pat_fast.plan import bind
from pat_fast.plan.running import call
from pat_fast.surgery import prune
from tests.helpers import canonical, masked_copy, random_keep

transformers = pytest.importorskip("transformers")


def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, 6))}


def image() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def text(family: str, **more: Any) -> nn.Module:
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **more})
    return getattr(transformers, f"{family}ForCausalLM")(config)


def gpt2(attention: str) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_implementation=attention,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def bigcode() -> nn.Module:
    """One key and one value for all queries."""
    return transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(
            vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, multi_query=True, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def bert(attention: str) -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
            max_position_embeddings=32, attn_implementation=attention,
        )
    )  # fmt: skip


def vit(attention: str) -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=32,
            patch_size=8, attn_implementation=attention,
        )
    )  # fmt: skip


def swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=4
        )
    )


def segformer() -> nn.Module:
    return transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[24, 36], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[3, 3], mlp_ratios=[2, 2], decoder_hidden_size=20,
        )
    )  # fmt: skip


# What is prunable by name: a piece of a root's name, and how many units of it there are.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, int]]] = {
    "llama-sdpa": (lambda: text("Llama", attn_implementation="sdpa"), ids, {"self_attn": 2, "mlp.up_proj": 56}),
    "llama-eager": (lambda: text("Llama", attn_implementation="eager"), ids, {"self_attn": 2, "mlp.up_proj": 56}),
    "llama-tied": (lambda: text("Llama", tie_word_embeddings=True), ids, {"self_attn": 2, "mlp.up_proj": 56}),
    "llama-one-pair-sdpa": (lambda: text("Llama", num_key_value_heads=1), ids, {"q_proj": 4, "mlp.up_proj": 56}),
    "llama-one-pair-eager": (
        lambda: text("Llama", num_key_value_heads=1, attn_implementation="eager"), ids, {"q_proj": 4, "mlp.up_proj": 56}
    ),
    "bigcode": (bigcode, ids, {"attn.c_attn": 4, "mlp.c_fc": 128}),
    "qwen2": (lambda: text("Qwen2"), ids, {"self_attn": 2, "mlp.up_proj": 56}),
    "gpt2-sdpa": (lambda: gpt2("sdpa"), ids, {"attn.c_attn": 4, "mlp.c_fc": 128, "wte": 32}),
    "gpt2-eager": (lambda: gpt2("eager"), ids, {"attn.c_attn": 4, "mlp.c_fc": 128, "wte": 32}),
    "bert-sdpa": (lambda: bert("sdpa"), ids, {"attention.self": 4, "intermediate": 56}),
    "bert-eager": (lambda: bert("eager"), ids, {"attention.self": 4, "intermediate": 56}),
    "vit-sdpa": (lambda: vit("sdpa"), image, {"attention": 4, "mlp.fc1": 56}),
    "vit-eager": (lambda: vit("eager"), image, {"attention": 4, "mlp.fc1": 56}),
    "swin": (swin, image, {"layers.0.blocks.0.attention": 3, "layers.1.blocks.1.attention": 6, "mlp.fc1": 96}),
    "segformer": (segformer, image, {"stages.1.blocks.0.attention": 3}),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_heads_and_widths_are_pruned_and_the_model_runs(family: str) -> None:
    build, inputs, expected = FAMILIES[family]
    torch.manual_seed(0)
    model, x = build(), inputs()
    plan = pat.build_plan(model, x)
    assert any("verified in" in note for note in plan.notes)
    units = {g.root: len(np.unique(plan.unit[g.start : g.stop])) for g in plan.groups}
    for part, count in expected.items():
        assert count in [n for root, n in units.items() if part in root], (part, units)
    parameters = list(model.parameters())
    pruned = prune(bind(plan, model), random_keep(plan, 0))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    call(model.train(), x).logits.square().mean().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.grad is not None)
    assert canonical(pat.build_plan(model, x)) == canonical(pruned.plan)
    if hasattr(model, "generate") and "input_ids" in x:
        model.eval().generate(**x, attention_mask=torch.ones_like(x["input_ids"]), max_new_tokens=3, do_sample=False)
    if "tied" in family:
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "family",
    ["llama-sdpa", "llama-one-pair-sdpa", "llama-one-pair-eager", "qwen2", "gpt2-sdpa", "vit-eager", "segformer"],
)
def test_a_config_says_what_was_pruned_and_builds_the_smaller_model(family: str) -> None:
    build, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    many_heads = {"llama-sdpa": "Llama", "qwen2": "Qwen2"}.get(family)
    model = build() if many_heads is None else text(many_heads, num_attention_heads=8, num_key_value_heads=4)
    x = inputs()
    plan = pat.build_plan(model, x)
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    for group in plan.groups:  # alike in every layer: what a config can say
        units = np.unique(plan.unit[group.start : group.stop])
        keep[np.isin(plan.unit, units[-max(len(units) // 4, 1) :])] = False
    before = model.config.to_dict()
    prune(bind(plan, model), keep)
    changed = {k for k, v in model.config.to_dict().items() if v != before[k]}
    heads = {"gpt2-sdpa": "n_head", "qwen2": "num_key_value_heads"}.get(family, "num_attention_heads")
    width = {"gpt2-sdpa": "n_embd", "segformer": "hidden_sizes"}.get(family, "hidden_size")
    assert {heads, width} <= changed
    if many_heads:
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 3)
        again = type(model)(model.config)  # the dimension of heads is a number of its own in these configs
        again.load_state_dict(model.state_dict())


def test_sizes_that_the_code_takes_from_one_another_shrink_together() -> None:
    """SegFormer reshapes the output of one convolution with the width of its input."""
    torch.manual_seed(0)
    plan = pat.build_plan(segformer(), image())
    assert [f.layer for f in plan.frozen] == ["decode_head.classifier"]
    group = next(g for g in plan.groups if "segformer.stages.0.blocks.0.mlp.fc2" in g.layers)
    assert "segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction" in group.layers
    sizes = np.bincount(plan.unit[group.start : group.stop])
    assert set(sizes[sizes > 0].tolist()) == {2}


@pytest.mark.parametrize("family", ["llama-sdpa", "llama-eager", "gpt2-sdpa", "bert-eager"])
def test_one_head_may_be_left_and_stays_whole(family: str) -> None:
    """Of grouped queries one key-value head with its queries. A plan lowered afresh may cut inside the last head."""
    build, inputs, _ = FAMILIES[family]
    torch.manual_seed(0)
    model, x = build().double().eval(), inputs()
    plan = pat.build_plan(model, x)
    keep = np.ones(plan.n_channels, dtype=np.bool_)
    attentions = [g for g in plan.groups if "attention.self" in g.root or ".self_attn" in g.root or ".attn" in g.root]
    for group in attentions:
        keep[group.start : group.stop] = plan.unit[group.start : group.stop] == plan.unit[group.stop - 1]
    twin = masked_copy(model, plan, keep)
    smaller = prune(bind(plan, model), keep).plan
    torch.testing.assert_close(call(model, x).logits, call(twin, x).logits, rtol=1e-9, atol=1e-9)
    left = {g.root: int(keep[g.start : g.stop].sum()) for g in attentions}
    assert len(left) == 2
    assert smaller.lone() == left
    assert not {g.root for g in smaller.groups} & set(left)
    assert smaller.params() == sum(p.numel() for p in model.parameters())
    afresh = pat.build_plan(model, x)
    assert (afresh.macs(), afresh.params()) == (smaller.macs(), smaller.params())
    assert {g.root for g in smaller.groups} == {g.root for g in afresh.groups} - set(left)
    if family.startswith("llama"):
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    else:
        assert (model.config.n_head if family == "gpt2-sdpa" else model.config.num_attention_heads) == 1
    if hasattr(model, "generate") and "bert" not in family:
        mask = torch.ones_like(x["input_ids"])
        out = model.generate(**x, attention_mask=mask, max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(out, twin.generate(**x, attention_mask=mask, max_new_tokens=3, do_sample=False))
