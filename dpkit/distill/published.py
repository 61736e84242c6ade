"""Other people's distilled sets: reading the three layouts that authors publish.

=====  ======================================================  ==========================================================
form   file                                                    images
=====  ======================================================  ==========================================================
idc    ``data.pt``: list [images, labels]                      pixels near [0, 1]; each decodes into factor^2 images
mtt    ``images_best.pt`` and ``labels_best.pt``: a tensor      normalised channels; whitened instead when the authors'
       each                                                    ``--zca`` was on: the file does not say which
dc     ``res_*.pt``: dict, ``data`` a list of                   normalised channels
       [images, labels], one an experiment, ``accs_all_exps``
=====  ======================================================  ==========================================================

Read from the authors' code: snu-mllab/Efficient-Dataset-Condensation (condense.py, test.py, README), which is IDC;
GeorgeCazenavette/mtt-distillation (distill.py, utils.py); VICO-UoE/DatasetCondensation (main.py, main_DM.py, utils.py), which
is DC, DSA and DM. All have hard labels, class after class. :mod:`dpkit.distill.export` writes the same layouts.
"""
from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpkit.data import Split
from dpkit.data.zca import Whitening

FORMS = ("idc", "mtt", "dc")
SPACES = ("pixels", "normalised", "whitened")
_SPACE = {"idc": "pixels", "dc": "normalised"}
_LAYOUTS = "idc: a list [images, labels]; mtt: images alone, the labels in a second file; dc: a dict with data"

_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: channel means and deviations that the authors normalise with: ``get_dataset`` in utils.py of either repository. They differ
#: for CIFAR-100, and the deviations of CIFAR-10 are means over images, not the deviation over all pixels.
AUTHORS: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "dc": {"cifar10": _CIFAR10, "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
           "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)), "mnist": ((0.1307,), (0.3081,)),
           "fashionmnist": ((0.2861,), (0.3530,))},
    "mtt": {"cifar10": _CIFAR10, "cifar100": _CIFAR10, "imagenette": _IMAGENET},
}


@dataclass(frozen=True, eq=False)
class Published:
    """A distilled set as its authors stored it, checked.

    images: (N, C, H, W) float32, as stored. labels: (N,) int64, or (N, K) float32 whose rows sum to one. form: one of
    :data:`FORMS`. space: what the images' values are, one of :data:`SPACES`. factor: each image decodes into factor x factor.
    classes: K. experiments: how many sets the file holds; this is one of them.
    """

    images: Tensor
    labels: Tensor
    form: str
    space: str
    factor: int
    classes: int
    experiments: int = 1

    @property
    def ipc(self) -> int:
        """Stored images a class."""
        return len(self.images) // self.classes

    def identity(self) -> dict[str, Any]:
        """The plain facts that say which set this is, for a key: its layout and the SHA-256 of its values."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return {"form": self.form, "space": self.space, "factor": self.factor, "shape": list(self.images.shape),
                "classes": self.classes, "sha256": digest.hexdigest()}


class _Ignored:
    """What stands in for numpy's scalars while a file is read."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# DC's files list test accuracies as numpy scalars, whose constructors torch refuses. The accuracies are not wanted: under these
# names a file gets an object that keeps nothing and does nothing, so numpy itself is never called.
_NAMES = [(_Ignored, name) for name in ("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")]


def authors_statistics(form: str, dataset: str) -> tuple[Tensor, Tensor] | None:
    """The channel means and deviations (C,), (C,) in the authors' recipe for a data set, or None where there is no record."""
    found = AUTHORS.get(form, {}).get(dataset)
    return (torch.tensor(found[0]), torch.tensor(found[1])) if found else None


