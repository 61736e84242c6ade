"""Distilled sets for other people: the layouts that their code reads, and sheets to look at."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpkit.data import Split, normalise
from dpkit.distill.published import FORMS, check_balance, check_factor, labels_beside
from dpkit.files import place


def write(split: Split, path: str | Path, form: str, mean: Tensor | None = None, std: Tensor | None = None, *, factor: int = 1,
          overwrite: bool = False) -> list[Path]:
    """Write pixel values in a published layout, class after class, as the authors' code expects; returns the files.

    path: the file, or for ``mtt`` that of the images (the labels go beside it), or an existing folder, which gets
    ``data.pt``, ``images_best.pt`` or ``res.pt``. mean, std: (C,), for ``mtt`` and ``dc``, which store normalised images; zeros
    and ones store the values as they are, such as whitened ones. factor: IDC's. Each file is written whole or
    not at all. Raises ``ValueError``, one line, when a file is there and ``overwrite`` is not set, and on what the layout or
    the authors' code cannot take: soft labels (their code cuts these to integers), classes of unequal size, factors other
    than 1 outside ``idc``, pixels that are not finite.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    path, where = Path(path), f"the set for {path}"
    if path.is_dir():
        path = path / {"idc": "data.pt", "mtt": "images_best.pt", "dc": "res.pt"}[form]
    if split.labels.dim() != 1:
        raise ValueError(f"{form} stores class numbers, got soft labels {tuple(split.labels.shape)}; give hard labels")
    if not len(split) or int(split.labels.min()) < 0:
        raise ValueError(f"{form} stores at least one image a class with labels from 0, got {len(split)} images")
    check_factor(factor, form, tuple(split.images.shape[1:]), where)
    check_balance(split.labels, int(split.labels.max()) + 1, where)
    split = split.to("cpu").select(torch.argsort(split.labels, stable=True).cpu())
    if form == "idc":
        images = split.images.float() / 255 if split.images.dtype == torch.uint8 else split.images
    elif mean is None or std is None:
        raise ValueError(f"{form} stores normalised images, got no mean and std; give those of the authors' recipe")
    else:
        images = normalise(split.images, mean.cpu(), std.cpu())
    if not bool(torch.isfinite(images).all()):
        raise ValueError(f"{where}: pixels are NaN or infinite, all must be finite; nothing was written")
    # a clone: torch.save would store the whole of what a view is a part of
    images, labels = images.detach().contiguous().clone(), split.labels.clone()
    if form == "mtt":
        beside = labels_beside(path)
        if beside == path:
            raise ValueError(f"{path.name} is where the labels go; name the file of the images images_best.pt")
        return place({beside: _saved(labels), path: _saved(images)}, overwrite)[::-1]
    return place({path: _saved([images, labels] if form == "idc" else
                                {"data": [[images, labels]], "accs_all_exps": {}})}, overwrite)


def write_sheet(images: Tensor, labels: Tensor, path: str | Path, *, zoom: int = 2, overwrite: bool = False) -> list[Path]:
    """Draw pixel values (N, C, H, W), clipped to [0, 1], as PNG; returns the files.

    path: a file that ends in .png, which gets all images, a row a class; or a folder, which gets that as ``all.png`` and one
    ``class-K.png`` a class, ten images a row. labels: (N,) or soft. zoom: pixels a side for each pixel. Each file is written
    whole or not at all. Raises ``ValueError`` where files are there and ``overwrite`` is not set, on other than 1 or 3
    channels, on pixels that are not finite, and when Pillow is not installed.
    """
    path, split = Path(path), Split(images.detach().cpu(), labels.detach().cpu())
    if split.images.shape[1] not in (1, 3) or not len(split):
        raise ValueError(f"a sheet needs images with 1 or 3 channels, got {tuple(images.shape)}")
    if zoom < 1:
        raise ValueError(f"zoom must be >= 1, got {zoom}")
    pixels = split.images if split.images.dtype == torch.uint8 else split.images.clamp(0, 1) * 255
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("a sheet needs finite pixels, got NaN or infinity")
    pixels = pixels.round().to(torch.uint8).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    hard = split.hard_labels()
    rows = [pixels[hard == c] for c in range(int(hard.max()) + 1)]
    if path.suffix.lower() == ".png":
        return place({path: _png(rows)}, overwrite)
    files = {path / "all.png": _png(rows)}
    for c, row in enumerate(rows):
        if len(row):
            files[path / f"class-{c:0{len(str(len(rows) - 1))}d}.png"] = _png(list(row.split(10)))
    return place(files, overwrite)


def _png(rows: list[Tensor], gap: int = 2) -> bytes:
    """Rows of uint8 images (n, C, H, W) side by side on white, as the bytes of a PNG file."""
    try:
        from PIL import Image
    except ImportError:
        raise ValueError("sheets need the package pillow; `pip install pillow`") from None
    channels, height, width = rows[0].shape[1:]
    columns = max(map(len, rows))
    sheet = torch.full((channels, gap + len(rows) * (height + gap), gap + columns * (width + gap)), 255, dtype=torch.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = gap + r * (height + gap), gap + c * (width + gap)
            sheet[:, top:top + height, left:left + width] = image
    buffer = io.BytesIO()
    Image.fromarray((sheet[0] if channels == 1 else sheet.permute(1, 2, 0)).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
