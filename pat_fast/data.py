"""Data of the training job: digits, image folders and the user's own, split and batched reproducibly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from .config import AugmentConfig, DataConfig
from .errors import ConfigError
from .factory import call_factory

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tiff", ".webp", ".ppm", ".pgm"})
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Splits:
    """Map-style datasets of ``(image [C, H, W] float32, label int)``; ``val`` may be None."""

    train: Dataset[Any]
    test: Dataset[Any]
    val: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()


def load_splits(config: DataConfig) -> Splits:
    """Load the data that ``config`` names.

    Raises:
        ConfigError: the data is missing, empty, too small to split, or needs a package that is not there.
    """
    if config.name == "digits":
        return _digits(config)
    if config.name == "image_folder":
        return _image_folder(config)
    return _from_factory(config)


def batches(
    dataset: Dataset[Any], config: DataConfig, *, shuffle_seed: int | None = None, pin: bool = False
) -> DataLoader[Any]:
    """Batches of ``(images [B, C, H, W], labels [B])``.

    With ``shuffle_seed`` the order is that of :class:`EpochSampler`, and a last batch that is not full is
    dropped (a batch norm cannot train on one image); without, every item comes once, in order.
    """
    sampler = None if shuffle_seed is None else EpochSampler(len(dataset), shuffle_seed)  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=config.batch_size,
        sampler=sampler,
        drop_last=sampler is not None and len(sampler) >= config.batch_size,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=pin,
    )


class EpochSampler(Sampler[int]):
    """A permutation that depends on the seed and the epoch alone, so that two runs see the same order."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=epoch_generator(self.seed, self.epoch)).tolist())


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A CPU generator for one epoch of one seed (a multiplier keeps neighbouring seeds apart)."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Shift and mirror each image of ``[B, C, H, W]`` by its own draw; edges are repeated outwards."""
    if not (config.flip or config.shift):
        return images
    count, _, height, width = images.shape
    if config.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None].to(images.device), images.flip(3), images)
    if config.shift:
        reach = config.shift
        offsets = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator).to(images.device)
        rows = offsets[0] + torch.arange(height, device=images.device)
        columns = offsets[1] + torch.arange(width, device=images.device)
        padded = F.pad(images, (reach,) * 4, mode="replicate")
        which = torch.arange(count, device=images.device)[:, None, None]
        # Index arrays around the channel slice put the channels last.
        images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    return images


def split_by_class(labels: Sequence[int] | Tensor, config: DataConfig) -> tuple[list[int], list[int], list[int]]:
    """Indices of the train, validation and test items: the same shares of every class.

    ``split_seed`` alone decides, so that runs with other seeds are tested on the same items.

    Raises:
        ConfigError: a class is too small to be in the train and the test part.
    """
    labels = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(config.split_seed)
    train: list[int] = []
    val: list[int] = []
    test: list[int] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = members[torch.randperm(len(members), generator=generator)].tolist()
        n_test = max(1, round(config.test_fraction * len(order)))
        n_val = max(1, round(config.val_fraction * len(order))) if config.val_fraction else 0
        if n_test + n_val >= len(order):
            raise ConfigError(
                f"data: expected enough images of each class to train and to test on, got {len(order)} "
                f"of class {label}; add images or lower data.test_fraction and data.val_fraction"
            )
        test += order[:n_test]
        val += order[n_test : n_test + n_val]
        train += order[n_test + n_val :]
    return train, val, test


