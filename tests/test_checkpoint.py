"""A saved model comes back to the bit; a damaged or foreign file is refused and changes nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import pat_fast as pat
from pat_fast.plan import bind, build_plan
from pat_fast.plan.running import call
from pat_fast.surgery import prune
from tests.helpers import Case, Small, random_keep, small_inputs, zoo_names


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small for two


def everything(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those that a state dict leaves out too."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    """What modules keep beside tensors and submodules."""
    return [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    tensors = everything(model)
    return (
        {name: id(t) for name, t in tensors.items()},
        {name: (t.shape, t.stride(), t.dtype, t.requires_grad, t.data_ptr()) for name, t in tensors.items()},
        {name: t.detach().clone().view(-1) for name, t in tensors.items()},
        copy.deepcopy(attributes(model)),
    )


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> bool:
    ids, layouts, values, attrs = snapshot(model)
    same = all(torch.equal(values[k], before[2][k]) for k in values)
    return (ids, layouts) == before[:2] and same and attrs == before[3]


def pruned(model: nn.Module, inputs: Any, prunes: int = 1) -> nn.Module:
    binding = bind(build_plan(model, inputs), model)
    for seed in range(prunes):
        binding = prune(binding, random_keep(binding.plan, seed))
    return model.eval()


# There and back

# Depthwise convolutions in float64 take seconds.
SLOW_IN_DOUBLE = ("mobilenet_v2", "shuffle_plain", "shufflenet_v2", "convnext_tiny", "depth_multiplier")


@pytest.mark.parametrize("name", zoo_names())
def test_the_zoo_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    case = Case.build(name, torch.float32 if name in SLOW_IN_DOUBLE else torch.float64)
    fresh = copy.deepcopy(case.model)
    with torch.no_grad():
        for t in everything(fresh).values():
            t.zero_()
    parameters = list(fresh.parameters())
    saved = pruned(case.model, case.inputs, prunes=2)
    pat.save(saved, tmp_path / "model.safetensors")
    assert pat.load(tmp_path / "model.safetensors", fresh) is fresh
    assert all(a is b for a, b in zip(fresh.parameters(), parameters, strict=True))
    for name, value in everything(saved).items():
        loaded = everything(fresh)[name]
        assert (loaded.dtype, loaded.shape) == (value.dtype, value.shape), name
        assert torch.equal(loaded, value), name
        assert loaded.data_ptr() % 64 == 0, name
    assert attributes(fresh.eval()) == attributes(saved)
    assert torch.equal(call(fresh, case.inputs), call(saved, case.inputs))
    # It is a model like any other: it trains, and can be pruned on.
    call(fresh.train(), case.inputs).sum().backward()
    pruned(fresh, case.inputs)


def test_the_file_says_the_dtype(tmp_path: Path) -> None:
    saved = pruned(Small(), small_inputs()).bfloat16()
    pat.save(saved, tmp_path / "half.safetensors")
    model = pat.load(tmp_path / "half.safetensors", Small().eval())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model(small_inputs().bfloat16()), saved(small_inputs().bfloat16()))


class Unusual(nn.Module):
    """Tied weights, a shared module, a buffer that no state dict holds, a parameter of no layer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.randn(1), persistent=False)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.again(self.mix(self.embed(ids)).relu() * self.scale + self.offset).relu())


