"""ZCA whitening against the formula written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dpkit.data import Split, zca


def some_images(count=60, shape=(2, 4, 4), seed=0):
    """Images whose pixels are correlated."""
    source = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape))
    mixing = torch.randn(size, size, generator=source) * 0.1
    return torch.sigmoid(torch.randn(count, size, generator=source) @ mixing).view(count, *shape)


def by_hand(images, eps):
    """Mean, transform and inverse with numpy's SVD of the covariance."""
    rows = images.double().numpy().reshape(len(images), -1)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / (len(rows) - 1)
    u, s, _ = np.linalg.svd(covariance)
    return mean, u @ np.diag(1 / np.sqrt(s + eps)) @ u.T, u @ np.diag(np.sqrt(s + eps)) @ u.T


@pytest.mark.parametrize("count", [60, 20], ids=["more images than pixels", "fewer images than pixels"])
def test_the_formula(count):
    images = some_images(count)
    found = zca.fit(images, 0.1)
    mean, transform, inverse = by_hand(images, 0.1)
    assert found.transform.dtype == torch.float64
    np.testing.assert_allclose(found.mean.numpy(), mean, atol=1e-13)
    np.testing.assert_allclose(found.transform.numpy(), transform, atol=1e-11)
    np.testing.assert_allclose(found.inverse.numpy(), inverse, atol=1e-11)
    white = found.apply(images)
    assert white.dtype == torch.float32
    assert white.shape == images.shape
    expected = (images.double().numpy().reshape(count, -1) - mean) @ transform
    np.testing.assert_allclose(white.numpy().reshape(count, -1), expected, atol=1e-6)


def test_a_case_on_paper():
    # two pixels, variance 2/3 each, covariance 0: everything is divided by sqrt(2/3 + eps)
    images = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]]).view(4, 1, 1, 2)
    torch.testing.assert_close(zca.fit(images, 1 / 3).apply(images), images)
    torch.testing.assert_close(zca.fit(images, 1e-9).apply(images), images * 1.5**0.5)


def test_whitened_pixels_are_uncorrelated_where_eps_is_small():
    images = some_images(500)
    rows = zca.fit(images, 1e-9).apply(images).double().flatten(1)
    torch.testing.assert_close(torch.cov(rows.T), torch.eye(32).double(), atol=1e-3, rtol=0)
    assert float((torch.cov(images.double().flatten(1).T) - torch.eye(32)).abs().max()) > 0.5


def test_inverting_gives_the_images_back():
    images, others = some_images(), some_images(seed=1)
    found = zca.fit(images)
    torch.testing.assert_close(found.invert(found.apply(others)), others, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.apply(found.invert(others)), others, atol=1e-6, rtol=0)


def test_bytes_are_pixels_over_255():
    images = (some_images() * 255).to(torch.uint8)
    found, other = zca.fit(images), zca.fit(images.double() / 255)
    torch.testing.assert_close(found.transform, other.transform, atol=1e-13, rtol=0)
    split = zca.whiten(Split(images, torch.arange(60)), found)
    assert torch.equal(split.images, other.apply(images.double() / 255))
    assert split.labels.tolist() == list(range(60))


def test_chunks_change_nothing_but_the_order_of_sums(monkeypatch):
    images = some_images()
    whole = zca.fit(images)
    monkeypatch.setattr(zca, "_ROWS", 7)
    parts = zca.fit(images)
    torch.testing.assert_close(parts.transform, whole.transform, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.apply(images), whole.apply(images), atol=1e-7, rtol=0)


def test_no_digits_are_lost_far_from_zero():
    images = some_images().double() + 1000
    np.testing.assert_allclose(zca.fit(images).transform.numpy(), by_hand(images, 0.1)[1], atol=1e-9)


@pytest.mark.parametrize("images, eps, line", [
    (torch.rand(1, 1, 2, 2), 0.1, r"at least two images \(N, C, H, W\), got \(1, 1, 2, 2\)"),
    (torch.rand(5, 4), 0.1, r"got \(5, 4\)"),
    (torch.rand(5, 1, 2, 2), 0.0, "eps must be > 0, got 0"),
    (torch.full((5, 1, 2, 2), float("nan")), 0.1, "finite pixels"),
], ids=["one image", "no images", "eps", "nan"])
def test_bad_input(images, eps, line):
    with pytest.raises(ValueError, match=line):
        zca.fit(images, eps)


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"with 32 values each.*got \(3, 1, 4, 4\)"):
        zca.fit(some_images()).apply(torch.rand(3, 1, 4, 4))
