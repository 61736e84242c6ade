"""What a network stands: against errors counted image by image, with corrupted images shared or made on the way."""
from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F

from dpkit import models, robustness, tree
from dpkit.data import Split, normalise
from dpkit.data.corruptions import STANDARD, corrupt
from dpkit.models.quantise import fake_quantise
from dpkit.robustness import RobustnessSpec, corrupted_images, measure

SPEC = RobustnessSpec(corruptions=("gaussian_noise", "contrast", "saturate"), severities=(2, 5), bits=(8, 2))
SMALL = SPEC.replace(images=7)


@pytest.fixture(scope="module", params=[tiny.MODEL, tiny.BATCH_NORM], ids=["instance", "batch"])
def trained(request):
    """A network that has learned to tell the colours of images of three classes."""
    fit = tiny.train(tiny.PLAIN.replace(epochs=40, lr=0.1), tiny.coloured(), model=request.param)
    return request.param, *fit.network(0)


def by_hand(model, params, buffers, pixels, labels):
    """Error and loss with one forward pass an image."""
    rows = [models.forward(model, params, buffers, normalise(x[None], tiny.MEAN, tiny.STD), train=False)[0][0] for x in pixels]
    logits = torch.stack(rows).double()
    return float((logits.argmax(1) != labels).double().mean()), float(F.cross_entropy(logits, labels))


def measured(spec, trained, seed=3, **options):
    model, params, buffers = trained
    return measure(spec, model, params, buffers, tiny.coloured(), tiny.MEAN, tiny.STD, seed, **options)


def test_every_error_is_counted_right(trained):
    model, params, buffers = trained
    found, split = measured(SPEC, trained), tiny.coloured()
    assert (found.clean_error, found.clean_loss) == pytest.approx(by_hand(*trained, split.images, split.labels))
    for row, name in enumerate(SPEC.corruptions):
        for column, severity in enumerate(SPEC.severities):
            pixels = corrupt(split.images, name, severity, tree.generator_for(3, "corrupt", name, severity))
            error, loss = by_hand(model, params, buffers, pixels, split.labels)
            assert float(found.corruption_errors[row, column]) == pytest.approx(error)
            assert float(found.corruption_losses[row, column]) == pytest.approx(loss)
    for place, bits in enumerate(SPEC.bits):
        rounded = fake_quantise(params, models.prunable(model), bits)
        error, loss = by_hand(model, rounded, buffers, split.images, split.labels)
        assert float(found.quantised_errors[place]) == pytest.approx(error)
        assert float(found.quantised_losses[place]) == pytest.approx(loss)
    assert found.mean_corruption_error == pytest.approx(found.corruption_errors.sum().item() / 6)
    assert found.clean_error < 0.2 < found.corruption_errors.max()  # there was something to lose
    assert found.corruption_errors.dtype == found.quantised_losses.dtype == torch.float64


def test_nothing_that_is_passed_in_changes(trained):
    _, params, buffers = trained
    before = tree.detach(params), tree.detach(buffers)
    measured(SPEC, trained)
    assert tiny.equal(before[0], params)
    assert tiny.equal(before[1], buffers)


def test_shared_images_are_those_made_on_the_way(trained):
    shared = corrupted_images(SMALL, tiny.coloured().images, 3)
    assert list(shared) == [(n, s) for n in SMALL.corruptions for s in SMALL.severities]
    alone, together = measured(SMALL, trained), measured(SMALL, trained, corrupted=shared)
    assert torch.equal(alone.corruption_losses, together.corruption_losses)
    assert torch.equal(alone.corruption_errors, together.corruption_errors)
    assert not torch.equal(alone.corruption_losses, measured(SMALL, trained, seed=4).corruption_losses)
    assert robustness.bytes_needed(SMALL, 20, (3, 8, 8)) == sum(images.numel() for images in shared.values())
    assert robustness.bytes_needed(SMALL, 5, (3, 8, 8)) == 5 * 192 * 6


