"""Reading the layouts that authors of distilled sets publish."""

from __future__ import annotations

import contextlib
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dpkit.data import Split, zca
from dpkit.distill.published import Published, as_stored, authors_statistics, read, to_pixels

SHAPE = (3, 8, 8)
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
WANT = {"classes": 3, "image_shape": SHAPE, "factor": 1}


def pixels(count=6):
    """Images of three classes in a mixed order."""
    source = torch.Generator().manual_seed(5)
    return Split(torch.rand(count, *SHAPE, generator=source), torch.arange(count) % 3)


def normalised(images):
    return (images - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)


def as_theirs(tmp_path, form, images, labels):
    """The files as the authors' code writes them."""
    if form == "idc":
        torch.save([images, labels], tmp_path / "data.pt")
        return tmp_path / "data.pt"
    if form == "mtt":
        torch.save(images, tmp_path / "images_best.pt")
        torch.save(labels, tmp_path / "labels_best.pt")
        return tmp_path / "images_best.pt"
    accuracies = {"ConvNet": [np.float64(0.31), np.float64(0.3)], "MLP": [np.float32(0.2)]}
    sets = [[images + 1, labels], [images, labels]]
    torch.save({"data": sets, "accs_all_exps": accuracies}, tmp_path / "res_DM.pt")
    return tmp_path / "res_DM.pt"


def options(form):
    return WANT | ({"space": "normalised"} if form == "mtt" else {"experiment": 1} if form == "dc" else {})


def line(error):
    """The message, which is one line."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def refused(path, **changes):
    with pytest.raises(ValueError) as error:
        read(path, **(WANT | changes))
    return line(error)


# --- what authors publish ---
@pytest.mark.parametrize("form", ["idc", "mtt", "dc"])
@pytest.mark.parametrize("asked", ["auto", "by name"])
def test_reading_what_authors_write(tmp_path, form, asked):
    split = pixels()
    path = as_theirs(tmp_path, form, split.images, split.labels)
    found = read(path, "auto" if asked == "auto" else form, **options(form))
    assert torch.equal(found.images, split.images)
    assert torch.equal(found.labels, split.labels)
    assert (found.form, found.factor, found.classes, found.ipc) == (form, 1, 3, 2)
    assert found.space == ("pixels" if form == "idc" else "normalised")
    assert found.experiments == (2 if form == "dc" else 1)


def test_the_first_experiment_is_the_default(tmp_path):
    split = pixels()
    path = as_theirs(tmp_path, "dc", split.images, split.labels)
    assert torch.equal(read(path, **WANT).images, split.images + 1)
    assert "experiment must be 0 to 1" in refused(path, experiment=2)
    assert "got -1" in refused(path, experiment=-1)


def test_files_of_old_versions_are_read(tmp_path):
    """Before 1.6, torch wrote no zip archive; numpy's scalars had another address before 2."""
    split = pixels()
    content = {"data": [[split.images, split.labels]], "accs_all_exps": {"ConvNet": [np.float64(0.3)]}}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    written = (tmp_path / "old.pt").read_bytes()
    assert b"numpy._core.multiarray" in written
    (tmp_path / "older.pt").write_bytes(written.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    for name in ("old.pt", "older.pt"):
        assert torch.equal(read(tmp_path / name, **WANT).images, split.images)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.half, nn.Parameter], ids=["double", "half", "parameter"])
def test_other_kinds_of_images(tmp_path, change):
    split = pixels()
    images = change(split.images)
    found = read(as_theirs(tmp_path, "idc", images, split.labels.int()), **WANT)
    assert found.images.dtype == torch.float32
    assert not found.images.requires_grad
    assert torch.equal(found.images, images.detach().float())
    assert found.labels.dtype == torch.int64


def test_tensors_of_a_gpu_are_read_without_one(tmp_path):
    split = pixels()
    path = as_theirs(tmp_path, "idc", split.images, split.labels)
    torch.save([split.images, split.labels], path, _use_new_zipfile_serialization=False)
    # a pickled text is its length and its bytes
    path.write_bytes(path.read_bytes().replace(b"\x03\x00\x00\x00cpu", b"\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in path.read_bytes()
    assert torch.equal(read(path, **WANT).images, split.images)


def test_folders_and_names(tmp_path):
    split = pixels()
    as_theirs(tmp_path, "mtt", split.images, split.labels)
    assert read(tmp_path, space="whitened", **WANT).space == "whitened"
    torch.save(split.images + 1, tmp_path / "images_500.pt")
    assert "labels_500.pt does not exist" in refused(tmp_path / "images_500.pt", space="normalised")
    found = read(tmp_path / "images_500.pt", labels=tmp_path / "labels_best.pt", space="pixels", **WANT)
    assert torch.equal(found.images, split.images + 1)
    torch.save([split.labels], tmp_path / "labels_500.pt")
    assert "holds a list of 1 (Tensor), allowed is one tensor of labels" in refused(tmp_path / "images_500.pt", space="pixels")
    as_theirs(tmp_path, "idc", split.images, split.labels)
    assert "holds 2 of data.pt, images_best.pt" in refused(tmp_path)
    assert read(tmp_path, "idc", **WANT).form == "idc"
    assert "does not exist" in refused(tmp_path / "nothing.pt")


def test_soft_labels(tmp_path):
    soft = torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.5, 0.2]])
    path = as_theirs(tmp_path, "mtt", pixels(3).images, soft)
    found = read(path, space="normalised", **WANT)
    assert torch.equal(found.labels, soft)
    ordered = as_stored(found)
    assert torch.equal(ordered.labels, soft[[1, 2, 0]])
    assert torch.equal(ordered.images, found.images[[1, 2, 0]])
    as_theirs(tmp_path, "mtt", pixels(3).images, soft * 4 - 1)
    assert "put logits through softmax" in refused(path, space="normalised")
    as_theirs(tmp_path, "mtt", pixels(4).images, torch.cat([soft, soft[:1]]))
    assert "4 images with soft labels for 3 classes" in refused(path, space="normalised")


