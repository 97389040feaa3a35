"""DPS and DMAP against loops written from the paper's algorithms, and where they call the networks."""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators, randn_like
from dmap_core.solvers import DMAP, DPS, guided_denoised

LATENT = (2, 4, 6)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv_problem(prior, batch, f=None, plan="fast"):
    f = f or SuperResolution(2)
    y = f(randn(batch, 3, 8, 12, seed=1).tanh())
    return Posterior(prior, f, y, plan), SIGMAS[0] * randn(batch, *LATENT, seed=2)


def mixture_problem(batch):
    means = randn(3, 1, 4, 4)
    f = Inpainting(torch.eye(4))
    y = f(means[:1] + 0.3 * randn(batch, 1, 4, 4, seed=1))
    return Posterior(GaussianMixture(means, 0.3), f, y), SIGMAS[0] * randn(batch, 1, 4, 4, seed=2)


@pytest.fixture(params=["conv", "mixture"])
def problem(request, conv_prior):
    return lambda batch: conv_problem(conv_prior(), batch) if request.param == "conv" else mixture_problem(batch)


def noise(z, generator):
    return torch.randn(z.shape, generator=generator).to(z)


def column(x):
    return x.view(-1, 1, 1, 1)


def residual_gradient(posterior, z, sigma):
    z = z.clone().requires_grad_()
    z0 = posterior.prior.denoise(z, sigma)
    norm = (posterior.operator(posterior.prior.decode(z0)) - posterior.y).flatten(1).norm(dim=1)
    return torch.autograd.grad(norm.sum(), z)[0]


def kernel(posterior, z, sigma, sigma_next, eta):
    """Mean and deviation of p(z_next | z): all noise of the mean's share is along z - z0."""
    z0 = posterior.prior.denoise(z, sigma).detach()
    up = eta * sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
    down = math.sqrt(sigma_next**2 - up**2)
    return z0 + down * (z - z0) / sigma, up


def dps_loop(posterior, z, sigmas, zeta, eta, generator):
    trace = []
    for sigma, sigma_next in pairwise(sigmas):
        mu, up = kernel(posterior, z, sigma, sigma_next, eta)
        eps = noise(z, generator) if up > 0 else torch.zeros_like(z)
        z = mu + up * eps - zeta * residual_gradient(posterior, z, sigma)
        trace.append(z)
    return trace


def dmap_loop(posterior, z, sigmas, zeta, steps, eta, generator):
    trace = []
    for sigma, sigma_next in pairwise(sigmas):
        mu, up = kernel(posterior, z, sigma, sigma_next, eta)
        z = mu
        if up > 0:
            z = mu + up * noise(z, generator)
            radius = math.sqrt(z[0].numel()) * up
            for _ in range(steps):
                z = z - zeta * residual_gradient(posterior, z, sigma_next)
                z = mu + radius * (z - mu) / column((z - mu).flatten(1).norm(dim=1))
        trace.append(z)
    return trace


class Trace:
    """A callback that keeps what it is given."""

    def __init__(self):
        self.steps, self.denoised, self.latents, self.residuals = [], [], [], []

    def __call__(self, step, denoised, z, residual):
        self.steps.append(step)
        self.denoised.append(denoised.clone())
        self.latents.append(z.clone())
        self.residuals.append(residual.clone())


