"""Figures of a picture and its original, by formulas written out in numpy and scipy."""

import numpy as np
import pytest
import torch
from host import import_torchvision
from scipy.ndimage import correlate1d
from torch.nn import functional as F

from dmap_core.metrics.reference import FeatureDistance, error_map, psnr, ssim


@pytest.fixture(autouse=True, scope="module")
def torchvision():
    import_torchvision()


@pytest.fixture(scope="module")
def feature_distance():
    return FeatureDistance()


def pictures(height=24, width=17, count=3, noise=0.1, seed=0):
    """(image, reference): smooth pictures with an edge, and others near them."""
    generator = torch.Generator().manual_seed(seed)
    reference = F.interpolate(torch.rand(count, 3, 4, 4, generator=generator), (height, width), mode="bilinear")
    reference[..., height // 2 :, :] *= 0.6
    image = (reference + noise * torch.randn(reference.shape, generator=generator)).clamp(0, 1)
    return image, reference


def test_psnr_is_the_formula_for_every_picture():
    image, reference = pictures()
    error = (image.numpy().astype(np.float64) - reference.numpy().astype(np.float64)) ** 2
    expected = 10 * np.log10(1 / error.reshape(3, -1).mean(axis=1))
    found = psnr(image, reference)
    assert found.shape == (3,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7)  # torchmetrics takes log(10) in float32
    assert psnr(torch.full((1, 3, 8, 8), 0.6), torch.full((1, 3, 8, 8), 0.5)).item() == pytest.approx(20, abs=1e-5)


def test_equal_pictures():
    image, other = pictures(32, 40)
    mixed = torch.cat([image[:1], other[1:]])
    assert psnr(mixed, image)[0] == torch.inf and psnr(mixed, image)[1:].isfinite().all()
    assert torch.allclose(ssim(image, image), torch.ones(3), atol=1e-6)
    assert error_map(image, image).max() == 0


def window_means(plane):
    """Means of an (H, W) plane under Wang's window, where it lies inside: (H - 10, W - 10)."""
    x = np.arange(-5, 6)
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window /= window.sum()
    return correlate1d(correlate1d(plane, window, axis=0), window, axis=1)[5:-5, 5:-5]


def wang(image, reference):
    """SSIM of two (H, W) planes with values up to 1: Eq. 13 of Wang et al. (2004), mean over the windows."""
    c1, c2 = 0.01**2, 0.03**2
    mu_x, mu_y = window_means(image), window_means(reference)
    var_x, var_y = window_means(image**2) - mu_x**2, window_means(reference**2) - mu_y**2
    covariance = window_means(image * reference) - mu_x * mu_y
    return np.mean((2 * mu_x * mu_y + c1) * (2 * covariance + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)))


@pytest.mark.parametrize("size", [(11, 11), (24, 17), (40, 32)])
def test_ssim_is_wangs_formula_for_every_picture(size):
    image, reference = pictures(*size, noise=0.05)
    expected = [
        np.mean([wang(x, y) for x, y in zip(a, b, strict=True)])
        for a, b in zip(image.double().numpy(), reference.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(ssim(image, reference).numpy(), expected, atol=2e-5)
    assert max(expected) < 0.99  # or the pictures would not tell formulas apart


def test_ssim_needs_a_window():
    image, reference = pictures(24, 10)
    with pytest.raises(ValueError, match="SSIM needs pictures of at least 11x11 pixels; these are 10x24"):
        ssim(image, reference)


def test_error_map_is_the_mean_absolute_difference_of_the_channels():
    image = torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 1] = torch.tensor([0.3, 0.6, 0.0])
    assert torch.allclose(error_map(image, torch.zeros(1, 3, 2, 2)), torch.tensor([[[[0.0, 0.3], [0.0, 0.0]]]]))


METRICS = [psnr, ssim, error_map]


@pytest.mark.parametrize("metric", METRICS)
def test_values_slightly_outside_are_those_of_a_saved_picture(metric):
    image, reference = pictures()
    beyond = image.clone()
    beyond[:, :, 3:9] = 1.3
    beyond[:, :, 9:12] = -0.2
    assert torch.equal(metric(beyond, reference), metric(beyond.clamp(0, 1), reference))
    assert torch.equal(metric(reference, beyond), metric(reference, beyond.clamp(0, 1)))


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_pictures_are_measured_in_full_precision(metric):
    image, reference = pictures()
    assert torch.equal(metric(image.half(), reference), metric(image.half().float(), reference))


@pytest.mark.parametrize("metric", [*METRICS, "features"])
def test_what_is_refused(metric, feature_distance):
    metric = feature_distance if metric == "features" else metric
    image, reference = pictures(32, 32)
    for given, message in (
        ((image, reference[..., :31]), r"image and reference have shapes \(3, 3, 32, 32\) and \(3, 3, 32, 31\); crop or resize"),
        ((image[:1], reference), "image and reference have shapes"),
        ((image[:, :1], reference[:, :1]), r"image has shape \(3, 1, 32, 32\).*RGB"),
        ((image[0], reference[0]), r"image has shape \(3, 32, 32\)"),
        ((image, reference * torch.nan), "reference holds NaN"),
        ((image * 2 - 1 - 0.2, reference), r"image has values from -1\.\d+ to .*must be in \[0, 1\]"),
        ((image, reference * 255), r"reference has values from .* must be in \[0, 1\]"),
        (((image * 255).byte(), reference), "image holds uint8.*divide"),
    ):
        with pytest.raises(ValueError, match=message):
            metric(*given)


def test_feature_distance_is_zero_for_equal_pictures_and_grows_with_blur(feature_distance):
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    soft, softer = (F.interpolate(F.avg_pool2d(picture, k), (64, 64)) for k in (2, 4))
    assert feature_distance(picture, picture).abs().max() < 1e-6
    near, far = feature_distance(picture, soft), feature_distance(picture, softer)
    assert (near > 0.01).all() and (far > near).all()
    alone = torch.stack([feature_distance(picture[i : i + 1], soft[i : i + 1])[0] for i in range(2)])
    assert torch.allclose(alone, near, atol=1e-5)


def test_feature_distance_compares_a_layer_of_every_scale_with_every_pixel_weighing_the_same(feature_distance):
    image, reference = pictures(48, 64, count=1)
    layers = list(zip(feature_distance.features(image), feature_distance.features(reference), strict=True))
    assert [tuple(x.shape[1:]) for x, _ in layers] == [(16, 24, 32), (24, 12, 16), (40, 6, 8), (112, 3, 4), (320, 2, 2)]
    total = 0.0
    for x, y in ((x[0].numpy(), y[0].numpy()) for x, y in layers):
        x, y = (a / np.linalg.norm(a, axis=0) for a in (x, y))
        total += ((x - y) ** 2).sum(axis=0).mean()
    assert float(feature_distance(image, reference)) == pytest.approx(total / 5, rel=1e-5)


def test_feature_distance_shows_the_network_what_it_was_trained_with(feature_distance):
    image, _ = pictures(48, 64)
    network = feature_distance.network
    last = network._swish(network._bn1(network._conv_head(feature_distance.features(image)[-1])))
    assert torch.allclose(network._fc(last.mean(dim=(2, 3))), network(2 * image - 1), atol=1e-4)


def test_feature_distance_needs_32_pixels(feature_distance):
    image, reference = pictures(31, 40)
    with pytest.raises(ValueError, match="the feature distance needs pictures of at least 32x32 pixels; these are 40x31"):
        feature_distance(image, reference)
    image, reference = pictures(32, 32)
    assert feature_distance(image, reference).shape == (3,)
