"""Adam's direction against torch.optim.Adam, and what it changes in the solvers."""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators
from dmap_core.solvers import DMAP, DPS
from dmap_core.solvers.adam import OPTIMIZERS, Adam, direction

SHAPE = (1, 4, 4)
SIGMAS = [3.0, 1.5, 0.7, 0.2, 0.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(count=30):
    """Of very different sizes per element and over time, with some zeros."""
    scale = torch.logspace(-6, 4, 24, dtype=torch.float64).view(2, 3, 4)
    return [(0 if n % 7 == 3 else 1 + n) * scale * (randn(2, 3, 4, seed=n) + 0.3) for n in range(count)]


@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3)])
def test_the_direction_is_what_torchs_adam_does_to_a_parameter(betas, eps):
    parameter = torch.zeros(2, 3, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=betas, eps=eps)
    ours = Adam(betas, eps)
    for grad in gradients():
        before = parameter.detach().clone()
        parameter.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(ours(grad), before - parameter.detach(), rtol=1e-7, atol=1e-7)


def test_the_defaults_are_those_of_the_paper_on_adam():
    assert (Adam().betas, Adam().eps) == ((0.9, 0.999), 1e-8)


def test_the_first_direction_is_the_sign():
    grad = gradients()[0]
    torch.testing.assert_close(Adam()(grad), grad / (grad.abs() + 1e-8), rtol=1e-9, atol=0)
    assert torch.equal(Adam()(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e6])
def test_the_gradients_scale_does_not_matter(scale):
    one, other = Adam(), Adam()
    for n in range(10):
        grad = randn(3, 5, seed=n)
        torch.testing.assert_close(one(grad), other(scale * grad), rtol=1e-4, atol=1e-4)


def test_the_given_gradient_is_left_alone():
    adam, grad = Adam(), randn(3, 5)
    before = grad.clone()
    adam(grad)
    adam(grad)
    assert torch.equal(grad, before)


def test_half_precision_is_not_squared_in_half():
    """1e-4 squared is 0 in float16, and the direction would be 1e4 instead of 1."""
    out = Adam()(torch.full((2, 3), 1e-4, dtype=torch.float16))
    torch.testing.assert_close(out, torch.ones(2, 3), rtol=1e-3, atol=0)


def test_directions_by_name():
    grad = randn(2, 3)
    assert torch.equal(direction("gradient")(grad), grad)
    assert isinstance(direction("adam"), Adam)
    assert direction("adam") is not direction("adam")
    with pytest.raises(ValueError, match=f"optimizer is 'rmsprop'; it must be one of {', '.join(OPTIMIZERS)}"):
        DPS(zeta=1.0, optimizer="rmsprop")


MEAN = 0.3 * randn(1, *SHAPE)
F = Inpainting(torch.eye(4))


class Scaled(Inpainting):
    """The same measurement in other units, so that every gradient is 1000 times larger."""

    def distance(self, y_hat, y):
        return 1000 * super().distance(y_hat, y)


def problem(batch, f=F):
    return Posterior(GaussianMixture(MEAN, 0.5), f, F(randn(batch, *SHAPE, seed=1))), 3 * randn(batch, *SHAPE, seed=2)


@pytest.mark.parametrize("sample", [DPS, DMAP])
def test_runs_do_not_depend_on_the_residuals_units(sample):
    posterior, z = problem(2)
    expected = sample(zeta=0.1, optimizer="adam")(posterior, z, SIGMAS, generator=generators(0, 2))
    scaled, z = problem(2, Scaled(F.mask[0, 0]))
    out = sample(zeta=0.1, optimizer="adam")(scaled, z, SIGMAS, generator=generators(0, 2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    plain = sample(zeta=0.1)(posterior, z, SIGMAS, generator=generators(0, 2))
    assert (expected - plain).abs().max() > 1e-2


def test_dps_steps_along_torchs_adam():
    """Deterministic, so that what every step takes from the mean is zeta times the direction; the moments live across noise levels."""
    posterior, z = problem(2)
    latents = [z]
    settings = {"zeta": 0.1, "eta": 0.0, "optimizer": "adam"}
    DPS(**settings)(posterior, z, SIGMAS, callback=lambda i, d, z, r: latents.append(z))
    parameter = torch.zeros_like(z, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        grad, denoised, _ = posterior.gradient(latents[i], sigma)
        before = parameter.detach().clone()
        parameter.grad = grad
        optimizer.step()
        mu, _ = ancestral_step(latents[i], denoised, sigma, sigma_next, 0.0)
        torch.testing.assert_close(mu - latents[i + 1], before - parameter.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("zeta, K", [(0.05, 1), (0.3, 2), (5.0, 3)])
def test_dmap_stays_on_every_samples_sphere(zeta, K, eta):
    posterior, z = problem(3)
    latents = [z]
    settings = {"zeta": zeta, "K": K, "eta": eta, "optimizer": "adam"}
    DMAP(**settings)(posterior, z, SIGMAS, generator=generators(0, 3), callback=lambda i, d, z, r: latents.append(z))
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS[:-1])):
        mu, up = ancestral_step(latents[i], posterior.denoise(latents[i], sigma), sigma, sigma_next, eta)
        distance = (latents[i + 1] - mu).flatten(1).norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, math.sqrt(16) * up), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sample", [DPS, DMAP])
def test_every_run_begins_with_new_moments(sample):
    posterior, z = problem(1)
    runs = [sample(zeta=0.1, optimizer="adam")(posterior, z, SIGMAS, generator=generators(0, 1)) for _ in range(2)]
    assert torch.equal(*runs)


def test_elements_without_gradient_are_not_moved():
    """Pixels that f does not see get no step, not even one of Adam's constant length."""
    posterior, z = problem(1)
    settings = {"zeta": 0.1, "eta": 0.0, "optimizer": "adam"}
    out = DPS(**settings)(posterior, z, SIGMAS)
    free = DPS(zeta=1e-12, eta=0.0)(posterior, z, SIGMAS)
    unseen = F.mask.bool().expand_as(z)
    torch.testing.assert_close(out[unseen], free[unseen], rtol=1e-9, atol=1e-9)
    assert ((out - free)[~unseen].abs() > 1e-3).all()
