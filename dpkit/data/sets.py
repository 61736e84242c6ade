"""Loading: the torchvision sets, ``npz:PATH``, ``folder:PATH`` and the built-in ``shapes``, all as uint8 splits."""
from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dpkit.data import _torchvision, shapes
from dpkit.data.split import Split
from dpkit.spec import Spec
from dpkit.tree import generator_for

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "mnist": "MNIST",
               "fashionmnist": "FashionMNIST", "imagenette": "Imagenette"}
_NPZ_FIELDS = ("train_images", "train_labels", "test_images", "test_labels")


class DataUnavailable(ValueError):
    """The data set is not on this machine and could not be fetched."""


@dataclass(frozen=True, kw_only=True)
class DataSpec(Spec):
    """Which images: ``dataset`` is ``shapes``, a torchvision name, ``npz:PATH`` or ``folder:PATH``.

    classes: how many classes to keep, the first ones (0: all). train, test: how many images of each part to keep, the first ones
    of these classes (0: all; for ``shapes`` 4,000 and 2,000, however many classes they are of).
    image_size: side that ``folder:`` and ``imagenette`` images are resized and centre-cropped to, in pixels.
    """

    dataset: str = "shapes"
    classes: int = 0
    train: int = 0
    test: int = 0
    image_size: int = 64

    def check(self) -> None:
        kind, _, path = self.dataset.partition(":")
        known = self.dataset in ("shapes", *TORCHVISION) or (kind in ("npz", "folder") and path)
        self.require(bool(known), f"dataset must be shapes, {', '.join(TORCHVISION)}, npz:PATH or folder:PATH; "
                                  f"got {self.dataset!r}")
        self.require(self.train >= 0 and self.test >= 0, f"train and test must be >= 0, got {self.train}, {self.test}")
        self.require(self.classes == 0 or self.classes >= 2, f"classes must be >= 2, or 0 for all; got {self.classes}")
        self.between("image_size", 8, 1024)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split with what is needed to use them.

    mean, std: (C,) float32 over the training pixels in [0, 1]. identity: the plain facts that make results
    reproducible (kind, sizes, SHA-256 of the bytes); it enters every key, a file's path does not.
    """

    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    class_names: tuple[str, ...]
    identity: dict
    description: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def load(spec: DataSpec, root: str | Path = "data") -> Dataset:
    """Load the data set, checked. Raises ``ValueError`` or :class:`DataUnavailable` with one clear line."""
    kind, _, path = spec.dataset.partition(":")
    if spec.dataset == "shapes":
        names: tuple[str, ...] = _some(shapes.CLASSES, spec.classes)
        train, test = (shapes.make(part, count, len(names)) for part, count in (("train", spec.train or 4000),
                                                                                ("test", spec.test or 2000)))
    elif kind == "npz":
        train, test, names = _npz(Path(path))
    elif kind == "folder":
        train, test, names = _folder(Path(path), spec.image_size)
    else:
        train, test, names = _from_torchvision(spec.dataset, Path(root), spec.image_size)
    if spec.dataset != "shapes":
        names = _some(names, spec.classes)
        train, test = (_first(_of_classes(split, spec.classes, part), count, part)
                       for split, count, part in ((train, spec.train, "train"), (test, spec.test, "test")))
    mean, std = statistics(train.images)
    digest = hashlib.sha256()
    for part in (train, test):
        digest.update(part.images.contiguous().numpy().data)
        digest.update(part.labels.numpy().data)
    identity = {"kind": "shapes" if spec.dataset == "shapes" else kind, "train": len(train), "test": len(test),
                "shape": list(train.images.shape[1:]), "classes": len(names), "sha256": digest.hexdigest()}
    label = spec.dataset if kind in ("shapes", *TORCHVISION) else f"{kind}:{Path(path).name}"
    few = f"the first {len(names)} classes, " if spec.classes else ""
    description = f"{label}, {few}{len(train):,} training and {len(test):,} test images"
    return Dataset(train, test, mean, std, names, identity, description)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Channel means and standard deviations (C,), (C,) of pixels in [0, 1]; exact integer sums for uint8."""
    total, square, count = 0.0, 0.0, images.numel() // images.shape[1]
    for chunk in images.split(5000):
        pixels = chunk.double() / (255 if images.dtype == torch.uint8 else 1)
        total, square = total + pixels.sum((0, 2, 3)), square + (pixels * pixels).sum((0, 2, 3))
    mean = total / count
    # a constant channel would divide by zero: leave it unscaled
    deviation = (square / count - mean * mean).clamp_min(0).sqrt()
    return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()


def _line(error: Exception) -> str:
    """The first line of an error's message, or its name when it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _some(names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The first ``count`` classes (0: all)."""
    if count > len(names):
        raise ValueError(f"classes must be at most {len(names)}, the classes that there are; got {count}")
    return names[:count] if count else names


def _of_classes(split: Split, count: int, part: str) -> Split:
    """The images of the first ``count`` classes (0: all)."""
    rows = torch.nonzero(split.labels < count).flatten() if count else torch.arange(len(split))
    if not len(rows):
        raise ValueError(f"{part} has no image of the first {count} classes; raise classes, or set it to 0 for all")
    return split.select(rows) if count else split


def _first(split: Split, limit: int, part: str) -> Split:
    if limit > len(split):
        raise ValueError(f"{part} must be at most {len(split)}, the images that there are; got {limit}")
    return split.select(torch.arange(limit)) if limit else split


