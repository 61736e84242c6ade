"""The settings of what a study makes: data, networks, small sets and tickets; :mod:`dpkit.stages.study` adds what it measures.

These two files are the only place where a parameter's name turns into a specification.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from dpkit.data import AugmentSpec, DataSpec
from dpkit.distill import METHODS, DMSpec, GeneratorSpec, IDCSpec, MethodSpec, MTTSpec
from dpkit.distill.published import SPACES
from dpkit.models import ModelSpec
from dpkit.models.spec import BLOCKS
from dpkit.prune import PruneSpec
from dpkit.spec import Spec
from dpkit.stages.arms import LENT, TAKEN, Arm, arm_of
from dpkit.training import TrainSpec

#: the small sets by name: the method that makes each
SETS: dict[str, str] = {"idc": "idc", "idc_factor1": "idc", "dc": "dc", "dsa": "dsa", "dm": "dm", "mtt": "mtt",
                        "generator": "generator", "random_real": "random", "herding": "herding", "k_center": "k_center",
                        "el2n": "el2n"}
#: how the parameters of a method begin, where it is not with the method's name
PREFIXES = {"idc": "distill", "dsa": "dc"}
SOFT = "_soft"  # a set's name with this has a teacher's labels


@dataclass(frozen=True, kw_only=True)
class Making(Spec):
    """What a study makes. Defaults are a small study of the built-in data set.

    Data: dataset, classes, train_images and test_images to keep (0: all), image_size, as in ``DataSpec``. Network: arch, width,
    norm. Training on real data: epochs, batch_size, lr, momentum, weight_decay, schedule, augment (operations joined by ``_``),
    cutmix (probability), label_smoothing, nesterov, alternating_flip, precision, compile.

    Distillation: sets to make and compare (names of ``SETS``; with ``_soft`` behind it a set has a teacher's labels at
    soft_temperature), published sets of others as ``NAME=FILE``, ``NAME=FILE@FACTOR`` or ``NAME=FILE@whitened``, ipc,
    set_seeds (times that a learned set is made), and by method: factor and distill_* (IDC), dc_* (DC and DSA), dm_*, mtt_*,
    generator_*, each as in its specification, and dsa_augment (of DSA, DM and MTT); expert_*: of the networks that MTT follows
    and that IDC's pool holds (distill_pool of them; 0: fresh networks); el2n_networks. distill_memory: gigabytes that a
    distillation may take (0: no bound). Training on small sets: set_epochs for IDC's decoded images (other sets get as many
    steps), set_lr, set_batch (0: batch_size), set_augment, set_cutmix, evaluation_seeds, and evaluation_archs, other networks to
    train on them, as ``ARCH:WIDTH``.

    Pruning: arms (names: :mod:`dpkit.stages.arms`), fraction, rounds, at_rounds (the rounds whose tickets are trained and
    measured), scope, allocation, spare (as in ``PruneSpec``), rewind_epochs (what ``ltr`` rewinds to), snapshots (further steps
    of the dense run to keep, for ``ltr_STEP``), combined_round (distilled rounds of ``combined``), large_batch, early_epochs (of
    the searches that are named so), score_per_class (real images that SNIP and GraSP see), seeds (initialisations). run: seed of
    the whole study.
    """

    dataset: str = "shapes"
    classes: int = 0
    train_images: int = 0
    test_images: int = 0
    image_size: int = 64
    arch: str = "convnet3"
    width: int = 16
    norm: str = "auto"
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
    sets: tuple[str, ...] = tuple(SETS)
    published: tuple[str, ...] = ()
    soft_temperature: float = 1.0
    set_seeds: int = 1
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
    distill_pool: int = 0
    distill_memory: float = 0.0
    dsa_augment: str = "color_crop_cutout_flip_scale_rotate"
    dc_outer: int = 10
    dc_inner: int = 10
    dc_lr: float = 0.1
    dc_distance: str = "cosine"
    dc_real_batch: int = 64
    dc_network_epochs: int = 10
    dc_network_lr: float = 0.01
    dc_network_batch: int = 256
    dm_steps: int = 200
    dm_lr: float = 1.0
    dm_real_batch: int = 64
    mtt_steps: int = 100
    mtt_lr_img: float = 1000.0
    mtt_lr: float = 0.01
    mtt_lr_lr: float = 1e-5
    mtt_student_steps: int = 10
    mtt_batch: int = 0
    mtt_expert_epochs: int = 2
    mtt_max_start_epoch: int = 4
    expert_count: int = 4
    expert_epochs: int = 10
    expert_lr: float = 0.01
    generator_steps: int = 500
    generator_width: int = 16
    generator_batch: int = 32
    generator_lr: float = 1e-3
    generator_ema: float = 0.998
    el2n_networks: int = 3
    set_epochs: int = 100
    set_lr: float = 0.02
    set_batch: int = 0
    set_augment: str = "color_crop_flip_scale_rotate"
    set_cutmix: float = 0.5
    evaluation_seeds: int = 5
    evaluation_archs: tuple[str, ...] = ()
    arms: tuple[str, ...] = ("imp", "ltr", "distilled", "random_real", "random")
    fraction: float = 0.2
    rounds: int = 5
    at_rounds: tuple[int, ...] = (2, 5)
    rewind_epochs: float = 1.0
    scope: str = "all"
    allocation: str = "global"
    spare: tuple[str, ...] = ()
    snapshots: tuple[int, ...] = ()
    combined_round: int = 2
    large_batch: int = 512
    early_epochs: int = 2
    score_per_class: int = 10
    seeds: int = 3
    run: int = 0

    def check(self) -> None:
        self.require(bool(self.arms) and len(set(self.arms)) == len(self.arms),
                     f"arms must name at least one, each once; got {', '.join(self.arms) or 'none'}")
        network = ModelSpec(arch=self.arch, width=self.width, norm=self.norm)
        for name in self.arms:
            found = self.arm(name)
            self.require("norm_only" not in (found.scope, self.scope) or network.norm_kind != "none",
                         f"arm {name} keeps norms (scope norm_only), but {self.arch} has none here; use another scope or norm")
            self.require(found.training != "early_stopped" or self.early_epochs <= self.epochs,
                         f"early_epochs must be at most epochs ({self.epochs}) for arm {name}, got {self.early_epochs}")
            self.require(found.control not in LENT or self.seeds >= 2,
                         f"seeds must be >= 2 for arm {name}, which takes another initialisation's mask; got {self.seeds}")
            self.require(found.score != "synflow" or self.arch != "vit",
                         f"arm {name} needs a network without attention, got {self.arch}; use snip or grasp")
        self.choose("sets", self.known_sets)
        for name in ("seeds", "ipc", "rounds", "evaluation_seeds", "set_epochs", "set_seeds", "expert_count", "el2n_networks",
                     "combined_round", "large_batch", "early_epochs", "score_per_class"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("distill_memory", "distill_pool", "set_batch"):
            self.require(getattr(self, name) >= 0, f"{name} must be >= 0, got {getattr(self, name):g}")
        self.require(bool(self.at_rounds), "at_rounds must name at least one round")
        wrong = [r for r in self.at_rounds if not 1 <= r <= self.rounds]
        self.require(not wrong, f"at_rounds must lie in [1, {self.rounds}], the rounds; got {wrong}")
        self.require(self.combined_round <= self.rounds or not any(self.arm(name).before for name in self.arms),
                     f"combined_round must lie in [1, {self.rounds}], the rounds; got {self.combined_round}")
        self.between("rewind_epochs", 0, self.epochs, open_low=True, open_high=True)
        # each specification checks its own fields; what it calls them is put in the words of this file
        self.data, self.prune  # noqa: B018
        checked(lambda: self.train, operations="augment")
        for method in METHODS:
            prefix = PREFIXES.get(method, method)
            checked(lambda method=method: self.distill(method, self.factor), **{name: f"{prefix}_{name}" for name in (
                "outer", "inner", "lr", "distance", "real_batch", "network_images", "precision", "steps", "width", "batch",
                "student_steps", "expert_epochs", "max_start_epoch", "lr_img", "network_epochs", "ema")})
        checked(lambda: self.experts, epochs="expert_epochs", lr="expert_lr", operations="set_augment")
        checked(lambda: self.train_on_set(self.ipc), lr="set_lr", operations="set_augment", cutmix="set_cutmix")
        self.require(self.soft_temperature > 0, f"soft_temperature must be > 0, got {self.soft_temperature:g}")
        self.search, self.others  # noqa: B018

    def choose(self, name: str, allowed: Iterable[str]) -> None:
        """Raise ``ValueError`` unless all of the parameter ``name`` are among ``allowed``."""
        allowed = tuple(allowed)
        unknown = [v for v in getattr(self, name) if v not in allowed]
        shown = [v for v in allowed if not v.endswith(SOFT)]
        more = f", and each with {SOFT}" if len(shown) < len(allowed) else ""
        self.require(not unknown, f"{name} must be chosen from {', '.join(shown)}{more}; got {', '.join(unknown)}")

    @property
    def known_sets(self) -> tuple[str, ...]:
        """All small sets by name, those with soft labels last."""
        plain = (*SETS, *self.published_files)
        return (*plain, *(name + SOFT for name in plain))

    def arm(self, name: str) -> Arm:
        """The arm of a name; raises ``ValueError`` where this study has none."""
        return arm_of(name, self.known_sets, self.snapshots)

    # --- the only conversions from parameters to specifications ---------------------------------------------------------
    @property
    def data(self) -> DataSpec:
        """Which images."""
        return DataSpec(dataset=self.dataset, classes=self.classes, train=self.train_images, test=self.test_images,
                        image_size=self.image_size)

    @property
    def train(self) -> TrainSpec:
        """Training on real data."""
        return TrainSpec(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, momentum=self.momentum,
                         weight_decay=self.weight_decay, schedule=self.schedule, precision=self.precision,
                         augment=AugmentSpec(operations=self.augment), cutmix=self.cutmix, compile=self.compile,
                         label_smoothing=self.label_smoothing, nesterov=self.nesterov,
                         alternating_flip=self.alternating_flip)

    def train_on_set(self, per_class: int) -> TrainSpec:
        """Training on a small set of ``per_class`` decoded images a class: as many steps for every set as for IDC's."""
        epochs = max(1, round(self.set_epochs * self.ipc * self.factor**2 / per_class))
        return TrainSpec(epochs=epochs, batch_size=self.set_batch or self.batch_size, lr=self.set_lr, momentum=self.momentum,
                         weight_decay=self.weight_decay, precision=self.precision, compile=self.compile,
                         augment=AugmentSpec(operations=self.set_augment), cutmix=self.set_cutmix)

    def distill(self, method: str, factor: int = 1) -> MethodSpec:
        """How a small set is made; ``factor`` is IDC's."""
        common = {"ipc": self.ipc}
        if method == "idc":
            return IDCSpec(**common, factor=factor, outer=self.distill_outer, inner=self.distill_inner, lr=self.distill_lr,
                           distance=self.distill_distance, real_batch=self.distill_real_batch,
                           network_images=self.distill_network_images, precision=self.distill_precision,
                           compile=self.distill_compile, networks="pool" if self.distill_pool else "fresh")
        if method in ("dc", "dsa"):
            siamese = {"augment": AugmentSpec(operations=self.dsa_augment, single=True)} if method == "dsa" else {}
            return METHODS[method].spec(**common, **siamese, outer=self.dc_outer, inner=self.dc_inner, lr=self.dc_lr,
                                        distance=self.dc_distance, real_batch=self.dc_real_batch,
                                        network_epochs=self.dc_network_epochs, network_lr=self.dc_network_lr,
                                        network_batch=self.dc_network_batch)
        if method == "dm":
            return DMSpec(**common, steps=self.dm_steps, lr=self.dm_lr, real_batch=self.dm_real_batch,
                          augment=self.dsa_augment)
        if method == "mtt":
            return MTTSpec(**common, steps=self.mtt_steps, lr_img=self.mtt_lr_img, lr=self.mtt_lr, batch=self.mtt_batch,
                           student_steps=self.mtt_student_steps, expert_epochs=self.mtt_expert_epochs,
                           max_start_epoch=self.mtt_max_start_epoch, lr_lr=self.mtt_lr_lr, augment=self.dsa_augment)
        if method == "generator":
            return GeneratorSpec(**common, steps=self.generator_steps, width=self.generator_width, batch=self.generator_batch,
                                 lr=self.generator_lr, ema=self.generator_ema)
        return METHODS[method].spec(**common)

    @property
    def experts(self) -> TrainSpec:
        """Training of MTT's experts, as published: plain SGD at a constant rate, augmented (arXiv 2203.11932, section 4)."""
        return TrainSpec(epochs=self.expert_epochs, batch_size=self.batch_size, lr=self.expert_lr, momentum=0.0,
                         weight_decay=0.0, schedule="constant", precision=self.precision, compile=self.compile,
                         augment=AugmentSpec(operations=self.set_augment), cutmix=0.0)

    @property
    def published_files(self) -> dict[str, tuple[str, int, str]]:
        """File, factor (0: not said) and space of published sets by the names that they are given here."""
        found = {}
        for word in self.published:
            name, _, place = word.partition("=")
            path, at, more = place.rpartition("@")
            factor, space = int(more) if more.isdigit() else 0, more if more in SPACES else "auto"
            good = name.isidentifier() and name not in SETS and name not in found and not name.endswith(SOFT)
            self.require(good and bool(place) and (not at or factor >= 1 or space != "auto"),
                         "published must be NAME=FILE, NAME=FILE@FACTOR or NAME=FILE@SPACE (space: "
                         f"{', '.join(SPACES)}), each name once and not one of {', '.join(SETS)}; got {word!r}")
            # an arm of this name would search with something else, and nobody would see that
            self.require(name not in TAKEN, f"published must name a set as nothing else is named, got {name}, which means "
                                            f"{TAKEN.get(name)}; for example my_{name}={place}")
            found[name] = path or place, factor, space
        return found

    @property
    def others(self) -> dict[str, Self]:
        """This study with each of the ``evaluation_archs``, by the architecture's name."""
        found = {}
        for word in self.evaluation_archs:
            arch, _, width = word.partition(":")
            self.require(width.isdigit() and arch not in found, f"evaluation_archs must be ARCH:WIDTH, each once; got {word!r}")
            ModelSpec(arch=arch, width=int(width))
            found[arch] = dataclasses.replace(self, arch=arch, width=int(width), norm="auto", evaluation_archs=())
        return found

    @property
    def prune(self) -> PruneSpec:
        """How masks are found."""
        return PruneSpec(fraction=self.fraction, rounds=self.rounds, scope=self.scope, allocation=self.allocation,
                         spare=self.spare)

    @property
    def search(self) -> dict[str, TrainSpec]:
        """How searches on real data train, by :attr:`Arm.training`.

        A large batch keeps rate and passes, so it takes fewer steps. Stopping early is the first epochs at a constant rate,
        which is what they are in a schedule that falls late.
        """
        return {"usual": self.train, "large_batch": self.train.replace(batch_size=self.large_batch),
                "early_stopped": self.train.replace(epochs=self.early_epochs, schedule="constant")}

    def model(self, identity: dict) -> ModelSpec:
        """The network for a data set of this identity (``Dataset.identity``)."""
        channels, height, width = identity["shape"]
        if height != width:
            raise ValueError(f"images must be square, got {height} x {width}")
        return ModelSpec(arch=self.arch, width=self.width, norm=self.norm, image_size=height, channels=channels,
                         classes=identity["classes"], stem="imagenet" if height > 64 and self.arch in BLOCKS else "cifar")


def checked(build: Callable[[], Any], **names: str) -> None:
    """Build a specification for its checks; in an error the field's name is put as ``names`` says."""
    try:
        build()
    except ValueError as error:
        word, _, rest = str(error).partition(" ")
        raise ValueError(f"{names.get(word, word)} {rest}") from None
