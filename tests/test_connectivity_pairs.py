"""Paths between all pairs, what they cost, and which networks are refused."""
import time

import pytest
import torch
from connectivity_networks import CONVNET, RESNET, examples, generator, network

from dpkit import models, tree
from dpkit.connectivity import PathSpec, all_pairs, check_masks, check_starts, path
from dpkit.models import ModelSpec, reestimation


def relatives(count):
    """Networks that say the same, each with hidden units in another order, images, and the labels that all of them give.

    Nothing separates them but the order, so the loss rises between each two of them.
    """
    params, _ = network(CONVNET)
    found = {}
    for child in range(count):
        made, source = tree.detach(params), generator(child)
        for i in range(3):
            order = torch.randperm(CONVNET.width, generator=source)
            for name in (f"conv{i}.weight", f"conv{i}.bias", f"norm{i}.weight", f"norm{i}.bias"):
                made[name] = made[name][order]
            following = "classifier.weight" if i == 2 else f"conv{i + 1}.weight"
            made[following] = made[following][:, order]
        found[str(child)] = made | {"classifier.weight": 5 * made["classifier.weight"]}, {}
    images, _ = examples(CONVNET)
    return found, images, models.forward(CONVNET, *found["0"], images)[0].argmax(1)


@pytest.mark.parametrize("statistics", ["reestimate", "interpolate", "repair"])
def test_all_pairs_are_the_single_paths(statistics):
    children, (images, labels) = {str(i): network(RESNET, i) for i in range(3)}, examples(RESNET)
    spec = PathSpec(points=4, statistics=statistics, statistics_images=20)
    found = all_pairs(spec, RESNET, children, images, labels, statistics_images=images)
    assert list(found) == [("0", "1"), ("0", "2"), ("1", "2")]
    for (one, other), line in found.items():
        alone = path(spec, RESNET, children[one], children[other], images, labels, statistics_images=images)
        for field in ("alphas", "errors", "losses"):
            assert torch.equal(getattr(line, field), getattr(alone, field))


def test_all_pairs_evaluate_each_network_once(counted):
    children, images, labels = relatives(4)
    counted.clear()
    found = all_pairs(PathSpec(points=5), CONVNET, children, images, labels)
    assert sum(counted) == (4 + 6 * 3) * 40
    counted.clear()
    refined = all_pairs(PathSpec(points=5, loss_tolerance=0.05), CONVNET, children, images, labels, threads=2)
    points = sum(len(line.alphas) for line in refined.values())
    assert points > 6 * 5
    assert sum(counted) == (points - 6 * 2 + 4) * 40
    for pair, line in refined.items():
        old = {float(a): float(v) for a, v in zip(found[pair].alphas, found[pair].losses, strict=True)}
        new = {float(a): float(v) for a, v in zip(line.alphas, line.losses, strict=True)}
        assert old.items() <= new.items()
        assert line.loss_gap <= 0.05


def test_a_path_refines_itself_and_keeps_its_points():
    children, images, labels = relatives(2)
    a, b = children.values()
    coarse = path(PathSpec(points=4), CONVNET, a, b, images, labels)
    fine = path(PathSpec(points=4, loss_tolerance=1e-3), CONVNET, a, b, images, labels)
    at = [fine.alphas.tolist().index(alpha) for alpha in coarse.alphas.tolist()]
    assert torch.equal(fine.losses[at], coarse.losses)
    dense = path(PathSpec(points=301), CONVNET, a, b, images, labels)
    assert fine.loss_barrier == pytest.approx(dense.loss_barrier, abs=1e-3)
    assert len(path(PathSpec(points=4, loss_tolerance=1e-9, most_points=9), CONVNET, a, b, images, labels).alphas) == 9


def test_25_points_are_25_forward_passes_over_the_images(counted):
    a, b, (images, labels) = network(CONVNET), network(CONVNET, 1), examples(CONVNET, 6000)
    spec = PathSpec(points=25)
    path(spec, CONVNET, a, b, images, labels)
    assert sum(counted) == 25 * 6000


@pytest.mark.parametrize(("statistics", "measured"), [("reestimate", 1000), ("interpolate", 0)])
def test_with_batchnorm_each_point_also_measures_its_statistics(counted, monkeypatch, statistics, measured):
    """With BatchNorm 25 points on 6,000 images are 25 times 6,000 + 1,000: a sixth more, and nothing but that."""
    model, original, trained = CONVNET.replace(norm="batch"), reestimation.moments, []
    monkeypatch.setattr(reestimation, "moments", lambda m, params, buffers, x: (trained.append(len(x)),
                                                                                original(m, params, buffers, x))[1])
    a, b, (images, labels) = network(model), network(model, 1), examples(model, 6000)
    path(PathSpec(points=25, statistics=statistics), model, a, b, images, labels, statistics_images=images)
    assert (sum(counted), sum(trained)) == (25 * 6000, 25 * measured)


@pytest.mark.slow
def test_25_points_take_hardly_longer_than_25_forward_passes():
    model = ModelSpec(arch="convnet3", width=8, image_size=16, classes=10)
    a, b, (images, labels) = network(model), network(model, 1), examples(model, 6000)

    def seconds(task):
        start = time.process_time()  # of this process alone: others on the machine do not count
        task()
        return time.process_time() - start

    @torch.no_grad()
    def passes():
        for _ in range(25):
            for x in images.split(500):
                models.forward(model, *a, x)

    passes()
    ratios = [seconds(lambda: path(PathSpec(points=25), model, a, b, images, labels)) / seconds(passes) for _ in range(5)]
    assert sorted(ratios)[2] < 1.1


