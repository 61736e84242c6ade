"""Gradient matching: how far the gradients of real and synthetic images are apart, and which way to change the synthetic.

For a class with real images T and synthetic images S on a network with weights w, the distance is D(g(S), g(T)), where g is the
gradient of the mean cross-entropy with respect to the matched weights (Kim et al. 2022, arXiv 2205.14959, equation 2). What a
step needs is its gradient with respect to S: a derivative of a derivative.

Three forms compute it, one class after another in eager mode (``loop``), one class after another by one compiled function
(``compiled``), and all classes at once by ``torch.func.vmap`` (``vmap``). They are the same mathematics; ``compiled`` and
``vmap`` agree with ``loop`` to rounding.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import models
from dpkit.distill.spec import MatchingSpec
from dpkit.training.gradient import can_compile, unbuilt
from dpkit.tree import Buffers, Params

FORMS = ("loop", "compiled", "vmap")


def distance(kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Distance of two gradients of one weight, (out, in, h, w) or (out, in): a scalar.

    ``squared`` and ``l1`` sum over all entries; ``cosine`` is one minus the cosine, summed over output channels.
    """
    if kind == "squared":
        return ((a - b) ** 2).sum()
    if kind == "l1":
        return (a - b).abs().sum()
    return (1 - F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)).sum()


def matched_names(model: models.ModelSpec, matched: str = "convolutions") -> tuple[str, ...]:
    """The weights whose gradients are matched: of ``convolutions``, or all ``weights`` with the classifier's; never biases."""
    return tuple(n for n in models.prunable(model) if matched == "weights" or n != f"{models.classifier_name(model)}.weight")


def cross_entropy(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
                  precision: str = "fp32") -> Tensor:
    """Mean cross-entropy in train mode: a scalar in the images' own precision, so that float64 stays float64."""
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits, _ = models.forward(model, params, buffers, images, train=True)
    return F.cross_entropy(logits.to(images.dtype), labels)


def gradient(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
             *, keep_graph: bool, precision: str = "fp32", matched: str = "convolutions") -> list[Tensor]:
    """Gradient of the mean cross-entropy with respect to the matched weights, in train mode."""
    loss = cross_entropy(model, params, buffers, images, labels, precision)
    return list(torch.autograd.grad(loss, [params[n] for n in matched_names(model, matched)], create_graph=keep_graph))


def matching_loss(spec: MatchingSpec, model: models.ModelSpec, params: Params, buffers: Buffers, real: Tensor,
                  synthetic: Tensor, label: int) -> Tensor:
    """Distance between the gradients of real and synthetic normalised images of one class (equation 2): a scalar.

    Differentiable with respect to ``synthetic``; the real gradient is a constant. All of ``params`` must require gradients.
    """
    def found(images: Tensor, keep_graph: bool) -> list[Tensor]:
        labels = torch.full((len(images),), label, device=images.device)
        return gradient(model, params, buffers, images, labels, keep_graph=keep_graph, precision=spec.precision,
                        matched=spec.matched)

    target = found(real, False)
    return sum(distance(spec.distance, f, t) for f, t in zip(found(synthetic, True), target, strict=True))