# The solvers round residuals and spheres to float32, the loops do not.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("zeta", [0.05, 1.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_dps_is_the_papers_loop(problem, eta, zeta, batch):
    posterior, z = problem(batch)
    trace = Trace()
    out = DPS(zeta=zeta, eta=eta)(posterior, z, SIGMAS, generator=torch.Generator().manual_seed(3), callback=trace)
    expected = dps_loop(posterior, z, SIGMAS, zeta, eta, torch.Generator().manual_seed(3))
    for ours, theirs in zip(trace.latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert torch.equal(out, trace.latents[-1])


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("zeta, K", [(0.05, 1), (0.3, 2), (1.0, 3)])
@pytest.mark.parametrize("batch", [1, 3])
def test_dmap_is_the_papers_loop(problem, eta, zeta, K, batch):
    posterior, z = problem(batch)
    trace = Trace()
    out = DMAP(zeta=zeta, K=K, eta=eta)(posterior, z, SIGMAS, generator=torch.Generator().manual_seed(3), callback=trace)
    expected = dmap_loop(posterior, z, SIGMAS, zeta, K, eta, torch.Generator().manual_seed(3))
    for ours, theirs in zip(trace.latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)
    assert torch.equal(out, trace.latents[-1])


def test_the_loops_tell_the_algorithms_apart(problem):
    """What the two tests above allow for rounding is far below what guidance, eta, K and the noise do."""
    posterior, z = problem(1)

    def dmap(zeta=0.3, steps=2, eta=1.0, seed=3):
        return dmap_loop(posterior, z, SIGMAS, zeta, steps, eta, torch.Generator().manual_seed(seed))[-1]

    def dps(zeta=0.3, eta=1.0):
        return dps_loop(posterior, z, SIGMAS, zeta, eta, torch.Generator().manual_seed(3))[-1]

    results = [dmap(), dmap(zeta=0.2), dmap(steps=1), dmap(eta=0.5), dmap(seed=4), dps(), dps(zeta=0.2), dps(eta=0.0), dps(eta=0.5)]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("zeta", [0.3, 4.8])
def test_dps_through_the_guided_denoiser(problem, zeta):
    """An ancestral sampler that is given the guided denoised latent (Prop. 1) is DPS."""
    posterior, z = problem(2)
    expected = DPS(zeta=zeta)(posterior, z, SIGMAS, generator=generators(5, 2))
    noises = generators(5, 2)
    for sigma, sigma_next in pairwise(SIGMAS):
        grad, denoised, _ = posterior.gradient(z, sigma)
        mu, sigma_up = ancestral_step(z, guided_denoised(denoised, grad, zeta, sigma, sigma_next), sigma, sigma_next)
        z = mu + sigma_up * randn_like(z, noises) if sigma_up > 0 else mu
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


def test_guided_denoised_is_the_conditional_tweedie():
    """In VP terms, x = sqrt(abar) z: s_DPS = s - sqrt(alpha_t) / beta_t * zeta_t * grad_x and z0 = (x + (1 - abar) s_DPS) / sqrt(abar)."""
    sigma, sigma_next, zeta = 2.0, 1.5, 0.7
    abar, abar_prev = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    alpha = abar / abar_prev
    z, z0, grad_z = randn(1, 2, 3, 3), randn(1, 2, 3, 3, seed=1), randn(1, 2, 3, 3, seed=2)
    x, grad_x = math.sqrt(abar) * z, grad_z / math.sqrt(abar)
    zeta_vp = zeta * math.sqrt(abar * abar_prev)
    score = (math.sqrt(abar) * z0 - x) / (1 - abar) - math.sqrt(alpha) / (1 - alpha) * zeta_vp * grad_x
    expected = (x + (1 - abar) * score) / math.sqrt(abar)
    torch.testing.assert_close(guided_denoised(z0, grad_z, zeta, sigma, sigma_next), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("zeta, K", [(0.3, 1), (4.8, 2), (100.0, 3)])
def test_dmap_stays_on_every_samples_sphere(problem, batch, eta, zeta, K):
    posterior, z = problem(batch)
    trace = Trace()
    DMAP(zeta=zeta, K=K, eta=eta)(posterior, z, SIGMAS, generator=generators(1, batch), callback=trace)
    before = [z, *trace.latents]
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS[:-1])):
        mu, up = kernel(posterior, before[i], sigma, sigma_next, eta)
        distance = (trace.latents[i] - mu).flatten(1).norm(dim=1)
        torch.testing.assert_close(distance, torch.full_like(distance, math.sqrt(z[0].numel()) * up), rtol=1e-5, atol=0)


def test_dmaps_last_step_is_the_denoised_latent(problem):
    posterior, z = problem(2)
    trace = Trace()
    out = DMAP(zeta=0.5)(posterior, z, SIGMAS, generator=generators(1, 2), callback=trace)
    torch.testing.assert_close(out, posterior.prior.denoise(trace.latents[-2], SIGMAS[-2]).detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(trace.denoised[-1], out, rtol=0, atol=0)
    y_hat = posterior.operator(posterior.prior.decode(out)).detach()
    torch.testing.assert_close(trace.residuals[-1].double(), (y_hat - posterior.y).flatten(1).norm(dim=1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("plan", ["fast", "lean", "checkpoint"])
@pytest.mark.parametrize("steps, K", [(1, 2), (2, 1), (6, 1), (6, 2), (6, 5)])
def test_calls_of_dmap(conv_prior, plan, steps, K):
    prior = conv_prior()
    posterior, z = conv_problem(prior, 1, plan=plan)
    DMAP(zeta=0.3, K=K)(posterior, z, SIGMAS[-steps - 1 :])
    gradients = (steps - 1) * K
    assert posterior.denoiser_calls == steps + gradients
    assert posterior.decoder_calls == gradients + 1
    assert prior.decoded == gradients + 1
    assert sum(with_gradient for _, with_gradient in prior.denoised_at) == gradients
    assert sum(not with_gradient for _, with_gradient in prior.denoised_at) == steps + (gradients if plan == "lean" else 0)


def test_dmap_differentiates_at_the_next_noise_level(conv_prior):
    prior = conv_prior()
    posterior, z = conv_problem(prior, 1)
    DMAP(zeta=0.3, K=2)(posterior, z, SIGMAS)
    expected = []
    for sigma, sigma_next in pairwise(SIGMAS):
        expected += [(sigma, False), *([(sigma_next, True)] * 2 if sigma_next else [])]
    assert prior.denoised_at == expected


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_calls_of_dps(conv_prior, steps):
    prior = conv_prior()
    posterior, z = conv_problem(prior, 1)
    sigmas = SIGMAS[-steps - 1 :]
    DPS(zeta=0.3)(posterior, z, sigmas)
    assert prior.denoised_at == [(sigma, True) for sigma in sigmas[:-1]]
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (steps, steps)


def test_dmap_with_a_k_written_with_a_point(problem):
    posterior, z = problem(1)
    expected = DMAP(zeta=0.5, K=2)(posterior, z, SIGMAS, generator=generators(1, 1))
    assert torch.equal(DMAP(zeta=0.5, K=2.0)(posterior, z, SIGMAS, generator=generators(1, 1)), expected)
