"""Operators against implementations that share no code with them."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image
from torch.nn import functional as F

from dmap_core.operators import GaussianBlur, KernelBlur, MotionBlur, SuperResolution, centred_box


def keys_cubic(x):
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def imresize_axis(x, scale, axis):
    """MATLAB's imresize(x, 1/scale) along one axis: 1-based coordinates, a window of 4 scale + 2 taps, symmetric padding."""
    x = np.moveaxis(x, axis, -1)
    n = x.shape[-1]
    pad = 4 * scale + 2
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(pad, pad)], mode="symmetric")
    out = np.empty((*x.shape[:-1], n // scale))
    for k in range(1, n // scale + 1):
        u = k * scale + 0.5 * (1 - scale)
        left = math.floor(u - 2 * scale)
        positions = range(left, left + 4 * scale + 2)
        weights = np.array([keys_cubic((u - p) / scale) / scale for p in positions])
        weights /= weights.sum()
        out[..., k - 1] = sum(w * padded[..., p - 1 + pad] for w, p in zip(weights, positions, strict=True))
    return np.moveaxis(out, -1, axis)


def imresize(x, scale):
    return imresize_axis(imresize_axis(x, scale, -2), scale, -1)


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("scale, size", [(2, (2, 2)), (2, (6, 10)), (3, (9, 21)), (4, (4, 20)), (5, (15, 25)), (8, (8, 8)), (8, (64, 40))])
def test_super_resolution_is_matlabs_imresize_up_to_the_border(scale, size):
    x = picture(2, 3, *size)
    np.testing.assert_allclose(SuperResolution(scale)(x).numpy(), imresize(x.numpy(), scale), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale, size", [(2, (32, 24)), (3, (36, 45)), (4, (64, 48)), (8, (96, 112))])
def test_super_resolution_inside_the_border_is_torchs_antialiased_bicubic(scale, size):
    x = picture(2, 3, *size)
    theirs = F.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True, align_corners=False)
    difference = (SuperResolution(scale)(x) - theirs).abs()
    # the kernel reaches 2 measured pixels to either side
    assert difference[..., 2:-2, 2:-2].max() < 1e-12
    assert difference.max() > 1e-3


@pytest.mark.parametrize("scale, size", [(2, (32, 24)), (4, (64, 48)), (8, (96, 112))])
def test_super_resolution_inside_the_border_is_pils_bicubic(scale, size):
    x = picture(*size).float()
    theirs = Image.fromarray(x.numpy()).resize((size[1] // scale, size[0] // scale), Image.Resampling.BICUBIC)
    ours = SuperResolution(scale)(x[None, None])[0, 0].numpy()
    np.testing.assert_allclose(ours[2:-2, 2:-2], np.asarray(theirs)[2:-2, 2:-2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("sigma, size", [(0.6, (5, 9)), (1.0, (5, 16)), (2.4, (20, 31)), (3.0, (40, 64))])
def test_gaussian_blur_is_scipys(sigma, size):
    x = picture(2, 3, *size)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), sigma, mode="mirror", truncate=4.0, axes=(2, 3))
    np.testing.assert_allclose(GaussianBlur(61, sigma)(x).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel_size", [3, 7, 13])
def test_gaussian_blur_is_cut_at_its_kernel_size_too(kernel_size):
    x = picture(1, 3, 20, 17)
    expected = scipy.ndimage.gaussian_filter(x.numpy(), 3.0, mode="mirror", radius=kernel_size // 2, axes=(2, 3))
    np.testing.assert_allclose(GaussianBlur(kernel_size, 3.0)(x).numpy(), expected, rtol=0, atol=1e-13)


def test_the_papers_gaussian_kernel():
    """61x61, sigma 3, from scipy's gaussian_filter of an impulse: 25 taps are not zero."""
    impulse = np.zeros((61, 61))
    impulse[30, 30] = 1
    x = torch.zeros(1, 1, 61, 61, dtype=torch.float64)
    x[..., 30, 30] = 1
    response = GaussianBlur()(x)[0, 0]
    assert int((response[30] != 0).sum()) == 25
    np.testing.assert_allclose(response.numpy(), scipy.ndimage.gaussian_filter(impulse, 3.0), rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape, size", [((3, 3), (4, 9)), ((5, 3), (6, 7)), ((1, 7), (8, 11)), ((7, 1), (12, 8)), ((9, 9), (20, 10))])
def test_kernel_blur_is_scipys_correlation(shape, size):
    kernel = torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 0.1
    x = picture(2, 3, *size)
    weights = kernel.numpy() / kernel.numpy().sum()
    expected = scipy.ndimage.correlate(x.numpy(), weights[None, None], mode="mirror")
    np.testing.assert_allclose(KernelBlur(kernel.tolist())(x).numpy(), expected, rtol=0, atol=1e-13)


def test_kernel_blur_with_a_gaussian_kernel_is_the_gaussian_blur():
    taps = np.exp(-(np.arange(-4, 5) ** 2) / 2.0)
    x = picture(1, 3, 9, 14)
    torch.testing.assert_close(KernelBlur(np.outer(taps, taps).tolist())(x), GaussianBlur(61, 1.0)(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1.5, 2, 3, 4.2, 7, 15, 30.5])
@pytest.mark.parametrize("angle", [0, 17, 45, 90, 133.3, -60])
def test_motion_kernel_has_sum_one_and_looks_the_same_upside_down(length, angle):
    kernel = MotionBlur(length, angle).kernel_tensor()
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-14)
    assert kernel.min() >= 0 and kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2 == 1
    torch.testing.assert_close(kernel, kernel.rot90(2), rtol=0, atol=1e-14)
    torch.testing.assert_close(MotionBlur(length, angle + 180).kernel_tensor(), kernel, rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", [1.5, 3, 8, 15, 21.7])
def test_horizontal_and_vertical_motion(length):
    horizontal, vertical = MotionBlur(length, 0).kernel_tensor(), MotionBlur(length, 90).kernel_tensor()
    middle = len(horizontal) // 2
    others = torch.arange(len(horizontal)) != middle
    assert not horizontal[others].any()
    torch.testing.assert_close(vertical, horizontal.mT, rtol=0, atol=1e-14)
    # all but the two pixels at either end, which the line covers in part, weigh the same; the line is sampled, hence 2 %
    inside = horizontal[middle, 2:-2]
    torch.testing.assert_close(inside, torch.full_like(inside, float(inside.max() if len(inside) else 0)), rtol=0.02, atol=0)


@pytest.mark.parametrize("length", [2, 3, 7.3, 15])
@pytest.mark.parametrize("angle", [0, 25, 45, 110])
def test_motion_kernel_is_the_line_between_the_outermost_pixel_centres(length, angle):
    """The integral of bilinear interpolation along a line of length - 1; the kernel's samples count both ends in full."""
    kernel = MotionBlur(length, angle).kernel_tensor().numpy()
    radius = len(kernel) // 2
    along = (np.arange(20_000) + 0.5) / 20_000 * (length - 1) - (length - 1) / 2
    x, y = along * math.cos(math.radians(angle)), -along * math.sin(math.radians(angle))
    expected = np.zeros_like(kernel)
    for row in range(-radius, radius + 1):
        for column in range(-radius, radius + 1):
            tents = np.clip(1 - abs(x - column), 0, None) * np.clip(1 - abs(y - row), 0, None)
            expected[row + radius, column + radius] = tents.mean()
    np.testing.assert_allclose(kernel, expected, rtol=0, atol=0.07 / length)


@pytest.mark.parametrize("length", [3, 15])
def test_motion_over_an_odd_number_of_pixels_touches_exactly_those(length):
    row = MotionBlur(length, 0).kernel_tensor()[length // 2]
    assert len(row) == length and (row > 0).all()


@pytest.mark.parametrize("length", [2.5, 6, 15])
@pytest.mark.parametrize("angle", [0, 20, 45, 71])
def test_quarter_turns_and_mirrors_of_the_motion_kernel(length, angle):
    kernel = MotionBlur(length, angle).kernel_tensor()
    turned = MotionBlur(length, angle + 90).kernel_tensor()
    torch.testing.assert_close(turned, kernel.rot90(1), rtol=0, atol=1e-14)
    torch.testing.assert_close(MotionBlur(length, -angle).kernel_tensor(), kernel.flip(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(MotionBlur(length, 90 - angle).kernel_tensor(), kernel.mT, rtol=0, atol=1e-14)


def test_a_positive_angle_turns_counter_clockwise():
    kernel = MotionBlur(9, 45).kernel_tensor()
    assert kernel[:4, 5:].sum() > 0.2 and kernel[5:, :4].sum() > 0.2
    assert not kernel[:4, :4].any() and not kernel[5:, 5:].any()


@pytest.mark.parametrize("size, box", [((512, 512), (128, 128)), ((8, 10), (4, 6)), ((7, 9), (3, 1))])
def test_centred_box(size, box):
    mask = centred_box(size, box)
    assert mask.shape == size and mask.sum() == box[0] * box[1]
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.flip(1))