def read(path: str | Path, form: str = "auto", *, classes: int, image_shape: tuple[int, int, int], factor: int,
         labels: str | Path | None = None, space: str = "auto", experiment: int = 0) -> Published:
    """Read a published set and check all of it; nothing is written, and no code from the file runs.

    path: the file, or a folder with ``data.pt`` or ``images_best.pt``. form: one of :data:`FORMS`; "auto" tells them by what
    the file holds. classes, image_shape (C, H, W): those of the data set. factor: IDC's multi-formation factor, which its
    files do not hold (its authors' folders are named after it); 1 for the others. labels: the second file of ``mtt``; by
    default named like the images' (``labels_best.pt`` beside ``images_best.pt``). space: what the values are; "auto" knows
    it for ``idc`` and ``dc``, for ``mtt`` it must be said: "whitened" if made with ``--zca``, "normalised" if not, "pixels"
    for ``images_zca_*.pt``. experiment: which of the sets in a ``dc`` file, from 0.

    Raises ``ValueError``, one line, on anything else: a file that is none of these, is cut off or wants code run; other
    sizes; pixels that are not finite; labels that are missing, out of range, no whole numbers, or not equally many a class
    (soft labels: as many images as a multiple of the classes).
    """
    if form not in ("auto", *FORMS):
        raise ValueError(f"form must be auto, {', '.join(FORMS)}; got {form!r}")
    if space not in ("auto", *SPACES):
        raise ValueError(f"space must be auto, {', '.join(SPACES)}; got {space!r}")
    file = _file(Path(path), form)
    content, where = _load(file), f"published set {file}"
    found = _form(content)
    if found is None or form not in ("auto", found):
        raise ValueError(f"{where} holds {_describe(content)}{f', which is {found}' if found else ''}; "
                         f"form {form} allows {_LAYOUTS}")
    check_factor(factor, found, image_shape, where)
    if labels is not None and found != "mtt":
        raise ValueError(f"{where} is {found}, which holds its labels itself; leave out the file of labels")
    experiments = len(content["data"]) if found == "dc" else 1
    if not 0 <= experiment < experiments:
        raise ValueError(f"experiment must be 0 to {experiments - 1}, the sets in {file}; got {experiment}")
    if space == "auto" and found == "mtt":
        raise ValueError(f"{where} does not say what its values are; say space whitened if it was made with --zca, "
                         "or normalised if not (NAME=FILE@whitened, NAME=FILE@normalised)")
    if found == "mtt":
        second = _labels_file(file, labels)
        images, targets = content, _load(second)
        if not isinstance(targets, Tensor):
            raise ValueError(f"{second} holds {_describe(targets)}, allowed is one tensor of labels; give the labels of {file}")
    else:
        images, targets = content["data"][experiment] if found == "dc" else content
    images = _images(images, image_shape, where)
    if found == "idc" and space == "auto" and float(((images < -0.5) | (images > 1.5)).float().mean()) > 0.01:
        raise ValueError(f"{where} has values from {float(images.min()):.3g} to {float(images.max()):.3g}, idc stores pixels in "
                         "[0, 1]; say space normalised or whitened if that is what they are, or pixels to take them as they are")
    return Published(images, _labels(targets, len(images), classes, where), found,
                     _SPACE[found] if space == "auto" else space, factor, classes, experiments)


def to_pixels(published: Published, mean: Tensor, std: Tensor, whitening: Whitening | None = None) -> Split:
    """The set as pixel values (N, C, H, W) float32, class after class; they may leave [0, 1].

    mean, std: (C,) that normalised images were normalised with, see :func:`authors_statistics`; not used for the other
    spaces. whitening: that of whitened images, fitted on the pixels of the real training images. Raises ``ValueError`` when it
    is lacking. The recipe of a whitened set trains on the images as they are, :func:`as_stored`; pixels are for looking.
    """
    split = as_stored(published)
    if published.space == "pixels":
        return split
    if published.space == "whitened":
        if whitening is None:
            raise ValueError("a whitened set stays whitened: train on it as stored and whiten the test images, or give its "
                             "whitening to turn it into pixels")
        return Split(whitening.invert(split.images), split.labels)
    return Split(split.images * std.cpu().view(1, -1, 1, 1) + mean.cpu().view(1, -1, 1, 1), split.labels)


def as_stored(published: Published) -> Split:
    """The set with its values as they are, class after class (soft labels: by the most probable class)."""
    split = Split(published.images, published.labels)
    return split.select(torch.argsort(split.hard_labels(), stable=True))


def _file(path: Path, form: str) -> Path:
    """The file meant by a path that may be a folder."""
    if path.is_dir():
        names = {"idc": ["data.pt"], "mtt": ["images_best.pt"], "dc": []}.get(form, ["data.pt", "images_best.pt"])
        there = [path / name for name in names if (path / name).is_file()]
        if len(there) != 1:
            raise ValueError(f"folder {path} holds {len(there)} of {', '.join(names) or 'res_*.pt'}; give the path of the file")
        return there[0]
    if not path.is_file():
        raise ValueError(f"published set {path} does not exist; give the path of a data.pt, images_best.pt or res_*.pt")
    return path


def labels_beside(images: Path) -> Path:
    """Where the labels of an ``mtt`` file of images are: ``labels_best.pt`` for ``images_best.pt``, and for any other name."""
    name = images.name.replace("images", "labels", 1) if images.name.startswith("images") else "labels_best.pt"
    return images.with_name(name)


def _labels_file(file: Path, given: str | Path | None) -> Path:
    path = labels_beside(file) if given is None else Path(given)
    if not path.is_file():
        raise ValueError(f"published set {file} has no labels: {path} does not exist; give the path of its labels_best.pt")
    return path


