"""What ours is compared with: the paper's way of doing each piece of work, written from its description, in plain PyTorch.

Nothing here is taken from the authors' scripts (``--peer`` times those). The shape is theirs: modules, fp32, batches of 64 from
a ``DataLoader`` over float tensors, augmentation a batch at a time in several small steps, loss and accuracy read with
``.item()`` in every step, one class after another when gradients are matched, and one weight after another copied into a module
on a path. Networks carry the library's parameter names, so that a test can compare their outputs with the library's own.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkit.models import ModelSpec
from dpkit.models.spec import BLOCKS

CROP, SCALE, ROTATE = 0.125, 1.2, 15.0  # largest shift (share of the side), largest zoom, largest angle (degrees)


class ConvNet3(nn.Module):
    """Three blocks of convolution, instance norm with scale and shift, ReLU and average pool; a linear classifier."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        for i in range(3):
            setattr(self, f"conv{i}", nn.Conv2d(model.width if i else model.channels, model.width, 3, padding=1))
            setattr(self, f"norm{i}", nn.GroupNorm(model.width, model.width))
        self.classifier = nn.Linear(model.width * (model.image_size // 8) ** 2, model.classes)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = F.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)))
            x = F.avg_pool2d(x, 2)
        return self.classifier(x.flatten(1))


class Block(nn.Module):
    """Basic block of a ResNet: two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet for small images: 3x3 stem, four stages of one or two blocks, or three of three (ResNet-20), mean over positions, a
    linear classifier."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        width = model.width
        self.conv1, self.bn1 = nn.Conv2d(model.channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        into, self.stages = width, 3 if model.arch == "resnet20" else 4
        for stage in range(self.stages):
            blocks = []
            for i in range(BLOCKS[model.arch]):
                blocks.append(Block(into, width * 2**stage, 2 if stage and not i else 1))
                into = width * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(into, model.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def network(model: ModelSpec) -> nn.Module:
    """The architecture as a module, in train mode."""
    return (ResNet if model.is_resnet else ConvNet3)(model)


def loader(images: Tensor, labels: Tensor, generator: torch.Generator | None = None, batch: int = 64) -> DataLoader:
    """Batches of float images, in an order drawn anew in each pass if there is a generator."""
    return DataLoader(TensorDataset(images, labels), batch_size=batch, shuffle=generator is not None, generator=generator)


def dsa(x: Tensor, generator: torch.Generator, shared: bool = False) -> Tensor:
    """Differentiable siamese augmentation of a batch: flip, colour, then one of crop, scale and rotation for all.

    Amounts are drawn for each image, or once for the whole batch when ``shared``, as gradient matching does.
    """
    count = 1 if shared else len(x)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(x.device)

    x = torch.where(uniform(count, 1, 1, 1) < 0.5, x.flip(3), x)
    x = x + (uniform(count, 1, 1, 1) - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * uniform(count, 1, 1, 1)) + grey
    level = x.mean((1, 2, 3), keepdim=True)
    x = (x - level) * (0.5 + uniform(count, 1, 1, 1)) + level
    chosen = int(torch.randint(3, (), generator=generator))
    affine = torch.zeros(count, 2, 3, device=x.device)
    if chosen == 0:
        affine[:, 0, 0] = affine[:, 1, 1] = 1
        side = x.shape[-1]
        affine[:, :, 2] = torch.round((uniform(count, 2) * 2 - 1) * CROP * side) * 2 / side  # whole pixels
    elif chosen == 1:
        affine[:, 0, 0], affine[:, 1, 1] = (1 / SCALE + uniform(2, count) * (SCALE - 1 / SCALE)).unbind()
    else:
        angle = (uniform(count) * 2 - 1) * math.radians(ROTATE)
        affine[:, 0, 0], affine[:, 0, 1] = angle.cos(), -angle.sin()
        affine[:, 1, 0], affine[:, 1, 1] = angle.sin(), angle.cos()
    grid = F.affine_grid(affine.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def train_epoch(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimiser: torch.optim.Optimizer,
                generator: torch.Generator, augment: bool = True,
                distort: Callable[[Tensor, torch.Generator], Tensor] = dsa) -> tuple[float, float]:
    """One pass of SGD; mean loss and accuracy. ``distort`` on each batch, and CutMix on every second one by chance."""
    device = next(net.parameters()).device
    total, right, seen = 0.0, 0.0, 0
    net.train()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        mixed = None
        if augment:
            with torch.no_grad():
                images = distort(images, generator)
            if float(torch.rand((), generator=generator)) < 0.5:
                side = images.shape[2]
                share = float(torch.rand((), generator=generator))  # Beta(1, 1)
                half = int(side * math.sqrt(1 - share)) // 2
                row, column = torch.randint(side, (2,), generator=generator).tolist()
                box = (slice(max(row - half, 0), row + half), slice(max(column - half, 0), column + half))
                other = torch.randperm(len(images), generator=generator).to(device)
                images[:, :, box[0], box[1]] = images[other][:, :, box[0], box[1]]
                area = images[0, 0, box[0], box[1]].numel() / side**2
                mixed = labels[other], area
        output = net(images)
        loss = F.cross_entropy(output, labels)
        if mixed is not None:
            loss = loss * (1 - mixed[1]) + F.cross_entropy(output, mixed[0]) * mixed[1]
        right += (output.argmax(1) == labels).float().sum().item()
        total += loss.item() * len(images)
        seen += len(images)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return total / seen, right / seen


def sgd(net: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    """The paper's optimiser."""
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def match_classes(net: nn.Module, synthetic: Tensor, optimiser: torch.optim.Optimizer, real: list[Tensor], factor: int,
                  generator: torch.Generator, batch: int = 64) -> float:
    """One step of IDC for every class in turn; sum of the matching losses.

    synthetic: (classes, ipc, C, S, S), a leaf. real: images of each class. Each class draws a real batch and one augmentation for
    both sides, differentiates the loss by all weights, sums the squared distances over the convolutions, and steps.
    """
    weights = list(net.parameters())
    matched = [i for i, w in enumerate(weights) if w.dim() == 4]
    total = 0.0
    net.train()
    for c, images in enumerate(real):
        chosen = images[torch.randperm(len(images), generator=generator)[:batch].to(images.device)]
        side = synthetic.shape[-1] // factor
        cut = [synthetic[c][:, :, i * side:(i + 1) * side, j * side:(j + 1) * side]
               for i in range(factor) for j in range(factor)]
        tiles = F.interpolate(torch.cat(cut), size=synthetic.shape[-2:], mode="bilinear")
        both = dsa(torch.cat([chosen, tiles]), generator, shared=True)
        label = torch.full((len(both),), c, device=both.device)
        n = len(chosen)
        wanted = torch.autograd.grad(F.cross_entropy(net(both[:n].detach()), label[:n]), weights)
        found = torch.autograd.grad(F.cross_entropy(net(both[n:]), label[n:]), weights, create_graph=True)
        loss = sum(((found[i] - wanted[i]) ** 2).sum() for i in matched)
        total += loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return total


@torch.no_grad()
def walk(net: nn.Module, a: dict[str, Tensor], b: dict[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]],
         points: int) -> list[tuple[float, float]]:
    """Error and loss at ``points`` between two state dicts, running statistics interpolated too, as the paper's scripts do."""
    found = []
    device = next(net.parameters()).device
    net.eval()
    for alpha in torch.linspace(0, 1, points).tolist():
        for name, tensor in net.state_dict().items():
            tensor.copy_((1 - alpha) * a[name] + alpha * b[name])
        wrong, total, seen = 0.0, 0.0, 0
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            output = net(images)
            total += F.cross_entropy(output, labels).item() * len(images)
            wrong += (output.argmax(1) != labels).float().sum().item()
            seen += len(images)
        found.append((wrong / seen, total / seen))
    return found


@contextmanager
def products_counted() -> Iterator[list[int]]:
    """Counts what PyHessian spends: a list whose one number is the Hessian products so far; it may be set back to 0.

    PyHessian must have been imported. Its methods look the function up in their module, so the count holds for all of them.
    """
    inner = sys.modules["pyhessian.hessian"]
    multiply, spent = inner.hessian_vector_product, [0]

    def counted(*arguments):
        spent[0] += 1
        return multiply(*arguments)

    inner.hessian_vector_product = counted
    try:
        yield spent
    finally:
        inner.hessian_vector_product = multiply