def test_new_fields_leave_old_keys_alone():
    assert PathSpec().to_dict() == {"points": 11, "statistics": "reestimate", "statistics_images": 1000}
    assert PathSpec(error_tolerance=0.01).to_dict()["error_tolerance"] == 0.01
    assert PathSpec(loss_tolerance=0.1, most_points=50).to_dict()["most_points"] == 50


@pytest.mark.parametrize("fields, message", [
    ({"error_tolerance": -0.1}, "error_tolerance must lie in \\[0, 1\\), got -0.1"),
    ({"loss_tolerance": -1.0}, "loss_tolerance must lie in"),
    ({"loss_tolerance": 0.1, "most_points": 5}, "most_points must be at least points, 11, to refine a path; got 5"),
])
def test_bad_tolerances_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PathSpec(**fields)


def masked(params, keep=0.5, seed=0):
    """A mask on the convolutions, and the network under it."""
    mask = {n: torch.rand(t.shape, generator=generator(seed)) < keep for n, t in params.items() if t.dim() == 4}
    return mask, {n: torch.where(mask[n], t, torch.zeros_like(t)) if n in mask else t for n, t in params.items()}


def one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_networks_of_another_architecture_are_refused():
    images, labels = examples(CONVNET)
    one_line(lambda: path(PathSpec(), CONVNET, network(CONVNET), network(RESNET), images, labels),
             "networks a and b must have the same tensors, but 'conv0.weight' is in a and not in b")
    one_line(lambda: path(PathSpec(), CONVNET, network(RESNET), network(RESNET, 1), images, labels),
             "networks a and b must be of convnet3 with instance norm, but 'bn1.weight' is no tensor of it and they lack "
             "'classifier.bias'; pass the specification that they were made with")
    one_line(lambda: path(PathSpec(), RESNET, (network(RESNET)[0], {}), (network(RESNET, 1)[0], {}), images, labels,
                          statistics_images=images), "resnet10 with batch norm, but they lack 'bn1.running_mean'")


def test_children_of_different_masks_are_refused():
    images, labels = examples(CONVNET)
    (mask, a), (other, b) = (masked(network(CONVNET, i)[0], seed=i) for i in range(2))
    same = masked(network(CONVNET, 1)[0])[1]
    found = path(PathSpec(points=3), CONVNET, (a, {}), (same, {}), images, labels, masks=(mask, mask))
    assert torch.equal(found.losses, path(PathSpec(points=3), CONVNET, (a, {}), (same, {}), images, labels).losses)
    differ = int((mask["conv0.weight"] != other["conv0.weight"]).sum())
    kept, others = (int(m["conv0.weight"].sum()) for m in (mask, other))
    one_line(lambda: path(PathSpec(), CONVNET, (a, {}), (b, {}), images, labels, masks=(mask, other)),
             f"networks a and b must have the same mask, but of 'conv0.weight' a keeps {kept} weights and b {others}, {differ} "
             "of 135 positions differ; compare children of one ticket")
    extra = int(((b["conv0.weight"] != 0) & ~mask["conv0.weight"]).sum())
    one_line(lambda: path(PathSpec(), CONVNET, (a, {}), (b, {}), images, labels, masks=(mask, mask)),
             f"network b must be zero where its mask removes weights, but 'conv0.weight' has {extra} others there")
    fewer = {n: m for n, m in mask.items() if n != "conv2.weight"}
    one_line(lambda: check_masks({"0": mask, "1": fewer}), "but 'conv2.weight' is masked in 0 and not in 1")
    one_line(lambda: check_masks({"0": fewer, "1": mask}), "but 'conv2.weight' is masked in 1 and not in 0")
    narrow = mask | {"conv0.weight": mask["conv0.weight"][:2]}
    one_line(lambda: check_masks({"0": mask, "1": narrow}), "but 'conv0.weight' is (5, 3, 3, 3) in 0 and (2, 3, 3, 3) in 1")


def test_children_of_different_initialisations_are_refused_where_that_is_asked_for():
    children, (images, labels) = {str(i): network(CONVNET, i) for i in range(2)}, examples(CONVNET)
    starts = {str(i): models.init(CONVNET, generator(0))[0] for i in range(2)}
    all_pairs(PathSpec(points=3), CONVNET, children, images, labels, starts=starts)
    starts["1"] = tree.detach(starts["0"])
    starts["1"]["conv1.weight"][0, 0, 0, :2] += 1
    one_line(lambda: all_pairs(PathSpec(points=3), CONVNET, children, images, labels, starts=starts),
             "networks 0 and 1 must start from the same initialisation, but 'conv1.weight' differs in 2 of 225 entries")
    one_line(lambda: check_starts({"0": starts["0"], "1": models.init(RESNET, generator(0))[0]}), "must have the same tensors")


def test_other_refusals_name_what_is_wrong():
    children, (images, labels) = {str(i): network(CONVNET, i) for i in range(3)}, examples(CONVNET)
    spec = PathSpec(points=3)
    one_line(lambda: all_pairs(spec, CONVNET, {"0": children["0"]}, images, labels), "paths need at least 2 networks, got 1")
    one_line(lambda: all_pairs(spec, CONVNET, children, images[:0], labels[:0]), "at least 1 image and one label for each, got 0")
    one_line(lambda: all_pairs(spec, CONVNET, children, images, labels, starts={"0": children["0"][0]}),
             "starts must be given for networks 0, 1, 2, got 0")
    params, buffers = children["2"]
    children["2"] = params | {"conv1.bias": params["conv1.bias"] * float("nan")}, buffers  # a copy: other tests have this network
    one_line(lambda: all_pairs(spec, CONVNET, children, images, labels),
             "network 2 must have finite weights, but 'conv1.bias' has NaN")
