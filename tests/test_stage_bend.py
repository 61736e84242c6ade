"""Stages that measure curvature: what they store is what the library says of the same network."""
from __future__ import annotations

import pytest
import torch
from small_study import plan

from dpkit import data, hessian, tree
from dpkit.data import AugmentSpec, augment, normalise
from dpkit.hessian import HessianSpec, Operator
from dpkit.models import ModelSpec
from dpkit.stages import Context, bend, compute, run
from dpkit.stages.make import network_of
from dpkit.store import Store

SETTINGS = {"arms": ("imp", "random", "imp_shuffled", "combined"), "combined_round": 1, "robust_arms": ("dense",), "seeds": 2,
            "at_rounds": (1, 2), "hessian_arms": ("imp",), "hessian_rounds": (1, 2), "sharpness_arms": ("dense", "imp"),
            "spectrum_arms": ("imp",), "eigenvalues": 3, "pair_products": 40, "density_probes": 4, "density_steps": 8,
            "diagonal_arms": ("imp",), "diagonal_limit": 2000, "removed_on": ("real", "idc"), "removed_probes": 60,
            "removed_draws": 2, "edge_arms": ("imp",), "edge_points": 2, "hessian_images": 20}
PARTS = ("hessian", "sharpness", "spectra", "diagonals", "removed", "edge")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    store, made = Store(tmp_path_factory.mktemp("bend") / "store"), plan(**SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SMALL", float("inf"))
        report = compute(store, [e.unit for part in PARTS for e in getattr(made, part)()], device="cpu")
    assert not report.errors
    assert not report.failed
    return store, made


def at(store, made, part, number=0, **options):
    """(unit, its artifact, the operator at its network on the fixed images)."""
    unit = getattr(made, part)()[number].unit
    dataset = data.load(made.study.data)
    chosen = hessian.subset(dataset.train.labels, 20)
    images, labels = normalise(dataset.train.images[chosen], dataset.mean, dataset.std), dataset.train.labels[chosen]
    mask = store.get(unit.parents["ticket"].key).group("mask") if "ticket" in unit.parents else None
    op = Operator(ModelSpec(**unit.spec["model"]), *network_of(store.get(unit.parents["network"].key)), images, labels,
                  mask=options.pop("mask", mask), **options)
    return unit, store.get(unit.key), op


def dense(op):
    return op.matmat(torch.eye(op.size, dtype=op.dtype)).double()


def test_places_and_rounds(done):
    _, made = done
    assert [(e.place["arm"], e.place["round"], e.place["seed"]) for e in made.hessian()] == [
        ("imp", round, seed) for round in (1, 2) for seed in (0, 1)]
    assert {e.place["round"] for e in made.spectra()} == {2}
    assert [(e.place["on"], e.place["seed"]) for e in made.removed()] == [("real", 0), ("real", 1), ("idc", 0), ("idc", 1)]
    assert plan(arms=("imp",), robust_arms=("dense",)).sharpness() == []


def test_a_spectrum_is_that_of_the_dense_matrix(done):
    store, made = done
    _, found, op = at(store, made, "spectra", dtype=torch.float64)
    values = torch.linalg.eigvalsh(dense(op))
    result, tensors = found.result, found.tensors
    largest = values[values.abs().argsort(descending=True)][:3]
    near = tensors["residuals"] < 0.05 * tensors["eigenvalues"].abs()
    assert bool(near.any())
    assert torch.allclose(tensors["eigenvalues"][near], largest[near], rtol=0.02)
    assert result["size"] == op.size == store.get(made.ticket("imp", 0, 2).key).result["surviving"]
    for name, true in (("trace", values.sum()), ("frobenius", values.norm())):
        assert abs(result[name] - float(true)) <= 6 * result[f"{name}_error"] + 1e-3 * float(values.abs().sum())
    sizes = values.abs()
    part = sizes[sizes > 0] / sizes.sum()
    true = {"negative_fraction": values.clamp(max=0).abs().sum() / sizes.sum(), "negative_total": values.clamp(max=0).sum(),
            "rank_entropy": torch.exp(-(part * part.log()).sum()), "rank_participation": sizes.sum() ** 2 / sizes.square().sum()}
    for name, value in true.items():
        assert abs(result[name] - float(value)) < 4 * result[f"{name}_error"], name
    assert result["negative_low"] <= float((values < 0).double().mean()) + 0.15
    assert torch.trapezoid(tensors["curve"], tensors["grid"]) == pytest.approx(1, abs=0.02)
    assert tensors["weights"].sum(1).tolist() == pytest.approx([1.0] * 4)
    assert result["known"] == int((tensors["residuals"] <= 0.01 * tensors["eigenvalues"].abs()).sum())
    newton = dense(at(store, made, "spectra", dtype=torch.float64, matrix="gauss_newton")[2])
    assert result["gn_top"] == pytest.approx(float(torch.linalg.eigvalsh(newton)[-1]), rel=0.02)
    assert abs(result["gn_trace"] - float(newton.trace())) <= 6 * result["gn_trace_error"]


def test_results_say_what_they_are_of(done):
    store, made = done
    _, _, op = at(store, made, "hessian", 2)
    usual = op.about
    assert usual == {"matrix": "hessian", "mode": "eval", "batch_statistics": "none", "pruned_entries": "left out", "images": 20,
                     "size": op.size, "dtype": "float32"}
    all_of_them = made.counts[0]
    for part, number, changes in (
            ("hessian", 2, {}), ("edge", 0, {}), ("removed", 0, {"size": all_of_them, "pruned_entries": "none"}),
            ("diagonals", 0, {"size": all_of_them, "pruned_entries": "included", "mode": "train", "images": 64})):
        assert store.get(getattr(made, part)()[number].unit.key).result["about"] == usual | changes, part
    by_matrix = store.get(made.spectra()[0].unit.key).result["about"]
    assert by_matrix == {matrix: usual | {"matrix": matrix} for matrix in ("hessian", "gauss_newton", "empirical_fisher")}


def made_with(store, part, **changes):
    """The first unit of a part with other settings, computed."""
    unit = getattr(plan(**SETTINGS | changes), part)()[0].unit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SMALL", float("inf"))
        assert not compute(store, [unit], device="cpu").errors
    return unit, store.get(unit.key).result


def test_a_trace_to_a_target(done):
    """The probes that the target asks for, from the specification to the result; the diagonal has its own."""
    store, made = done
    _, plain, op = at(store, made, "hessian", dtype=torch.float64)
    truth = float(dense(op).trace())
    unit, found = made_with(store, "hessian", trace_target=0.08)
    assert unit.spec["hessian"]["target"] == 0.08
    assert unit.key != made.hessian()[0].unit.key
    assert found["trace_reached"] is True
    assert found["trace_probes"] >= 16
    assert 0 < found["trace_error"] <= 0.08 * abs(found["trace"]) * 1.2  # the target is a share of the pilot's mean
    assert abs(found["trace"] - truth) <= 4 * found["trace_error"]
    assert found["products"] == plain.result["products"] + 16 + found["trace_probes"]
    assert found["diagonal_error"] == plain.result["diagonal_error"]
    assert "trace_probes" not in plain.result
    again = Operator.from_spec(HessianSpec(**unit.spec["hessian"]), op.model, *fixed(store, made, unit))
    direct = hessian.to_error(again, 0.08, 1000, tree.generator_for(unit.spec["seed"], "target")).estimate
    assert found["trace"] == pytest.approx(direct.value, rel=1e-5)
    with pytest.raises(ValueError, match=r"trace_target must lie in \[0, 1\), got 1"):
        plan(**SETTINGS | {"trace_target": 1.0})


def fixed(store, made, unit):
    """Network, images, labels and mask of a unit that is measured on the fixed images."""
    dataset = data.load(made.study.data)
    chosen = hessian.subset(dataset.train.labels, 20)
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    return (*network_of(store.get(unit.parents["network"].key)), images, dataset.train.labels[chosen],
            store.get(unit.parents["ticket"].key).group("mask"))


def test_sharpness_is_measured_on_the_same_images(done):
    store, made = done
    unit, found, op = at(store, made, "sharpness", 2)
    assert unit.label.startswith("sharpness imp 0")
    result = found.result
    assert result["loss"] == pytest.approx(op.loss, rel=1e-5)
    assert result["sharpness"] >= max(0.0, result["sharpness_first"]) - 1e-9
    assert result["adaptive_sharpness"] >= max(0.0, result["adaptive_first"]) - 1e-9
    assert result["fisher_rao"] > 0


def test_the_published_diagonal_by_hand(done):
    store, made = done
    unit = made.diagonals()[0].unit
    found, dataset = store.get(unit.key), data.load(made.study.data)
    chosen = hessian.subset(dataset.train.labels, 64)
    images = normalise(dataset.train.images[chosen], dataset.mean, dataset.std)
    images = augment(AugmentSpec(operations=unit.spec["augment"]), images, tree.generator_for(unit.spec["seed"], "augment"))
    mask = store.get(unit.parents["ticket"].key).group("mask")
    op = Operator.from_spec(HessianSpec.published(), ModelSpec(**unit.spec["model"]),
                            *network_of(store.get(unit.parents["network"].key)), images, dataset.train.labels[chosen], mask=mask)
    values = dense(op).diagonal()
    assert found.result["exact"] is True
    assert torch.allclose(found.tensors["values"].double(), values, atol=1e-4 * float(values.abs().max()))
    survives = found.tensors["survives"]
    assert int(survives.sum()) == found.result["surviving"] < found.result["size"] == op.size
    assert found.result["published_mean"] == pytest.approx(float(values[survives].sum() / op.size), rel=1e-3)
    assert found.result["published_surviving"] == pytest.approx(float(values[survives].mean()), rel=1e-3)
    assert found.result["published_loose"] == pytest.approx(float(values.mean()), rel=1e-3)
    assert found.result["published_mean_error"] == 0


def test_the_published_diagonal_by_probes(done):
    store, made = done
    exact = store.get(made.diagonals()[0].unit.key).result
    _, found = made_with(store, "diagonals", diagonal_limit=0, diagonal_probes=400)
    assert found["exact"] is False
    for name in ("published_mean", "published_surviving", "published_loose"):
        assert 0 < found[f"{name}_error"] < abs(exact[name])
        assert abs(found[name] - exact[name]) < 4 * found[f"{name}_error"]


def test_surviving_entries_are_exact_where_they_are_few(done):
    """More entries than the limit and fewer survivors: these are exact, and with them both means that need no others."""
    store, made = done
    whole = store.get(made.diagonals()[0].unit.key)
    exact, surviving = whole.result, whole.result["surviving"]
    assert exact["exact_loose"] is True
    unit, found = made_with(store, "diagonals", diagonal_limit=surviving, diagonal_probes=400)
    assert (found["exact"], found["exact_loose"], found["products"]) == (True, False, surviving + 400)
    for name in ("published_mean", "published_surviving"):
        assert found[name] == pytest.approx(exact[name], rel=1e-4)
        assert found[f"{name}_error"] == 0
    assert 0 < found["published_loose_error"] < abs(exact["published_loose"])
    assert abs(found["published_loose"] - exact["published_loose"]) < 4 * found["published_loose_error"]
    tensors = store.get(unit.key).tensors
    survives = tensors["survives"]
    assert not tensors["errors"][survives].any()
    assert bool((tensors["errors"][~survives] > 0).any())
    torch.testing.assert_close(tensors["values"][survives], whole.tensors["values"][survives], rtol=1e-3, atol=1e-6)
    assert made_with(store, "diagonals", diagonal_limit=surviving - 1, diagonal_probes=10)[1]["exact"] is False


def test_what_masks_remove_from_the_dense_network(done):
    store, made = done
    _, found, op = at(store, made, "removed", mask=None)
    # a control has its arm's densities, and the first rounds of `combined` are those of distilled pruning
    assert found.result["arms"] == ["imp", "random", "combined"]
    values = torch.linalg.eigh(dense(op))
    vectors = values.eigenvectors[:, values.eigenvalues.argsort(descending=True)[:3]]
    mask = store.get(made.ticket("imp", 0, 2).key).group("mask")
    kept = op.flatten({name: mask[name] for name in op.names}).bool()
    share = float(vectors[kept].square().sum() / 3)
    assert bool((found.tensors["residuals"] < 0.05 * found.tensors["eigenvalues"]).all())
    assert float(found.tensors["overlap"][0]) == pytest.approx(share, abs=0.05)
    diagonal = dense(op).diagonal()
    for name, rows in (("removed", ~kept), ("kept", kept)):
        error = float(found.tensors[f"{name}_error"][0])
        assert error < 0.5 * float(diagonal.abs().mean())
        assert abs(float(found.tensors[name][0]) - float(diagonal[rows].mean())) <= 4 * error
    assert found.tensors["rise_random"].shape == (3, 2)
    on_set = store.get(made.removed()[2].unit.key)
    assert made.removed()[2].unit.parents.keys() >= {"network", "images"}
    assert not torch.equal(on_set.tensors["eigenvalues"], found.tensors["eigenvalues"])


class Parent:
    """What a stage may find of a parent: nothing here."""

    failed = "diverged at step 3"


def test_what_masks_remove_needs_its_network_its_set_and_a_ticket(done):
    store, made = done
    on_set = made.removed()[2].unit
    parents = {role: store.get(unit.key) for role, unit in on_set.parents.items()}
    context = Context(store)
    for left_out, said in ((("network",), "the dense network has no result"), (("images",), "the small set has no result"),
                           (("imp", "random", "combined"), "no ticket has a result")):
        kept = {role: parent for role, parent in parents.items() if role not in left_out}
        assert bend.measure_removed(context, on_set, kept).failed == said
    found = bend.measure_removed(context, on_set, {role: parent for role, parent in parents.items() if role != "imp"})
    assert found.failed is None
    assert found.result["arms"] == ["random", "combined"]


def test_a_network_without_curvature_is_a_row_without_a_result(done):
    store, made = done
    unit = made.spectra()[0].unit
    parents = {role: store.get(parent.key) for role, parent in unit.parents.items()}

    class Collapsed:
        """The network with its classifier removed."""

        def __init__(self, of, value):
            self.of, self.value, self.result = of, value, of.result

        def group(self, name):
            return {n: torch.full_like(t, self.value) if n == "classifier.weight" and name != "buffers" else t
                    for n, t in self.of.group(name).items()}

    parents = {"network": Collapsed(parents["network"], 0.0), "ticket": Collapsed(parents["ticket"], False)}
    for function, at in ((bend.measure_spectrum, unit), (bend.measure_sharpness, made.sharpness()[2].unit),
                         (bend.measure_hessian, made.hessian()[2].unit)):
        found = function(Context(store), at, parents)
        assert found.failed
        assert "\n" not in found.failed
    whole = parents["ticket"].of.group("mask")
    parents["ticket"] = type("Whole", (), {"group": lambda self, name: {n: torch.ones_like(t) for n, t in whole.items()}})()
    found = bend.measure_hessian(Context(store), made.hessian()[2].unit, parents)
    assert "trace" in found.result  # a classifier of zeros still bends along its own weights


def test_a_network_cut_through_has_no_curvature_to_rank(done):
    """Nothing gets from the first layer to the next: its weights do not matter, and 0 would make it the flattest of all."""
    store, made = done
    unit = made.hessian()[2].unit
    parents = {role: store.get(parent.key) for role, parent in unit.parents.items()}

    class Cut:
        """The network without its second layer and its classifier's weights, or the mask that says so."""

        result = parents["network"].result

        def __init__(self, of):
            self.of = of

        def group(self, name):
            found = self.of.group(name)
            cut = [n for n in found if n in ("conv1.weight", "classifier.weight")] if name != "buffers" else []
            return {n: torch.zeros_like(t) if n in cut else t for n, t in found.items()}

    found = bend.measure_hessian(Context(store), unit, {role: Cut(parent) for role, parent in parents.items()})
    assert found.failed == "no curvature above rounding"
    assert found.result["surviving"] > 0
    assert "trace" not in found.result


def test_the_edge_along_a_training(done):
    store, made = done
    found = store.get(made.edge()[0].unit.key)
    study = made.study
    total = study.train.steps(made.identity["train"])
    # even steps, powers of 3 within the first of two epochs of five steps, and the first of the highest learning rate
    assert total == 10
    peak = max(range(total), key=lambda s: study.train.learning_rate(s, total))
    steps = sorted({0, 5, 10, 1, 3, peak})
    assert found.tensors["steps"].tolist() == steps
    expected = [study.train.learning_rate(min(s, total - 1), total) for s in steps]
    assert found.tensors["lr"].tolist() == pytest.approx(expected)
    ratios = [(top + 5e-4) * lr / (2 * 1.9) for top, lr in zip(found.tensors["top"].tolist(), expected, strict=True)]
    assert found.tensors["ratio"].tolist() == pytest.approx(ratios)
    assert found.result["edge_highest"] == pytest.approx(max(ratios[:-1]))


def test_the_highest_learning_rate_is_watched():
    """One cycle: the rate is highest after a warm-up, between even steps; what `ltr` trains starts late."""
    made = plan(**SETTINGS | {"schedule": "onecycle", "arms": ("imp", "ltr"), "edge_arms": ("dense", "ltr"), "epochs": 40})
    train, count = made.study.train, made.identity["train"]
    total, epoch = train.steps(count), train.steps_per_epoch(count)
    for entry in made.edge():
        network = entry.unit.parents["network"].spec
        first, steps = network["first_step"], network["snapshots"]
        assert first == (0 if entry.place["arm"] == "dense" else made.rewind_step)
        peak = max(range(first, total), key=lambda s: train.learning_rate(s, total))
        assert peak in steps
        assert [s - first for s in steps if s < first + epoch] == [0, *(3**k for k in range(9) if 3**k < epoch)]
        assert {first, first + (total - first + 1) // 2, total} <= set(steps)
        assert steps == sorted(set(steps))


def test_bad_settings_are_named():
    for changes, said in (({"hessian_rounds": (5,)}, r"hessian_rounds must be among at_rounds \(1, 2\), got \[5\]"),
                          ({"removed_on": ("nothing",)}, "removed_on must be chosen from real, idc"),
                          ({"eigenvalues": 50}, r"eigenvalues must lie in \[1, 40\] \(pair_products\), got 50"),
                          ({"density_probes": 1}, "density_probes must be >= 3, got 1"),
                          ({"sharpness_radius": 0.0}, "sharpness_radius must be > 0, got 0.0"),
                          ({"diagonal_limit": -1}, r"diagonal_limit must be >= 0 \(0: never exact\), got -1"),
                          ({"edge_arms": ("snip",)}, "edge_arms must be chosen from dense, imp")):
        with pytest.raises(ValueError, match=said):
            plan(**SETTINGS | changes)
