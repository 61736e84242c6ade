"""Stages that measure curvature: at trained networks, of what masks remove, and along training."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dpkit import hessian, models, tree
from dpkit.data import AugmentSpec, augment, normalise
from dpkit.hessian import Estimate, HessianSpec, Operator, SharpnessSpec, SparseSpec
from dpkit.hessian.spectrum import SpectrumSpec, curve, spectrum
from dpkit.models import ModelSpec
from dpkit.stages.connect import on_device
from dpkit.stages.make import network_of
from dpkit.stages.sets import read_set
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact
from dpkit.training import TrainSpec
from dpkit.tree import Mask

FLAT = 1e-6  # eigenvalues of a loss in nats below this are rounding: the network does not depend on its weights


def _fixed(context: Context, unit: Unit, count: int, parents: Mapping[str, Artifact]) -> tuple[Tensor, Tensor]:
    """The fixed, un-augmented, class-balanced training images and their labels, or all images of the small set ``images``."""
    dataset = context.dataset(unit.data)
    if "images" in parents:
        small = read_set(parents["images"])
        return (normalise(small.images, dataset.mean, dataset.std).to(context.device), small.labels.to(context.device))
    chosen = hessian.subset(dataset.train.labels, min(count, len(dataset.train)))
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    return images.to(context.device), dataset.train.labels[chosen].to(context.device)


def _mask(context: Context, parents: Mapping[str, Artifact]) -> Mask | None:
    return tree.to(parents["ticket"].group("mask"), context.device) if "ticket" in parents else None


def _named(**found: Estimate) -> dict[str, float]:
    """Values and standard errors under ``NAME`` and ``NAME_error``."""
    return {name + end: getattr(estimate, field) for name, estimate in found.items()
            for end, field in (("", "value"), ("_error", "standard_error"))}


def _flat(op: Operator, products: int) -> Output:
    """No result: the network does not depend on its weights, and a curvature of 0 would make it the flattest of all."""
    return Output({}, {"surviving": op.size, "products": products, "about": op.about}, failed="no curvature above rounding")


def _as_failure(function):
    """A network on which a measure is not defined (a collapsed one, say) is a row without a result and stops no chapter."""
    @wraps(function)
    def measured(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
        try:
            return function(context, unit, parents)
        except ValueError as error:
            return Output({}, {}, failed=str(error).splitlines()[0])

    return measured


@stage("hessian", 2)
@_as_failure
def measure_hessian(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Trace, diagonal and top eigenvalue at a trained network, on surviving weights.

    Result: values and standard errors; with a ``target``, also trace_probes and whether it was reached; about, what matrix, mode
    and images they are of (:attr:`dpkit.hessian.Operator.about`).
    """
    spec, model = HessianSpec(**unit.spec["hessian"]), ModelSpec(**unit.spec["model"])
    images, labels = _fixed(context, unit, spec.images, parents)
    network, mask = on_device(context.device, parents["network"]), _mask(context, parents)
    op = Operator.from_spec(spec.replace(images=len(images)), model, *network, images, labels, mask=mask, compile="auto")
    how = hessian if spec.precision == "fp32" else hessian.mixed
    trace, diagonal = how.trace_and_diagonal(op, spec.probes, tree.generator_for(unit.spec["seed"], "probes"))
    steps = min(spec.lanczos_steps, op.size)
    top = how.top_eigenvalue(op, steps, tree.generator_for(unit.spec["seed"], "lanczos"))
    values, products = diagonal.values.double(), trace.products + top.products
    if max(abs(top.value), float(values.abs().max())) < FLAT:
        return _flat(op, products)
    targeted = {}
    if spec.target > 0:
        found = hessian.to_error(op, spec.target, spec.most, tree.generator_for(unit.spec["seed"], "target"))
        trace, products = found.estimate, products + found.estimate.products
        targeted = {"trace_probes": trace.samples, "trace_reached": found.reached}
    negative = float((values < -2 * diagonal.standard_errors.double()).double().mean())
    return Output({"diagonal": diagonal.values.float(), "diagonal_error": diagonal.standard_errors.float()},
                  {"trace": trace.value, "trace_error": trace.standard_error, "top_eigenvalue": top.value,
                   "top_eigenvalue_error": top.standard_error, "surviving": op.size,
                   "trace_per_weight": trace.value / op.size, "diagonal_negative": negative,
                   "diagonal_error": float(torch.sqrt((diagonal.standard_errors.double() ** 2).mean())),
                   "products": products, **targeted, "about": op.about})


