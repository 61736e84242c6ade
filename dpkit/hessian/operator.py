"""The Hessian of a network's loss on its surviving weights, and its two relatives, as linear operators."""
from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpkit import models, tree
from dpkit.hessian.checks import check_labels, check_memory, full_precision, subset
from dpkit.hessian.matrices import MATRICES, Multiply, multiplier
from dpkit.hessian.memory import Watch, fitting
from dpkit.hessian.product import MEMORY, CompiledProduct, chunk_size, usual_chunk, worthwhile
from dpkit.hessian.spec import MODES, PRECISIONS, HessianSpec
from dpkit.hessian.weights import Weights
from dpkit.models import ModelSpec
from dpkit.training.gradient import can_compile
from dpkit.tree import Buffers, Mask, Params

EAGER = 100
"""Images a chunk of an uncompiled product."""


class Operator(Weights):
    """H = d2L/dw2 with L the mean cross-entropy over fixed images, w the surviving weights, in eval mode.

    A principal submatrix of the full Hessian: rows and columns of pruned entries are left out, not set to 0,
    so neither trace nor diagonal is diluted by weights that the network does not have. Vectors are (n,) with
    n = ``size``: the entries of ``names`` in their order, each tensor row by row, pruned ones skipped
    (:meth:`flatten`, :meth:`unflatten`). Other matrices of the same weights and other modes are options.

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
             100, and once compiled less for less than 200 images, so that there are two
    keep     most images whose graphs stay in memory between products (about 5 MB an image for a ConvNet-3 of
             width 64 at 32 x 32; half a MB once compiled, and three times that or more in bf16, where it speeds up
             products); None: ``chunk``, so a single chunk is kept and several are not; once compiled, as many as
             2 GiB hold
    dtype    torch.float32 or torch.float64; None: that of ``params``
    compile  True: compile the product on its first use (about 20 seconds in a process, less the second time on a
             machine), then about twice as fast; "auto": on a CPU, where ``products`` products are work enough to
             pay for that (:func:`dpkit.hessian.product.worthwhile`). Results differ from uncompiled ones by
             rounding. Where there is no C++ compiler, or compiling fails or gives another product: one warning,
             and products as without it
    products how many products will be asked for, for "auto"
    threads  chunks computed side by side once compiled, on a core each; None: as many as torch computes with
    matrix   "hessian"; "gauss_newton", which is the Fisher matrix of a softmax with cross-entropy; "empirical_fisher", the
             second moment of the images' own gradients: :mod:`dpkit.hessian.matrices`
    mode     "eval"; "train": BatchNorm normalises by the images given, which then are one batch and one chunk, and L is a
             function of all of them together. Networks without BatchNorm compute the same in both modes
    include_pruned  rows and columns for pruned entries too, as if the network could move along them
    precision  "fp32", or "bf16": a compiled product multiplies in bfloat16 (:mod:`dpkit.hessian.bf16`), at nearly twice the speed
             on a processor that has it, for a relative error of about 0.01; :meth:`exact` does not, and
             :mod:`dpkit.hessian.mixed` makes estimates of both. An uncompiled product does not either
    memory   bytes that a product may hold at once, beyond network, images, vectors and what a kernel takes for itself; decides
             ``chunk`` (the one given is then an upper limit) and ``keep`` (must be None). None: no bound

    Attributes: size n; dtype; device; names; chunk; loss, the value of L (nats); matrix; mode; pruned ("left out", "included",
    or "none", where nothing is); precision; about, all of it as a dictionary that belongs beside every result.

    Raises ``ValueError`` for unknown names, masks that do not fit, pruned entries that are not 0, no
    surviving weights, no images, labels that do not fit, a loss that is not finite, or a loss that differs
    between two passes over the images (then H would be another matrix in each product and Lanczos would
    return nonsense); for batch statistics of less than two images or of a part of them, and where one image needs more than
    ``memory``.
    """

    def __init__(self, model: ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                 mask: Mask | None = None, names: Iterable[str] | None = None, chunk: int | None = None,
                 keep: int | None = None, dtype: torch.dtype | None = None, *, compile: bool | str = False,
                 products: int = 60, threads: int | None = None, matrix: str = "hessian", mode: str = "eval",
                 include_pruned: bool = False, memory: int | None = None, precision: str = "fp32") -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be >= 1, got {chunk}")
        if compile not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
        for word, value, allowed in (("matrix", matrix, MATRICES), ("mode", mode, MODES), ("precision", precision, PRECISIONS)):
            if value not in allowed:
                raise ValueError(f"{word} must be one of {', '.join(allowed)}; got {value!r}")
        check_memory(memory)
        if memory is not None and keep is not None:
            raise ValueError(f"keep must be None where memory decides it, got keep {keep} and memory {memory}")
        super().__init__(model, params, mask, names, dtype, include_pruned)
        if precision == "bf16" and self.dtype != torch.float32:
            raise ValueError(f"precision bf16 rounds products of dtype float32, got dtype {self.dtype}; leave one of them out")
        self._buffers = tree.to(tree.detach(buffers), dtype=self.dtype)
        check_labels(images, labels, model.classes)
        self._images = images.to(device=self.device, dtype=self.dtype)
        self._labels = labels.to(self.device, self.dtype if labels.is_floating_point() else torch.int64)
        self.matrix, self.mode, self.precision = matrix, mode, precision
        self._graphs: list[Multiply] | None = None
        self._given = chunk, keep, threads, memory
        self.chunk = self._chunk_of(chunk, EAGER)
        self._keep = self.chunk if keep is None else keep
        pays = self.device.type == "cpu" and worthwhile(model, len(images), products)
        self._compile = pays if compile == "auto" else bool(compile)
        self._compiled: CompiledProduct | None = None
        self.loss = self._checked_loss()

    @classmethod
    def from_spec(cls, spec: HessianSpec, model: ModelSpec, params: Params, buffers: Buffers, images: Tensor,
                  labels: Tensor, mask: Mask | None = None, chunk: int | None = None,
                  keep: int | None = None, *, compile: bool | str = False, products: int | None = None,
                  threads: int | None = None, memory: int | None = None) -> Self:
        """The operator that ``spec`` describes, on the :func:`subset` of ``spec.images`` of the images given.

        Images normalised and un-augmented, except for a protocol that asks for an augmented batch
        (:meth:`HessianSpec.published`): then they are that batch; products: None: those of the specification;
        the rest as for the class. Raises ``ValueError`` as the class
        does, and where there are fewer than ``spec.images``.
        """
        index = subset(labels, spec.images).to(images.device)
        names = models.prunable(model) if spec.scope == "weights" else tuple(params)
        products = spec.probes + spec.lanczos_steps if products is None else products
        return cls(model, params, buffers, images[index], labels[index.to(labels.device)], mask, names, chunk,
                   keep, dtype=getattr(torch, spec.dtype), compile=compile, products=products, threads=threads,
                   matrix=spec.matrix, mode=spec.mode, include_pruned=spec.include_pruned, memory=memory,
                   precision=spec.precision)

    @property
    def batched(self) -> bool:
        """Whether the images are one batch, whose statistics BatchNorm takes: then they cannot be cut into chunks."""
        return self.mode == "train" and bool(models.statistics(self.model))

    @property
    def about(self) -> dict[str, str | int]:
        """What was measured, in words and numbers, to stand beside a result."""
        statistics = ("none" if not models.statistics(self.model) else
                      f"of the batch of {len(self._images)}" if self.batched else "running")
        return {"matrix": self.matrix, "mode": self.mode, "batch_statistics": statistics, "pruned_entries": self.pruned,
                "images": len(self._images), "size": self.size, "dtype": str(self.dtype).removeprefix("torch."),
                **({"precision": self.precision} if self.precision != "fp32" else {})}

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
        return self._product(vectors, self._compiled_product)

    def exact(self, vectors: Tensor) -> Tensor:
        """H V as :meth:`matmat` with precision "fp32": the same unless this operator's products are rounded, then uncompiled.

        Raises as :meth:`matvec`.
        """
        return self._product(vectors, self._compiled_product if self.precision == "fp32" else lambda: None)

    @functools.cached_property
    def rounding(self) -> float:
        """How far a product is from one in full precision, ||A v - H v|| / ||H v|| for one v; 0 where nothing is rounded."""
        if self.precision == "fp32" or self._compiled_product() is None:
            return 0.0
        vector = self._probe()[:, None]
        exact = self.exact(vector)
        return float((self.matmat(vector) - exact).norm() / exact.norm().clamp_min(torch.finfo(self.dtype).tiny))

    def _product(self, vectors: Tensor, how: Callable[[], CompiledProduct | None]) -> Tensor:
        self._check_shape(vectors, 2)
        columns = vectors.to(device=self.device, dtype=self.dtype).T.contiguous()
        with full_precision():
            compiled = how()
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
        for multiply in self._multipliers():
            # One column at a time: a batched backward pass (``is_grads_batched``) has no rule for group
            # normalisation differentiated twice, and took 1.3 times as long on a ResNet.
            for row, column in enumerate(columns):
                parts = multiply(tuple(self.unflatten(column).values()))
                products[row] += self.flatten(dict(zip(self.names, parts, strict=True)))
                del parts
            del multiply  # and with it its graph, before the next one is built
        return products

    def _multipliers(self) -> Iterable[Multiply]:
        """The product on each chunk, with its graph: kept ones, or built one at a time."""
        if self._graphs is None:
            starts = range(0, len(self._images), self.chunk)
            lazily = (self._multiplier(slice(start, start + self.chunk)) for start in starts)
            if len(self._images) > self._keep:
                return lazily
            self._graphs = list(lazily)
        return self._graphs

    def _multiplier(self, chunk: slice) -> Multiply:
        weights = tuple(self._weights.values())
        return multiplier(self.matrix, self._logits(chunk), self._labels[chunk], weights, len(self._images))

    def _logits(self, chunk: slice) -> Tensor:
        return models.forward(self.model, {**self._fixed, **self._weights}, self._buffers, self._images[chunk],
                              self.mode == "train")[0]

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
        chunk, keep, threads, memory = self._given
        threads, count = threads or torch.get_num_threads(), len(self._images)
        limit = MEMORY if keep is None else math.inf if keep >= count else 0
        if memory is not None:
            # One half for what is kept, the other for chunks at work. An uncompiled chunk holds more than a compiled one.
            limit, memory = memory // 2, memory - memory // 2
            threads = max(1, min(threads, memory // self.peak(count if self.batched else 1)))
            memory //= threads
        size = count if self.batched else chunk_size(count, self._chunk_of(chunk, usual_chunk(count), memory))

        def on(images: Tensor, labels: Tensor, laid_out: bool = True) -> CompiledProduct:
            return CompiledProduct(self.model, {n: w.detach() for n, w in self._weights.items()}, self._fixed,
                                   self._buffers, images, labels, size, limit, threads, matrix=self.matrix,
                                   train=self.mode == "train", precision=self.precision, laid_out=laid_out)

        # A wrong program would give a wrong spectrum without a sign of it, so a few images are compared.
        few = slice(0, count if self.batched else min(4, size))
        vector = self.unflatten(self._probe())
        made = on(self._images, self._labels)
        found = self.flatten(on(self._images[few], self._labels[few], made.laid_out)([vector])[0])
        with torch.enable_grad():
            parts = self._multiplier(few)(tuple(vector.values()))
        expected = self.flatten(dict(zip(self.names, parts, strict=True))) * count
        # Rounding puts single units on the other side of a ReLU's corner, which moves a product by up to 1e-3.
        allowed = 1e-2 if self.precision == "fp32" else 1e-1
        if (found - expected).norm() > allowed * expected.norm() + torch.finfo(self.dtype).tiny:
            raise ValueError("its product differs from the uncompiled one")
        return made

    def _probe(self) -> Tensor:
        return torch.arange(self.size, device=self.device).cos().to(self.dtype)

    def _chunk_of(self, chunk: int | None, usual: int, memory: int | None = None) -> int:
        """Images a chunk: as given or as usual, all of them where they are one batch, and no more than memory holds."""
        count, memory = len(self._images), self._given[3] if memory is None else memory
        if self.batched:
            if count < 2 or (chunk or count) < count:
                raise ValueError(f"mode train takes the images as one batch of at least 2 in one chunk, got {count} images and "
                                 f"chunk {chunk}; give more, leave chunk out, or choose mode eval")
            chunk = count
        chunk = usual if chunk is None else chunk
        if memory is None:
            return chunk
        most = min(chunk, count)
        least = most if self.batched else 1
        found = fitting(self.peak, memory, most) if least == 1 else most if self.peak(most) <= memory else 0
        if not found:
            raise ValueError(f"memory must be at least {self.peak(least)} bytes for a chunk of {least} image"
                             f"{'s' * (least > 1)} of {self.model.arch}, got {memory}")
        return found

    def peak(self, images: int) -> int:
        """Bytes that an uncompiled product with one vector holds at most, for a chunk of so many images.

        Rehearsed on tensors without storage, so nothing is computed, in about a second for a ResNet; beyond network, images,
        vector, and what a kernel takes for itself while it runs.
        """
        fake, twin = FakeTensorMode(), copy.copy(self)
        given = []
        for part in ("_weights", "_fixed", "_buffers", "_entries"):
            tensors = {n: None if t is None else fake.from_tensor(t) for n, t in getattr(self, part).items()}
            setattr(twin, part, tensors)
            given += [t for t in tensors.values() if t is not None]
        with fake:
            twin._images, twin._labels = (torch.empty(images, *t.shape[1:], dtype=t.dtype, device=self.device)
                                          for t in (self._images, self._labels))
            twin._graphs, twin.chunk, twin._keep = None, images, images
            column = torch.zeros(1, self.size, dtype=self.dtype, device=self.device)
            with Watch(*given, twin._images, twin._labels, column) as watch:
                twin._eager(column)
        return watch.peak

    @torch.no_grad()
    def _checked_loss(self) -> float:
        """L, after two passes over the images that must agree up to the rounding of the dtype."""
        def share(start: int) -> float:
            chunk = slice(start, start + self.chunk)
            return float(F.cross_entropy(self._logits(chunk), self._labels[chunk], reduction="sum") / len(self._images))

        starts = range(0, len(self._images), self.chunk)
        with full_precision():
            first, second = (sum(share(start) for start in starts) for _ in range(2))
        if not (math.isfinite(first) and math.isfinite(second)):
            raise ValueError(f"the loss must be finite, got {first}; "
                             "the network has diverged or the images are not finite")
        # Not bit for bit: on a GPU the order of a sum may change from one pass to the next.
        if abs(first - second) > 100 * torch.finfo(self.dtype).eps * max(abs(first), 1.0):
            raise ValueError(f"two passes over the images must give one loss, got {first!r} and {second!r}; "
                             "switch off augmentation, dropout or train mode")
        return first
