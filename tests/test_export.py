"""Writing distilled sets for the authors' code, and sheets to look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dpkit.data import Split
from dpkit.distill.export import write, write_sheet
from dpkit.distill.published import as_stored, read, to_pixels

SHAPE = (3, 8, 8)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
WANT = {"classes": 3, "image_shape": SHAPE, "factor": 1}


def pixels(count=6):
    """Images of three classes in a mixed order."""
    source = torch.Generator().manual_seed(5)
    return Split(torch.rand(count, *SHAPE, generator=source), torch.arange(count) % 3)


def normalised(images):
    return (images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


IMAGES, LABELS = pixels().images, pixels().labels


def line(error):
    """The message, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def soiled(value):
    images = IMAGES.clone()
    images[2, 0, 0, 0] = value
    return images


# --- the layouts ---
@pytest.mark.parametrize("form", ["idc", "mtt", "dc"])
@pytest.mark.parametrize("kind", ["float", "bytes"])
def test_round_trip(tmp_path, form, kind):
    split = pixels() if kind == "float" else Split((IMAGES * 255).byte(), LABELS)
    expected = split.images if kind == "float" else split.images / 255
    files = write(split, tmp_path / "images_7.pt", form, MEAN, STD)
    assert files[0] == tmp_path / "images_7.pt"
    assert sorted(tmp_path.iterdir()) == sorted(files)  # nothing else is left
    published = read(files[0], **WANT, **({"space": "normalised"} if form == "mtt" else {}))
    assert published.form == form
    found = to_pixels(published, MEAN, STD)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(found.images, expected[[0, 3, 1, 4, 2, 5]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["idc", "mtt", "dc"])
def test_the_authors_code_can_take_them(tmp_path, form):
    """Plain containers and tensors, class after class, unpacked the way that their scripts do."""
    first, *rest = write(pixels(), tmp_path, form, MEAN, STD)
    content = torch.load(first, weights_only=True)
    if form == "idc":
        images, labels = content
    elif form == "mtt":
        images, labels = content, torch.load(rest[0], weights_only=True)
        assert rest[0].name == "labels_best.pt"
    else:
        images, labels = content["data"][-1][0], content["data"][-1][1]
        assert content["accs_all_exps"] == {}
    assert type(images) is type(labels) is torch.Tensor
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not images.requires_grad
    expected = pixels().images[[0, 3, 1, 4, 2, 5]]
    torch.testing.assert_close(images, expected if form == "idc" else normalised(expected))


def test_values_can_be_stored_as_they_are(tmp_path):
    images = IMAGES * 9 - 4
    files = write(Split(images, LABELS), tmp_path, "mtt", torch.zeros(3), torch.ones(3))
    assert torch.equal(as_stored(read(files[0], space="whitened", **WANT)).images, images[[0, 3, 1, 4, 2, 5]])


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "labels_best.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"labels_best.pt exists; choose another path") as error:
        write(pixels(), tmp_path, "mtt", MEAN, STD)
    line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["labels_best.pt"]
    assert (tmp_path / "labels_best.pt").read_text() == "mine"
    write(pixels(), tmp_path, "mtt", MEAN, STD, overwrite=True)
    assert read(tmp_path, space="normalised", **WANT).ipc == 2


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    write(pixels(), tmp_path / "data.pt", "idc")
    before = (tmp_path / "data.pt").read_bytes()
    monkeypatch.setattr("dpkit.files.os.fsync", full)
    with pytest.raises(ValueError, match=r"data.pt cannot be written \(No space left on device\)") as error:
        write(Split(IMAGES * 0.5, LABELS), tmp_path / "data.pt", "idc", overwrite=True)
    line(error)
    assert [p.name for p in tmp_path.iterdir()] == ["data.pt"]
    assert (tmp_path / "data.pt").read_bytes() == before


@pytest.mark.parametrize("split, form, changes, words", [
    (pixels(), "kip", {}, "form must be one of idc, mtt, dc; got 'kip'"),
    (pixels(), "dc", {}, "dc stores normalised images, got no mean and std"),
    (Split(IMAGES, torch.eye(3)[LABELS]), "mtt", {}, r"mtt stores class numbers, got soft labels \(6, 3\)"),
    (pixels(5), "idc", {}, "classes have 2, 2, 1 images"),
    (Split(IMAGES[:0], LABELS[:0]), "idc", {}, "got 0 images"),
    (Split(soiled(float("nan")), LABELS), "idc", {}, "NaN or infinite.*nothing was written"),
    (pixels(), "mtt", {"mean": MEAN, "std": STD, "factor": 2}, "factor must be 1 for mtt, got 2"),
], ids=range(7))
def test_what_cannot_be_written(tmp_path, split, form, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        write(split, tmp_path / "set.pt", form, **changes)
    line(error)
    assert not list(tmp_path.iterdir())


def test_the_labels_file_is_not_taken_by_images(tmp_path):
    with pytest.raises(ValueError, match=r"labels_best.pt is where the labels go"):
        write(pixels(), tmp_path / "labels_best.pt", "mtt", MEAN, STD)


# --- sheets ---
def test_sheets(tmp_path):
    images = torch.stack([torch.full(SHAPE, v) for v in (-1.0, 0.5, 0.2, 2.0, 0.4, 0.6)])
    files = write_sheet(images, LABELS, tmp_path / "sheets", zoom=3)
    assert [p.name for p in files] == ["all.png", "class-0.png", "class-1.png", "class-2.png"]
    assert sorted((tmp_path / "sheets").iterdir()) == files
    sheet = np.asarray(Image.open(files[0]))
    assert sheet.shape == (2 + 3 * 26, 2 + 2 * 26, 3)
    levels = [[int(sheet[2 + 26 * r + 12, 2 + 26 * c + 12, 0]) for c in range(2)] for r in range(3)]
    assert levels == [[0, 255], [128, 102], [51, 153]]  # clipped; one row a class
    assert np.asarray(Image.open(files[1])).shape == (28, 54, 3)


def test_one_sheet_of_grey_images(tmp_path):
    path = tmp_path / "sheet.png"
    assert write_sheet(torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8), torch.arange(2), path, zoom=1) == [path]
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (22, 12)
    assert sheet[2:10, 2:10].tolist() == torch.arange(64).view(8, 8).tolist()
    with pytest.raises(ValueError, match=r"sheet.png exists"):
        write_sheet(IMAGES, LABELS, path)
    write_sheet(IMAGES, torch.eye(3)[LABELS], path, overwrite=True)
    assert np.asarray(Image.open(path)).shape == (56, 38, 3)


@pytest.mark.parametrize("images, zoom, words", [
    (IMAGES[:, :2], 1, "1 or 3 channels"), (IMAGES, 0, "zoom must be >= 1, got 0"), (soiled(float("nan")), 1, "finite pixels"),
], ids=["channels", "zoom", "nan"])
def test_what_cannot_be_drawn(tmp_path, images, zoom, words):
    with pytest.raises(ValueError, match=words):
        write_sheet(images, LABELS, tmp_path / "a.png", zoom=zoom)
    assert not list(tmp_path.iterdir())
