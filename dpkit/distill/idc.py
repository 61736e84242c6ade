"""IDC: information-intensive dataset condensation (Kim et al. 2022, arXiv 2205.14959).

Stored images are mosaics of ``factor`` x ``factor`` training images (section 4.1), and the network that they are matched on is
trained on real images between the steps (section 4.3), so that its gradients stay large.

Departure from the published loop, with the same dynamics: there, one optimiser with momentum 0.5 steps once for each class
in turn, so between two gradients of a class its momentum has decayed ten times. Per class that is plain gradient descent
with twice the learning rate (to one part in a thousand for ten classes). Here all classes are matched on the same network
and stepped together, without momentum and with the doubled rate.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from dpkit.data import AugmentSpec
from dpkit.distill.interface import Made, Task
from dpkit.distill.learn import learn
from dpkit.distill.spec import MatchingSpec


@dataclass(frozen=True, kw_only=True)
class IDCSpec(MatchingSpec):
    """IDC's settings; defaults as published for CIFAR-10 with ConvNet-3.

    lr: image learning rate at ten images a class (it grows with ipc / 10). The form for ImageNet subsets has ``distance``
    ``l1``, ``factor`` 3, 500 ``outer`` iterations, ``lr`` 3e-3, 500 ``network_images`` and ``networks`` from a ``pool`` of
    networks that were trained for some epochs before.
    """

    method = "idc"
    factor: int = 2
    outer: int = 2000
    inner: int = 100
    lr: float = 5e-3
    augment: AugmentSpec = field(default_factory=lambda: AugmentSpec(operations="color_crop_cutout"))


def idc(spec: IDCSpec, task: Task, form: str = "auto") -> Made:
    """Learn ``ipc`` mosaics per class; history: the matching distance of each outer iteration. See :func:`learn`."""
    return learn(spec, task, rate=2 * spec.lr * spec.ipc / 10, form=form)  # doubled: see the head of this file