def test_a_corruption_is_the_same_whatever_else_is_asked_for():
    images = tiny.coloured().images
    wide, narrow = (corrupted_images(spec, images, 3) for spec in (SPEC, SPEC.replace(corruptions=("saturate", "gaussian_noise"),
                                                                                      severities=(5,))))
    assert all(torch.equal(narrow[place], wide[place]) for place in narrow)
    assert not torch.equal(wide["gaussian_noise", 5], corrupted_images(SPEC, images, 4)["gaussian_noise", 5])


def test_few_images_are_evenly_spaced_and_all_measures_use_them(trained):
    split, index = tiny.coloured(), torch.tensor([0, 2, 5, 8, 11, 14, 17])
    found, shared = measured(SMALL, trained), corrupted_images(SMALL, split.images, 3)
    assert found.clean_loss == pytest.approx(by_hand(*trained, split.images[index], split.labels[index])[1])
    plain = corrupt(split.images[index], "contrast", 5, torch.Generator())  # draws nothing
    assert torch.equal(shared["contrast", 5], plain)
    assert torch.equal(measured(SPEC.replace(images=50), trained).corruption_losses, measured(SPEC, trained).corruption_losses)


def test_bits_may_be_left_out(trained):
    found = measured(SMALL.replace(bits=()), trained)
    assert found.quantised_errors.shape == (0,)
    assert found.corruption_errors.shape == (3, 2)


def test_the_usual_ones():
    spec = RobustnessSpec()
    assert (spec.corruptions, spec.severities, spec.images) == (STANDARD, (1, 2, 3, 4, 5), 0)
    assert RobustnessSpec(**spec.to_dict()) == spec


@pytest.mark.parametrize("changes, message", [
    ({"corruptions": ("fog", "frost")}, "corruptions must be chosen from gaussian_noise, .*; got frost"),
    ({"corruptions": ()}, "corruptions must name at least one"),
    ({"corruptions": ("fog", "fog")}, "corruptions must name each one once, got fog, fog"),
    ({"severities": (0, 1)}, r"severities must lie in \[1, 5\], got \[0\]"),
    ({"severities": (1, 1)}, "severities must name each one once, got 1, 1"),
    ({"severities": ()}, "severities must name at least one"),
    ({"bits": (8, 1)}, r"bits must lie in \[2, 16\], got \[1\]"),
    ({"bits": (4, 4)}, "bits must name each one once"),
    ({"bits": (4.5,)}, "bits must be a whole number, got 4.5"),
    ({"images": -1}, r"images must be at least 0 \(0 means all\), got -1"),
])
def test_a_specification_is_checked(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        RobustnessSpec(**changes)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_measured_is_refused_in_one_line(trained):
    model, params, buffers = trained
    split, shared = tiny.coloured(), corrupted_images(SMALL, tiny.coloured().images, 3)
    normalised = Split(normalise(split.images, tiny.MEAN, tiny.STD), split.labels)
    soft = Split(split.images, split.targets(3))
    for test, corrupted, message in (
            (normalised, None, "test must be uint8 images with hard labels .*, got float32 and"),
            (soft, None, r"got uint8 and labels \(20, 3\)"),
            (Split(split.images[:0], split.labels[:0]), None, "at least 1 image"),
            (split, {k: v for k, v in shared.items() if k != ("contrast", 2)}, "contrast at 2 is missing; make it with"),
            (split, shared | {("contrast", 2): split.images},
             r"must be \(7, 3, 8, 8\) uint8 .* contrast at 2 with \(20, 3, 8, 8\)"),
            (split, shared | {("contrast", 2): shared["contrast", 2].float()}, r"at 2 with \(7, 3, 8, 8\) float32")):
        with pytest.raises(ValueError, match=message) as caught:
            measure(SMALL, model, params, buffers, test, tiny.MEAN, tiny.STD, 3, corrupted)
        assert len(str(caught.value).splitlines()) == 1
