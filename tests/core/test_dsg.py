"""DSG: one step by hand, its sphere, and the ends of its mix rate."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, Noisy
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators, randn_like
from dmap_core.solvers import DSG
from dmap_core.solvers.dsg import unit

SHAPE = (1, 4, 4)
STD = 0.5
SIGMAS = [3.0, 1.5, 0.7, 0.2, 0.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN = 0.3 * randn(1, *SHAPE)
F = Inpainting(torch.eye(4))


def problem(batch, f=F):
    return Posterior(GaussianMixture(MEAN, STD), f, F(randn(batch, *SHAPE, seed=1))), 3 * randn(batch, *SHAPE, seed=2)


def run(posterior, z, sigmas=SIGMAS, seed=3, **settings):
    latents = [z]
    out = DSG(**settings)(posterior, z, sigmas, generator=generators(seed, len(z)), callback=lambda i, d, z, r: latents.append(z))
    assert torch.equal(out, latents[-1])
    return latents


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("zeta", [0.08, 0.3, 1.0])
def test_one_step_by_hand(zeta, eta):
    """Eq. 40 and 41 sample by sample in numpy; the Gaussian prior's gradient is s (z0 - y) / ||z0 - y|| where y is known."""
    posterior, z = problem(3)
    sigma, sigma_next = SIGMAS[:2]
    (_, ours, *_) = run(posterior, z, zeta=zeta, eta=eta)
    noises = [torch.randn(SHAPE, generator=g).double().numpy() for g in generators(3, 3)]
    known, mean = 1 - np.eye(4)[None], MEAN[0].numpy()
    shrink = STD**2 / (STD**2 + sigma**2)
    up = eta * sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
    down = math.sqrt(sigma_next**2 - up**2)
    for i in range(3):
        x = z[i].numpy()
        z0 = mean + shrink * (x - mean)
        error = known * z0 - posterior.y[i].numpy()
        g = shrink * error / np.sqrt((error**2).sum())
        mu = z0 + down / sigma * (x - z0)
        best = -math.sqrt(16) * up * g / np.sqrt((g**2).sum())
        eps = up * noises[i]
        u = eps + zeta * (best - eps)
        expected = mu + math.sqrt(16) * up * u / np.sqrt((u**2).sum())
        # the sphere is rounded to float32
        np.testing.assert_allclose(ours[i].numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("zeta", [0.08, 0.5, 1.0])
def test_every_sample_is_on_its_own_sphere(zeta, eta):
    posterior, z = problem(3)
    latents = run(posterior, z, zeta=zeta, eta=eta)
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS[:-1])):
        mu, up = ancestral_step(latents[i], posterior.denoise(latents[i], sigma), sigma, sigma_next, eta)
        distance = (latents[i + 1] - mu).flatten(1).norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, 4 * up), rtol=1e-5, atol=0)


def test_zeta_1_is_steepest_descent():
    """No noise is left: the direction is -grad whatever the seed."""
    posterior, z = problem(3)
    sigma, sigma_next = SIGMAS[:2]
    one, other = run(posterior, z, zeta=1.0)[1], run(posterior, z, zeta=1.0, seed=8)[1]
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    grad, denoised, _ = posterior.gradient(z, sigma)
    mu, up = ancestral_step(z, denoised, sigma, sigma_next)
    torch.testing.assert_close(one - mu, -4 * up * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1), rtol=1e-5, atol=1e-5)


def test_a_small_zeta_stays_near_the_noise():
    posterior, z = problem(3)
    sigma, sigma_next = SIGMAS[:2]
    mu, up = ancestral_step(z, posterior.denoise(z, sigma), sigma, sigma_next)
    noise = up * randn_like(z, generators(3, 3))
    on_sphere = mu + 4 * up * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    away = [float((run(posterior, z, zeta=zeta)[1] - on_sphere).flatten(1).norm(dim=1).max()) for zeta in (1e-8, 1e-3, 1e-2, 0.1, 0.5)]
    assert away[0] < 1e-5
    # u* and eps are both at most a diameter from each other
    assert away[1] < 2.1e-3 * 4 * up
    assert away == sorted(away)
    assert away[-1] > 0.1 * up


def test_the_last_step_is_the_denoised_latent():
    posterior, z = problem(3)
    latents = run(posterior, z, zeta=0.3)
    torch.testing.assert_close(latents[-1], posterior.denoise(latents[-2], SIGMAS[-2]), rtol=0, atol=1e-12)
    assert torch.equal(run(posterior, z, [3.0, 0.0], zeta=0.3)[-1], posterior.denoise(z, 3.0))


def fitted(posterior, z, sigma, i):
    """Gives sample i the measurement that its denoised latent has, so that its residual and gradient are 0."""
    posterior.y = posterior.y.clone()
    posterior.y[i] = F(posterior.denoise(z, sigma))[i]


@pytest.mark.parametrize("zeta", [0.08, 0.5, 1.0])
def test_a_sample_without_gradient_keeps_its_noise(zeta):
    posterior, z = problem(3)
    sigma, sigma_next = SIGMAS[:2]
    expected = run(posterior, z, [sigma, sigma_next, 0.0], zeta=zeta)[1]
    fitted(posterior, z, sigma, 1)
    assert not posterior.gradient(z, sigma)[0][1].any()
    ours = run(posterior, z, [sigma, sigma_next, 0.0], zeta=zeta)[1]
    mu, up = ancestral_step(z, posterior.denoise(z, sigma), sigma, sigma_next)
    noise = up * randn_like(z, generators(3, 3))[1]
    torch.testing.assert_close(ours[1], mu[1] + 4 * up * noise / noise.norm(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[[0, 2]], expected[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("zeta", [0.3, 1.0])
def test_a_measurement_fitted_up_to_its_noise_is_no_divergence(zeta):
    """Within the noise there is nothing to gain and every gradient is 0: what remains is the prior's own sample, on its spheres."""
    posterior, z = problem(2, Noisy(F, 100.0))
    assert not posterior.gradient(z, SIGMAS[0])[0].any()
    latents = run(posterior, z, zeta=zeta)
    assert all(torch.isfinite(latent).all() for latent in latents)


def test_unit():
    g = randn(3, 2, 4, 4)
    g[1] = 0
    instead = randn(3, 2, 4, 4, seed=9)
    out = unit(g, instead)
    torch.testing.assert_close(out.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[1] * instead[1].norm(), instead[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unit(1e-3 * g[:1], instead[:1]), out[:1], rtol=1e-6, atol=0)
    assert unit(torch.ones(2, 4), torch.ones(2, 4)).shape == (2, 4)
