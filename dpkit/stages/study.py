"""The settings of a whole study: one flat list of parameters, and the specifications that follow from it.

A profile (a small YAML file) gives some of them, ``--set`` and a notebook's parameters cell change some; the rest are the
defaults here. This is the only place where a parameter's name turns into a specification.
"""
from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dpkit.connectivity import PathSpec
from dpkit.data import AugmentSpec, DataSpec
from dpkit.distill import DistillSpec
from dpkit.hessian import HessianSpec
from dpkit.landscape import PlaneSpec
from dpkit.models import ModelSpec
from dpkit.prune import PruneSpec
from dpkit.spec import Spec, parse
from dpkit.training import TrainSpec

#: what each arm searches its mask with, and whether it rewinds to an early step instead of initialisation
ARMS: dict[str, tuple[str, bool]] = {
    "imp": ("real", False),
    "ltr": ("real", True),
    "distilled": ("idc", False),
    "random_real": ("random", False),
    "random": ("none", False),
}
SETS = ("idc", "idc_factor1", "random_real", "herding")


@dataclass(frozen=True, kw_only=True)
class Study(Spec):
    """Everything that a study is made of. Defaults are a small study of the built-in data set.

    Data: dataset (see ``DataSpec``), train_images and test_images to keep (0: all), image_size of image folders. Network:
    arch, width. Training on real data: epochs, batch_size, lr, momentum, weight_decay, schedule, augment (operations joined
    by ``_``), cutmix (probability), label_smoothing, nesterov, alternating_flip, precision, compile. Distillation: sets to
    make and compare, ipc, factor, distill_* as in ``DistillSpec``. Training on small sets: set_epochs for IDC's decoded
    images (other sets get as many steps), set_lr, set_augment, set_cutmix, evaluation_seeds. Pruning: arms, fraction, rounds,
    at_rounds (the rounds whose tickets are trained and measured), rewind_epochs (what ``ltr`` rewinds to), scope. Measuring:
    seeds (initialisations), children (per ticket), points on a path, statistics (BatchNorm on the way),
    path_precision (of paths and planes), plane_arms,
    plane_resolution, plane_images, hessian_arms, hessian_images, probes, lanczos_steps. run: seed of the whole study.
    """

    dataset: str = "shapes"
    train_images: int = 0
    test_images: int = 0
    image_size: int = 64
    arch: str = "convnet3"
    width: int = 16
    epochs: int = 15
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "multistep"
    augment: str = ""
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    nesterov: bool = False
    alternating_flip: bool = False
    precision: str = "fp32"
    compile: bool = False
    sets: tuple[str, ...] = SETS
    ipc: int = 10
    factor: int = 2
    distill_outer: int = 20
    distill_inner: int = 10
    distill_lr: float = 5e-3
    distill_distance: str = "squared"
    distill_real_batch: int = 64
    distill_network_images: int = 256
    distill_precision: str = "fp32"
    distill_compile: bool = False
    set_epochs: int = 100
    set_lr: float = 0.02
    set_augment: str = "color_crop_flip_scale_rotate"
    set_cutmix: float = 0.5
    evaluation_seeds: int = 5
    arms: tuple[str, ...] = tuple(ARMS)
    fraction: float = 0.2
    rounds: int = 5
    at_rounds: tuple[int, ...] = (2, 5)
    rewind_epochs: float = 1.0
    scope: str = "all"
    seeds: int = 3
    children: int = 2
    points: int = 11
    statistics: str = "reestimate"
    path_precision: str = "fp32"
    plane_arms: tuple[str, ...] = ("dense", "distilled")
    plane_resolution: int = 15
    plane_images: int = 1000
    hessian_arms: tuple[str, ...] = ("dense", "imp", "distilled", "random_real")
    hessian_images: int = 500
    probes: int = 20
    lanczos_steps: int = 20
    run: int = 0

    def check(self) -> None:
        for name, allowed in (("arms", tuple(ARMS)), ("sets", SETS), ("plane_arms", ("dense", *self.arms)),
                              ("hessian_arms", ("dense", *self.arms))):
            unknown = [v for v in getattr(self, name) if v not in allowed]
            self.require(not unknown, f"{name} must be chosen from {', '.join(allowed)}; got {', '.join(unknown)}")
        for name in ("seeds", "ipc", "rounds", "evaluation_seeds", "set_epochs"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        self.require(self.children >= 2, f"children must be >= 2, a path needs two ends; got {self.children}")
        self.require(bool(self.at_rounds), "at_rounds must name at least one round")
        wrong = [r for r in self.at_rounds if not 1 <= r <= self.rounds]
        self.require(not wrong, f"at_rounds must lie in [1, {self.rounds}], the rounds; got {wrong}")
        self.between("rewind_epochs", 0, self.epochs, open_low=True, open_high=True)
        self.one_of("statistics", ("reestimate", "interpolate"))
        # each specification checks its own fields; what it calls them is put in the words of this file
        self.data, self.prune  # noqa: B018
        _checked(lambda: self.train, operations="augment")
        _checked(lambda: self.distill(self.factor), **{name: f"distill_{name}" for name in (
            "outer", "inner", "lr", "distance", "real_batch", "network_images", "precision")})
        _checked(lambda: self.train_on_set(self.factor), lr="set_lr", operations="set_augment", cutmix="set_cutmix")
        ModelSpec(arch=self.arch, width=self.width)
        _checked(lambda: PathSpec(points=self.points, precision=self.path_precision), precision="path_precision")
        _checked(lambda: PlaneSpec(resolution=self.plane_resolution, images=self.plane_images), resolution="plane_resolution",
                 images="plane_images")
        _checked(lambda: HessianSpec(images=self.hessian_images, probes=self.probes, lanczos_steps=self.lanczos_steps),
                 images="hessian_images")

    # --- the only conversions from parameters to specifications ---------------------------------------------------------
    @property
    def data(self) -> DataSpec:
        """Which images."""
        return DataSpec(dataset=self.dataset, train=self.train_images, test=self.test_images, image_size=self.image_size)

    @property
    def train(self) -> TrainSpec:
        """Training on real data."""
        return TrainSpec(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, momentum=self.momentum,
                         weight_decay=self.weight_decay, schedule=self.schedule, precision=self.precision,
                         augment=AugmentSpec(operations=self.augment), cutmix=self.cutmix, compile=self.compile,
                         label_smoothing=self.label_smoothing, nesterov=self.nesterov,
                         alternating_flip=self.alternating_flip)

    def train_on_set(self, factor: int) -> TrainSpec:
        """Training on a small set. Sets that decode into fewer images get more epochs, so that all take as many steps."""
        epochs = max(1, round(self.set_epochs * (self.factor / factor) ** 2))
        return TrainSpec(epochs=epochs, batch_size=self.batch_size, lr=self.set_lr, momentum=self.momentum,
                         weight_decay=self.weight_decay, precision=self.precision, compile=self.compile,
                         augment=AugmentSpec(operations=self.set_augment), cutmix=self.set_cutmix)

    def distill(self, factor: int, method: str = "idc") -> DistillSpec:
        """How a small set is made."""
        if method != "idc":
            return DistillSpec(method=method, ipc=self.ipc, factor=1)
        return DistillSpec(ipc=self.ipc, factor=factor, outer=self.distill_outer, inner=self.distill_inner,
                           lr=self.distill_lr, distance=self.distill_distance, real_batch=self.distill_real_batch,
                           network_images=self.distill_network_images, precision=self.distill_precision,
                           compile=self.distill_compile)

    @property
    def prune(self) -> PruneSpec:
        """How masks are found."""
        return PruneSpec(fraction=self.fraction, rounds=self.rounds, scope=self.scope)

    def model(self, identity: dict) -> ModelSpec:
        """The network for a data set of this identity (``Dataset.identity``)."""
        channels, height, width = identity["shape"]
        if height != width:
            raise ValueError(f"images must be square, got {height} x {width}")
        return ModelSpec(arch=self.arch, width=self.width, image_size=height, channels=channels,
                         classes=identity["classes"], stem="imagenet" if height > 64 and self.arch != "convnet3" else "cifar")


def _checked(build: Callable[[], Any], **names: str) -> None:
    """Build a specification for its checks; in an error the field's name is put as ``names`` says."""
    try:
        build()
    except ValueError as error:
        word, _, rest = str(error).partition(" ")
        raise ValueError(f"{names.get(word, word)} {rest}") from None


FIELDS: dict[str, Any] = {name: kind for name, kind in typing.get_type_hints(Study).items()
                          if name in {f.name for f in dataclasses.fields(Study)}}


def unknown(kind: str, name: str, allowed: typing.Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``allowed``, with the nearest one that is."""
    allowed = list(allowed)
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"
    return ValueError(f"unknown {kind} {name!r}; {hint}")


@cache
def profiles() -> dict[str, Path]:
    """The profiles that come with the library, by name."""
    folder = resources.files("dpkit") / "profiles"
    return {Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if str(f).endswith(".yml")}


def read_profile(name: str) -> dict[str, Any]:
    """The settings in a profile: a name that comes with the library, or the path of a YAML file."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else profiles().get(name)
    if path is None:
        raise unknown("profile", name, profiles())
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"profile file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {name} is not readable YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"profile {name} must be a list of `name: value` lines")
    return settings


def load_study(profile: str, overrides: dict[str, Any] | None = None) -> Study:
    """The study of a profile with some parameters changed; words are read as the declared types.

    Where ``arms`` changes and plane_arms or hessian_arms do not, arms that are no longer there are not measured either.
    Raises ``ValueError`` on an unknown profile or parameter, a wrong type or a value out of range.
    """
    settings: dict[str, Any] = {}
    for source in (read_profile(profile), overrides or {}):
        for name, value in source.items():
            if name not in FIELDS:
                raise unknown("parameter", str(name), FIELDS)
            # YAML reads 1e-3 as a word, so words are parsed from files too
            settings[name] = parse(name, value, FIELDS[name])
        for name in ("plane_arms", "hessian_arms"):
            if "arms" in source and name not in source:
                before = settings.get(name, getattr(Study, name))
                settings[name] = tuple(a for a in before if a in ("dense", *settings["arms"])) or ("dense",)
    return Study(**settings)
