"""The comparison with PyHessian on a trained ResNet-20: a plain module is the same function, and rows hold what they say."""
import csv

import pytest
import torch

from dpkit import data, hessian, models, tree
from dpkit.bench import agreement, reference
from dpkit.data import AugmentSpec, DataSpec
from dpkit.hessian import Operator
from dpkit.models import ModelSpec
from dpkit.training import TrainSpec

MODEL = ModelSpec(arch="resnet20", width=8, image_size=16)
FAST = TrainSpec(epochs=4, batch_size=20, lr=0.05, augment=AugmentSpec(operations=""), cutmix=0.0)
GIVEN = {"spec": DataSpec(train=200, test=40), "model": MODEL, "recipe": FAST, "seeds": [0, 1], "images": 20, "probes": 6,
         "steps": 25, "compile": False}


def test_the_plain_module_is_the_same_function():
    params, buffers = models.init(MODEL, tree.generator_for("agreement"))
    net = reference.network(MODEL).eval()
    missing = net.load_state_dict({**params, **buffers}, strict=False)
    assert not missing.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in missing.missing_keys)
    assert [name for name, _ in net.named_parameters()] == list(params)
    x = torch.randn(3, 3, 16, 16, generator=tree.generator_for("x"))
    torch.testing.assert_close(net(x), models.forward(MODEL, params, buffers, x)[0])


def test_our_rows_are_over_all_parameters_of_a_trained_network():
    found = list(agreement.rows(**GIVEN, tools=("dpkit",)))
    assert [(r["seed"], r["quantity"], r["tool"]) for r in found] == [
        (seed, quantity, "dpkit") for seed in (0, 1) for quantity in ("trace", "top eigenvalue")]
    assert {r["parameters"] for r in found} == {sum(t.numel() for t in models.init(MODEL, tree.generator_for("x"))[0].values())}
    assert [r["products"] for r in found] == [6, 25] * 2
    assert all(r["error"] > 0 and 0 <= r["accuracy"] <= 1 for r in found)
    traces = [r["value"] for r in found if r["quantity"] == "trace"]
    assert traces[0] != traces[1]
    tops = [r["value"] for r in found if r["quantity"] == "top eigenvalue"]
    assert tops[0] == pytest.approx(tops[1], rel=0.05)


def test_both_tools_agree():
    """Same network, same images: traces within their errors, top eigenvalues within their residuals."""
    pytest.importorskip("pyhessian")
    found = list(agreement.rows(**GIVEN | {"probes": 20, "seeds": [0]}))
    by = {(r["tool"], r["quantity"]): r for r in found}
    ours, theirs = by["dpkit", "trace"], by["PyHessian", "trace"]
    assert abs(ours["value"] - theirs["value"]) <= 5 * (ours["error"] ** 2 + theirs["error"] ** 2) ** 0.5
    assert ours["products"] == theirs["products"] == 20
    ours, theirs = by["dpkit", "top eigenvalue"], by["PyHessian", "top eigenvalue"]
    assert ours["value"] == pytest.approx(theirs["value"], rel=0.02)
    assert theirs["products"] > 1


def test_residuals_are_those_of_the_matrix():
    params, buffers = models.init(MODEL, tree.generator_for("agreement"))
    sets = data.load(DataSpec(train=10, test=10))
    images = data.normalise(sets.train.images, sets.mean, sets.std)
    op = Operator(MODEL, params, buffers, images, sets.train.labels, names=("fc.bias",))
    values, vectors = torch.linalg.eigh(op.matmat(torch.eye(10)))
    assert agreement._residual(op, vectors[:, -1], float(values[-1])) < 1e-5
    assert agreement._residual(op, vectors[:, -1], 0.0) == pytest.approx(float(values[-1]), rel=1e-3)
    pairs = hessian.top_eigenpairs(op, 1, 10, tree.generator_for("t"))
    assert float(pairs.values[0]) == pytest.approx(float(values[-1]), rel=1e-4)


def test_main_writes_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "rows", lambda spec: iter([{"seed": 0, "tool": spec.dataset, "value": 1 / 3}]))
    agreement.main("shapes", str(tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"seed": "0", "tool": "shapes", "value": "0.333333"}]
