"""Every way of loading images, good and bad: npz files, folders, and the sets of torchvision."""

from __future__ import annotations

import pickle
import sys
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dpkit.data import DataSpec, DataUnavailable, load
from dpkit.data._torchvision import load as load_torchvision


# --- npz ----------------------------------------------------------------------------------------------------
def arrays(**changes):
    rng = np.random.default_rng(1)
    good = {
        "train_images": rng.integers(0, 256, (12, 6, 5, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": rng.integers(0, 256, (5, 6, 5, 3), dtype=np.uint8),
        "test_labels": np.arange(5) % 3,
    }
    return {name: a for name, a in (good | changes).items() if a is not None}


def test_an_npz_file_is_read_with_channels_first(tmp_path):
    good = arrays()
    np.savez_compressed(tmp_path / "a.npz", **good)
    found = load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}", train=9))
    assert found.train.images.shape == (9, 3, 6, 5)
    assert torch.equal(found.test.images, torch.from_numpy(good["test_images"]).permute(0, 3, 1, 2))
    assert found.train.labels.tolist() == [0, 1, 2] * 3
    assert found.classes == 3
    assert found.identity["kind"] == "npz"
    assert str(tmp_path) not in str(found.identity) + found.description
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "b.npz", **good)
    again = load(DataSpec(dataset=f"npz:{tmp_path / 'elsewhere' / 'b.npz'}", train=9))
    assert again.identity == found.identity  # the same pixels from another place, packed another way


def test_an_npz_file_without_a_channel_axis_is_grey(tmp_path):
    grey = {f"{part}_images": arrays()[f"{part}_images"][..., 0] for part in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays(**grey))
    assert load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}")).train.images.shape == (12, 1, 6, 5)


def test_the_first_classes_of_a_file_are_kept_and_counted_before_images_are(tmp_path):
    good = arrays()
    np.savez(tmp_path / "a.npz", **good)
    name = f"npz:{tmp_path / 'a.npz'}"
    found = load(DataSpec(dataset=name, classes=2, train=6))
    rows = good["train_labels"] < 2
    assert found.train.labels.tolist() == [0, 1] * 3
    assert np.array_equal(found.train.images.numpy(), good["train_images"][rows][:6].transpose(0, 3, 1, 2))
    assert found.test.labels.tolist() == [0, 1, 0, 1]
    assert found.class_names == ("0", "1")
    assert found.identity["classes"] == 2
    assert found.description == "npz:a.npz, the first 2 classes, 6 training and 4 test images"
    assert load(DataSpec(dataset=name, classes=3)).identity == load(DataSpec(dataset=name)).identity
    with pytest.raises(ValueError, match="train must be at most 8, the images that there are; got 9"):
        load(DataSpec(dataset=name, classes=2, train=9))


@pytest.mark.parametrize("classes, line", [(1, "classes must be >= 2, or 0 for all; got 1"),
                                           (-2, "classes must be >= 2, or 0 for all; got -2"),
                                           (4, "classes must be at most 3, the classes that there are; got 4")])
def test_a_number_of_classes_that_cannot_be_is_refused(classes, line, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(ValueError, match=line):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}", classes=classes))


def test_a_part_without_any_of_the_classes_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(test_labels=np.full(5, 2)))
    with pytest.raises(ValueError, match="test has no image of the first 2 classes; raise classes"):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}", classes=2))


