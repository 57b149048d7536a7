from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from pat_fast.config import AugmentConfig, DataConfig
from pat_fast.data import Splits, augment, batches, epoch_generator, load_splits, split_by_class
from pat_fast.errors import ConfigError

Image = pytest.importorskip("PIL.Image")


def two_tensors(count: int = 10) -> tuple[TensorDataset, TensorDataset]:
    data = TensorDataset(torch.randn(count, 1, 4, 4), torch.arange(count) % 2)
    return data, data


def one_tensor() -> torch.Tensor:
    return torch.zeros(3)


def failing(**_: Any) -> None:
    raise ValueError("no luck")


def save_image(path: Path, width: int, height: int, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        for i in range(6):
            save_image(tmp_path / name / f"{i}.png", 20 + 5 * i, 30, colour)
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    return tmp_path


def test_digits_are_scaled_up_normalised_and_split_by_class() -> None:
    config = DataConfig(val_fraction=0.15)
    splits = load_splits(config)
    parts = [splits.train, splits.val, splits.test]
    assert sum(len(part) for part in parts) == 1797
    images = torch.stack([splits.train[i][0] for i in range(len(splits.train))])
    assert images.shape[1:] == (1, 16, 16)
    assert abs(images.mean().item()) < 1e-4
    assert abs(images.std().item() - 1) < 1e-3
    labels = torch.stack([splits.test[i][1] for i in range(len(splits.test))])
    assert labels.bincount().min() >= 40
    again = load_splits(config)
    assert torch.equal(again.test[5][0], splits.test[5][0])
    other = load_splits(DataConfig(val_fraction=0.15, split_seed=1))
    assert not torch.equal(other.test[5][0], splits.test[5][0])


def test_splits_are_disjoint_and_complete() -> None:
    labels = [0] * 20 + [1] * 40
    train, val, test = split_by_class(labels, DataConfig(test_fraction=0.25, val_fraction=0.1))
    assert sorted(train + val + test) == list(range(60))
    assert (len(test), len(val)) == (15, 6)
    with pytest.raises(ConfigError, match="got 1 of class 1"):
        split_by_class([0, 0, 0, 1], DataConfig())


def test_batches_repeat_for_a_seed_and_differ_between_epochs() -> None:
    data, _ = two_tensors(21)
    config = DataConfig(batch_size=4)

    def order(seed: int, epoch: int) -> list[float]:
        loader = batches(data, config, shuffle_seed=seed)
        loader.sampler.epoch = epoch
        return torch.cat([images for images, _ in loader]).flatten().tolist()

    assert len(order(0, 0)) == 20 * 16  # the last image alone would be a batch of one
    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)
    assert sum(len(labels) for _, labels in batches(data, config)) == 21


def test_augmentation_moves_whole_images_and_repeats_for_a_seed() -> None:
    images = torch.arange(2 * 3 * 5 * 6, dtype=torch.float32).view(2, 3, 5, 6)
    config = AugmentConfig(shift=2, flip=True)
    moved = augment(images, config, epoch_generator(0, 0))
    assert moved.shape == images.shape
    assert moved.is_contiguous()
    assert torch.equal(moved, augment(images, config, epoch_generator(0, 0)))
    assert augment(images, AugmentConfig(), epoch_generator(0, 0)) is images
    shifted = augment(images, AugmentConfig(shift=1), epoch_generator(0, 3))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate")
    for image, source in zip(shifted, padded, strict=True):
        windows = [source[:, i : i + 5, j : j + 6] for i in range(3) for j in range(3)]
        assert any(torch.equal(image, window) for window in windows)
    flipped = augment(images, AugmentConfig(flip=True), epoch_generator(0, 1))
    for image, source in zip(flipped, images, strict=True):
        assert torch.equal(image, source) or torch.equal(image, source.flip(2))


def test_an_image_folder_is_split_resized_and_normalised(folder: Path) -> None:
    plain = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    splits = load_splits(DataConfig(name="image_folder", root=str(folder), size=8, **plain))
    assert splits.classes == ("blue", "red")
    assert (len(splits.train), len(splits.test), splits.val) == (8, 4, None)
    for i in range(8):
        image, label = splits.train[i]
        assert image.shape == (3, 8, 8)
        assert image.dtype == torch.float32
        assert image.mean((1, 2)).tolist() == ([0, 0, 1] if label == 0 else [1, 0, 0])
    images, labels = next(iter(batches(splits.train, DataConfig(batch_size=4), shuffle_seed=0)))
    assert images.shape == (4, 3, 8, 8)
    assert labels.dtype == torch.int64


def test_the_middle_of_an_image_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24), dtype=np.uint8)
    pixels[:, 8:16] = 255
    for name in ("a", "b"):
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    config = DataConfig(name="image_folder", root=str(tmp_path), size=8, channels=1, test_fraction=0.5)
    splits = load_splits(config)
    assert torch.equal(splits.train[0][0], torch.ones(1, 8, 8))


def test_folders_that_are_split_already(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "split"
    for part in ("train", "val", "test"):
        save_image(root / part / "a" / "0.png", 9, 9, (0, 0, 0))
        save_image(root / part / "b" / "0.png", 9, 9, (0, 0, 0))
    splits = load_splits(DataConfig(name="image_folder", root=str(root), size=8))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 2, 2]
    save_image(root / "test" / "c" / "0.png", 9, 9, (0, 0, 0))
    with pytest.raises(ConfigError, match="expected the classes a, b, got also c"):
        load_splits(DataConfig(name="image_folder", root=str(root), size=8))


def test_bad_image_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(root: Path) -> Splits:
        return load_splits(DataConfig(name="image_folder", root=str(root), size=8))

    with pytest.raises(ConfigError, match=r"data\.root: expected a folder with one sub-folder"):
        load(folder / "nowhere")
    with pytest.raises(ConfigError, match=r"two or more sub-folders .* got 0"):
        load(folder / "red")
    (folder / "red" / "0.png").write_bytes(b"not a PNG")
    splits = load(folder)
    with pytest.raises(ConfigError, match=r"0\.png: expected an image that Pillow can read"):
        [part[i] for part in (splits.train, splits.test) for i in range(len(part))]
    (folder / "green").mkdir()
    with pytest.raises(ConfigError, match=r"green: expected images \(.*got none"):
        load(folder)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match="pip install pillow"):
        load(folder)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        load_splits(DataConfig())


def test_data_from_a_factory() -> None:
    splits = load_splits(DataConfig(name=f"{__name__}:two_tensors", args={"count": 6}))
    assert len(splits.train) == 6
    assert splits.val is None


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("one_tensor", {}, r"return \(train, test\).*got Tensor"),
        ("failing", {}, "expected .*failing.* to succeed, got ValueError: no luck"),
        ("two_tensors", {"cuont": 1}, "got TypeError"),
        ("two_tensor", {}, "did you mean 'two_tensors'"),
        ("two_tensors", {"count": 0}, "non-empty"),
    ],
)
def test_bad_data_factories(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_splits(DataConfig(name=f"{__name__}:{name}", args=args))
