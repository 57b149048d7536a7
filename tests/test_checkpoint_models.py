"""What a checkpoint has to tell beside tensors: sizes of any module, channels that are left, where it came from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.checkpoint import read_structure
from pat_fast.pretrained import save_pretrained
from pat_fast.surgery.modules import SIZES
from tests.helpers import Small, small_inputs
from tests.test_checkpoint import attributes, everything, pruned, snapshot, unchanged


def same(loaded: nn.Module, saved: nn.Module) -> None:
    """Every tensor to the bit, every attribute of every module."""
    ours, theirs = everything(loaded), everything(saved)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    for one, two in zip(attributes(loaded), attributes(saved), strict=True):
        for attribute in ("config", "name_or_path"):
            one.pop(attribute, None), two.pop(attribute, None)
        assert one == two


# What the file says


def test_channels_that_are_left_are_those_of_the_dense_model(tmp_path: Path) -> None:
    """Over several prunes, a saving and a loading in between: rows of the dense weight that are still there."""
    torch.manual_seed(0)
    model = Small()
    dense = copy.deepcopy(model)
    pat.save(pruned(model, small_inputs(), prunes=2), tmp_path / "a")
    again = pruned(pat.load(tmp_path / "a", Small()), small_inputs())
    pat.save(again, tmp_path / "b")
    found = read_structure(tmp_path / "b")
    assert found.provenance["prunes"] == 3
    assert found.provenance["dense"]["params"] == sum(p.numel() for p in dense.parameters())
    assert set(found.channels) == {"stem", "inner"} or set(found.channels) == {"outer", "inner"}
    stem = next(v["kept"] for k, v in found.channels.items() if k in ("stem", "outer"))
    inner = found.channels["inner"]["kept"]
    assert found.channels["inner"]["of"] == 16
    assert 0 < len(inner) < 16
    assert torch.equal(again.stem.weight, dense.stem.weight[stem])
    assert torch.equal(again.inner.weight, dense.inner.weight[np.ix_(inner, stem)])


def test_config_metrics_and_versions(tmp_path: Path) -> None:
    pat.save(Small(), tmp_path / "a", config={"width": 12}, metrics={"accuracy": 0.5})
    found = read_structure(tmp_path / "a")
    assert (found.config, found.metrics) == ({"width": 12}, {"accuracy": 0.5})
    assert found.provenance["torch"] == torch.__version__
    assert found.provenance["prunes"] == 0
    with safe_open(tmp_path / "a", "pt") as file:
        assert json.loads(file.metadata()["pat_fast"])["format"] == 2


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}, json.loads("[" * 70 + "]" * 70)])
def test_what_is_no_json_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(pat.CheckpointError, match="expected what JSON can hold"):
        pat.save(Small(), tmp_path / "a", metrics={"x": value})
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_first_format() -> None:
    path = Path(__file__).parent / "data" / "format1.safetensors"
    model = pat.load(path, Small().eval())
    assert (model.stem.out_channels, model.inner.out_channels, model.head.in_features) == (8, 11, 8)
    expected = torch.tensor([[-0.1272, -0.1915, 0.0476], [-0.1678, -0.2271, -0.0062]])
    torch.testing.assert_close(model(small_inputs())[:2, :3].detach(), expected, atol=1e-4, rtol=0)
    assert read_structure(path).channels == {}
    pruned(model, small_inputs())


# Modules of every kind


class Heads(nn.Module):
    """Attention that reshapes by sizes which it keeps, one in a tuple, and a custom layer that only tells its size."""

    def __init__(self, dim: int = 24, heads: int = 6) -> None:
        super().__init__()
        self.heads, self.shape = heads, (heads, 4)
        self.q, self.k, self.v = (nn.Linear(dim, 4 * heads) for _ in range(3))
        self.proj = nn.Linear(4 * heads, dim)
        self.norm = nn.LayerNorm(dim)
        self.scale = Scale(dim)
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, *self.shape).transpose(1, 2)
        k, v = (layer(x).reshape(b, n, self.heads, 4).transpose(1, 2) for layer in (self.k, self.v))
        out = (q @ k.mT).softmax(-1) @ v
        x = self.norm(self.scale(x + self.proj(out.transpose(1, 2).flatten(2))))
        return self.head(x.mean(1))


class Scale(nn.Module):
    """A layer of a kind that nobody knows, with a bare parameter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = dim
        self.gamma = nn.Parameter(torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.fixture
def registered() -> Any:
    pat.register_layer(Scale, sizes={"features": ("gamma", 0)})
    yield
    del SIZES[Scale]


class Embedded(nn.Module):
    """The heads behind an embedding, so that all widths may change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.body = Heads()

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed(ids))


def ids() -> Tensor:
    return torch.arange(10).reshape(2, 5)


@pytest.mark.usefixtures("registered")
def test_sizes_that_only_the_plan_knows(tmp_path: Path) -> None:
    saved = pruned(Embedded(), ids(), prunes=3)
    assert saved.body.heads < 6
    assert saved.body.shape == (saved.body.heads, 4)
    assert saved.body.scale.features == saved.embed.embedding_dim < 24
    pat.save(copy.deepcopy(saved), tmp_path / "a")  # what a copy says is what the model says
    loaded = pat.load(tmp_path / "a", Embedded().eval())
    same(loaded, saved)
    assert torch.equal(loaded(ids()), saved(ids()))
    assert read_structure(tmp_path / "a").modules["body"] == {"heads": saved.body.heads, "shape": [saved.body.heads, 4]}
    pat.save(loaded, tmp_path / "b")  # a loaded model tells as much
    assert read_structure(tmp_path / "b").modules == read_structure(tmp_path / "a").modules


@pytest.mark.usefixtures("registered")
def test_a_part_and_a_whole_of_what_was_pruned(tmp_path: Path) -> None:
    saved = pruned(Embedded(), ids())
    pat.save(saved.body, tmp_path / "part")
    same(pat.load(tmp_path / "part", Heads().eval()), saved.body)
    pat.save(nn.Sequential(saved, nn.ReLU()), tmp_path / "whole")
    same(pat.load(tmp_path / "whole", nn.Sequential(Embedded(), nn.ReLU()).eval())[0], saved)
    channels = read_structure(tmp_path / "whole").channels
    assert channels
    assert all(name.startswith("0.") for name in channels)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("heads", 7, "body.heads = 7 cannot be a pruned 6"),
        ("heads", 0, "body.heads = 0"),
        ("shape", [6], r"body.shape = \[6\]"),
        ("shape", [7, 4], r"body.shape = \[7, 4\]"),
        ("shape", ["6", 4], "body.shape"),
        ("no_such", 1, "it has no 'no_such'"),
        ("_parameters", 1, "body._parameters = 1"),
        ("head.in_features", 3, "it has no 'head.in_features'"),
    ],
)
def test_sizes_that_were_tampered_with(tmp_path: Path, attribute: str, value: Any, message: str) -> None:
    path = tmp_path / "a"
    pat.save(pruned(Embedded(), ids()), path)
    change(path, lambda structure: structure["modules"]["body"].update({attribute: value}))
    model = Embedded()
    before = snapshot(model)
    with pytest.raises(pat.CheckpointError, match=message):
        pat.load(path, model)
    assert unchanged(model, before)


def change(path: Path, how: Any) -> None:
    """Change the structure in a file's header."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        structure = json.loads(file.metadata()["pat_fast"])
    how(structure)
    save_file(tensors, path, metadata={"pat_fast": json.dumps(structure)})


def test_a_weight_that_a_parametrization_makes(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        first = nn.utils.parametrizations.weight_norm(nn.Linear(6, 12))
        return nn.Sequential(first, nn.ReLU(), nn.Linear(12, 3))

    x = torch.randn(2, 6)
    saved = pruned(build(), x)
    assert saved[0].out_features < 12
    pat.save(saved, tmp_path / "a")
    loaded = pat.load(tmp_path / "a", build().eval())
    same(loaded, saved)
    assert torch.equal(loaded(x), saved(x))
    change(tmp_path / "a", lambda s: s["modules"]["0"].update(out_features=1))
    with pytest.raises(pat.CheckpointError, match=r"0\.bias has shape"):
        pat.load(tmp_path / "a", build())


# Devices and types


def test_a_dense_model_that_was_never_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = pruned(Embedded(), ids())
    saved.body.head.weight = nn.Parameter(saved.body.head.weight.detach(), requires_grad=False)
    pat.save(saved, tmp_path / "a")
    with torch.device("meta"):
        model = Embedded().eval()
        model.body.head.weight.requires_grad_(False)
    loaded = pat.load(tmp_path / "a", model)
    same(loaded, saved)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert not loaded.body.head.weight.requires_grad
    assert torch.equal(loaded(ids()), saved(ids()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(ids)).relu()) + self.offset


def test_tied_weights_on_the_meta_device(tmp_path: Path) -> None:
    saved = pruned(Tied(), ids())
    pat.save(saved, tmp_path / "a")
    with torch.device("meta"):
        model = Tied().eval()
    loaded = pat.load(tmp_path / "a", model)
    assert loaded.out.weight is loaded.embed.weight
    same(loaded, saved)
    assert torch.equal(loaded(ids()), saved(ids()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_values_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = pruned(Small(), small_inputs()).to(dtype)
    pat.save(saved, tmp_path / "a")
    loaded = pat.load(tmp_path / "a", Small().half(), device="cpu")
    for name, value in everything(saved).items():
        assert everything(loaded)[name].dtype == value.dtype
        assert everything(loaded)[name].view(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


@pytest.mark.gpu
def test_from_one_device_to_another(tmp_path: Path) -> None:
    saved = pruned(Small(), small_inputs()).cuda()
    pat.save(saved, tmp_path / "a")
    same(pat.load(tmp_path / "a", Small().eval()), copy.deepcopy(saved).cpu())
    loaded = pat.load(tmp_path / "a", Small().eval(), device="cuda")
    same(loaded, saved)
    assert torch.equal(loaded(small_inputs().cuda()), saved(small_inputs().cuda()))
    same(pat.load(tmp_path / "a", Small().eval().cuda()), saved)


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"anything": 1}


def test_what_only_pickle_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pat.CheckpointError, match=r"0 \(Extra\) keeps extra state"):
        pat.save(nn.Sequential(Extra(2, 2)), tmp_path / "a")
    with pytest.raises(pat.CheckpointError, match=r"0\.weight: .* not initialised yet"):
        pat.save(nn.Sequential(nn.LazyLinear(2)), tmp_path / "a")
    with pytest.raises(pat.CheckpointError, match=r"weight: .* on the meta device"):
        pat.save(nn.Linear(2, 2, device="meta"), tmp_path / "a")
    model = nn.Module()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(pat.CheckpointError, match=r"mask: .* sparse"):
        pat.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Transformers


def bert(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**{**small, "vocab_size": 50, "max_position_embeddings": 20, **fields})
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def uneven(model: Any, share: dict[int, int]) -> Any:
    """Prune the feed-forward width of encoder layer ``i`` down to ``share[i]``."""
    from pat_fast.plan import bind, build_plan
    from pat_fast.surgery import prune

    binding = bind(build_plan(model, torch.arange(10).reshape(2, 5)), model)
    keep = np.ones(binding.plan.n_channels, dtype=bool)
    for i, left in share.items():
        root = next(g for g in binding.plan.groups if f"layer.{i}.intermediate.dense" in g.root)
        keep[root.start + left : root.stop] = False
    prune(binding, keep)
    return model


def test_a_config_that_says_the_pruned_widths(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = uneven(bert(), {0: 20, 1: 20})
    assert model.config.intermediate_size == 20
    pat.save(model, tmp_path / "a")
    loaded = pat.load(tmp_path / "a", bert())
    same(loaded, model)
    assert loaded.config.intermediate_size == 20
    save_pretrained(model, tmp_path / "folder")
    again = AutoModel.from_pretrained(tmp_path / "folder", add_pooling_layer=False).eval()
    same(again, model)
    assert torch.equal(again(ids()).last_hidden_state, model(ids()).last_hidden_state)


def test_a_config_that_cannot_is_told(tmp_path: Path) -> None:
    model = uneven(bert(), {0: 20, 1: 28})
    with pytest.raises(pat.CheckpointError, match=r"encoder.layer.0.intermediate.dense.weight .*pat_fast.save"):
        save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    pat.save(model, tmp_path / "a")
    loaded = pat.load(tmp_path / "a", bert())
    same(loaded, model)
    assert torch.equal(loaded(ids()).last_hidden_state, model(ids()).last_hidden_state)


@pytest.mark.parametrize("kind", ["number", "table"])
def test_what_a_config_would_make_otherwise_is_told(kind: str, tmp_path: Path) -> None:
    """Of the width at first, an embedding's scale or a table of positions: no shape shows it, and no file holds it."""
    import transformers

    small = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 16}
    x: Any = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    if kind == "number":
        more = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.Gemma2Config(**small, **more, head_dim=8, intermediate_size=32)
        model: Any = transformers.Gemma2ForCausalLM(config)
        message = r"model.embed_tokens.\w*embed_scale is 5.6569, the config makes it 4: .*use pat_fast.save"
    else:
        more = {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in
                (("layers", 1), ("attention_heads", 4), ("ffn_dim", 32))}  # fmt: skip
        model = transformers.MarianMTModel(transformers.MarianConfig(**small, d_model=32, **more))
        x["decoder_input_ids"] = x["input_ids"]
        message = r"embed_positions.weight \(16, 16\) holds other values than the config .*use pat_fast.save"
    pruner = pat.Pruner(model.eval(), 0.5, end_epoch=1, example_inputs=x, ranking="local")
    pruner.step()
    with pytest.raises(pat.CheckpointError, match=message):
        save_pretrained(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_is_no_model_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(pat.CheckpointError, match=r"expected a model of Transformers, got Small; use pat_fast.save"):
        save_pretrained(Small(), tmp_path)
