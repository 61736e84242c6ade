"""One type for real and for distilled images."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images and labels that belong together.

    images: (N, C, H, W), either uint8 in [0, 255] or float32 in [0, 1].
    labels: (N,) int64 class indices, or (N, K) float32 soft labels whose rows sum to one.
    Raises ``ValueError`` on any other shape or type, or when the lengths differ.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"images must be (N, C, H, W) of uint8 or float32, got {tuple(self.images.shape)} "
                             f"of {str(self.images.dtype).removeprefix('torch.')}")
        hard = self.labels.dim() == 1 and self.labels.dtype == torch.int64
        soft = self.labels.dim() == 2 and self.labels.dtype == torch.float32
        if not (hard or soft):
            raise ValueError(f"labels must be (N,) int64 or (N, K) float32, got {tuple(self.labels.shape)} "
                             f"of {str(self.labels.dtype).removeprefix('torch.')}")
        if len(self.images) != len(self.labels):
            raise ValueError(f"images and labels must be equally many, got {len(self.images)} and {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> Split:
        """The rows at ``index`` (M,) int64, in that order."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def targets(self, classes: int) -> Tensor:
        """Labels as probabilities (N, classes) float32."""
        if self.labels.dim() == 2:
            return self.labels
        return torch.nn.functional.one_hot(self.labels, classes).float()

    def hard_labels(self) -> Tensor:
        """Class indices (N,) int64; the most probable class of soft labels."""
        return self.labels if self.labels.dim() == 1 else self.labels.argmax(1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Pixels (N, C, H, W), uint8 in [0, 255] or float in [0, 1], as float32 with channel mean 0 and deviation 1."""
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    shape = (1, -1, 1, 1)
    return (pixels - mean.to(pixels).view(shape)) / std.to(pixels).view(shape)


def per_class_indices(labels: Tensor, classes: int) -> list[Tensor]:
    """For each class the positions (n_c,) of its images, in order."""
    return [torch.nonzero(labels == c).flatten() for c in range(classes)]
