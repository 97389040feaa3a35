"""Kernels that are convolved by Fourier transforms: the same as directly, to rounding, and small ones directly."""

import time

import pytest
import torch
from scipy import ndimage
from torch.autograd import gradcheck
from torch.nn import functional as F

from dmap_core.operators import Compose, Grayscale, KernelBlur, MotionBlur
from dmap_core.operators.blur import correlate, fast_length, spectrum, spread


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel(height, width, seed=0):
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / (height * width)


LARGE = [
    pytest.param(MotionBlur(21, 30.0), id="usual"),
    pytest.param(MotionBlur(40, 30.0), id="motion"),
    pytest.param(MotionBlur(39.5, 90.0), id="vertical"),
    pytest.param(KernelBlur(kernel(33, 35).tolist()), id="lopsided"),
    pytest.param(KernelBlur(kernel(1, 1001).tolist()), id="row"),
    pytest.param(Compose([Grayscale(), KernelBlur(kernel(37, 29, 3).tolist())]), id="compose"),
]


def size_for(f):
    return (3, 503) if "1x1001" in f.describe() else (23, 26)


@pytest.mark.parametrize("f", LARGE)
def test_against_scipy(f):
    if f.name == "Compose":
        return
    x = randn(2, 3, *size_for(f))
    for got, image in zip(f(x).flatten(0, 1), x.flatten(0, 1), strict=True):
        expected = ndimage.correlate(image.numpy(), f.kernel_tensor().numpy(), mode="mirror")
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=1e-13)


@pytest.mark.parametrize("f", LARGE)
def test_adjoint_and_gradient_are_exact(f):
    size = size_for(f)
    x = randn(2, 3, *size, seed=1).requires_grad_()
    y_hat = f(x)
    y = randn(*y_hat.shape, seed=2)
    (grad,) = torch.autograd.grad((y_hat * y).sum(), x)
    torch.testing.assert_close(f.adjoint(y, size), grad, rtol=0, atol=1e-12)
    torch.testing.assert_close((f(x) * y).sum(), (x * f.adjoint(y, size)).sum(), rtol=1e-12, atol=1e-12)
    if f.name == "MotionBlur":
        assert gradcheck(f, x, fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("f", LARGE)
def test_lower_precision(f, dtype, tolerance):
    x = randn(1, 3, *size_for(f)).to(dtype)
    y = f(x)
    assert y.dtype == dtype and f.adjoint(y, size_for(f)).dtype == dtype
    torch.testing.assert_close(y.double(), f(x.double()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("height, width", [(33, 33), (31, 63), (65, 17)])
def test_both_ways_are_the_same(height, width):
    """Directly, and by transforms."""
    k = kernel(height, width)
    x = randn(2, 3, 80, 75)
    there, back = (80 - height + 1, 75 - width + 1), (80, 75)
    factors = spectrum(k, back)
    direct = correlate(x, k, there)
    assert direct.shape == (2, 3, *there)
    torch.testing.assert_close(correlate(x, factors, there), direct, rtol=0, atol=1e-14)
    torch.testing.assert_close(spread(direct, factors, back), spread(direct, k, back), rtol=0, atol=1e-14)


@pytest.mark.parametrize("f", [MotionBlur(5, 30.0), KernelBlur(kernel(9, 11).tolist())])
def test_small_kernels_are_convolved_directly(f):
    x = randn(1, 3, 40, 44, dtype=torch.float32)
    k = f.kernel_tensor().float()
    padded = F.pad(x, (k.shape[1] // 2,) * 2 + (k.shape[0] // 2,) * 2, mode="reflect")
    assert torch.equal(f(x), F.conv2d(padded, k.expand(3, 1, *k.shape), groups=3))


def test_the_longest_motion_of_the_node_takes_no_minute():
    """Directly one call takes a minute and more; by transforms a tenth of a second on one core."""
    f = MotionBlur(255, 45.0)
    x = randn(1, 3, 256, 256, dtype=torch.float32).requires_grad_()
    started = time.perf_counter()
    f(x).square().sum().backward()
    assert time.perf_counter() - started < 10
    assert torch.isfinite(x.grad).all()


def test_a_kernel_is_made_once():
    f = KernelBlur(kernel(511, 511).tolist())
    assert f.kernel_tensor() is f.kernel_tensor()
    assert MotionBlur(40, 3.0).kernel_tensor() is MotionBlur(40, 3.0).kernel_tensor()


def test_a_kernel_first_made_under_inference_mode():
    f = KernelBlur(kernel(33, 33).tolist())
    with torch.inference_mode():
        f(randn(1, 3, 40, 40))
    x = randn(1, 3, 40, 40).requires_grad_()
    f(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("n, expected", [(1, 1), (7, 8), (11, 12), (243, 243), (509, 512), (766, 768), (1021, 1024), (2049, 2160)])
def test_fast_lengths(n, expected):
    found = fast_length(n)
    assert n <= found <= expected
    for prime in (2, 3, 5):
        while found % prime == 0:
            found //= prime
    assert found == 1
