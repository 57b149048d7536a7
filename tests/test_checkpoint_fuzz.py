"""Hostile files: one that is loaded makes a model that works, any other is refused and nothing is changed."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

import pat_fast as pat
from tests.helpers import Small, small_inputs
from tests.test_checkpoint import pruned, snapshot, unchanged

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = st.sampled_from(["head", "stem", "..", "/etc/passwd", "head.weight", "__class__", "training", ""])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "model"
    pat.save(pruned(Small(), small_inputs()), path)
    return path.read_bytes()


def meets(content: bytes, path: Path) -> None:
    """A file is loaded into a model that works, or refused and the model is as it was."""
    path.write_bytes(content)
    model = Small()
    before = snapshot(model)
    try:
        pat.load(path, model)
    except pat.PatError:
        assert unchanged(model, before)
    else:
        model.eval()(small_inputs().to(model.stem.weight.dtype))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_structure(data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    structure = json.loads(header["__metadata__"]["pat_fast"])
    where = data.draw(st.sampled_from([None, *structure]))
    value = data.draw(JSON)
    if where is None:
        structure = value
    elif isinstance(structure[where], dict) and data.draw(st.booleans()):
        inner = structure[where].setdefault(data.draw(PATHS), {})
        if isinstance(inner, dict) and data.draw(st.booleans()):
            inner[data.draw(PATHS | st.sampled_from(["in_features", "groups", "kernel_size"]))] = value
        else:
            structure[where][data.draw(PATHS)] = value
    else:
        structure[where] = value
    header["__metadata__"]["pat_fast"] = json.dumps(structure)
    text = json.dumps(header).encode()
    meets(struct.pack("<Q", len(text)) + text + good[8 + length :], tmp_path_factory.getbasetemp() / "structure")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes(data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    start = data.draw(st.integers(0, len(good)))
    gone = data.draw(st.integers(0, 64))
    content = good[:start] + data.draw(st.binary(max_size=64)) + good[start + gone :]
    meets(content, tmp_path_factory.getbasetemp() / "bytes")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tensor_entry(data: st.DataObject, good: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Types, shapes and offsets that were made up; none may cost memory."""
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    entry = header[data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))]
    kinds = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "U64", "X"]
    sizes = st.integers(-1, 20) | st.sampled_from([2**31, 2**62, 2**64])
    key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    values = {"dtype": st.sampled_from(kinds), "shape": st.lists(sizes, max_size=6), "data_offsets": st.lists(sizes)}
    entry[key] = data.draw(values[key])
    text = json.dumps(header).encode()
    meets(struct.pack("<Q", len(text)) + text + good[8 + length :], tmp_path_factory.getbasetemp() / "entry")