def test_the_same_set_is_known_again(tmp_path):
    split = pixels()
    path = as_theirs(tmp_path, "idc", split.images, split.labels)
    first = read(path, **WANT).identity()
    assert first == read(path, **WANT).identity()
    assert first != read(path, **(WANT | {"factor": 2})).identity()
    as_theirs(tmp_path, "idc", split.images * 0.999, split.labels)
    assert first["sha256"] != read(path, **WANT).identity()["sha256"]


# --- what is refused ---
class Harm:
    """Makes a file when it is unpickled carelessly."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Sly(Harm):
    """The same with the names that DC's files may hold."""

    def __reduce__(self):
        return np.dtype, (Harm(self.target),)


@pytest.mark.parametrize("kind", [Harm, Sly])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["alone", "idc", "dc", "labels"])
def test_code_in_a_file_does_not_run(tmp_path, kind, zipped, where):
    target, split = tmp_path / "harmed", pixels()
    path = as_theirs(tmp_path, "mtt", split.images, split.labels)
    harm = kind(target)
    content = {"alone": harm, "idc": [split.images, split.labels, harm], "labels": harm,
               "dc": {"data": [[split.images, split.labels]], "accs_all_exps": {"ConvNet": [harm]}}}[where]
    torch.save(content, tmp_path / "labels_best.pt" if where == "labels" else path, _use_new_zipfile_serialization=zipped)
    before = sorted(tmp_path.iterdir())
    assert "wants to run posix.system, which was not done" in refused(path, space="normalised")
    assert sorted(tmp_path.iterdir()) == before
    assert not target.exists()
    if where == "alone":  # the file is as harmful as it should be
        with contextlib.suppress(TypeError):
            torch.load(path, weights_only=False)
        assert target.exists()


def test_plain_pickles_run_nothing_either(tmp_path):
    (tmp_path / "data.pt").write_bytes(pickle.dumps(Harm(tmp_path / "harmed")))
    assert "get the file again" in refused(tmp_path / "data.pt") or "not done" in refused(tmp_path / "data.pt")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [b"", b"hello, this is no archive", pickle.dumps([1, 2]), b"PK\x03\x04junk", b"\x80\x02}q"],
                         ids=["empty", "text", "plain pickle", "zip", "pickle cut off"])
