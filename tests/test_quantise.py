"""Weights of few bits against torch's fake quantisation and values worked out by hand."""
from __future__ import annotations

import itertools

import pytest
import torch

from dpkit import models
from dpkit.models import ModelSpec
from dpkit.models.quantise import fake_quantise

MODEL = ModelSpec(width=6, image_size=8, classes=5)


def network(seed=0):
    """Parameters, a third of the prunable weights removed, one channel removed whole."""
    source = torch.Generator().manual_seed(seed)
    params, _ = models.init(MODEL, source)
    for name in models.prunable(MODEL):
        keep = torch.rand(params[name].shape, generator=source) > 1 / 3
        params[name] = torch.where(keep, params[name] + 0.1 * torch.randn(keep.shape, generator=source), 0.0)
    params["conv1.weight"][2] = 0
    return params


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("per_channel", [True, False])
def test_values_are_those_of_torch(bits, per_channel):
    params, names = network(), models.prunable(MODEL)
    found = fake_quantise(params, names, bits, per_channel)
    most = 2 ** (bits - 1) - 1
    for name in names:
        weight = params[name]
        if per_channel:
            scale = (weight.abs().flatten(1).amax(1) / most).clamp_min(1e-30)
            zero = torch.zeros(len(weight), dtype=torch.int32)
            expected = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -most, most)
        else:
            expected = torch.fake_quantize_per_tensor_affine(weight, float(weight.abs().max() / most), 0, -most, most)
        torch.testing.assert_close(found[name], expected, atol=1e-7, rtol=1e-6)


def test_three_levels_by_hand():
    weight = torch.tensor([[1.0, -0.4, 0.6, 0.0], [-0.2, 0.1, 0.05, -0.11], [0.0, 0.0, 0.0, 0.0]])
    # a step of 1, of .2, and none; halves go to the even level
    expected = torch.tensor([[1.0, 0.0, 1.0, 0.0], [-0.2, 0.0, 0.0, -0.2], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(fake_quantise({"w": weight}, ["w"], 2)["w"], expected)
    by_tensor = fake_quantise({"w": weight}, ["w"], 2, per_channel=False)["w"]
    torch.testing.assert_close(by_tensor, torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0] * 4, [0.0] * 4]))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_removed_weights_stay_removed_and_levels_are_few(bits):
    params, names = network(), models.prunable(MODEL)
    found = fake_quantise(params, names, bits)
    for name in names:
        weight = found[name]
        assert not weight[params[name] == 0].any()
        assert not bool((torch.signbit(weight) & (weight == 0)).any())  # no negative zeros
        assert max(len(channel.unique()) for channel in weight) <= 2**bits - 1
        torch.testing.assert_close(weight.flatten(1).abs().amax(1), params[name].flatten(1).abs().amax(1))


def test_each_bit_halves_the_error_and_what_is_not_named_is_passed_on():
    params, names = network(), models.prunable(MODEL)
    before = {name: t.clone() for name, t in params.items()}
    worst = []
    for bits in range(3, 11):
        found = fake_quantise(params, names, bits)
        assert list(found) == list(params)
        assert all(found[name] is params[name] for name in params if name not in names)
        errors = torch.cat([(found[name] - params[name]).flatten(1).abs().amax(1) for name in names])
        steps = torch.cat([params[name].flatten(1).abs().amax(1) for name in names]) / (2 ** (bits - 1) - 1)
        assert bool((errors <= steps / 2 + 1e-7).all())
        worst.append(float(errors.mean()))
    assert all(b < 0.7 * a for a, b in itertools.pairwise(worst))
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_denormal_weights_do_not_become_nan():
    weight = torch.tensor([[1e-45, 0.0], [1e-42, -1e-43]])
    assert bool(torch.isfinite(fake_quantise({"w": weight}, ["w"], 8)["w"]).all())


@pytest.mark.parametrize("bits", [0, 1, 17, 4.0, True, "4"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits must be a whole number in \[2, 16\], got "):
        fake_quantise(network(), ["conv0.weight"], bits)


def test_what_cannot_be_rounded_is_refused():
    params = network()
    with pytest.raises(ValueError, match=r"must be parameters of the network, got 'conv9.weight'; it has conv0.weight, "):
        fake_quantise(params, ["conv9.weight"], 4)
    with pytest.raises(ValueError, match=r"several weights in each, got conv0.bias of shape \(6,\); leave it out"):
        fake_quantise(params, ["conv0.bias"], 4)
    assert fake_quantise(params, ["conv0.bias"], 4, per_channel=False)["conv0.bias"].shape == (6,)
    params["conv0.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights must be finite to be quantised, conv0.weight is not"):
        fake_quantise(params, models.prunable(MODEL), 4)
