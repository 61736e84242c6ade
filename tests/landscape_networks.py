"""Small networks for the tests of landscapes, among them one whose loss is known in closed form."""
import torch

from dpkit import models
from dpkit.models import ModelSpec

CONVNET = ModelSpec(arch="convnet3", width=5, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=16, classes=4)
MLP = ModelSpec(arch="mlp", width=6, image_size=4, channels=1, classes=4, norm="none")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(model, seed=0):
    params, buffers = models.init(model, generator(seed))
    source = generator(seed + 100)
    params = {n: t + 0.3 * torch.randn(t.shape, generator=source) for n, t in params.items()}
    return params, {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}


def several(model, count):
    return [network(model, seed)[0] for seed in range(count)]


def examples(model, count=30, seed=1):
    shape = (count, model.channels, model.image_size, model.image_size)
    images = torch.randn(shape, generator=generator(seed))
    return images, torch.randint(model.classes, (count,), generator=generator(seed + 1))


def constant(logits, model=MLP):
    """A network that says the same ``logits`` (K,) of every image: all weights 0, the classifier's bias alone is left."""
    params, _ = models.init(model, generator())
    params = {name: torch.zeros_like(t) for name, t in params.items()}
    return params | {"classifier.bias": torch.as_tensor(logits, dtype=torch.float32)}


def known_values(logits, labels):
    """Error and loss of a network that says ``logits`` (K,) of every image, in float64; labels (N,) or (N, K)."""
    logits = torch.as_tensor(logits).double()
    shares = labels.double() if labels.dim() == 2 else torch.nn.functional.one_hot(labels, len(logits)).double()
    loss = logits.exp().sum().log() - (shares @ logits).mean()
    return float((shares.argmax(1) != logits.argmax()).double().mean()), float(loss)


def random_mask(model, params, keep=0.4, seed=5):
    source = generator(seed)
    return {name: torch.rand(params[name].shape, generator=source) < keep for name in models.prunable(model)}


def masked(params, mask):
    return {n: torch.where(mask[n], t, 0.0) if n in mask else t for n, t in params.items()}
