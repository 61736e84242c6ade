"""Which layers make a barrier: one layer moved from a network to another while the others stay, and all but one moved.

Adilova, Andriushchenko, Kamp, Fischer & Jaggi 2023, "Layer-wise linear mode connectivity" (arXiv 2307.06966), move one layer or
a group of layers and keep the rest at one of both networks. The barrier of a layer is there the highest value on its path minus
the mean of both full networks (:func:`dpkit.barriers.barrier_over`), not of the ends of the path, whose second one is a network
that nobody trained. The other network as the one that is kept (``layer_paths(spec, model, b, a, ...)``) gives other barriers.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpkit.barriers import barrier_over
from dpkit.connectivity.places import Measured, Network, check, evaluator
from dpkit.connectivity.record import Path
from dpkit.connectivity.spec import PathSpec, evenly
from dpkit.models import ModelSpec
from dpkit.models.layers import Norm, Weight
from dpkit.models.network import family
from dpkit.tree import Mask, Params


@dataclasses.dataclass(frozen=True)
class LayerPaths:
    """L layers' paths from network a: errors (fraction in [0, 1]) and mean cross-entropies (nats), float64.

    layers: names (L,), in forward order.  alphas: (T,) from 0 to 1.
    errors, losses: (L, T), one layer moved from a to b, the others kept at a.
    others_errors, others_losses: (L, T), this layer kept at a, all others moved. All rows begin at a.
    end_errors, end_losses: (2,), of a and of b themselves.
    """

    layers: tuple[str, ...]
    alphas: Tensor
    errors: Tensor
    losses: Tensor
    others_errors: Tensor
    others_losses: Tensor
    end_errors: Tensor
    end_losses: Tensor

    def moved(self, layer: str) -> Path:
        """The path on which ``layer`` alone moves; the barriers of this record are those against its own ends."""
        i = self._row(layer)
        return Path(self.alphas, self.errors[i], self.losses[i])

    def others(self, layer: str) -> Path:
        """The path on which all layers but ``layer`` move."""
        i = self._row(layer)
        return Path(self.alphas, self.others_errors[i], self.others_losses[i])

    @property
    def error_barriers(self) -> Tensor:
        """(L,): highest error on the path of each layer minus the mean of both networks, a fraction; may be negative."""
        return _over(self.errors, self.end_errors)

    @property
    def loss_barriers(self) -> Tensor:
        """(L,): the same of losses, nats."""
        return _over(self.losses, self.end_losses)

    @property
    def others_error_barriers(self) -> Tensor:
        """(L,): the same where all layers but this one move, a fraction: low where this one makes the barrier."""
        return _over(self.others_errors, self.end_errors)

    @property
    def others_loss_barriers(self) -> Tensor:
        """(L,): the same of losses, nats."""
        return _over(self.others_losses, self.end_losses)

    def _row(self, layer: str) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}; got {layer!r}")
        return self.layers.index(layer)


def _over(rows: Tensor, ends: Tensor) -> Tensor:
    return torch.tensor([barrier_over(row, ends) for row in rows], dtype=torch.float64)


def layer_tensors(model: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Parameters and buffers that move together, by the name of each layer (that of its prunable weight), in forward order.

    Weight, bias, and the norm that follows with its running statistics; in a ViT the norm that comes before, as it normalises
    what this layer alone reads, and with the patches' map the positions. Every tensor is in one layer.
    """
    found: dict[str, tuple[str, ...]] = {}
    waiting: tuple[str, ...] = ()
    last = ""
    for entry in family(model).table(model):
        tensors = (*entry.shapes(), *entry.buffers())
        if isinstance(entry, Weight):
            last = entry.name
            found[last], waiting = (*waiting, *tensors), ()
        elif isinstance(entry, Norm) and model.arch == "vit":
            waiting = tensors
        else:
            found[last] += tensors
    return found


def layer_paths(spec: PathSpec, model: ModelSpec, a: Network, b: Network, images: Tensor, labels: Tensor, *,
                layers: Iterable[str] | None = None, statistics_images: Tensor | None = None, threads: int = 1,
                masks: tuple[Mask, Mask] | None = None, starts: tuple[Params, Params] | None = None,
                known: LayerPaths | None = None) -> LayerPaths:
    """Error and loss with one layer, and with all but one, moved along the line from network ``a`` to ``b``, in eval mode.

    layers: which, by name (see :func:`layer_tensors`); all by default. ``a``, ``b`` and each place are evaluated once:
    2 + 2 L (points - 1) evaluations, in one job. BatchNorm's statistics are as the specification says: measured anew at every
    place; or the running ones of a, those of the layers that move taken along; or repaired between the ends of each path.
    known: measured before between the same networks on the same images, of some of the layers or all; its points are taken over.
    Other arguments and errors as of :func:`dpkit.connectivity.path`. Also raises ``ValueError`` on unknown layers, and when the
    specification asks for refinement: all layers share their points.
    """
    both = {"a": a, "b": b}
    masks_of, starts_of = (pair and dict(zip(both, pair, strict=True)) for pair in (masks, starts))
    check(model, both, images, labels, masks_of, starts_of)
    if spec.error_tolerance or spec.loss_tolerance:
        raise ValueError(f"paths of layers share their points, got error_tolerance {spec.error_tolerance:g} and loss_tolerance "
                         f"{spec.loss_tolerance:g}; set both to 0 and ask for more points")
    tensors = layer_tensors(model)
    names = tuple(tensors if layers is None else layers)
    _check_layers(names, model, tensors)
    networks = dict(both)
    for name in names:
        networks[f"moved {name}"] = _mixed(a, b, tensors[name])
        networks[f"others {name}"] = _mixed(b, a, tensors[name])
    measured = Measured(evaluator(spec, model, networks, images, labels, statistics_images, threads), len(images))
    if known is not None:
        _check_layers(known.layers, model, tensors)
        measured.take("a", "b", Path(torch.tensor([0.0, 1.0]), known.end_errors, known.end_losses))
        for name in known.layers:
            measured.take("a", f"moved {name}", known.moved(name))
            measured.take("a", f"others {name}", known.others(name))
    alphas = evenly(spec.points)
    ends = [("a", "a", 0.0), ("b", "b", 0.0)]
    rows = [("a", f"{form} {name}", alpha) for form in ("moved", "others") for name in names for alpha in alphas.tolist()]
    errors, losses = measured(ends + rows)
    shape = (2, len(names), len(alphas))
    (one, rest), (one_losses, rest_losses) = (t[2:].reshape(shape) for t in (errors, losses))
    return LayerPaths(names, alphas, one, one_losses, rest, rest_losses, errors[:2], losses[:2])


def _mixed(a: Network, b: Network, moved: Sequence[str]) -> Network:
    """``a`` with the tensors called ``moved`` taken from ``b``; nothing is copied."""
    params, buffers = ({n: other[n] if n in moved else one[n] for n in one} for one, other in zip(a, b, strict=True))
    return params, buffers


def _check_layers(names: Sequence[str], model: ModelSpec, tensors: dict[str, tuple[str, ...]]) -> None:
    wrong = [name for name in names if name not in tensors]
    if wrong or not names or len(set(names)) < len(names):
        raise ValueError(f"layers must be different ones of {model.arch}, at least one: {', '.join(tensors)}; got "
                         f"{', '.join(wrong or names) or 'none'}")