def test_tied_weights_shared_modules_and_buffers_of_no_state_dict(tmp_path: Path) -> None:
    ids = torch.arange(6).reshape(2, 3)
    saved = pruned(Unusual(), ids)
    assert saved.embed.embedding_dim < 8
    pat.save(saved, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "embed.weight" in file.keys()  # noqa: SIM118 (not a dict)
        assert "out.weight" not in file.keys()  # noqa: SIM118
    model = pat.load(tmp_path / "model.safetensors", Unusual().eval())
    assert model.out.weight is model.embed.weight
    assert model.again is model.mix
    assert torch.equal(model.offset, saved.offset)
    assert not model.frozen.requires_grad
    assert torch.equal(model(ids), saved(ids))


def test_memory_format_does_not_matter(tmp_path: Path) -> None:
    saved = pruned(Small().to(memory_format=torch.channels_last), small_inputs())
    pat.save(saved, tmp_path / "model.safetensors")
    model = pat.load(tmp_path / "model.safetensors", Small().eval())
    torch.testing.assert_close(model(small_inputs()), saved(small_inputs()))


def test_folders_are_made_and_files_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b" / "model.safetensors"
    pat.save(Small(), path)
    first = path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]

    def fails(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_text("half a file")
        raise OSError("disk full")

    monkeypatch.setattr("pat_fast.checkpoint.save_file", fails)
    with pytest.raises(pat.CheckpointError, match=r"cannot write .*model.safetensors: disk full"):
        pat.save(Small(), path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pat.CheckpointError, match=r"cannot write .*file/model.safetensors"):
        pat.save(Small(), tmp_path / "file" / "model.safetensors")


@pytest.mark.parametrize("argument", ["config", "metrics"])
def test_what_is_no_dict_is_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(pat.CheckpointError, match=rf"{argument}: expected a dict of what JSON can hold, got str"):
        pat.save(Small(), tmp_path / "model.safetensors", **{argument: "wide"})
    assert not list(tmp_path.iterdir())


# Damaged and foreign files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    pat.save(pruned(Small(), small_inputs()), path)
    return path.read_bytes()


def refused(content: bytes, path: Path, message: str = "cannot read", model: nn.Module | None = None) -> None:
    """Loading raises CheckpointError and leaves the model alone."""
    path.write_bytes(content)
    model = Small() if model is None else model
    before = snapshot(model)
    with pytest.raises(pat.CheckpointError, match=message):
        pat.load(path, model)
    assert unchanged(model, before)


def test_truncated_files(good: bytes, tmp_path: Path) -> None:
    lengths = {0, 1, 7, 8, 9, len(good) - 1, *range(10, len(good), len(good) // 40)}
    for length in sorted(lengths):
        refused(good[:length], tmp_path / "cut", "cannot read .*cut")
    refused(good + b"\0", tmp_path / "longer", "cannot read")


def test_flipped_bytes(good: bytes, tmp_path: Path) -> None:
    """Damage to values cannot be seen; everything else is refused, and nothing but CheckpointError is raised."""
    chance = random.Random(0)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    path, outcomes = tmp_path / "flipped", [0, 0]
    model = Small()
    fresh = snapshot(model)
    for _ in range(400):
        content = bytearray(good)
        for _ in range(chance.choice([1, 1, 2, 8])):
            content[chance.randrange(header)] = chance.randrange(256)
        path.write_bytes(bytes(content))
        try:
            pat.load(path, model)
        except pat.CheckpointError:
            outcomes[0] += 1
            assert unchanged(model, fresh)
        else:  # a digit of something that is not checked: the shapes must fit all the same
            outcomes[1] += 1
            model.eval()(small_inputs().to(model.stem.weight.dtype))
            model = Small()
            fresh = snapshot(model)
    assert outcomes[0] > 350, outcomes


def rewritten(good: bytes, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], path: Path) -> bytes:
    """The good file with its tensors and its structure changed by ``change(tensors, structure)``."""
    path.write_bytes(good)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        structure = json.loads(file.metadata()["pat_fast"])
    result = change(tensors, structure)
    text = result if isinstance(result, str) else json.dumps(structure)
    save_file(tensors, path, metadata={"pat_fast": text})
    return path.read_bytes()


def put(name: str, attribute: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda t, s: s["modules"][name].__setitem__(attribute, value)


CHANGES: list[tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = [
    (lambda t, s: "not json", "cannot read"),
    (lambda t, s: "[" * 50_000, "cannot read"),
    (lambda t, s: json.dumps(s | {"metrics": {"a": float("nan")}}), "cannot read .*: NaN is no JSON"),
    (lambda t, s: json.dumps(s | {"config": {"a": -float("inf")}}), "cannot read .*: -Infinity is no JSON"),
    (lambda t, s: json.dumps(s)[:-1] + ', "modules": {}}', "cannot read .*: a key stands twice"),
    (lambda t, s: s["config"].update(a=json.loads("[" * 70 + "]" * 70)), "nested more than 64 levels deep"),
    (lambda t, s: s["provenance"].update(prunes=-1), "the provenance does not count"),
    (lambda t, s: s["provenance"].update(dense={"channels": 10**400}), "the provenance does not count"),
    (lambda t, s: "[1, 2]", "expected format 1 or 2, got 'list'"),
    (lambda t, s: s.pop("format"), "expected format 1 or 2, got None"),
    (lambda t, s: s.update(format=3), "expected format 1 or 2, got 3; a newer pat_fast may read it"),
    (lambda t, s: s.pop("modules"), "lacks 'modules'"),
    (lambda t, s: s.update(aliases=[]), "lacks 'aliases'"),
    (lambda t, s: t.pop("head.bias"), "lacks 'head.bias'"),
    (lambda t, s: t.update(extra=torch.ones(1)), "has 'extra', which the model does not"),
    (lambda t, s: s["aliases"].update({"other": "stem.weight"}), "has 'other', which the model does not"),
    (lambda t, s: s["aliases"].update({"head.bias": "stem.weight"}), "are one tensor in the file, but not in the"),
    (lambda t, s: s["aliases"].update({"head.bias": ["stem.weight"]}), "are one tensor in the file"),
    (lambda t, s: s["aliases"].update({"head.bias": None}), "are one tensor in the file"),
    (lambda t, s: t.update({"head.bias": torch.ones(9)}), r"head.bias has shape \(9,\), which cannot be a"),
    (lambda t, s: t.update({"head.bias": torch.ones(0)}), r"head.bias has shape \(0,\)"),
    (lambda t, s: t.update({"head.bias": torch.ones(5, 1)}), r"head.bias has shape \(5, 1\)"),
    (lambda t, s: t.update({"head.bias": torch.ones(5).int()}), r"head.bias is of torch.int32, which cannot"),
    (lambda t, s: t.update({"head.bias": torch.ones(5, dtype=torch.complex64)}), r"torch.complex64, which cannot"),
    (lambda t, s: t.update({"head.bias": torch.ones(4)}), r"head.bias has shape \(4,\), its layer's sizes"),
    (lambda t, s: t.update({"stem.weight": t["stem.weight"][:, :, :1].contiguous()}), "stem.weight has shape"),
    (lambda t, s: s["modules"].update(nowhere={"in_features": 1}), "the sizes of 'nowhere' do not fit"),
    (lambda t, s: s["modules"].update(head=3), "the sizes of 'head' do not fit"),
    (lambda t, s: s["modules"]["head"].pop("in_features"), "the sizes of 'head' do not fit"),
    (lambda t, s: s["modules"]["head"].update(training=1), "head.training = 1 cannot be a pruned True"),
    (lambda t, s: s["modules"]["head"].update({"weight.data": 1}), "it has no 'weight.data'"),
    (lambda t, s: s["modules"]["head"].update({"__class__": 1}), "it has no '__class__'"),
    (lambda t, s: s["modules"]["head"].update({"forward.__code__.co_argcount": 1}), "it has no 'forward"),
    (lambda t, s: s["channels"].update(stem=3), "the kept channels of 'stem' are no channels"),
    (lambda t, s: s["channels"]["outer"].update(kept=[0, 12]), "the kept channels of 'outer' are no channels"),
    (lambda t, s: s["channels"]["outer"].update(kept=[1, 0]), "the kept channels of 'outer' are no channels"),
    (lambda t, s: s["channels"]["outer"].update(of="12"), "the kept channels of 'outer' are no channels"),
    (lambda t, s: s.update(metrics=[]), "lacks 'metrics'"),
    (lambda t, s: s["modules"].pop("stem"), "the sizes of 'stem' do not fit"),
    (put("head", "in_features", 0), "head.in_features = 0 cannot be a pruned 12"),
    (put("head", "in_features", -1), "head.in_features = -1"),
    (put("head", "in_features", 13), "head.in_features = 13"),
    (put("head", "in_features", 2**80), "head.in_features = 12"),
    (put("head", "in_features", 1), "head.weight has shape"),
    (put("head", "in_features", "8"), "head.in_features = '8'"),
    (put("head", "in_features", True), "head.in_features = True"),
    (put("head", "in_features", 8.0), "head.in_features = 8.0"),
    (put("head", "in_features", [8]), r"head.in_features = \[8\]"),
    (put("head", "in_features", None), "head.in_features = None"),
    (put("stem", "groups", 0), "stem.groups = 0"),
    (put("norm", "num_features", 1), r"norm.\w+ has shape"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_files_that_were_tampered_with(
    good: bytes, tmp_path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], Any], message: str
) -> None:
    refused(rewritten(good, change, tmp_path / "changed"), tmp_path / "changed", message)


class Normed(nn.Module):
    """Sizes that are tuples, and a grouped convolution whose sizes need not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.grouped(self.norm(self.first(x)).unsqueeze(2)).squeeze(2))


@pytest.mark.parametrize(
    ("name", "attribute", "value", "message"),
    [
        ("norm", "normalized_shape", 6, "norm.normalized_shape = 6 cannot be a pruned"),
        ("norm", "normalized_shape", [6, 1], r"norm.normalized_shape = \[6, 1\]"),
        ("norm", "normalized_shape", [[6]], r"norm.normalized_shape = \[\[6\]\]"),
        ("norm", "normalized_shape", [5], r"norm.\w+ has shape"),
        ("grouped", "in_channels", 5, "grouped.weight has shape"),
        ("grouped", "groups", 1, "grouped.weight has shape"),
    ],
)
def test_sizes_that_do_not_belong_together(
    tmp_path: Path, name: str, attribute: str, value: Any, message: str
) -> None:
    path = tmp_path / "normed"
    pat.save(Normed(), path)
    content = rewritten(path.read_bytes(), put(name, attribute, value), path)
    refused(content, path, message, Normed())


def test_sizes_that_agree_only_after_division(tmp_path: Path) -> None:
    """Five inputs in two groups are not two in each, although 5 // 2 is 2."""

    def change(tensors: dict[str, Tensor], structure: dict[str, Any]) -> None:
        tensors["grouped.weight"] = tensors["grouped.weight"][:, :2].contiguous()
        structure["modules"]["grouped"]["in_channels"] = 5

    path = tmp_path / "normed"
    pat.save(Normed(), path)
    refused(rewritten(path.read_bytes(), change, path), path, r"grouped.weight has shape \(6, 2, 1\)", Normed())


def test_a_parameter_of_no_layer_cannot_vanish(tmp_path: Path) -> None:
    path = tmp_path / "unusual"
    pat.save(Unusual(), path)
    content = rewritten(path.read_bytes(), lambda t, s: t.update(frozen=torch.ones(0)), path)
    refused(content, path, r"frozen has shape \(0,\)", Unusual())


def headed(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    structure = {"pat_fast": json.dumps({"format": 1, "modules": {}, "aliases": {}})}
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return headed({"__metadata__": structure, "a": entry}, bytes(min(abs(offsets[1] - offsets[0]), 64)))


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**9) + b"{}",
        headed(b"[]"),
        headed(b"\xff\xfe{}"),
        headed(b"{" * 10_000),
        headed({"__metadata__": {"pat_fast": 3}}),
        one_tensor("F32", [2**62, 4], [0, 4]),
        one_tensor("F32", [2**40], [0, 2**42]),
        one_tensor("F32", [-1], [0, 4]),
        one_tensor("F32", [1], [4, 0]),
        one_tensor("X9", [1], [0, 4]),
    ],
    ids=range(11),
)
def test_headers_made_up(content: bytes, tmp_path: Path) -> None:
    refused(content, tmp_path / "made_up")


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"other": "1"}}])
def test_files_that_others_wrote(header: dict[str, Any], tmp_path: Path) -> None:
    refused(headed(header), tmp_path / "other", "is a safetensors file, but not one that pat_fast.save wrote")


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        *(("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E8M0", 8), ("F8_E4M3", 8), ("F8_E5M2", 8)),
        *(("C64", 64), ("U16", 16), ("U32", 32), ("U64", 64), ("I8", 8), ("BOOL", 8)),
    ],
)
def test_dtypes_of_other_worlds(dtype: str, bits: int, tmp_path: Path) -> None:
    """Whatever a file may name: it is loaded as what it is, or refused."""
    model = nn.Module()
    model.register_buffer("a", torch.zeros(8))
    before = snapshot(model)
    (tmp_path / "file").write_bytes(one_tensor(dtype, [8], [0, bits]))  # eight elements
    try:
        pat.load(tmp_path / "file", model)
    except pat.CheckpointError:
        assert unchanged(model, before)
    else:
        assert model.a.dtype.is_floating_point


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pat.CheckpointError, match="it is no file"):
        pat.load(tmp_path / "pipe", Small())


