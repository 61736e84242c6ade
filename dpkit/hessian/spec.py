"""What a Hessian measurement does: how many images, probes and Lanczos steps, on which parameters."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from dpkit.hessian.matrices import MATRICES
from dpkit.spec import Spec, later

MODES = ("eval", "train")
PRECISIONS = ("fp32", "bf16")
SCOPES = ("weights", "all")
DTYPES = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class HessianSpec(Spec):
    """Settings of one measurement.

    images         fixed images, spread evenly over the classes, un-augmented (at least 1)
    probes         random vectors for trace and diagonal (at least 2, or no error bar exists)
    lanczos_steps  products spent on the top eigenvalue (at least 1, at most the number of surviving weights)
    scope          "weights": the prunable weights; "all": biases and norm parameters too
    dtype          "float32" or "float64"
    target         relative standard error wanted of the trace, in [0, 1): a pilot decides how many fresh probes it takes
                   (:func:`dpkit.hessian.stopping.to_error`), and the diagonal keeps its ``probes``; 0: those serve both. Not with
                   precision bf16
    most           products that a target may cost at most (at least 32, a pilot and as many probes); unused without one
    matrix         "hessian", "gauss_newton" (the Fisher matrix) or "empirical_fisher": :mod:`dpkit.hessian.matrices`
    mode           "eval": running statistics; "train": BatchNorm takes those of the images, as one batch
    include_pruned rows and columns for pruned entries too, as if the network could move along them
    precision      "fp32"; "bf16": compiled products multiply in bfloat16, and a few in full precision correct the estimates

    How many images are differentiated at once is not here: it changes time and memory, not the result.
    Raises ``ValueError`` outside these ranges.
    """

    images: int = 500
    probes: int = 30
    lanczos_steps: int = 30
    scope: str = "weights"
    dtype: str = "float32"
    target: float = 0.0
    most: int = 1000
    matrix: str = later("hessian", before="hessian")
    mode: str = later("eval", before="eval")
    include_pruned: bool = later(False, before=False)
    precision: str = later("fp32", before="fp32")

    def check(self) -> None:
        self.require(self.images >= 1, f"images must be >= 1, got {self.images}")
        self.require(self.probes >= 2, f"probes must be >= 2 to give an error bar, got {self.probes}")
        self.require(self.lanczos_steps >= 1, f"lanczos_steps must be >= 1, got {self.lanczos_steps}")
        self.one_of("scope", SCOPES)
        self.one_of("dtype", DTYPES)
        self.one_of("matrix", MATRICES)
        self.one_of("mode", MODES)
        self.one_of("precision", PRECISIONS)
        self.require(self.precision == "fp32" or self.dtype == "float32",
                     f"precision bf16 rounds products of dtype float32, got dtype {self.dtype}; leave one of them out")
        self.between("target", 0.0, 1.0, open_high=True)
        self.require(self.target == 0 or self.precision == "fp32",
                     f"target needs precision fp32, got {self.precision}; leave one of them out")
        self.require(self.most >= 32, f"most must be >= 32 products (a pilot and as many probes), got {self.most}")

    @classmethod
    def published(cls, **changes) -> Self:
        """The published protocol: one batch of 64 images in train mode, pruned entries included, on the prunable weights.

        The images to go with it are 64 training images after one draw of the training augmentation, and the quantity is the
        exact diagonal (:func:`dpkit.hessian.exact_diagonal`, one product an entry): ``exact_diagonal(Operator.from_spec(
        HessianSpec.published(), ...), limit=...)``. It is there to be compared with the default, which avoids what bends it
        (:mod:`dpkit.hessian`). ``changes``: fields that are to differ.
        """
        return cls(**{"images": 64, "mode": "train", "include_pruned": True, **changes})