BAD_NPZ = {
    "field": (arrays(test_labels=None), "it lacks test_labels"),
    "type": (
        arrays(train_images=arrays()["train_images"] / 255),
        r"train images must be .* uint8 .* float64",
    ),
    "axes": (arrays(test_images=np.zeros((5, 90), np.uint8)), r"test images must be .* got \(5, 90\)"),
    "empty": (
        arrays(test_images=np.zeros((0, 6, 5, 3), np.uint8), test_labels=np.zeros(0, int)),
        "not empty",
    ),
    "channels": (arrays(train_images=np.zeros((12, 3, 6, 5), np.uint8)), "1 or 3 channels last"),
    "sizes": (arrays(test_images=np.zeros((5, 6, 6, 3), np.uint8)), "they must agree"),
    "count": (arrays(train_labels=np.arange(11) % 3), r"labels must be \(12,\) integers, got \(11,\)"),
    "floats": (arrays(train_labels=np.zeros(12)), r"must be \(12,\) integers, got \(12,\) float64"),
    "negative": (arrays(train_labels=np.arange(12) % 3 - 1), "out of range: -1 to 1"),
    "large": (
        arrays(test_labels=np.array([0, 1, 2, 3, 0])),
        "test label 3 is out of range, training labels are 0 to 2",
    ),
    "gap": (
        arrays(train_labels=np.arange(12) % 2 * 2),
        "no training image has label 1; labels must be 0 to 2",
    ),
    "objects": (arrays(train_labels=np.array([{}] * 12)), "must hold plain arrays"),
}


@pytest.mark.parametrize("kind", BAD_NPZ)
def test_a_bad_npz_file_is_refused_in_one_line(tmp_path, kind):
    content, line = BAD_NPZ[kind]
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=line) as caught:
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}"))
    assert "\n" not in str(caught.value)
    assert "a.npz" in str(caught.value)