def test_missing_files_and_folders(tmp_path: Path) -> None:
    model = Small()
    for path in (tmp_path / "missing", tmp_path, "a\0b"):
        with pytest.raises(pat.CheckpointError, match="cannot read"):
            pat.load(path, model)
    for attempt in (pat.save, lambda model, path: pat.load(path, model)):
        with pytest.raises(pat.ConfigError, match=r"expected a torch\.nn\.Module, got type"):
            attempt(Small, tmp_path / "file")


@pytest.mark.parametrize("name", ["resnet18", "vit_s16", "conv1d"])
def test_another_model(good: bytes, name: str, tmp_path: Path) -> None:
    refused(good, tmp_path / "small", "belongs to another definition", Case.build(name).model)


def test_a_narrower_definition(good: bytes, tmp_path: Path) -> None:
    refused(good, tmp_path / "small", r"cannot be a pruned", Small(width=4))


def test_weights_tied_in_the_model_but_not_in_the_file(tmp_path: Path) -> None:
    loose = Unusual()
    loose.out.weight = nn.Parameter(torch.randn(11, 8))
    pat.save(loose, tmp_path / "loose")
    content = (tmp_path / "loose").read_bytes()
    refused(content, tmp_path / "loose", "'embed.weight' and 'out.weight' are one tensor in the model", Unusual())
    pat.save(Unusual(), tmp_path / "tied")
    refused((tmp_path / "tied").read_bytes(), tmp_path / "tied", "are one tensor in the file, but not", loose)


@pytest.mark.parametrize("device", ["foo", "cuda:99", 1.5])
def test_a_device_that_is_not_there_is_refused(device: Any, tmp_path: Path) -> None:
    pat.save(Small(), tmp_path / "model")
    with pytest.raises(pat.ConfigError, match=r"device: expected one that this machine has, got"):
        pat.load(tmp_path / "model", Small(), device=device)


def test_a_device_that_fails_changes_nothing(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors are on their device before the first is put into the model."""
    (tmp_path / "file").write_bytes(good)
    model = Small()
    before = snapshot(model)
    moves = []
    real = Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        moves.append(tensor)
        if len(moves) == 4:
            raise torch.OutOfMemoryError("no")
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(torch.OutOfMemoryError):
        pat.load(tmp_path / "file", model)
    monkeypatch.undo()
    assert unchanged(model, before)
