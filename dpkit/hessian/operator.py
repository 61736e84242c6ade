"""The Hessian of a network's loss on its surviving weights, as a linear operator."""
from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models, tree
from dpkit.hessian.product import CHUNK, MEMORY, CompiledProduct, chunk_size, worthwhile
from dpkit.hessian.spec import HessianSpec
from dpkit.models import ModelSpec
from dpkit.training.gradient import can_compile
from dpkit.tree import Buffers, Mask, Params


class Operator:
    """H = d2L/dw2 with L the mean cross-entropy over fixed images, w the surviving weights, in eval mode.

    A principal submatrix of the full Hessian: rows and columns of pruned entries are left out, not set to 0,
    so neither trace nor diagonal is diluted by weights that the network does not have. Vectors are (n,) with
    n = ``size``: the entries of ``names`` in their order, each tensor row by row, pruned ones skipped
    (:meth:`flatten`, :meth:`unflatten`).

    A product differentiates the inner product of the gradient with the vector, H v = d(g'v)/dw (Pearlmutter
    1994, Fast exact multiplication by the Hessian), in reverse both times: group normalisation has no
    forward-mode derivative of its backward pass. The gradient's graph is kept between products for up to
    ``keep`` images, which saves a third of the time; for more, each call rebuilds it chunk by chunk, once for
    all columns of :meth:`matmat`.

    model    architecture
    params   the network, copied; pruned entries must be 0
    buffers  running statistics, copied and never updated
    images   (N, C, H, W) normalised and un-augmented
    labels   (N,) class numbers or (N, K) probabilities
    mask     True where an entry survives; names without a mask survive whole; None: nothing is pruned
    names    parameters that make up w; None: the prunable weights
    chunk    images differentiated at once (at least 1): time and memory only, the result is the same; None:
             100, and 50 once compiled
    keep     most images whose graphs stay in memory between products (about 5 MB an image for a ConvNet-3 of
             width 64 at 32 x 32, half a MB once compiled); None: ``chunk``, so a single chunk is kept and several
             are not; once compiled, as many as 2 GiB hold
    dtype    torch.float32 or torch.float64; None: that of ``params``
    compile  True: compile the product on its first use (about 20 seconds in a process, less the second time on a
             machine), then about twice as fast; "auto": on a CPU, where ``products`` products are work enough to
             pay for that (:func:`dpkit.hessian.product.worthwhile`). Results differ from uncompiled ones by
             rounding. Where there is no C++ compiler, or compiling fails or gives another product: one warning,
             and products as without it
    products how many products will be asked for, for "auto"
    threads  chunks computed side by side once compiled, on a core each; None: as many as torch computes with

    Attributes: size n; dtype; device; names; loss, the value of L (nats).

    Raises ``ValueError`` for unknown names, masks that do not fit, pruned entries that are not 0, no
    surviving weights, no images, labels that do not fit, a loss that is not finite, or a loss that differs
    between two passes over the images (then H would be another matrix in each product and Lanczos would
    return nonsense).
    """

    def __init__(self, model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                 mask: Mask | None = None, names: Iterable[str] | None = None, chunk: int | None = None,
                 keep: int | None = None, dtype: torch.dtype | None = None, *, compile: bool | str = False,
                 products: int = 60, threads: int | None = None) -> None:
        self.model = model
        self.names = tuple(models.prunable(model) if names is None else names)
        unknown = [name for name in self.names if name not in params]
        if unknown or len(set(self.names)) != len(self.names):
            raise ValueError(f"names must be distinct parameters of {model.arch}, "
                             f"got {', '.join(unknown or self.names)}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        if compile not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
        first = next(iter(params.values()))
        self.dtype, self.device = dtype or first.dtype, first.device
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {self.dtype}")
        self._fixed = tree.to(tree.detach(params), dtype=self.dtype)
        self._buffers = tree.to(tree.detach(buffers), dtype=self.dtype)
        self._weights = {name: self._fixed.pop(name).requires_grad_() for name in self.names}
        masks = check_mask(mask or {}, {**self._weights, **self._fixed})
        # Places of the surviving entries in each flattened tensor; None where all survive.
        self._entries = {name: masks[name].reshape(-1).nonzero().squeeze(1) if name in masks else None
                         for name in self.names}
        self._counts = [w.numel() if entries is None else len(entries)
                        for w, entries in zip(self._weights.values(), self._entries.values(), strict=True)]
        self.size = sum(self._counts)
        if self.size == 0:
            raise ValueError("the Hessian needs surviving weights, got a mask that prunes all of them")
        check_labels(images, labels, model.classes)
        self._images = images.to(device=self.device, dtype=self.dtype)
        self._labels = labels.to(self.device, self.dtype if labels.is_floating_point() else torch.int64)
        self._given = chunk, keep, threads
        self._chunk = 100 if chunk is None else chunk
        self._keep = self._chunk if keep is None else keep
        self._graphs: list[tuple[Tensor, ...]] | None = None
        pays = self.device.type == "cpu" and worthwhile(model, len(images), products)
        self._compile = pays if compile == "auto" else bool(compile)
        self._compiled: CompiledProduct | None = None
        self.loss = self._checked_loss()

    @classmethod
    def from_spec(cls, spec: HessianSpec, model: ModelSpec, params: Params, buffers: Buffers, images: Tensor,
                  labels: Tensor, mask: Mask | None = None, chunk: int | None = None,
                  keep: int | None = None, *, compile: bool | str = False, threads: int | None = None) -> Self:
        """The operator that ``spec`` describes, on the :func:`subset` of ``spec.images`` of the images given.

        Images normalised and un-augmented; the rest as for the class. Raises ``ValueError`` as the class
        does, and where there are fewer than ``spec.images``.
        """
        index = subset(labels, spec.images).to(images.device)
        names = models.prunable(model) if spec.scope == "weights" else tuple(params)
        return cls(model, params, buffers, images[index], labels[index.to(labels.device)], mask, names, chunk,
                   keep, dtype=getattr(torch, spec.dtype), compile=compile,
                   products=spec.probes + spec.lanczos_steps, threads=threads)

    def flatten(self, values: Params) -> Tensor:
        """The surviving entries of tensors named and shaped like the weights, as one vector (n,)."""
        parts = ((values[name].reshape(-1), entries) for name, entries in self._entries.items())
        return torch.cat([part if entries is None else part[entries] for part, entries in parts])

    def unflatten(self, vector: Tensor) -> Params:
        """Inverse of :meth:`flatten`: tensors named and shaped like the weights, 0 at pruned entries.

        Raises ``ValueError`` unless ``vector`` is (n,).
        """
        self._check_shape(vector, 1)
        tensors = {}
        for (name, weight), part in zip(self._weights.items(), vector.split(self._counts), strict=True):
            entries = self._entries[name]
            full = part if entries is None else part.new_zeros(weight.numel()).index_copy(0, entries, part)
            tensors[name] = full.view(weight.shape)
        return tensors

    def matvec(self, vector: Tensor) -> Tensor:
        """H v for a vector (n,), in the operator's dtype.

        Raises ``ValueError`` on another shape or a product that is not finite.
        """
        self._check_shape(vector, 1)
        return self.matmat(vector[:, None])[:, 0]

    def matmat(self, vectors: Tensor) -> Tensor:
        """H V for the columns of V (n, k), in the operator's dtype; a graph is built once for all columns.

        Raises as :meth:`matvec`.
        """
        self._check_shape(vectors, 2)
        columns = vectors.to(device=self.device, dtype=self.dtype).T.contiguous()
        with full_precision():
            compiled = self._compiled_product()
            if compiled is None:
                products = self._eager(columns)
            else:
                sums = compiled([self.unflatten(column) for column in columns])
                products = torch.stack([self.flatten(each) for each in sums]) / len(self._images)
        if not torch.isfinite(products).all():
            raise ValueError(f"Hessian products must be finite, got NaN or infinity in {self.dtype}; "
                             "try float64")
        return products.T

    @torch.enable_grad()
    def _eager(self, columns: Tensor) -> Tensor:
        products = torch.zeros_like(columns)
        weights = tuple(self._weights.values())
        for gradient in self._gradients():
            # One column at a time: a batched backward pass (``is_grads_batched``) has no rule for group
            # normalisation differentiated twice, and took 1.3 times as long on a ResNet.
            for row, column in enumerate(columns):
                parts = torch.autograd.grad(gradient, weights, tuple(self.unflatten(column).values()),
                                            retain_graph=True, materialize_grads=True)
                products[row] += self.flatten(dict(zip(self.names, parts, strict=True)))
        return products

    def _compiled_product(self) -> CompiledProduct | None:
        """The compiled product, made on first use; None where it is not wanted or not to be had."""
        if self._compile and self._compiled is None:
            self._compile = can_compile()
        if self._compile and self._compiled is None:
            try:
                self._compiled = self._made()
            except Exception as error:  # whatever a compiler may raise: the products are the same without it
                self._compile = False
                reason = str(error).strip().split("\n")[0][:200]
                warnings.warn(f"the Hessian product could not be compiled ({reason}): slower, with the same "
                              "mathematics", stacklevel=4)
        return self._compiled

    def _made(self) -> CompiledProduct:
        chunk, keep, threads = self._given
        size = chunk_size(len(self._images), chunk or CHUNK)

        def on(images: Tensor, labels: Tensor) -> CompiledProduct:
            return CompiledProduct(self.model, {n: w.detach() for n, w in self._weights.items()}, self._fixed,
                                   self._buffers, images, labels, size,
                                   MEMORY if keep is None else math.inf if keep >= len(self._images) else 0,
                                   threads or torch.get_num_threads())

        # A wrong program would give a wrong spectrum without a sign of it, so a few images are compared.
        few = slice(0, min(4, size))
        vector = self.unflatten(torch.arange(self.size, device=self.device).cos().to(self.dtype))
        found = self.flatten(on(self._images[few], self._labels[few])([vector])[0])
        weights = tuple(self._weights.values())
        with torch.enable_grad():
            gradient = torch.autograd.grad(self._loss(few), weights, create_graph=True, materialize_grads=True)
            parts = torch.autograd.grad(gradient, weights, tuple(vector.values()), materialize_grads=True)
        expected = self.flatten(dict(zip(self.names, parts, strict=True))) * len(self._images)
        # Rounding puts single units on the other side of a ReLU's corner, which moves a product by up to 1e-3.
        if (found - expected).norm() > 1e-2 * expected.norm() + torch.finfo(self.dtype).tiny:
            raise ValueError("its product differs from the uncompiled one")
        return on(self._images, self._labels)

    def _gradients(self) -> Iterable[tuple[Tensor, ...]]:
        """Gradients of each chunk's share of L, with their graphs: kept ones, or built one at a time."""
        if self._graphs is None:
            weights = tuple(self._weights.values())
            starts = range(0, len(self._images), self._chunk)
            lazily = (torch.autograd.grad(self._loss(slice(start, start + self._chunk)), weights,
                                          create_graph=True, materialize_grads=True) for start in starts)
            if len(self._images) > self._keep:
                return lazily
            self._graphs = list(lazily)
        return self._graphs

    def _loss(self, chunk: slice) -> Tensor:
        """The share of L that the images of a chunk contribute: their summed cross-entropy over N."""
        params = {**self._fixed, **self._weights}
        logits, _ = models.forward(self.model, params, self._buffers, self._images[chunk])
        return F.cross_entropy(logits, self._labels[chunk], reduction="sum") / len(self._images)

    def _check_shape(self, vectors: Tensor, dimensions: int) -> None:
        if vectors.dim() != dimensions or len(vectors) != self.size:
            expected = f"({self.size},)" if dimensions == 1 else f"({self.size}, k)"
            raise ValueError(f"vectors must be {expected}, one row for each surviving weight, "
                             f"got {tuple(vectors.shape)}")

    @torch.no_grad()
    def _checked_loss(self) -> float:
        """L, after two passes over the images that must agree up to the rounding of the dtype."""
        starts = range(0, len(self._images), self._chunk)
        with full_precision():
            first, second = (sum(float(self._loss(slice(start, start + self._chunk))) for start in starts) for _ in range(2))
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ValueError(f"the loss must be finite, got {first}; "
                             "the network has diverged or the images are not finite")
        # Not bit for bit: on a GPU the order of a sum may change from one pass to the next.
        if abs(first - second) > 100 * torch.finfo(self.dtype).eps * max(abs(first), 1.0):
            raise ValueError(f"two passes over the images must give one loss, got {first!r} and {second!r}; "
                             "switch off augmentation, dropout or train mode")
        return first


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 convolutions and matrix products at their own precision, then the former setting again.

    A GPU computes convolutions in TF32 by default; its 10 bits of mantissa are too coarse for the derivative
    of a derivative. Without effect on a CPU.
    """
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def check_labels(images: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ``ValueError`` unless every image, of at least one, has a class or ``classes`` probabilities."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError("images and labels must be equally many and at least one, "
                         f"got {len(images)} images and {len(labels)} labels")
    if labels.is_floating_point():
        fits = labels.dim() == 2 and labels.shape[1] == classes
    else:
        fits = labels.dim() == 1 and bool(((labels >= 0) & (labels < classes)).all())
    if not fits:
        raise ValueError(f"labels must be (N,) whole numbers from 0 to {classes - 1} or "
                         f"(N, {classes}) probabilities, got {tuple(labels.shape)} {labels.dtype} "
                         f"from {labels.min().item():g} to {labels.max().item():g}")


def check_mask(mask: Mask, params: Params) -> Mask:
    """``mask`` on the device of ``params``.

    Raises ``ValueError`` where a mask does not fit its parameter or a pruned entry is not 0.
    """
    for name, keep in mask.items():
        if name not in params or keep.shape != params[name].shape or keep.dtype != torch.bool:
            has = tuple(params[name].shape) if name in params else "no such parameter"
            raise ValueError(f"mask of {name} must be boolean and shaped like it ({has}), "
                             f"got {tuple(keep.shape)} {keep.dtype}")
        weight = params[name].detach()
        pruned = int((weight[~keep.to(weight.device)] != 0).sum())
        if pruned:
            raise ValueError(f"pruned entries must be 0, got {pruned} others in {name}; "
                             "apply the mask to the network first")
    return {name: keep.to(params[name].device) for name, keep in mask.items()}


def subset(labels: Tensor, count: int) -> Tensor:
    """Index (count,) of a fixed selection: the first image of every class, then the second, and so on.

    No random number enters, so every network of a study is measured on the same images, and a data set sorted
    by class does not give one class only. Soft labels (N, K) count as their largest. Raises ``ValueError``
    unless 1 <= count <= N.
    """
    if not 1 <= count <= len(labels):
        raise ValueError(f"images must lie in [1, {len(labels)}] (the images given), got {count}")
    classes = (labels.argmax(1) if labels.dim() == 2 else labels).cpu()
    rank = torch.empty(len(classes), dtype=torch.int64)
    for c in classes.unique():
        members = (classes == c).nonzero().squeeze(1)
        rank[members] = torch.arange(len(members))
    # Stable, so that images of equal rank keep the order of the data.
    return torch.argsort(rank, stable=True)[:count]