def damaged(kind, good):
    """The bytes of a damaged file, from those of a good one."""
    middle = len(good) // 2
    return {
        "cut": good[:middle],
        "empty": b"",
        "text": b"hello",
        "flipped": good[:600] + b"\xff" * 40 + good[640:],
    }[kind]


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["cut", "empty", "text", "flipped"])
def test_a_damaged_npz_file_is_refused_in_one_line(tmp_path, pack, kind):
    file = tmp_path / "a.npz"
    pack(file, **arrays())
    file.write_bytes(damaged(kind, file.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.npz cannot be (read|used) \(.*\); it m") as caught:
        load(DataSpec(dataset=f"npz:{file}"))
    assert "\n" not in str(caught.value)


def test_a_single_array_or_a_foreign_archive_is_no_npz_file(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(
        ValueError,
        match=r"a\.npy cannot be used \(it holds a single array\); it must hold plain arrays train_images",
    ):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.npy'}"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train_images", b"no array")
    with pytest.raises(ValueError, match="it lacks train_labels, test_images, test_labels"):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.zip'}"))


def test_an_archive_of_other_things_is_no_npz_file(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in arrays():
            archive.writestr(name, b"no array")
    with pytest.raises(ValueError, match=r"a\.zip cannot be used \(its train_images is no array\)"):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.zip'}"))


def test_a_missing_npz_file_is_unavailable(tmp_path):
    with pytest.raises(DataUnavailable, match=r"nothing\.npz does not exist; give a path"):
        load(DataSpec(dataset=f"npz:{tmp_path / 'nothing.npz'}"))


def test_more_images_than_there_are_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    with pytest.raises(ValueError, match="test must be at most 5, the images that there are; got 6"):
        load(DataSpec(dataset=f"npz:{tmp_path / 'a.npz'}", test=6))


@pytest.mark.parametrize("dataset", ["cifar11", "npz:", "folder:", "npz", "CIFAR10", ""])
def test_an_unknown_set_is_refused(dataset):
    with pytest.raises(ValueError, match=r"dataset must be shapes, cifar10, .*npz:PATH or folder:PATH; got"):
        DataSpec(dataset=dataset)


# --- folders ------------------------------------------------------------------------------------------------
def write_folder(root, classes=("cat", "dog"), size=(12, 20)):
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((*size, 3), 60 * label + 10 * i, dtype=np.uint8)
                pixels[:, : size[1] // 5] = 255  # a stripe at the left that a centre crop removes
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_a_folder_is_resized_and_cropped_at_the_centre(tmp_path):
    write_folder(tmp_path)
    found = load(DataSpec(dataset=f"folder:{tmp_path}", image_size=8))
    assert found.train.images.shape == (6, 3, 8, 8)
    assert found.class_names == ("cat", "dog")
    shades = found.train.images[:, :, :, 4:].amax((1, 2, 3)).tolist()
    assert sorted(shades) == [0, 10, 20, 60, 70, 80]
    assert found.train.labels.tolist() == [int(shade >= 60) for shade in shades]
    assert int(found.train.images[0].max()) < 255
    assert len(found.test) == 4


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path):
    (tmp_path / "val").mkdir()
    for part, count in (("train", 20), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / part / name / f"{i:02d}.png")
    spec = DataSpec(dataset=f"folder:{tmp_path}", image_size=8, train=12)
    assert set(load(spec).train.labels.tolist()) == {0, 1}
    assert load(spec).identity == load(spec).identity


def no_validation(root):
    for file in sorted((root / "val").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (root / "val").rmdir()


def cut_image(root):
    file = root / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:60])


BAD_FOLDERS = {
    "part": (
        no_validation,
        DataUnavailable,
        r"lacks the folder val; it must hold train/CLASS/\* and val/CLASS/\*",
    ),
    "classes": (
        lambda root: (root / "val" / "dog").rename(root / "val" / "cow"),
        ValueError,
        "they must agree",
    ),
    "text": (
        lambda root: (root / "val" / "cat" / "0.png").write_text("no image"),
        ValueError,
        "0.png cannot be read",
    ),
    "cut": (cut_image, ValueError, "1.png cannot be read"),
    "empty": (
        lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()],
        ValueError,
        "for the classes cat",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, kind):
    write_folder(tmp_path)
    damage, error, line = BAD_FOLDERS[kind]
    damage(tmp_path)
    with pytest.raises(error, match=line) as caught:
        load(DataSpec(dataset=f"folder:{tmp_path}", image_size=8))
    assert "\n" not in str(caught.value)


# --- torchvision --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashionmnist", "imagenette"])
def test_a_set_that_cannot_be_fetched_is_unavailable(tmp_path, monkeypatch, name):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(
        DataUnavailable, match=f"^{name} is not under .* could not be downloaded .*npz:PATH"
    ) as caught:
        load(DataSpec(dataset=name), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_package_that_a_set_needs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(load_torchvision().datasets.SVHN, "_check_integrity", lambda self: True)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(
        DataUnavailable, match="svhn needs the package scipy; `pip install scipy`, or use npz:PATH"
    ):
        load(DataSpec(dataset="svhn"), tmp_path)


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashionmnist", "FashionMNIST")])
def test_mnist_from_its_files(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part, count in (("train", 20), ("t10k", 10)):
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images[:count].tobytes())
        head = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            head + (np.arange(count) % 10).astype(np.uint8).tobytes()
        )
    found = load(DataSpec(dataset=name), tmp_path)
    assert torch.equal(found.train.images[:, 0], torch.from_numpy(images))
    assert found.test.labels.tolist() == list(range(10))
    assert found.classes == 10
    assert found.identity["kind"] == name


def test_cifar_from_its_files(tmp_path, monkeypatch):
    datasets = load_torchvision().datasets
    monkeypatch.setattr(
        datasets.CIFAR10, "_check_integrity", lambda self: True
    )  # tiny files have other checksums
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    for i, file in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        (folder / file).write_bytes(pickle.dumps({"data": rows[i : i + 1], "labels": [i]}))
    names = [f"name {n}" for n in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    found = load(DataSpec(dataset="cifar10"), tmp_path)
    assert torch.equal(found.train.images, torch.from_numpy(rows[:5].reshape(5, 3, 32, 32)))
    assert found.train.labels.tolist() == [0, 1, 2, 3, 4]
    assert found.test.labels.tolist() == [5]
    assert found.class_names == tuple(names)


def test_imagenette_is_resized(tmp_path):
    for part in ("train", "val"):
        for wnid in ("n01440764", "n02102040"):
            folder = tmp_path / "imagenette2-160" / part / wnid
            folder.mkdir(parents=True)
            Image.fromarray(np.full((30, 20, 3), 200, np.uint8)).save(folder / "0.JPEG")
    found = load(DataSpec(dataset="imagenette", image_size=16), tmp_path)
    assert found.train.images.shape == (2, 3, 16, 16)
    assert sorted(found.train.labels.tolist()) == [0, 1]
    assert found.class_names[0].startswith("tench")
