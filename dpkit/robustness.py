"""What a trained network loses on corrupted images and with weights of few bits; nothing is trained or adapted.

Corruptions: Hendrycks and Dietterich 2019 (arXiv 1903.12261), see :mod:`dpkit.data.corruptions`. Quantisation: see
:mod:`dpkit.models.quantise`. BatchNorm keeps the statistics of its training in both.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dpkit import models, tree
from dpkit.data import Split, normalise
from dpkit.data.corruptions import NAMES, SEVERITIES, STANDARD, corrupt
from dpkit.models import ModelSpec
from dpkit.models.quantise import LEAST_BITS, MOST_BITS, fake_quantise
from dpkit.spec import Spec
from dpkit.training import evaluate_many
from dpkit.training.evaluation import pays
from dpkit.tree import Buffers, Params

#: uint8 images (N, C, H, W) by corruption and severity
Corrupted = Mapping[tuple[str, int], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustnessSpec(Spec):
    """What is done to the test images and to the weights.

    corruptions: names of ``dpkit.data.corruptions.NAMES``; by default those of the benchmark's test that can be made from the
    images alone. severities: of 1 to 5. bits: of the weights, each from 2 to 16; empty for none. images: how many test images
    are used, evenly spaced over those passed; 0 for all.
    """

    corruptions: tuple[str, ...] = STANDARD
    severities: tuple[int, ...] = SEVERITIES
    bits: tuple[int, ...] = (8, 6, 4, 3, 2)
    images: int = 0

    def check(self) -> None:
        unknown = [name for name in self.corruptions if name not in NAMES]
        self.require(not unknown, f"corruptions must be chosen from {', '.join(NAMES)}; got {', '.join(unknown)}")
        outside = [s for s in self.severities if s not in SEVERITIES]
        self.require(not outside, f"severities must lie in [{SEVERITIES[0]}, {SEVERITIES[-1]}], got {outside}")
        outside = [b for b in self.bits if not LEAST_BITS <= b <= MOST_BITS]
        self.require(not outside, f"bits must lie in [{LEAST_BITS}, {MOST_BITS}], got {outside}")
        for name in ("corruptions", "severities", "bits"):
            values = getattr(self, name)
            self.require(len(set(values)) == len(values), f"{name} must name each one once, got {', '.join(map(str, values))}")
            self.require(bool(values) or name == "bits", f"{name} must name at least one; leave it out for the usual ones")
        self.require(self.images >= 0, f"images must be at least 0 (0 means all), got {self.images}")


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Errors (fractions in [0, 1]) and mean cross-entropies (nats) of one network on the same test images; float64.

    clean_*: on the images as they are, with the weights as they are. corruption_errors, corruption_losses: (C, S), rows and
    columns in the order of the specification. quantised_errors, quantised_losses: (B,), on clean images with prunable weights
    of so many bits.
    """

    clean_error: float
    clean_loss: float
    corruption_errors: Tensor
    corruption_losses: Tensor
    quantised_errors: Tensor
    quantised_losses: Tensor

    @property
    def mean_corruption_error(self) -> float:
        """Mean error over corruptions and severities, each counting the same: Hendrycks and Dietterich's mCE (2019, section 4.2)
        without division by the errors of a reference network, since every arm stands beside the dense one."""
        return float(self.corruption_errors.mean())


def chosen(spec: RobustnessSpec, count: int) -> Tensor:
    """Positions of the test images that are used, out of ``count``: (M,) int64, evenly spaced."""
    return models.spread(count, spec.images or count)


def corrupted_images(spec: RobustnessSpec, images: Tensor, seed: int) -> dict[tuple[str, int], Tensor]:
    """The used ones of the test ``images`` (N, C, H, W) uint8, under each corruption and severity: (M, C, H, W) uint8 each.

    Random numbers come from ``seed`` and the names alone, so a corruption is the same whatever else is asked for, and every
    network that is measured with this seed sees the same images. All are held at once: :func:`bytes_needed` of them.
    """
    return dict(_corrupted(spec, images, seed))