def class_gradient(kind: str, model: models.ModelSpec, precision: str, matched: Params, rest: Params, buffers: Buffers,
                   real: Tensor, synthetic: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the matching loss with respect to ``synthetic`` (S, C, H, W), and the loss, as one pure function.

    kind: of distance. matched, rest: the parameters that are matched and the others. real: (R, C, H, W). label: () int64.
    Reverse mode over reverse mode, as the norms' backward pass has no forward-mode derivative; it can be compiled and mapped.
    """
    def loss(matched: Params, images: Tensor) -> Tensor:
        return cross_entropy(model, rest | matched, buffers, images, label.expand(len(images)), precision)

    target = torch.func.grad(loss)(matched, real)

    def gap(synthetic: Tensor) -> Tensor:
        found = torch.func.grad(loss)(matched, synthetic)
        return sum(distance(kind, found[name], target[name]) for name in matched)

    return torch.func.grad_and_value(gap)(synthetic)


@functools.lru_cache(maxsize=8)
def _function(kind: str, model: models.ModelSpec, precision: str, mapped: bool, compiled: bool):
    """:func:`class_gradient` of one class, or of several at once: buffers, images and labels then have a leading axis."""
    function = functools.partial(class_gradient, kind, model, precision)
    if mapped:
        function = torch.func.vmap(function, in_dims=(None, None, 0, 0, 0, 0))
    return torch.compile(function, dynamic=False) if compiled else function


class Matcher:
    """Matches synthetic with real images of some classes on one network; the form is chosen once, the contract is one.

    form: one of ``FORMS``, or ``auto``: on a CPU ``compiled`` if the specification says ``compile`` and ``loop`` if not, as
    ``vmap`` is slower there and needs nine times the memory (measured); on a GPU ``vmap``, since the kernels of one class are
    too small to fill it (not measured). With ``compile`` ``vmap`` is compiled too. Without a C++ compiler ``compiled`` becomes
    ``loop``, with one warning. Raises ``ValueError`` on another form.

    What ``vmap`` cannot do is done uncompiled, and then by ``loop``, with a warning that says why.

    Memory: ``loop`` and ``compiled`` hold the activations of one class, ``vmap`` of all classes that it is given; when a GPU
    runs out of memory ``vmap`` takes half as many at a time from then on, and says so once.
    """

    def __init__(self, spec: MatchingSpec, model: models.ModelSpec, *, form: str = "auto", device: torch.device | str = "cpu",
                 at_once: int | None = None):
        if form not in ("auto", *FORMS):
            raise ValueError(f"form must be one of auto, {', '.join(FORMS)}; got {form!r}")
        compiled = form == "compiled" or spec.compile
        if form == "auto":
            form = "vmap" if torch.device(device).type == "cuda" else "compiled" if compiled else "loop"
        if compiled and not can_compile():
            compiled, form = False, "vmap" if form == "vmap" else "loop"
        self.spec, self.model, self.form, self.compiled = spec, model, form, compiled and form != "loop"
        self.names = frozenset(matched_names(model, spec.matched))
        self.at_once = at_once  # classes in one pass of vmap; None: all that are given

    def groups(self, sizes: Sequence[int]) -> list[list[int]]:
        """The classes to give to one call, for real batches of these ``sizes``: in one group only classes of equal size."""
        if self.form != "vmap":
            return [[c] for c in range(len(sizes))]
        return [[c for c, size in enumerate(sizes) if size == one] for one in sorted(set(sizes), reverse=True)]

    def __call__(self, params: Params, buffers: Buffers, real: Tensor, synthetic: Tensor,
                 labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Gradient of the matching losses with respect to ``synthetic`` (G, S, C, H, W), and the losses (G,), of G classes.

        real: (G, R, C, H, W) normalised images; labels: the G classes. Nothing that is passed in changes. May be called from
        several threads at once.
        """
        if self.form == "vmap":
            return self._all(params, buffers, real, synthetic, labels)
        one = self._compiled if self.compiled and real.shape[1] == self.spec.real_batch else self._eager
        found = [one(params, buffers, *row) for row in zip(real, synthetic, labels, strict=True)]
        return torch.stack([g for g, _ in found]), torch.stack([value for _, value in found])

    def _eager(self, params: Params, buffers: Buffers, real: Tensor, synthetic: Tensor, label: int) -> tuple[Tensor, Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        synthetic = synthetic.detach().requires_grad_()
        value = matching_loss(self.spec, self.model, leaves, buffers, real, synthetic, label)
        return torch.autograd.grad(value, synthetic)[0], value.detach()

    def _compiled(self, params: Params, buffers: Buffers, real: Tensor, synthetic: Tensor, label: int) -> tuple[Tensor, Tensor]:
        if not self.compiled:
            return self._eager(params, buffers, real, synthetic, label)
        # only whole batches come here: a class with fewer images would cost another compilation
        function = _function(self.spec.distance, self.model, self.spec.precision, False, True)
        matched, rest = self._parts(params)
        try:
            return function(matched, rest, buffers, _channels_last(real), _channels_last(synthetic),
                            torch.tensor(label, device=real.device))
        except Exception as error:
            # what torch.compile cannot build (bf16 matching on ResNets, in torch 2.13) is computed without it
            if not unbuilt(error):
                raise
            self.compiled = False
            warnings.warn(f"the matching step of {self.model.arch} cannot be compiled here ({type(error).__name__}): slower, "
                          "with the same mathematics", stacklevel=2)
            return self._eager(params, buffers, real, synthetic, label)

    def _all(self, params: Params, buffers: Buffers, real: Tensor, synthetic: Tensor,
             labels: Sequence[int]) -> tuple[Tensor, Tensor]:
        classes, found, at = sent(labels, real.device), [], 0
        while at < len(labels) and self.form == "vmap":
            function = _function(self.spec.distance, self.model, self.spec.precision, True, self.compiled)
            matched, rest = self._parts(params)
            part = slice(at, at + (self.at_once or len(labels)))
            count = len(labels[part])
            # BatchNorm writes its running statistics in place, so that each class needs its own
            own = {name: b.expand(count, *b.shape).clone() for name, b in buffers.items()}
            try:
                found.append(function(matched, rest, own, real[part], synthetic[part], classes[part]))
                at += count
                continue
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
            except RuntimeError as error:
                self._simpler(error)
                continue
            # here, outside the handler, which would keep the failed pass's tensors alive
            self.at_once = count // 2
            warnings.warn(f"not enough memory to match {count} classes at once: {self.at_once} at a time from here on")
            if real.is_cuda:
                torch.cuda.empty_cache()
        if at < len(labels):
            return self(params, buffers, real, synthetic, labels)
        return torch.cat([g for g, _ in found]), torch.cat([value for _, value in found])

    def _simpler(self, error: RuntimeError) -> None:
        """The next simpler way than the one that failed with ``error``."""
        words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if self.compiled:
            self.compiled, then = False, "uncompiled"
        else:
            self.form, then = "loop", "class after class"
        warnings.warn(f"the matching step of {self.model.arch} does not work as it is ({words}): {then} from here on, slower, "
                      "with the same mathematics", stacklevel=2)

    def _parts(self, params: Params) -> tuple[Params, Params]:
        """The matched parameters and the others, without gradients, and channels last for compiled code."""
        ready = {n: _channels_last(t.detach()) if self.compiled else t.detach() for n, t in params.items()}
        return {n: t for n, t in ready.items() if n in self.names}, {n: t for n, t in ready.items() if n not in self.names}


def sent(index: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """An index (n,) int64 on the ``device``, which is not waited for, as it would be for a list in brackets."""
    return torch.as_tensor(index).to(device, non_blocking=True)


def _channels_last(t: Tensor) -> Tensor:
    """Images and convolution weights with channels innermost, the faster order for compiled convolutions; others as they are."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
