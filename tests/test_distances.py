"""Distances of weights against flat vectors, and of predictions against counts by hand."""
import math

import pytest
import torch

from dpkit import models
from dpkit.connectivity import churn, disagreement, distances, predict
from dpkit.models import ModelSpec

CONVNET = ModelSpec(arch="convnet3", width=4, image_size=8, classes=3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pair():
    return [models.init(CONVNET, generator(seed))[0] for seed in range(2)]


def flat(params, names):
    return torch.cat([params[n].double().flatten() for n in names])


def test_numbers_by_hand():
    a = {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([[1.0]])}
    b = {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor([[2.0]])}
    found = distances(a, b)
    assert found.tensors == ("x", "y")
    assert found.sizes.tolist() == [2, 1, 3]
    assert found.l2.tolist() == pytest.approx([5, 1, math.sqrt(26)])
    assert found.cosine.tolist() == pytest.approx([0, 1, 2 / math.sqrt(10 * 20)])


def test_networks_against_flat_vectors():
    a, b = pair()
    found = distances(a, b)
    for i, names in enumerate([*((n,) for n in a), tuple(a)]):
        x, y = flat(a, names), flat(b, names)
        assert int(found.sizes[i]) == len(x)
        assert float(found.l2[i]) == pytest.approx(float(torch.dist(x, y)), rel=1e-12)
        if float(x.norm()) and float(y.norm()):
            assert float(found.cosine[i]) == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-12)
    shifts = list(a).index("norm0.bias")
    assert math.isnan(found.cosine[shifts])  # zero at initialisation in both: no direction
    assert found.l2[shifts] == 0
    assert found.l2.dtype == found.cosine.dtype == torch.float64


def test_surviving_weights_only():
    a, b = pair()
    mask = {n: torch.rand(a[n].shape, generator=generator(5)) < 0.4 for n in models.prunable(CONVNET)}
    b["conv0.weight"] = torch.where(mask["conv0.weight"], b["conv0.weight"], 1e6 * torch.ones(()))
    found = distances(a, b, mask=mask)
    assert found.tensors == models.prunable(CONVNET)
    x, y = (torch.cat([p[n].double()[m] for n, m in mask.items()]) for p in (a, b))
    assert int(found.sizes[-1]) == sum(int(m.sum()) for m in mask.values()) == len(x)
    assert float(found.l2[-1]) == pytest.approx(float(torch.dist(x, y)), rel=1e-12)
    assert float(found.cosine[-1]) == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-12)
    one = distances(a, b, mask=mask, names=["conv1.weight", "conv1.bias"])
    assert one.sizes.tolist() == [int(mask["conv1.weight"].sum()), 4, int(mask["conv1.weight"].sum()) + 4]


def test_ways_from_a_common_start():
    a, b = pair()
    start = {n: t.clone() for n, t in a.items()}
    one, other = ({n: t + step[n] for n, t in start.items()} for step in (b, {n: -2 * t for n, t in b.items()}))
    found = distances(one, other, origin=start)
    assert float(found.cosine[-1]) == pytest.approx(-1, abs=1e-6)
    assert float(found.l2[-1]) == pytest.approx(float(distances(one, other).l2[-1]), rel=1e-6)
    assert float(found.cosine.nan_to_num().min()) >= -1


def test_a_network_has_no_distance_from_itself():
    a, _ = pair()
    found = distances(a, a)
    assert found.l2.tolist() == [0.0] * (len(a) + 1)
    assert float(found.cosine[-1]) == pytest.approx(1, abs=1e-12)
    assert float(found.cosine.nan_to_num().max()) <= 1


@pytest.mark.parametrize("change, message", [
    ({"names": ["conv9.weight"]}, "names must be tensors of the networks, got 'conv9.weight' which a and b lack"),
    ({"names": []}, "distances need at least 1 tensor, got none"),
    ({"mask": {"conv0.weight": torch.ones(2, dtype=torch.bool)}},
     "mask of conv0.weight is (2,), the weight of a and b is (4, 3, 3, 3); use their mask"),
    ({"mask": {"nothing": torch.ones(2, dtype=torch.bool)}}, "got 'nothing' which a and b lack"),
    ({"origin": {"conv0.weight": torch.ones(2)}}, "networks a and origin must have tensors of the same shapes"),
])
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        distances(*pair(), **change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_and_other_shapes_are_refused():
    a, b = pair()
    with pytest.raises(ValueError, match="networks a and b must have tensors of the same shapes"):
        distances(a, b | {"conv0.bias": torch.zeros(3)})
    b["conv1.bias"][0] = float("nan")
    with pytest.raises(ValueError, match="network b must have finite weights"):
        distances(a, b)


def test_predictions_are_those_of_the_forward_pass():
    (params, buffers), images = models.init(CONVNET, generator(3)), torch.randn(23, 3, 8, 8, generator=generator(4))
    found = predict(CONVNET, params, buffers, images, chunk=10)
    assert found.dtype == torch.int64
    assert torch.equal(found, models.forward(CONVNET, params, buffers, images)[0].argmax(1))
    with pytest.raises(ValueError, match="the evaluation set is empty"):
        predict(CONVNET, params, buffers, images[:0])


def test_disagreement_and_churn_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0])
    a = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    b = torch.tensor([0, 0, 1, 2, 0, 1, 2, 2])
    found = churn(a, b, labels)
    assert (found.gains, found.losses, found.sideways) == (1 / 8, 2 / 8, 2 / 8)
    assert found.total == disagreement(a, b) == 5 / 8
    assert found.needless == pytest.approx(4 / 8)
    back = churn(b, a, labels)
    assert (back.gains, back.losses, back.sideways) == (2 / 8, 1 / 8, 2 / 8)
    assert disagreement(a, a) == churn(a, a, labels).total == 0


def test_churn_holds_what_it_says_for_any_predictions():
    source = generator(7)
    for _ in range(20):
        a, b, labels = torch.randint(3, (3, 50), generator=source)
        found, errors = churn(a, b, labels), [float((x != labels).double().mean()) for x in (a, b)]
        assert found.total == pytest.approx(disagreement(a, b))
        assert found.gains - found.losses == pytest.approx(errors[0] - errors[1])
        assert abs(errors[0] - errors[1]) - 1e-12 <= found.total <= sum(errors) + 1e-12
        assert found.needless >= -1e-12


@pytest.mark.parametrize("a, b", [([], []), ([0, 1], [0]), ([[0]], [[1]])])
def test_predictions_of_other_images_are_refused(a, b):
    with pytest.raises(ValueError, match="one class for each of the same images, at least 1, got a"):
        disagreement(torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64))
