"""Cotangents on their way back through networks in half precision: nothing is lost to underflow, and full precision does not notice."""

import pytest
import torch
from torch import nn

from dmap_core.gradient import vjp


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16)).to(dtype)


def product(dtype, x, cotangent, function):
    x = x.to(dtype).float().requires_grad_()
    with torch.enable_grad():
        out = network(dtype)(x.to(dtype)).float()
    return function(out, x, cotangent)


def unscaled(out, x, cotangent):
    return torch.autograd.grad(out, x, cotangent)[0]


@pytest.fixture
def x():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cotangent():
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("exponent", [-30, -20, -10, 0, 10, 30])
def test_the_size_of_a_cotangent_does_not_matter(x, cotangent, exponent):
    """Half precision alone rounds all of it to zero at 2^-30 and makes it infinite at 2^30."""
    size = 2.0**exponent
    expected = product(torch.float16, x, cotangent, vjp)
    assert torch.equal(product(torch.float16, x, cotangent * size, vjp), expected * size)
    exact = product(torch.float32, x, cotangent, unscaled)
    assert float((expected - exact).norm()) < 0.01 * float(exact.norm())
    if abs(exponent) == 30:
        lost = product(torch.float16, x, cotangent * size, unscaled)
        assert not torch.isfinite(lost).all() or float(lost.abs().max()) == 0


@pytest.mark.parametrize("size", [1e-12, 3e-3, 1.0, 7e5])
def test_full_precision_is_the_same_to_the_last_bit(x, cotangent, size):
    assert torch.equal(product(torch.float32, x, size * cotangent, vjp), product(torch.float32, x, size * cotangent, unscaled))


def test_every_sample_has_a_scale_of_its_own(x, cotangent):
    sizes = torch.tensor([[1e-8], [1.0], [0.0]])
    together = product(torch.float16, x, sizes * cotangent, vjp)
    assert torch.equal(together[2], torch.zeros(16))
    for i in range(2):
        alone = product(torch.float16, x[i : i + 1], (sizes * cotangent)[i : i + 1], vjp)
        assert float((together[i] - alone[0]).norm()) < 0.01 * float(alone.norm()) and float(alone.norm()) > 0


def test_what_is_not_finite_stays_so(x, cotangent):
    for bad in (float("nan"), float("inf")):
        spoilt = cotangent.clone()
        spoilt[0, 0] = bad
        result = product(torch.float32, x, spoilt, vjp)
        assert not torch.isfinite(result[0]).all() and torch.isfinite(result[1:]).all()


def test_the_largest_entry_that_a_network_is_given_lies_below_1():
    for largest in (1e-30, 0.49, 0.5, 1.0, 3e20):
        seen = []
        x = torch.ones(1, 2, requires_grad=True)
        out = x * 1.0
        out.register_hook(lambda cotangent, seen=seen: seen.append(float(cotangent.abs().max())))
        vjp(out, x, torch.tensor([[largest, 0.1 * largest]]))
        assert 0.5 <= seen[0] < 1


def test_double_precision_and_subnormal_numbers():
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    for size in (1e-310, 1e-200, 1.0, 1e200):
        cotangent = torch.tensor([[size, -size / 4]], dtype=torch.float64)
        assert torch.equal(vjp(x * 3.0, x, cotangent), 3.0 * cotangent)
