"""Many networks on the same images: each as if it were alone, in every form."""
import pytest
import torch

from dpkit import models
from dpkit.connectivity import PathSpec, path
from dpkit.landscape import PlaneSpec, grid, plane
from dpkit.models import ModelSpec
from dpkit.training import evaluate, evaluation
from dpkit.training.evaluation import evaluate_many, fitting, pays

CONVNET = ModelSpec(arch="convnet3", width=5, image_size=8, classes=4)
RESNET = ModelSpec(arch="resnet10", width=4, image_size=16, classes=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(model, count=3):
    """Networks with strong weights, so that they disagree, and with statistics off their initial values."""
    found = []
    for seed in range(count):
        source = generator(seed + 100)
        params, buffers = models.init(model, generator(seed))
        found.append(({n: t + 0.3 * torch.randn(t.shape, generator=source) for n, t in params.items()},
                      {n: t + torch.rand(t.shape, generator=source) for n, t in buffers.items()}))
    return found


def examples(model, count=40, seed=1):
    images = torch.randn((count, model.channels, model.image_size, model.image_size), generator=generator(seed))
    return images, torch.randint(model.classes, (count,), generator=generator(seed + 1))


def alone(model, nets, images, labels, statistics=None):
    """Errors and losses by one call of ``evaluate`` a network."""
    values = []
    for params, buffers in nets:
        if statistics is not None:
            buffers = models.reestimate(model, params, buffers, statistics)
        values.append(evaluate(model, params, buffers, images, labels))
    return torch.tensor(values, dtype=torch.float64).unbind(1)


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("reestimated", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_networks_in_turn_have_the_bits_of_each_alone(model, reestimated, threads):
    nets, (images, labels) = networks(model, 4), examples(model, 503)  # one full chunk and a short one
    statistics = examples(model, 21, seed=9)[0] if reestimated else None
    before = torch.get_num_threads()
    found = evaluate_many(model, 4, nets.__getitem__, images, labels, statistics_images=statistics, threads=threads)
    assert torch.get_num_threads() == before
    for value, expected in zip(found, alone(model, nets, images, labels, statistics), strict=True):
        assert value.dtype == torch.float64
        assert torch.equal(value, expected)
    assert len(set(found[1].tolist())) == 4


@pytest.mark.parametrize("model", [CONVNET, RESNET], ids=["convnet", "resnet"])
@pytest.mark.parametrize("reestimated", [False, True])
def test_networks_together_equal_networks_in_turn(model, reestimated, monkeypatch):
    nets, (images, labels) = networks(model, 5), examples(model)
    statistics = examples(model, 21, seed=9)[0] if reestimated else None
    monkeypatch.setattr(evaluation, "fitting", lambda *_: 2)  # blocks of two, two and one
    errors, losses = evaluate_many(model, 5, nets.__getitem__, images, labels, statistics_images=statistics, form="vmap")
    expected = alone(model, nets, images, labels, statistics)
    torch.testing.assert_close(losses, expected[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(errors, expected[0], rtol=0, atol=1 / 40 + 1e-9)  # at most one image on the edge


def test_statistics_change_the_result_of_batchnorm_alone():
    nets, (images, labels) = networks(RESNET, 1), examples(RESNET)
    kept = evaluate_many(RESNET, 1, nets.__getitem__, images, labels)[1]
    fresh = evaluate_many(RESNET, 1, nets.__getitem__, images, labels, statistics_images=images)[1]
    assert abs(float(kept - fresh)) > 1e-3
    plain = networks(CONVNET, 1)
    assert torch.equal(*(evaluate_many(CONVNET, 1, plain.__getitem__, *examples(CONVNET), statistics_images=s)[1]
                         for s in (None, examples(CONVNET)[0])))


def test_a_network_is_asked_for_once_and_one_at_a_time():
    nets, asked = networks(CONVNET, 3), []
    evaluate_many(CONVNET, 3, lambda i: asked.append(i) or nets[i], *examples(CONVNET))
    assert asked == [0, 1, 2]


def test_filled_up_chunks_count_real_images_only():
    images, labels = examples(CONVNET, 23)
    chunks = evaluation._chunks(images, labels, 10, True, torch.channels_last)
    assert [len(x) for x, _ in chunks] == [len(y) for _, y in chunks] == [10, 10, 10]
    assert chunks[2][1].tolist() == [*labels[20:].tolist(), *[evaluation.IGNORED] * 7]
    assert chunks[0][0].is_contiguous(memory_format=torch.channels_last)
    params, buffers = networks(CONVNET, 1)[0]
    wrong, loss = sum(evaluation._score(CONVNET, "fp32", params, buffers, x, y) for x, y in chunks) / 23
    error, expected = evaluate(CONVNET, params, buffers, images, labels)
    assert float(wrong) == pytest.approx(error, abs=1e-12)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    few = evaluation._chunks(images[:3], labels[:3], 10, True, torch.channels_last)
    assert [len(x) for x, _ in few] == [3]  # nothing to fill up to


def test_compiled_networks_agree_within_rounding():
    nets, (images, labels) = networks(CONVNET, 3), examples(CONVNET, 120)
    errors, losses = evaluate_many(CONVNET, 3, nets.__getitem__, images, labels, compiled=True)
    expected = alone(CONVNET, nets, images, labels)
    torch.testing.assert_close(losses, expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors, expected[0], rtol=0, atol=1 / 120 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_statistics_agree_within_rounding(precision, threads):
    nets, (images, labels) = networks(RESNET, 3), examples(RESNET, 120)
    statistics = examples(RESNET, 21, seed=9)[0]
    found = evaluate_many(RESNET, 3, nets.__getitem__, images, labels, statistics_images=statistics, compiled=True,
                          precision=precision, threads=threads)
    near = 1e-4 if precision == "fp32" else 3e-2
    torch.testing.assert_close(found[1], alone(RESNET, nets, images, labels, statistics)[1], rtol=near, atol=near)


def test_bf16_is_near_and_not_the_same():
    nets, (images, labels) = networks(CONVNET, 2), examples(CONVNET, 200)
    exact, rough = (evaluate_many(CONVNET, 2, nets.__getitem__, images, labels, precision=p)[1] for p in ("fp32", "bf16"))
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, rtol=2e-2, atol=2e-2)


def test_paths_and_grids_take_precision_and_threads():
    nets, (images, labels) = networks(CONVNET, 3), examples(CONVNET)
    spec = PathSpec(points=3)
    one, two = (path(spec, CONVNET, *nets[:2], images, labels, threads=n) for n in (1, 2))
    assert torch.equal(one.losses, two.losses)
    assert not torch.equal(path(spec.replace(precision="bf16"), CONVNET, *nets[:2], images, labels).losses, one.losses)
    flat, coarse = plane(*(params for params, _ in nets)), PlaneSpec(resolution=2)
    exact, again = (grid(coarse, CONVNET, flat, {}, images, labels, threads=n) for n in (1, 2))
    assert torch.equal(exact.losses, again.losses)
    rough = grid(coarse.replace(precision="bf16"), CONVNET, flat, {}, images, labels)
    assert not torch.equal(rough.losses, exact.losses)


@pytest.mark.parametrize("spec", [PathSpec, PlaneSpec])
def test_precision_leaves_old_keys_alone(spec):
    assert "precision" not in spec().to_dict()
    assert spec(precision="bf16").to_dict()["precision"] == "bf16"
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16; got 'fp16'"):
        spec(precision="fp16")


def test_long_work_is_compiled_and_short_work_is_not():
    assert pays(ModelSpec(), 25 * 6000)
    assert not pays(ModelSpec(), 100)
    assert not pays(ModelSpec(width=16), 11 * 6000)


def test_as_many_networks_together_as_memory_allows():
    images, _ = examples(CONVNET)
    assert fitting(CONVNET, 7, images) == 7
    large = ModelSpec(arch="resnet18", width=64, image_size=224, stem="imagenet")
    assert fitting(large, 100, torch.empty(500, 3, 1, 1)) == 1


@pytest.mark.parametrize("change, message", [
    ({"form": "all"}, "form must be one of auto, solo, vmap; got 'all'"),
    ({"precision": "half"}, "precision must be one of fp32, bf16; got 'half'"),
])
def test_unknown_choices_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_many(CONVNET, 1, networks(CONVNET, 1).__getitem__, *examples(CONVNET), **change)


def test_no_images_are_refused():
    images, labels = examples(CONVNET)
    with pytest.raises(ValueError, match="at least 1 image and one label for each, got 0 images"):
        evaluate_many(CONVNET, 1, networks(CONVNET, 1).__getitem__, images[:0], labels[:0])
