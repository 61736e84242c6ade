"""Small networks for the tests of paths, and images for them."""
import functools

import torch

from dpkit import models
from dpkit.models import ModelSpec

CONVNET = ModelSpec(arch="convnet3", width=5, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=8, classes=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def network(model, seed=0):
    params, buffers = models.init(model, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.3 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def examples(model, count=40, seed=1):
    images = torch.randn((count, model.channels, model.image_size, model.image_size), generator=generator(seed))
    return images, torch.randint(model.classes, (count,), generator=generator(seed + 1))