@stage("sharpness", 1)
@_as_failure
def measure_sharpness(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Plain and adaptive sharpness, worst case and average, and the squared Fisher-Rao norm, on surviving weights; all in nats.

    Result: sharpness and adaptive_sharpness with those of SAM's one step (``_first``), average_sharpness, adaptive_average and
    fisher_rao with standard errors, and the loss on the same images.
    """
    spec, model = SharpnessSpec(**unit.spec["sharpness"]), ModelSpec(**unit.spec["model"])
    images, labels = _fixed(context, unit, spec.images, parents)
    loss = hessian.fixed_loss(model, *on_device(context.device, parents["network"]), images, labels, _mask(context, parents),
                              count=len(images), scope=spec.scope, dtype=spec.dtype)
    found = hessian.measure(spec, loss, tree.generator_for(unit.spec["seed"], "sharpness"))
    return Output({}, {"sharpness": found.plain.value, "sharpness_first": found.plain.first_order,
                       "adaptive_sharpness": found.adaptive.value, "adaptive_first": found.adaptive.first_order,
                       **_named(average_sharpness=found.average, adaptive_average=found.adaptive_average),
                       "fisher_rao": found.fisher_rao.labels, "fisher_rao_error": found.fisher_rao.labels_error,
                       "loss": loss.loss})


def _operators(context: Context, unit: Unit, parents: Mapping[str, Artifact], count: int, dtype: str, products: int,
               about: dict[str, Any]) -> Callable[[str], Operator]:
    """The operator of each matrix by its name; ``about`` is filled with what each is of."""
    model = ModelSpec(**unit.spec["model"])
    images, labels = _fixed(context, unit, count, parents)
    network, mask = on_device(context.device, parents["network"]), _mask(context, parents)

    def operator(matrix: str) -> Operator:
        op = Operator(model, *network, images, labels, mask=mask, dtype=getattr(torch, dtype), matrix=matrix, compile="auto",
                      products=products)
        about[matrix] = op.about
        return op

    return operator


@stage("spectrum", 2)
@_as_failure
def measure_spectrum(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """The whole spectrum at a trained network, on surviving weights.

    Tensors: eigenvalues and residuals (k,), of largest size first; nodes and weights (p, m) of the density's rules, the last
    ``known`` columns exact eigenvalues; grid, curve and curve_error (g,), that density per unit of eigenvalue. Result: numbers
    with standard errors (``_error``); negative_low and negative_high, bounds of the share of negative eigenvalues; products;
    about, by matrix.
    """
    spec, about = SpectrumSpec(**unit.spec["spectrum"]), {}
    products = spec.pair_products + spec.probes * spec.steps
    operator = _operators(context, unit, parents, spec.images, spec.dtype, products, about)
    found = spectrum(spec, operator, tree.generator_for(unit.spec["seed"], "spectrum"))
    if float(found.pairs.values.abs().max()) < FLAT:
        return Output({}, {"size": found.size, "products": found.products, "about": about},
                      failed="no curvature above rounding")
    grid, values, errors = curve(found.density)
    top, lowest = int(found.pairs.values.argmax()), found.density.nodes[found.density.weights > 0].min()
    model = ModelSpec(**unit.spec["model"])
    images, labels = _fixed(context, unit, spec.images, parents)
    last = hessian.last_layer_diagonal(model, *on_device(context.device, parents["network"]), images, labels,
                                       _mask(context, parents))
    return Output({"eigenvalues": found.pairs.values, "residuals": found.pairs.residuals, "nodes": found.density.nodes,
                   "weights": found.density.weights, "grid": grid, "curve": values, "curve_error": errors},
                  {"size": found.size, "products": found.products, "known": found.density.known,
                   "top_eigenvalue": float(found.pairs.values[top]), "top_eigenvalue_error": float(found.pairs.residuals[top]),
                   "lowest_eigenvalue": float(lowest), "last_layer_mean": float(last.values.mean()),
                   **_named(trace=found.trace, frobenius=found.frobenius, negative_total=found.negative.total,
                            negative_fraction=found.negative.fraction, rank_entropy=found.rank.entropy,
                            rank_participation=found.rank.participation, gn_trace=found.gauss_newton,
                            gn_top=found.gauss_newton_top, fisher_trace=found.fisher),
                   "negative_low": found.negative.low.value, "negative_high": found.negative.high.value, "about": about})


@stage("diagonal", 2)
@_as_failure
def measure_diagonal(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """The published protocol: the diagonal on one augmented batch of 64, in train mode, pruned entries counted.

    The batch is augmented as in training on real data. Exact where there are at most ``limit`` entries, or that many surviving
    ones: then those alone, and the pruned ones by probes; else all by probes. CutMix is left out, as its mixed labels are not a
    class. Tensors: values and errors (n,), survives (n,) bool. Result, with standard errors: published_mean, over all entries
    with those of pruned weights as 0, which they are where the mask is part of the function; published_surviving, over the
    surviving ones; exact, whether these two are; published_loose, over all, pruned ones as if let loose; exact_loose; about.
    """
    spec, model, dataset = HessianSpec(**unit.spec["hessian"]), ModelSpec(**unit.spec["model"]), context.dataset(unit.data)
    seed = unit.spec["seed"]
    chosen = hessian.subset(dataset.train.labels, min(spec.images, len(dataset.train)))
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    images = augment(AugmentSpec(operations=unit.spec["augment"]), images, tree.generator_for(seed, "augment")).to(context.device)
    mask, entries = _mask(context, parents), models.count_prunable(model)
    kept = entries if mask is None else sum(int(mask[name].sum()) for name in models.prunable(model))
    op = Operator.from_spec(spec.replace(images=len(images)), model, *on_device(context.device, parents["network"]), images,
                            dataset.train.labels[chosen].to(context.device), mask=mask, compile="auto",
                            products=spec.probes + (kept if kept <= unit.spec["limit"] else 0))
    survives = torch.ones(op.size, dtype=torch.bool)
    if mask is not None:
        survives = op.flatten({name: mask[name] for name in op.names}).cpu()
    limit, surviving = unit.spec["limit"], int(survives.sum())
    exact, all_exact, products = surviving <= limit, op.size <= limit, 0
    values, errors = torch.zeros(2, op.size, dtype=torch.float64)
    if not all_exact:
        # The error of a sum is that of the probes' own sums, so each group that is sampled has one.
        groups = torch.stack([torch.ones_like(survives), survives, ~survives])
        sums, found = hessian.diagonal_and_sums(op, groups, spec.probes, tree.generator_for(seed, "probes"))
        (loose, kept, gone), values, errors, products = sums, found.values.clone(), found.standard_errors.clone(), found.products
    if exact:
        places = torch.arange(op.size) if all_exact else survives.nonzero().squeeze(1)
        values[places], errors[places] = hessian.exact_diagonal(op, limit=limit, entries=places).values, 0.0
        products += len(places)
        kept = Estimate(float(values[survives].sum()), 0.0, len(places))
        loose = (Estimate(float(values.sum()), 0.0, len(places)) if all_exact else
                 Estimate(kept.value + gone.value, gone.standard_error, products))
    means = {"published_mean": (kept, op.size), "published_surviving": (kept, surviving), "published_loose": (loose, op.size)}
    result = _named(**{name: Estimate(total.value / size, total.standard_error / size, total.products)
                       for name, (total, size) in means.items()})
    return Output({"values": values.float(), "errors": errors.float(), "survives": survives},
                  {"exact": exact, "exact_loose": all_exact, **result, "size": op.size, "surviving": surviving,
                   "products": products, "about": op.about})


@stage("removed", 2, tolerant=True)
@_as_failure
def measure_removed(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Curvature of the weights that each arm's mask removes from the dense trained network, and overlap with its top eigenspace.

    On real training images, or on the small set ``images``. Arms whose ticket has no result are left out. Tensors over A arms:
    see :class:`dpkit.hessian.sparse.Removed` (removed, kept, all, chance, excess and their ``_error``), ``score``; overlap, with
    what random masks give, overlap_layerwise and overlap_uniform, and overlap_score; rise, of the loss when the removed weights
    are set to 0, and rise_random (A, draws), of random masks. eigenvalues and residuals (k,). Result: the arms; about.
    """
    for role, word in (("network", "the dense network"), ("images", "the small set")):
        if role in unit.parents and role not in parents:
            return Output({}, {}, failed=f"{word} has no result")
    arms = [arm for arm in unit.spec["arms"] if arm in parents]
    if not arms:
        return Output({}, {}, failed="no ticket has a result")
    spec, model = SparseSpec(**unit.spec["removed"]), ModelSpec(**unit.spec["model"])
    images, labels = _fixed(context, unit, spec.images, parents)
    network = on_device(context.device, parents["network"])
    products = spec.probes + spec.lanczos_steps + len(unit.spec["arms"]) * (1 + spec.draws)
    op = Operator(model, *network, images, labels, dtype=getattr(torch, spec.dtype), compile="auto", products=products)
    loss = hessian.fixed_loss(model, *network, images, labels, count=len(images), dtype=spec.dtype)
    spec = spec.replace(lanczos_steps=min(spec.lanczos_steps, op.size), directions=min(spec.directions, op.size))
    masks = {}
    for arm in arms:
        mask = tree.to(parents[arm].group("mask"), context.device)
        masks[arm] = hessian.entries(op, {name: mask[name] for name in models.prunable(model)})
    found, values, residuals = hessian.answers(spec, op, loss, masks, tree.generator_for(unit.spec["seed"], "removed"))
    columns: dict[str, list[Any]] = {}
    for arm in arms:
        curvature, move, overlap = found[arm]
        row = _named(removed=curvature.removed, kept=curvature.kept, all=curvature.all, chance=curvature.chance,
                     excess=curvature.excess)
        row |= {"score": curvature.score, "overlap": overlap.share, "overlap_layerwise": overlap.layerwise.mean,
                "overlap_uniform": overlap.uniform.mean, "overlap_score": overlap.score, "rise": move.rise,
                "quotient": move.quotient}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    tensors["rise_random"] = torch.stack([found[arm].move.random[:, 3] for arm in arms])
    return Output(tensors | {"eigenvalues": values, "residuals": residuals},
                  {"arms": arms, "images": len(images), "about": op.about})


@stage("edge", 2)
@_as_failure
def measure_edge(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """The Hessian's top eigenvalue along a training, and how close to the edge of stability it is (Cohen et al. 2021).

    Tensors: steps, epochs, top, top_error (a residual), lr of the next step, ratio (S,). Result: the highest ratio before the
    end, and that at the end; about.
    """
    spec, model, train = (kind(**unit.spec[name]) for kind, name in (
        (HessianSpec, "hessian"), (ModelSpec, "model"), (TrainSpec, "train")))
    images, labels = _fixed(context, unit, spec.images, parents)
    mask, way = _mask(context, parents), parents["network"]
    count = unit.spec["data"]["train"]
    total, rows = train.steps(count), []
    for step in sorted(way.meta["spec"]["snapshots"]):
        network = tuple(tree.to(part, context.device) for part in network_of(way, f"{step}/"))
        op = Operator(model, *network, images, labels, mask=mask, compile="auto", products=spec.lanczos_steps)
        top = hessian.top_eigenvalue(op, min(spec.lanczos_steps, op.size), tree.generator_for(unit.spec["seed"], "edge"))
        lr = train.learning_rate(min(step, total - 1), total)
        ratio = hessian.edge_ratio(top.value, lr, train.momentum, nesterov=train.nesterov, weight_decay=train.weight_decay)
        rows.append((step, step / train.steps_per_epoch(count), top.value, top.standard_error, lr, ratio))
    steps, epochs, tops, errors, rates, ratios = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return Output({"steps": steps.long(), "epochs": epochs, "top": tops, "top_error": errors, "lr": rates, "ratio": ratios},
                  {"edge_highest": float(ratios[:max(1, len(ratios) - 1)].max()), "edge_last": float(ratios[-1]),
                   "about": op.about})