def _load(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors, lists, dicts, numbers and text, nothing else."""
    try:
        with torch.serialization.safe_globals(_NAMES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: one line is enough
            return torch.load(str(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise ValueError(f"{file} wants to run {wanted[1]}, which was not done; only tensors in lists and dicts are read, "
                             "save it so again if you trust it") from None
        reason = "it is not what torch.save writes"
    except Exception as error:  # foreign bytes fail in any way
        reason = "it is cut off or not what torch.save writes" if not isinstance(error, PermissionError) else error.strerror
    raise ValueError(f"{file} cannot be read ({reason}); get the file again") from None


def _form(content: Any) -> str | None:
    """Which layout this is, or None."""
    def pair(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, Tensor) for v in value)
    if isinstance(content, Tensor):
        return "mtt"
    if isinstance(content, dict):
        data = content.get("data")
        return "dc" if isinstance(data, (list, tuple)) and data and all(pair(one) for one in data) else None
    return "idc" if pair(content) else None


def _describe(content: Any) -> str:
    """What a file holds, in words."""
    if isinstance(content, Tensor):
        return "one tensor"
    if isinstance(content, dict):
        shown = ", ".join(repr(key)[:20] if isinstance(key, str) else type(key).__name__ for key in list(content)[:4])
        what = f"a dict with {shown or 'nothing'}{', ...' if len(content) > 4 else ''}"
        return what + (", whose data is no list of [images, labels]" if "data" in content else "")
    if isinstance(content, (list, tuple)):
        kinds = ", ".join(type(value).__name__ for value in content[:4])
        return f"a list of {len(content)} ({kinds}{', ...' if len(content) > 4 else ''})" if content else "an empty list"
    return f"a value of type {type(content).__name__}"


def check_factor(factor: int, form: str, shape: tuple[int, ...], where: str) -> None:
    """Raise ``ValueError`` unless images of ``shape`` (C, H, W) decode by ``factor`` in this layout."""
    most = min(shape[1:]) if form == "idc" else 1
    if not 1 <= factor <= most:
        raise ValueError(f"factor must be 1{f' to {most}' if most > 1 else ''} for {form}, got {factor} for {where}")


def _plain(value: Tensor, what: str, where: str) -> Tensor:
    """An ordinary tensor in memory that has a stored value for each entry."""
    ordinary = not value.is_nested and value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not ordinary or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{where}: {what} must be an ordinary tensor that is stored in full; save it again as one")
    return value.detach()


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _images(value: Tensor, shape: tuple[int, int, int], where: str) -> Tensor:
    value = _plain(value, "images", where)
    if value.dim() != 4 or tuple(value.shape[1:]) != tuple(shape) or not len(value) or not value.is_floating_point():
        raise ValueError(f"{where}: images are {_kind(value)}, this data set's are (N, {', '.join(map(str, shape))}) floating "
                         "point; use the data set that it was made from")
    value = value.float().contiguous().clone()
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).flatten(1).any(1).sum())
        raise ValueError(f"{where}: {bad} of {len(value)} images have pixels that are NaN or infinite, all must be finite; "
                         "get the file again")
    return value


def _labels(value: Tensor, count: int, classes: int, where: str) -> Tensor:
    value = _plain(value, "labels", where)
    if value.dim() == 2 and tuple(value.shape) == (count, classes) and value.is_floating_point():
        return _soft(value.float().contiguous().clone(), classes, where)
    if tuple(value.shape) != (count,) or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{where}: labels are {_kind(value)}, allowed are ({count},) class numbers or ({count}, {classes}) "
                         "probabilities; use the labels and the number of classes that belong to the images")
    whole = value.double()
    if not bool((whole == whole.floor()).all()):
        raise ValueError(f"{where}: labels are not whole numbers (such as {float(whole[whole != whole.floor()][0]):g}), allowed "
                         f"are 0 to {classes - 1}; use the labels that belong to the images")
    if float(whole.min()) < 0 or float(whole.max()) >= classes:
        raise ValueError(f"{where}: labels are {float(whole.min()):.0f} to {float(whole.max()):.0f}, allowed are 0 to "
                         f"{classes - 1}; use the data set that it was made from")
    check_balance(value.long(), classes, where)
    return value.long().clone()


def _soft(value: Tensor, classes: int, where: str) -> Tensor:
    sums = value.sum(1)
    if not bool((value >= 0).all()) or not bool(((sums - 1).abs() <= 1e-3).all()):
        raise ValueError(f"{where}: soft labels are {float(value.min()):.3g} to {float(value.max()):.3g} with sums "
                         f"{float(sums.min()):.3g} to {float(sums.max()):.3g}, allowed are probabilities that sum to one; "
                         "put logits through softmax and save them again")
    if len(value) % classes:
        raise ValueError(f"{where}: {len(value)} images with soft labels for {classes} classes, allowed is a multiple of "
                         f"{classes}; use the set as its authors made it")
    return value


def check_balance(labels: Tensor, classes: int, where: str) -> None:
    """Raise ``ValueError`` unless each class has equally many of the labels (N,) int64."""
    counts = torch.bincount(labels, minlength=classes).tolist()
    if len(set(counts)) > 1:
        shown = ", ".join(map(str, counts[:20])) + (", ..." if classes > 20 else "")
        raise ValueError(f"{where}: classes have {shown} images, each must have equally many; leave out what is too much")
