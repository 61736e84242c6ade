"""Where things lie: the checkout, the store, the data, the executed notebooks. Everything else takes paths as arguments."""
from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """The checkout: the folder that holds ``_config.yml`` and ``notebooks``; the current folder if there is none."""
    here = Path(__file__).resolve().parents[1]
    for folder in (Path.cwd(), *Path.cwd().parents, here):
        if (folder / "_config.yml").is_file() and (folder / "notebooks").is_dir():
            return folder
    return Path.cwd()


def store_folder() -> Path:
    """The store: ``$DPKIT_STORE``, or ``results/store`` in the checkout."""
    return Path(os.environ.get("DPKIT_STORE") or root() / "results" / "store")


def data_folder() -> Path:
    """Where torchvision's sets are kept: ``$DPKIT_DATA``, or ``data`` in the checkout."""
    return Path(os.environ.get("DPKIT_DATA") or root() / "data")


def profile_name(profile: str) -> str:
    """The short name of a profile given by name or by the path of its file."""
    return Path(profile).stem


def run_folder(profile: str) -> Path:
    """Where the executed notebooks, figures and numbers of a profile go."""
    return root() / "book" / "runs" / profile_name(profile)


def recorded_folders() -> list[Path]:
    """Folders of the book that hold recorded results: those with a ``provenance.json``, recorded ones first."""
    book = root() / "book"
    found = [sorted(book.glob(pattern)) for pattern in ("*/provenance.json", "runs/*/provenance.json")]
    return [path.parent for paths in found for path in paths]