def bytes_needed(spec: RobustnessSpec, count: int, shape: tuple[int, int, int]) -> int:
    """Bytes that :func:`corrupted_images` takes for ``count`` test images of ``shape`` (C, H, W)."""
    kept = min(spec.images or count, count)
    return kept * shape[0] * shape[1] * shape[2] * len(spec.corruptions) * len(spec.severities)


def _corrupted(spec: RobustnessSpec, images: Tensor, seed: int) -> Iterator[tuple[tuple[str, int], Tensor]]:
    used = images[chosen(spec, len(images)).to(images.device)]
    for name in spec.corruptions:
        for severity in spec.severities:
            yield (name, severity), corrupt(used, name, severity, tree.generator_for(seed, "corrupt", name, severity))


@torch.no_grad()
def measure(spec: RobustnessSpec, model: ModelSpec, params: Params, buffers: Buffers, test: Split, mean: Tensor, std: Tensor,
            seed: int, corrupted: Corrupted | None = None) -> Robustness:
    """Errors of one network in eval mode on clean and corrupted images, and with its prunable weights rounded to few bits.

    test: uint8 images with hard labels, not normalised. mean, std: (C,), with which the network was trained. seed: of the
    corruptions. corrupted: of :func:`corrupted_images` with the same arguments, if several networks share them; None makes them
    one after another, the same ones.
    Raises ``ValueError`` when the images are not uint8 or do not fit the network, when labels are soft, and when ``corrupted``
    lacks what is asked for or has another number of images.
    """
    if test.images.dtype != torch.uint8 or test.labels.dim() != 1:
        raise ValueError(f"test must be uint8 images with hard labels (N,), got {str(test.images.dtype).removeprefix('torch.')} "
                         f"and labels {tuple(test.labels.shape)}; pass the split as it was loaded, not normalised")
    device = next(iter(params.values())).device
    index = chosen(spec, len(test))
    clean, labels = test.images[index.to(test.images.device)], test.labels[index.to(test.labels.device)].to(device)
    if corrupted is not None:
        _check_corrupted(spec, corrupted, clean)
    source = _corrupted(spec, test.images, seed) if corrupted is None else (
        ((name, severity), corrupted[name, severity]) for name in spec.corruptions for severity in spec.severities)
    passes = 1 + len(spec.corruptions) * len(spec.severities) + len(spec.bits)
    compiled = pays(model, passes * len(clean))

    def score(pixels: Tensor, *networks: Params) -> Tensor:
        """(networks, 2): error and loss."""
        images = normalise(pixels.to(device), mean, std)
        return torch.stack(evaluate_many(model, len(networks), lambda i: (networks[i], buffers), images, labels,
                                         compiled=compiled), 1)

    names = models.prunable(model)
    on_clean = score(clean, params, *(fake_quantise(params, names, bits) for bits in spec.bits))
    on_corrupted = torch.cat([score(pixels, params) for _, pixels in source])
    table = on_corrupted.view(len(spec.corruptions), len(spec.severities), 2)
    return Robustness(clean_error=float(on_clean[0, 0]), clean_loss=float(on_clean[0, 1]),
                      corruption_errors=table[..., 0].contiguous(), corruption_losses=table[..., 1].contiguous(),
                      quantised_errors=on_clean[1:, 0].contiguous(), quantised_losses=on_clean[1:, 1].contiguous())


def _check_corrupted(spec: RobustnessSpec, corrupted: Corrupted, clean: Tensor) -> None:
    for name in spec.corruptions:
        for severity in spec.severities:
            found = corrupted.get((name, severity))
            if found is None:
                raise ValueError(f"corrupted must hold every corruption and severity asked for, {name} at {severity} is missing; "
                                 "make it with corrupted_images and the same specification")
            if found.shape != clean.shape or found.dtype != torch.uint8:
                kind = str(found.dtype).removeprefix("torch.")
                raise ValueError(f"corrupted images must be {tuple(clean.shape)} uint8 as the clean ones are, got {name} at "
                                 f"{severity} with {tuple(found.shape)} {kind}; make them with the same specification and images")