def _npz(path: Path) -> tuple[Split, Split, tuple[str, ...]]:
    if not path.is_file():
        raise DataUnavailable(f"npz file {path} does not exist; give a path to a file with {', '.join(_NPZ_FIELDS)}")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("it holds a single array")
        with archive:
            missing = [name for name in _NPZ_FIELDS if name not in archive.files]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            arrays = {name: archive[name] for name in _NPZ_FIELDS}
        foreign = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if foreign:
            raise ValueError(f"its {foreign[0]} is no array")
    except ValueError as error:
        raise ValueError(f"npz file {path} cannot be used ({_line(error)}); it must hold plain arrays "
                         f"{', '.join(_NPZ_FIELDS)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"npz file {path} cannot be read ({_line(error)}); it may be cut off, make it again") from None
    parts = [_checked(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{path} {part}") for part in ("train", "test")]
    if parts[0].images.shape[1:] != parts[1].images.shape[1:]:
        raise ValueError(f"npz file {path}: train images are {tuple(parts[0].images.shape[1:])}, test images "
                         f"{tuple(parts[1].images.shape[1:])}; they must agree")
    classes = int(parts[0].labels.max()) + 1
    if int(parts[1].labels.max()) >= classes:
        raise ValueError(f"npz file {path}: test label {int(parts[1].labels.max())} is out of range, "
                         f"training labels are 0 to {classes - 1}")
    absent = sorted(set(range(classes)) - set(parts[0].labels.tolist()))
    if absent:
        raise ValueError(f"npz file {path}: no training image has label {absent[0]}; labels must be 0 to {classes - 1} "
                         "without gaps")
    return parts[0], parts[1], tuple(str(c) for c in range(classes))


def _checked(images: np.ndarray, labels: np.ndarray, where: str) -> Split:
    """A split from (N, H, W, C) or (N, H, W) uint8 images and (N,) integer labels."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"{where} images must be (N, H, W, C) uint8 and not empty, got {images.shape} {images.dtype}")
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"{where} images must have 1 or 3 channels last, got shape {images.shape}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(images):
        raise ValueError(f"{where} labels must be ({len(images)},) integers, got {labels.shape} {labels.dtype}")
    if labels.min() < 0 or labels.max() >= 1000:
        raise ValueError(f"{where} labels are out of range: {labels.min()} to {labels.max()}; they must be 0 to classes - 1")
    return Split(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))), torch.from_numpy(labels.astype(np.int64)))


def _resized(paths: list[tuple[str, int]], side: int) -> Split:
    """Images read with PIL, shorter side resized to ``side``, centre-cropped, in a fixed shuffled order.

    Folders list one class after another; the first N of a shuffled list are a sample of all classes.
    """
    from PIL import Image, UnidentifiedImageError

    order = torch.randperm(len(paths), generator=generator_for("folder", len(paths)))
    paths = [paths[i] for i in order.tolist()]
    pixels = np.empty((len(paths), 3, side, side), dtype=np.uint8)
    for row, (path, _) in enumerate(paths):
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"image {path} cannot be read ({error}); remove or replace it") from None
        scale = side / min(image.size)
        image = image.resize((max(side, round(image.width * scale)), max(side, round(image.height * scale))),
                             Image.Resampling.BILINEAR, reducing_gap=3.0)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        pixels[row] = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    return Split(torch.from_numpy(pixels), torch.tensor([label for _, label in paths]))


def _folder(path: Path, side: int) -> tuple[Split, Split, tuple[str, ...]]:
    parts, names = [], []
    for part in ("train", "val"):
        if not (path / part).is_dir():
            raise DataUnavailable(f"folder {path} lacks the folder {part}; it must hold train/CLASS/* and val/CLASS/*")
        datasets = _torchvision.load().datasets
        try:
            folder = datasets.ImageFolder(str(path / part))
        except FileNotFoundError as error:
            raise ValueError(f"folder {path / part}: {str(error).splitlines()[0]}") from None
        parts.append(_resized(folder.samples, side))
        names.append(tuple(folder.classes))
    if names[0] != names[1]:
        raise ValueError(f"folder {path}: train has classes {', '.join(names[0][:5])}..., val has "
                         f"{', '.join(names[1][:5])}...; they must agree")
    return parts[0], parts[1], names[0]


def _from_torchvision(name: str, root: Path, side: int) -> tuple[Split, Split, tuple[str, ...]]:
    datasets = _torchvision.load().datasets
    build = getattr(datasets, TORCHVISION[name])
    if name == "imagenette":
        arguments: list[dict] = [{"split": "train", "size": "160px"}, {"split": "val", "size": "160px"}]
    elif name == "svhn":
        arguments = [{"split": "train"}, {"split": "test"}]
    else:
        arguments = [{"train": True}, {"train": False}]
    parts = []
    for options in arguments:
        try:
            try:
                dataset = build(str(root), download=False, **options)
            except RuntimeError:  # not there, or damaged: fetch it
                dataset = build(str(root), download=True, **options)
        except ModuleNotFoundError as error:  # torchvision reads SVHN with scipy
            package = str(error.name).split(".")[0]
            raise DataUnavailable(f"{name} needs the package {package}; `pip install {package}`, or use npz:PATH or shapes"
                                  ) from None
        except (RuntimeError, OSError) as error:  # URLError is an OSError
            raise DataUnavailable(f"{name} is not under {root} and could not be downloaded ({_line(error)}); "
                                  f"put it there on a machine with a network, or use npz:PATH or shapes") from None
        if name == "imagenette":
            parts.append(_resized(dataset._samples, side))
            continue
        images = np.asarray(dataset.data)
        labels = np.asarray(dataset.labels if name == "svhn" else dataset.targets)
        images = images.transpose(0, 2, 3, 1) if name == "svhn" else images
        parts.append(_checked(images, labels, name))
    names = getattr(dataset, "classes", None) or range(int(parts[0].labels.max()) + 1)
    flat = (" / ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    return parts[0], parts[1], tuple(flat)
