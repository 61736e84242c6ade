"""What a mask keeps of a network's weights and arithmetic, and whether tensors are those of a network."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dpkit import models
from dpkit.models import ModelSpec
from dpkit.prune import compact
from dpkit.prune.masks import listed
from dpkit.tree import Buffers, Mask, Params, generator_for


@dataclass(frozen=True)
class LayerCount:
    """One prunable weight. weights: its entries; kept: those that survive.

    multiply_adds: of the dense layer for one image; kept_multiply_adds: those with a surviving weight.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int
    multiply_adds: int
    kept_multiply_adds: int


@dataclass(frozen=True)
class Counts:
    """What a mask keeps, layer by layer and in all, for one image.

    rest: multiply-adds in which no prunable weight takes part, such as the products of attention; they are in both totals.
    remnant: share in [0, 1] of the dense multiply-adds that is left when channels that cannot matter are taken out
    (:mod:`dpkit.prune.compact`); None where that is not exact, and ``why``.
    """

    layers: tuple[LayerCount, ...]
    rest: int = 0
    remnant: float | None = None
    why: str = ""

    @property
    def weights(self) -> int:
        """Prunable weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """Surviving weights."""
        return sum(layer.kept for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """Of the dense network."""
        return self.rest + sum(layer.multiply_adds for layer in self.layers)

    @property
    def kept_multiply_adds(self) -> int:
        """Those that a program without any work on zeros would do."""
        return self.rest + sum(layer.kept_multiply_adds for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations of the dense network: two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def kept_flops(self) -> int:
        """Floating-point operations with surviving weights."""
        return 2 * self.kept_multiply_adds


def counts(model: ModelSpec, mask: Mask, params: Params | None = None, buffers: Buffers | None = None) -> Counts:
    """Weights and multiply-adds that a mask keeps, exact integers.

    A weight takes part in one multiply-add for each position of its layer's output, so a layer keeps the share of its
    multiply-adds that its density says; padding counts as it is computed, norms, biases, activations and pools are left out
    (:func:`dpkit.models.layer_work`). Zeros save nothing by themselves: dense kernels multiply them. What a machine saves
    without sparse kernels is ``remnant``. params, buffers: of the ticket, which tell whether a channel that nothing writes is
    zero; without them only channels that nothing reads are taken out.
    Raises ``ValueError`` in one line where the mask is not one of this network.
    """
    check_tensors("mask", mask, shapes(model)["mask"], f"this {model.arch}")
    layers, seen = [], 0
    for work in models.layer_work(model):
        name = f"{work.name}.weight"
        if name not in mask:
            continue
        size, kept = mask[name].numel(), int(mask[name].sum())
        seen += work.flops
        layers.append(LayerCount(name, tuple(mask[name].shape), size, kept, work.flops // 2, work.flops // 2 * kept // size))
    rest = (round(models.forward_work(model).flops) - seen) // 2
    try:
        if params is None:
            start = models.init(model, generator_for(0, "shapes"))
            left = compact.remnant(model, mask, *start, silent=False)
        else:
            left = compact.remnant(model, mask, params, buffers or {})
        return Counts(tuple(layers), rest, compact.share(model, left))
    except ValueError as error:
        return Counts(tuple(layers), rest, None, str(error))


def shapes(model: ModelSpec) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of a network's masks, parameters and buffers, in its own order."""
    params, buffers = ({n: tuple(t.shape) for n, t in part.items()} for part in models.init(model, generator_for(0, "shapes")))
    return {"mask": {name: params[name] for name in models.prunable(model)}, "params": params, "buffers": buffers}


def check_tensors(group: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ``ValueError`` unless the tensors are those of the network, by name and shape; names all that differ."""
    missing, unknown = [n for n in shapes if n not in tensors], [n for n in tensors if n not in shapes]
    if missing or unknown:
        said = [f"lacks {listed(missing)}"] * bool(missing)
        said += [f"has {listed(unknown)}, which the network has not"] * bool(unknown)
        raise ValueError(f"{group} of {where} must have the network's {len(shapes)} tensors, but it {' and '.join(said)}; "
                         "use the specification that it was made with")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{group} of {where}: {name} must be {shape} as in the network, got {tuple(tensor.shape)}; "
                             "use the specification that it was made with")
        if (tensor.dtype == torch.bool) != (group == "mask"):
            wanted, got = "bool" if group == "mask" else "numbers", str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{group} of {where}: {name} must be {wanted}, got {got}; convert it")
