"""The one interface of all methods: a specification and a task in, a small set out."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dpkit.data import Split, per_class_indices
from dpkit.models import ModelSpec
from dpkit.spec import Spec
from dpkit.tree import Buffers, Params

#: one network at several times of its training, the earliest first
Trajectory = Sequence[tuple[Params, Buffers]]


@dataclass(frozen=True, kw_only=True)
class MethodSpec(Spec):
    """What every method is asked: ``ipc`` stored images per class. Subclasses name their ``method`` and add its settings.

    :meth:`to_dict` writes the method's name too; :func:`dpkit.distill.spec_of` reads it.
    """

    method: ClassVar[str]
    factor: ClassVar[int] = 1  # each stored image decodes into factor x factor training images
    ipc: int = 10

    def check(self) -> None:
        self.require(self.ipc >= 1, f"ipc must be >= 1, got {self.ipc}")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method} | super().to_dict()

    def held(self, classes: int) -> float:
        """The most images whose activations are kept at once, counted in those of one image of a plain backward pass."""
        return 0.0

    def fewest(self, classes: int) -> float:
        """The same when as little is done at once as the method can."""
        return self.held(classes)

    def lower(self) -> str:
        """The options that lower :meth:`fewest`, in words."""
        return "ipc"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method works on, and how it is run.

    real: the training images. mean, std: (C,) of the normalisation. model: the network that matches, embeds or learns.
    seed: all of the method's randomness follows from it. networks: trajectories of networks trained on real data, for the
    methods that want them. device, threads: where it runs; threads are Python threads of one core each, for a CPU, which
    change no bit. held: at most so many images' activations at once (see :meth:`MethodSpec.held`); None: no bound. resume:
    what ``checkpoint`` was last given, by a run that was stopped; the rest then comes out as in a straight run, bit for bit
    on a CPU. progress: called with (step, steps).
    """

    real: Split
    mean: Tensor
    std: Tensor
    model: ModelSpec
    seed: int
    networks: Sequence[Trajectory] = ()
    device: str = "cpu"
    threads: int = 1
    held: float | None = None
    resume: Mapping[str, Tensor] | None = None
    checkpoint: Callable[[Mapping[str, Tensor]], None] | None = None
    progress: Callable[[int, int], None] | None = None

    def places(self, count: int, what: str = "ipc") -> list[Tensor]:
        """The positions of each class's images; raises ``ValueError`` where a class has fewer than ``count``."""
        places = per_class_indices(self.real.hard_labels(), self.model.classes)
        for c, place in enumerate(places):
            if len(place) < count:
                raise ValueError(f"{what} must be at most the images of a class; class {c} has {len(place)}, got {count}")
        return places

    def tick(self, step: int, steps: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress is not None:
            self.progress(step, steps)

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """Offer a state to go on from, if anybody keeps it."""
        if self.checkpoint is not None:
            self.checkpoint(state)

    def room(self, spec: MethodSpec) -> bool:
        """Whether all that ``spec`` would like to hold at once is allowed. Raises ``ValueError`` if not even the least is."""
        if self.held is None:
            return True
        least = spec.fewest(self.model.classes)
        if least > self.held:
            raise ValueError(f"{spec.method} needs the activations of {least:,.0f} images at once, the memory bound allows "
                             f"{self.held:,.0f}; raise distill_memory, or lower {spec.lower()}")
        return spec.held(self.model.classes) <= self.held


@dataclass(frozen=True)
class Made:
    """A small set as a method leaves it.

    split: the stored images (K * ipc, C, H, W) float32 as pixel values, class after class, and their labels. Methods that do
    not clamp may leave [0, 1]. history: one value a step or an outer iteration, the method's own loss. learned: settings of
    the training that were learned with the images, such as ``lr``; they belong to the recipe. before: the stored images
    (K * ipc, C, H, W) that a learned set started from.
    """

    split: Split
    history: tuple[float, ...] = ()
    learned: Mapping[str, float] = field(default_factory=dict)
    before: Tensor | None = None


Maker = Callable[[Any, Task], Made]