def test_other_files(tmp_path, content):
    (tmp_path / "data.pt").write_bytes(content)
    assert "cannot be read" in refused(tmp_path / "data.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_files_cut_off(tmp_path, zipped, share):
    split = pixels()
    torch.save([split.images, split.labels], tmp_path / "data.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "data.pt").read_bytes()
    (tmp_path / "data.pt").write_bytes(whole[:int(len(whole) * share)])
    assert "cannot be read" in refused(tmp_path / "data.pt")


IMAGES, LABELS = pixels().images, pixels().labels
CYCLE: dict = {}
CYCLE["data"] = CYCLE


@pytest.mark.parametrize("content, words", [
    ([IMAGES], "a list of 1 (Tensor)"), ([], "an empty list"), ("text", "a value of type str"),
    ([IMAGES, LABELS, LABELS], "a list of 3"), ([IMAGES, LABELS.tolist()], "a list of 2 (Tensor, list)"),
    ({"images": IMAGES, "la\nbels": LABELS}, "a dict with 'images', 'la\\nbels'"),
    ({"data": []}, "whose data is no list"), ({"data": [[IMAGES, LABELS], [IMAGES]]}, "whose data is no list"),
    (CYCLE, "whose data is no list"), (IMAGES, "does not say what its values are"),
], ids=range(10))
def test_other_contents(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    assert words in refused(tmp_path / "a.pt")


def soiled(value):
    images = IMAGES.clone()
    images[2, 0, 0, 0] = value
    return images


@pytest.mark.parametrize("images, labels, words", [
    (IMAGES[:, :1], LABELS, "images are (6, 1, 8, 8) float32, this data set's are (N, 3, 8, 8)"),
    (IMAGES[..., :4], LABELS, "images are (6, 3, 8, 4)"), (IMAGES[0], LABELS, "images are (3, 8, 8)"),
    (IMAGES[:0], LABELS[:0], "images are (0, 3, 8, 8)"), ((IMAGES * 255).byte(), LABELS, "(6, 3, 8, 8) uint8"),
    (soiled(float("nan")), LABELS, "1 of 6 images have pixels that are NaN"), (soiled(float("inf")), LABELS, "infinite"),
    (soiled(1e30).double() * 1e30, LABELS, "infinite"),
    (IMAGES[:1].clone().expand(6, -1, -1, -1), LABELS, "stored in full"), (IMAGES.to_sparse(), LABELS, "stored in full"),
    (IMAGES.to("meta"), LABELS, "stored in full"), (IMAGES, LABELS.to("meta"), "labels must be an ordinary tensor"),
    (IMAGES * 8 - 4, LABELS, "idc stores pixels in [0, 1]"),
    (IMAGES, LABELS[:5], "labels are (5,) int64, allowed are (6,)"),
    (IMAGES, LABELS + 1, "labels are 1 to 3, allowed are 0 to 2"),
    (IMAGES, LABELS - 1, "labels are -1 to 1"), (IMAGES, LABELS + 0.5, "not whole numbers (such as 0.5)"),
    (IMAGES, LABELS * float("nan"), "not whole numbers"), (IMAGES, LABELS > 0, "labels are (6,) bool"),
    (IMAGES, torch.rand(6, 4), "labels are (6, 4) float32"), (IMAGES, LABELS.clamp(max=1), "classes have 2, 4, 0 images"),
], ids=range(21))
def test_other_images_and_labels(tmp_path, images, labels, words):
    torch.save([images, labels], tmp_path / "data.pt")
    assert words in refused(tmp_path / "data.pt")


def test_other_requests(tmp_path):
    path = as_theirs(tmp_path, "idc", IMAGES, LABELS)
    assert "form dc allows" in refused(path, form="dc")
    assert "form must be auto, idc, mtt, dc; got 'kip'" in refused(path, form="kip")
    assert "space must be auto" in refused(path, space="yuv")
    assert "factor must be 1 to 8 for idc, got 9" in refused(path, factor=9)
    assert "factor must be 1 to 8 for idc, got 0" in refused(path, factor=0)
    assert "leave out the file of labels" in refused(path, labels=path)
    assert "allowed are 0 to 1" in refused(path, classes=2)
    path = as_theirs(tmp_path, "dc", IMAGES, LABELS)
    assert "factor must be 1 for dc, got 2" in refused(path, factor=2)


def test_whole_numbers_may_be_stored_as_floats(tmp_path):
    assert read(as_theirs(tmp_path, "idc", IMAGES, LABELS.float()), **WANT).labels.tolist() == LABELS.tolist()


# --- pixels ---
def test_normalised_sets_become_pixels_class_after_class(tmp_path):
    split = pixels()
    found = to_pixels(read(as_theirs(tmp_path, "dc", normalised(split.images), split.labels), **options("dc")), MEAN, STD)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(found.images, split.images[[0, 3, 1, 4, 2, 5]])


def test_pixels_stay_pixels(tmp_path):
    found = to_pixels(read(as_theirs(tmp_path, "idc", IMAGES * 1.2, LABELS), **WANT), MEAN, STD)
    assert torch.equal(found.images, IMAGES[[0, 3, 1, 4, 2, 5]] * 1.2)


def test_whitened_sets_stay_whitened():
    real = torch.rand(50, *SHAPE, generator=torch.Generator().manual_seed(2))
    whitening = zca.fit(real)
    published = Published(whitening.apply(IMAGES), LABELS, "mtt", "whitened", 1, 3)
    with pytest.raises(ValueError, match="a whitened set stays whitened") as error:
        to_pixels(published, MEAN, STD)
    line(error)
    assert torch.equal(as_stored(published).images, published.images[[0, 3, 1, 4, 2, 5]])
    torch.testing.assert_close(to_pixels(published, MEAN, STD, whitening).images, IMAGES[[0, 3, 1, 4, 2, 5]], atol=1e-6, rtol=0)


def test_the_authors_statistics():
    mean, std = authors_statistics("dc", "cifar100")
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4866, 0.4409]))
    torch.testing.assert_close(std, torch.tensor([0.2673, 0.2564, 0.2762]))
    torch.testing.assert_close(authors_statistics("mtt", "cifar100")[0], torch.tensor([0.4914, 0.4822, 0.4465]))
    assert authors_statistics("dc", "shapes") is None
    assert authors_statistics("idc", "cifar10") is None  # pixels need none
