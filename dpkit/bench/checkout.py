"""A checkout of the authors' own scripts as the peer: found by its layout, imported in a process of its own, timed as it is.

Two layouts are known.

1. The published repository (and that of IDC, on which it is based): ``train.py`` with
   ``train_epoch(args, train_loader, model, criterion, optimizer, epoch, logger, aug, mixup)``, ``misc/augment.py`` with
   ``DiffAug``, ``models/convnet.py`` and ``models/resnet.py``. Their code asks for a GPU by name; where there is none, "cuda" is
   read as the processor in that process, and nothing else is changed. A missing ``efficientnet_pytorch``, which the
   scripts import and this work does not use, is stood in for by an empty module.
2. Any folder with a ``dpkit_peer.py`` that defines ``make(arch, width, images, labels)`` and returns a function without arguments
   that trains one epoch in batches of 64. images: (N, 3, 32, 32) normalised float32; labels: (N,) int64; arch: ``convnet3``,
   ``resnet10`` or ``resnet18``.
"""
from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpkit import tree
from dpkit.bench import jobs, reference
from dpkit.bench.harness import Job
from dpkit.bench.rows import NETWORKS, SMALL, Row, training_row
from dpkit.data import _torchvision
from dpkit.models import ModelSpec

OWN = "dpkit_peer.py"
LAYOUT = ("train.py", "misc/augment.py", "models/convnet.py", "models/resnet.py")


def check(path: Path) -> None:
    """Raise ``ValueError`` with one line unless ``path`` is a folder of a known layout."""
    if not path.is_dir():
        raise ValueError(f"--peer takes a folder with a checkout of the authors' scripts, and {path} is none")
    if not (path / OWN).is_file():
        absent = [name for name in LAYOUT if not (path / name).is_file()]
        if absent:
            raise ValueError(f"{path} holds no {absent[0]}, as the authors' checkout does, and no {OWN}; give the checkout's "
                             f"folder, or write {OWN} with make(arch, width, images, labels)")


def rows(path: Path, quick: bool) -> list[Row]:
    """The rows of training with the checkout as the peer."""
    check(path)
    found = []
    for name in ([SMALL] if quick else ["ConvNet-3-128", "ResNet-10-32"]):
        ours = training_row("", name, 0, 256 if quick else 1280, quick, 2 if quick else 3)
        images = 256 if quick else 640
        job = Job("dpkit.bench.checkout:train", images, {"path": str(path.resolve()), "model": NETWORKS[name], "images": images})
        found.append(replace(ours, id=f"peer-{NETWORKS[name]['arch']}", name=f"{ours.name}; scripts in {path.resolve().name}",
                             reference="the authors' scripts", target=None, peer=job, controls={}))
    return found


def train(path: str, model: dict[str, Any], images: int) -> Callable[[], object]:
    """An epoch of the checkout's training on ``images`` images, in batches of 64 on what the scripts call cuda."""
    sys.path.insert(0, path)
    spec = ModelSpec(**model)
    if (Path(path) / OWN).is_file():
        return importlib.import_module(OWN.removesuffix(".py")).make(spec.arch, spec.width, *jobs.floats(spec, images))
    if not torch.cuda.is_available():
        _read_cuda_as_cpu()
    _torchvision.load()
    if importlib.util.find_spec("efficientnet_pytorch") is None:
        sys.modules["efficientnet_pytorch"] = types.ModuleType("efficientnet_pytorch")
        sys.modules["efficientnet_pytorch"].EfficientNet = None
    scripts, augment = importlib.import_module("train"), importlib.import_module("misc.augment")
    net = _network(spec).cuda()
    batches = reference.loader(*jobs.floats(spec, images), tree.generator_for("benchmark", "peer"))
    batches.device = "cpu"  # their loader's own attribute: where its batches lie
    args = types.SimpleNamespace(mix_p=0.5, beta=1.0, nclass=spec.classes, verbose=False)
    args.print_freq = args.epoch_print_freq = 10**9  # never
    return functools.partial(scripts.train_epoch, args, batches, net, nn.CrossEntropyLoss(), reference.sgd(net), 1, None,
                             augment.DiffAug(strategy="color_crop_flip_scale_rotate", batch=False), mixup="cut")


def _network(spec: ModelSpec) -> nn.Module:
    if spec.is_resnet:
        scripts = importlib.import_module("models.resnet")
        return scripts.ResNet("cifar10", 10 if spec.arch == "resnet10" else 18, spec.classes, "batch", spec.image_size)
    scripts = importlib.import_module("models.convnet")
    return scripts.ConvNet(spec.classes, net_norm="instance", net_depth=3, net_width=spec.width,
                           im_size=(spec.image_size, spec.image_size))


def _read_cuda_as_cpu() -> None:
    """In this process, let ``.cuda()`` and ``device="cuda"`` mean the processor."""
    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return function(*args, **kwargs)

        return call

    for name in ("tensor", "arange", "zeros", "ones", "randperm", "rand", "randn"):
        setattr(torch, name, plain(getattr(torch, name)))
    to = torch.Tensor.to
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.Tensor.to = lambda self, *args, **kwargs: to(self, *("cpu" if a == "cuda" else a for a in args), **kwargs)
    nn.Module.cuda = lambda self, *_, **__: self
