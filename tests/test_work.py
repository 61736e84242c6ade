"""Counted work of a forward pass against counts by hand and against torch's own counter of operations."""
from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpkit import models, tree
from dpkit.models import ModelSpec, forward_work, layer_work

SIZES = (("cifar", 32), ("cifar", 20), ("imagenet", 64), ("imagenet", 50))
RESNETS = [ModelSpec(arch=arch, width=4, image_size=size, stem=stem) for arch in ("resnet10", "resnet18") for stem, size in SIZES]
OTHERS = [ModelSpec(arch="convnet4", width=3, image_size=16), ModelSpec(arch="resnet20", width=2, image_size=20),
          ModelSpec(arch="resnet20", width=2, image_size=40, stem="imagenet"), ModelSpec(arch="alexnet", width=3, image_size=28),
          ModelSpec(arch="vgg16", width=2, image_size=28), ModelSpec(arch="mlp", width=3, image_size=5, channels=1),
          ModelSpec(arch="vit", width=8, image_size=16), ModelSpec(arch="vit", width=64, image_size=8)]
SPECS = [ModelSpec(width=16, image_size=16), ModelSpec(width=7, classes=3, channels=1), *RESNETS, *OTHERS]


def counted(spec: ModelSpec, images: int) -> int:
    params, buffers = models.init(spec, tree.generator_for("work"))
    with FlopCounterMode(display=False) as counter:
        models.forward(spec, params, buffers, torch.zeros(images, spec.channels, spec.image_size, spec.image_size), train=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.arch}-{s.stem}-{s.image_size}")
def test_operations_equal_what_torch_counts(spec):
    assert forward_work(spec).flops * 2 == counted(spec, images=2)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.arch}-{s.stem}-{s.image_size}")
def test_layers_come_as_prunable_names_them(spec):
    assert [f"{layer.name}.weight" for layer in layer_work(spec)] == list(models.prunable(spec))
    assert sum(layer.weights for layer in layer_work(spec)) == models.count_prunable(spec)


def test_convnet_by_hand():
    # 3 -> 128 at 32 x 32, 128 -> 128 at 16 x 16 and at 8 x 8, then 2,048 numbers to ten classes
    adds = 9 * (3 * 128 * 1024 + 128 * 128 * 256 + 128 * 128 * 64) + 2048 * 10
    moved = (3 + 128) * 1024 + 2 * 128 * 256 + 2 * 128 * 64 + 2048 + 10
    assert forward_work(ModelSpec(width=128)) == models.Work(2.0 * adds, 4.0 * moved)
    assert forward_work(ModelSpec(width=128), itemsize=2).bytes == 2.0 * moved


def test_resnet_by_hand():
    # stem and one block of width 2 at 8 x 8, then blocks of 4, 8, 16 channels at 4, 2 and 1 pixels a side, each with a shortcut
    adds = 9 * 3 * 2 * 64 + 2 * 9 * 2 * 2 * 64 + 16 * 10
    moved = (3 + 2) * 64 + 2 * (2 + 2) * 64 + 16 + 10
    for into, out, before, after in ((2, 4, 64, 16), (4, 8, 16, 4), (8, 16, 4, 1)):
        adds += (9 * into * out + 9 * out * out + into * out) * after
        moved += 2 * (into * before + out * after) + 2 * out * after
    assert forward_work(ModelSpec(arch="resnet10", width=2, image_size=8)) == models.Work(2.0 * adds, 4.0 * moved)


def test_vit_by_hand():
    # 64 patches of 2 x 2 pixels to 64 dimensions; in each of six blocks 64 x 64 scores for each of two heads; the mean to ten
    tokens, width = 64, 64
    layers = [(3 * 256, tokens * width, tokens * 12 * width)]
    for out, into in ((3, 1), (1, 1), (4, 1), (1, 4)):
        layers += [(tokens * into * width, tokens * out * width, tokens * into * out * width**2)] * 6
    scores = 2 * tokens**2
    layers += [(2 * tokens * width, scores, tokens**2 * width), (scores + tokens * width, tokens * width, tokens**2 * width)] * 6
    layers += [(width, 10, width * 10)]
    spec = ModelSpec(arch="vit", width=64, image_size=16)
    expected = models.Work(2.0 * sum(adds for _, _, adds in layers), 4.0 * sum(read + written for read, written, _ in layers))
    assert forward_work(spec) == expected
    assert sum(layer.flops for layer in models.attention_work(spec)) == 6 * 2 * 2 * tokens**2 * width
    assert list(models.attention_work(ModelSpec())) == []
