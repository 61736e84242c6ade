"""The settings of a whole study: one flat list of parameters. Those of what is made: :mod:`dpkit.stages.making`.

Profiles: :mod:`dpkit.stages.profiles`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpkit.connectivity import STATISTICS, PathSpec
from dpkit.hessian import HessianSpec, SharpnessSpec, SparseSpec
from dpkit.hessian.spectrum import SpectrumSpec
from dpkit.landscape import AroundSpec, PlaneSpec, ProfileSpec, SquareSpec
from dpkit.models import ModelSpec
from dpkit.robustness import RobustnessSpec
from dpkit.stages.making import SETS, SOFT, Making, checked


@dataclass(frozen=True, kw_only=True)
class Study(Making):
    """Everything that a study is made of: what it makes (see :class:`~dpkit.stages.making.Making`) and what it measures.

    Tickets: children (networks trained from each). Masks: early_bird_sources (``real`` or small sets) and early_bird_points
    (networks along their training). Robustness: robust_arms, robust_round (0: the last measured one), corruptions, severities,
    bits and robust_images (as in ``RobustnessSpec``).

    Connectivity: points on a path, statistics (BatchNorm on the way), path_precision (of paths and planes), path_tolerance
    (``error_tolerance`` of ``PathSpec``), train_path_images (training images on which paths are measured too; 0: none);
    statistics_arms, whose paths are measured with each kind of statistics, in a network with statistics_norm (``same``: the
    study's own), of statistics_arch (``ARCH:WIDTH``; nothing: the study's own); spawn_arms, whose children also part at each of
    spawn_epochs, for spawn_seeds initialisations (0: all); layer_arms, whose paths are measured layer by layer; between_arms,
    connected with each other and from round to round.

    Landscapes, at plane_round (0: the last measured one), on plane_images, with plane_compile: plane_arms (of the first
    initialisation, planes through three children), plane_resolution, plane_sets (small sets on which they are measured too),
    trajectory_points (networks along the training of each child, projected onto its plane; 0: none); square_arms,
    square_resolution, square_form (``bilinear``, through four children; ``diagonals``, the plane of the paper's code, which holds
    two); around_arms, around_resolution (random filter-normalised directions); and of all initialisations: profile_arms,
    profile_directions, profile_points (lines in such directions). reach: how far random directions go, in filters' norms.

    Curvature, on hessian_images: hessian_arms, probes, lanczos_steps, hessian_precision, trace_target (as precision
    and target in ``HessianSpec``; 0: ``probes`` serve); sharpness_arms, sharpness_radius, adaptive_radius (as in
    ``SharpnessSpec``); both at hessian_rounds (none: the last measured one). At spectrum_round (0: the last): spectrum_arms,
    eigenvalues, pair_products, density_probes, density_steps, trace_probes, other_probes (as in ``SpectrumSpec``);
    diagonal_arms, diagonal_probes, diagonal_limit (the published protocol's diagonal, exact up to so many entries, or surviving
    ones); removed_on (``real``, or small sets: what masks remove from the dense network's curvature), removed_probes,
    removed_draws; edge_arms, edge_points (the top eigenvalue along training, at so many even steps and some early ones).
    """

    children: int = 2
    early_bird_sources: tuple[str, ...] = ("real", "idc")
    early_bird_points: int = 10
    robust_arms: tuple[str, ...] = ("dense", "imp", "distilled", "random_real")
    corruptions: tuple[str, ...] = RobustnessSpec().corruptions
    severities: tuple[int, ...] = RobustnessSpec().severities
    bits: tuple[int, ...] = RobustnessSpec().bits
    robust_images: int = 0
    robust_round: int = 0
    points: int = 11
    statistics: str = "reestimate"
    path_precision: str = "fp32"
    path_tolerance: float = 0.0
    train_path_images: int = 0
    statistics_arms: tuple[str, ...] = ()
    statistics_norm: str = "batch"
    statistics_arch: str = ""
    spawn_arms: tuple[str, ...] = ()
    spawn_epochs: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    spawn_seeds: int = 0
    layer_arms: tuple[str, ...] = ()
    between_arms: tuple[str, ...] = ()
    plane_arms: tuple[str, ...] = ("dense", "distilled")
    plane_round: int = 0
    plane_resolution: int = 15
    plane_images: int = 1000
    plane_compile: bool = False
    plane_sets: tuple[str, ...] = ()
    trajectory_points: int = 0
    square_arms: tuple[str, ...] = ()
    square_resolution: int = 15
    square_form: str = "bilinear"
    around_arms: tuple[str, ...] = ()
    around_resolution: int = 15
    profile_arms: tuple[str, ...] = ()
    profile_directions: int = 5
    profile_points: int = 21
    reach: float = 1.0
    hessian_arms: tuple[str, ...] = ("dense", "imp", "distilled", "random_real")
    hessian_images: int = 500
    probes: int = 20
    hessian_precision: str = "fp32"
    trace_target: float = 0.0
    lanczos_steps: int = 20
    hessian_rounds: tuple[int, ...] = ()
    sharpness_arms: tuple[str, ...] = ()
    sharpness_radius: float = 0.05
    adaptive_radius: float = 0.5
    spectrum_arms: tuple[str, ...] = ()
    spectrum_round: int = 0
    eigenvalues: int = 10
    pair_products: int = 60
    density_probes: int = 10
    density_steps: int = 40
    trace_probes: int = 20
    other_probes: int = 10
    diagonal_arms: tuple[str, ...] = ()
    diagonal_probes: int = 100
    diagonal_limit: int = 0
    removed_on: tuple[str, ...] = ()
    removed_probes: int = 100
    removed_draws: int = 10
    edge_arms: tuple[str, ...] = ()
    edge_points: int = 8

    def check(self) -> None:
        super().check()
        self.choose("early_bird_sources", ("real", *self.known_sets))
        # what others published may lie in a whitened space, where these networks cannot see
        self.choose("plane_sets", (name for name in self.known_sets if name.removesuffix(SOFT) in SETS))
        for part in ARMED:
            self.choose(f"{part}_arms", ("dense", *self.arms))
        self.choose("removed_on", ("real", *(name for name in self.known_sets if name.removesuffix(SOFT) in SETS)))
        wrong = [r for r in self.hessian_rounds if r not in self.at_rounds]
        self.require(not wrong, f"hessian_rounds must be among at_rounds ({', '.join(map(str, self.at_rounds))}), got {wrong}")
        for name in ("early_bird_points", "profile_directions", "edge_points"):
            self.require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("train_path_images", "trajectory_points"):
            self.require(getattr(self, name) >= 0, f"{name} must be >= 0 (0: none), got {getattr(self, name)}")
        self.require(self.children >= 2, f"children must be >= 2, a path needs two ends; got {self.children}")
        for name in ("robust_round", "plane_round", "spectrum_round"):
            self.require(getattr(self, name) in (0, *self.at_rounds),
                         f"{name} must be 0 (the last) or one of at_rounds ({', '.join(map(str, self.at_rounds))}), got "
                         f"{getattr(self, name)}")
        self.require(0 <= self.spawn_seeds <= self.seeds,
                     f"spawn_seeds must lie in [0, {self.seeds}], the seeds (0: all of them), got {self.spawn_seeds}")
        if self.spawn_arms:
            wrong = [f"{epoch:g}" for epoch in self.spawn_epochs if not 0 < epoch < self.epochs]
            self.require(not wrong, f"spawn_epochs must lie between 0 and epochs ({self.epochs}), got {', '.join(wrong)}")
        self.one_of("statistics", STATISTICS)
        self.measured_network  # noqa: B018
        # each specification checks its own fields; what it calls them is put in the words of this file
        checked(lambda: self.robustness, images="robust_images")
        checked(lambda: self.path, precision="path_precision", error_tolerance="path_tolerance")
        checked(lambda: PlaneSpec(resolution=self.plane_resolution, images=self.plane_images), resolution="plane_resolution",
                images="plane_images")
        checked(lambda: SquareSpec(resolution=self.square_resolution, form=self.square_form), resolution="square_resolution",
                form="square_form")
        checked(lambda: AroundSpec(resolution=self.around_resolution, reach=self.reach), resolution="around_resolution")
        checked(lambda: ProfileSpec(points=self.profile_points, reach=self.reach), points="profile_points")
        self.require((self.profile_points - 1) % 4 == 0 or not self.profile_arms,
                     f"profile_points must be one more than a multiple of 4, so that half of the reach is a point; got "
                     f"{self.profile_points}")
        checked(lambda: HessianSpec(images=self.hessian_images, probes=self.probes, lanczos_steps=self.lanczos_steps,
                                    precision=self.hessian_precision, target=self.trace_target), images="hessian_images",
                precision="hessian_precision", target="trace_target")
        checked(lambda: SpectrumSpec(eigenvalues=self.eigenvalues, pair_products=self.pair_products, probes=self.density_probes,
                                     steps=self.density_steps, trace_probes=self.trace_probes, other_probes=self.other_probes),
                probes="density_probes", steps="density_steps")
        checked(lambda: SharpnessSpec(radius=self.sharpness_radius, adaptive_radius=self.adaptive_radius),
                radius="sharpness_radius")
        checked(lambda: SparseSpec(probes=self.removed_probes, draws=self.removed_draws, directions=self.eigenvalues,
                                   lanczos_steps=self.pair_products), probes="removed_probes", draws="removed_draws")
        checked(lambda: HessianSpec.published(probes=self.diagonal_probes), probes="diagonal_probes")
        self.require(self.diagonal_limit >= 0, f"diagonal_limit must be >= 0 (0: never exact), got {self.diagonal_limit}")

    # --- conversions to specifications ------------------------------------------------------------------------------------
    @property
    def robustness(self) -> RobustnessSpec:
        """What networks have to stand."""
        return RobustnessSpec(corruptions=self.corruptions, severities=self.severities, bits=self.bits,
                              images=self.robust_images)

    @property
    def path(self) -> PathSpec:
        """How paths between networks are measured."""
        return PathSpec(points=self.points, statistics=self.statistics, precision=self.path_precision,
                        error_tolerance=self.path_tolerance)

    @property
    def measured_network(self) -> dict[str, Any]:
        """The network whose statistics are compared: its arch, width and norm."""
        arch, _, width = self.statistics_arch.partition(":")
        self.require(not self.statistics_arch or width.isdigit(),
                     f"statistics_arch must be ARCH:WIDTH, such as resnet10:8, or nothing; got {self.statistics_arch!r}")
        norm = self.norm if self.statistics_norm == "same" else self.statistics_norm
        found = {"arch": arch or self.arch, "width": int(width) if width else self.width, "norm": norm}
        if self.statistics_arms:
            checked(lambda: ModelSpec(**found), norm="statistics_norm", arch="statistics_arch")
        return found


#: what has a parameter of its own for its arms, which must be among those of the study
ARMED = ("plane", "hessian", "robust", "statistics", "spawn", "layer", "between", "square", "around", "profile",
         "sharpness", "spectrum", "diagonal", "edge")