def _digits(config: DataConfig) -> Splits:
    """Scikit-learn's 1,797 handwritten digits (8x8 grey), scaled up to ``size`` (16) and normalised."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "data 'digits': expected scikit-learn, which holds the images, got no such package; "
            "install it with: pip install scikit-learn"
        ) from None
    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).div_(16).unsqueeze_(1)
    labels = torch.tensor(source.target, dtype=torch.int64)
    size = config.size or 16
    if size != images.shape[-1]:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    train, val, test = split_by_class(labels, config)
    # The training part alone gives the statistics: the held-out images must not leak into them.
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std

    def part(indices: list[int]) -> TensorDataset:
        return TensorDataset(images[indices], labels[indices])

    return Splits(part(train), part(test), part(val) if val else None, tuple(map(str, range(10))))


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images under one sub-folder per class, read with Pillow: ``([C, size, size] float32, label)``.

    The shorter side is resized to ``size``, the middle is cut out, and the result is normalised with
    ``mean`` and ``std`` (ImageNet's for colour, 0.5 for grey).
    """

    def __init__(self, files: list[tuple[Path, int]], config: DataConfig) -> None:
        self.files, self.size, self.channels = files, config.size or 64, config.channels or 3
        default = (IMAGENET_MEAN, IMAGENET_STD) if self.channels == 3 else ((0.5,), (0.5,))
        self.mean = torch.tensor(config.mean or default[0]).view(-1, 1, 1)
        self.std = torch.tensor(config.std or default[1]).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return (_read_image(path, self.size, self.channels) - self.mean) / self.std, label


def _read_image(path: Path, size: int, channels: int) -> Tensor:
    """``[channels, size, size]`` float32 in [0, 1]."""
    image_module = _pillow()
    import numpy as np

    try:
        with image_module.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except OSError as error:
        raise ConfigError(f"{path}: expected an image that Pillow can read, got: {error}") from None
    scale = size / min(image.size)
    sides = [max(size, round(side * scale)) for side in image.size]
    resized = image.resize(sides, image_module.Resampling.BILINEAR)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    cropped = resized.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(cropped, dtype=np.float32)).div_(255)
    return pixels.view(size, size, channels).permute(2, 0, 1).contiguous()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError(
            "data 'image_folder': expected Pillow, which reads images, got no such package; "
            "install it with: pip install pillow"
        ) from None
    return Image


def _image_folder(config: DataConfig) -> Splits:
    """Split ``root/class/image``, or take ``root/train``, ``root/test`` (and ``root/val``) as they stand."""
    _pillow()
    root = Path(config.root or "").expanduser()
    if not root.is_dir():
        raise ConfigError(f"data.root: expected a folder with one sub-folder of images per class, got {root}")
    if (root / "train").is_dir() and (root / "test").is_dir():
        classes = _class_names(root / "train")
        present = [part for part in ("train", "val", "test") if (root / part).is_dir()]
        parts = {part: _list_images(root / part, classes) for part in present}
    else:
        classes = _class_names(root)
        files = _list_images(root, classes)
        indices = split_by_class([label for _, label in files], config)
        parts = {
            part: [files[i] for i in chosen]
            for part, chosen in zip(("train", "val", "test"), indices, strict=True)
            if chosen
        }
    made = {part: ImageFolder(files, config) for part, files in parts.items()}
    return Splits(made["train"], made["test"], made.get("val"), classes)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if len(names) < 2:
        raise ConfigError(f"data.root: expected two or more sub-folders (one per class) in {folder}, got {len(names)}")
    return names


def _list_images(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The images of ``folder/class`` for every class, sorted.

    Raises:
        ConfigError: a class has no images here, or the folder has a class that is not known.
    """
    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise ConfigError(f"{folder}: expected the classes {', '.join(classes)}, got also {', '.join(unknown)}")
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        inside = (folder / name).rglob("*") if (folder / name).is_dir() else iter(())
        found = sorted(path for path in inside if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not found:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ConfigError(f"{folder / name}: expected images ({kinds}), got none")
        files += [(path, label) for path in found]
    return files


def _from_factory(config: DataConfig) -> Splits:
    made = call_factory(config.name, config.args, "data")
    parts = tuple(made) if isinstance(made, (tuple, list)) else ()
    if len(parts) not in (2, 3) or not all(_is_dataset(part) for part in parts):
        raise ConfigError(
            f"data {config.name!r}: expected the factory to return (train, test) or (train, val, test) "
            f"of non-empty datasets with __len__ and __getitem__, got {_kind(made)}"
        )
    return Splits(parts[0], parts[-1], parts[1] if len(parts) == 3 else None)


def _is_dataset(part: Any) -> bool:
    return hasattr(part, "__len__") and hasattr(part, "__getitem__") and len(part) > 0


def _kind(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"{type(made).__name__} of {', '.join(type(part).__name__ for part in made) or 'nothing'}"
    return type(made).__name__
