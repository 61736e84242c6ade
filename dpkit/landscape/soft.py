"""Many networks on images with soft labels, as small sets have them."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import cores, models
from dpkit.models import ModelSpec
from dpkit.training.evaluation import CHUNK
from dpkit.tree import Buffers, Params


@torch.no_grad()
def evaluate_soft(model: ModelSpec, count: int, network: Callable[[int], tuple[Params, Buffers]], images: Tensor, labels: Tensor,
                  *, statistics_images: Tensor | None, precision: str, threads: int) -> tuple[Tensor, Tensor]:
    """Error and mean cross-entropy (nats) of ``count`` networks on soft ``labels`` (N, K): two float64 tensors (count,), CPU.

    Error: share of the images whose largest logit is of another class than the largest label. Loss: -sum_k label_k log p_k.
    Small sets are some hundred images, so networks are taken in turn and not compiled. Other arguments as of
    :func:`dpkit.training.evaluate_many`.
    """
    @torch.no_grad()  # a thread starts with gradients on
    def one(i: int) -> Tensor:
        params, buffers = network(i)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            if statistics_images is not None:
                buffers = models.reestimate(model, params, buffers, statistics_images)
        return sum(_score(model, precision, params, buffers, x, y)
                   for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True))

    if threads > 1 and count > 1:
        with cores.used(1), ThreadPoolExecutor(threads) as pool:
            totals = list(pool.map(one, range(count)))
    else:
        totals = [one(i) for i in range(count)]
    return (torch.stack(totals).cpu() / len(images)).unbind(1)


def _score(model: ModelSpec, precision: str, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tensor:
    """(2,) float64: how many images are classified otherwise than labelled, and the sum of their cross-entropies."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        inputs = models.features(model, params, buffers, x)
    name = models.classifier_name(model)
    weight = params[f"{name}.weight"]
    logits = F.linear(inputs.to(weight.dtype), weight, params[f"{name}.bias"])
    wrong = (logits.argmax(1) != y.argmax(1)).sum()
    return torch.stack([wrong.double(), F.cross_entropy(logits.double(), y.double(), reduction="sum")])
