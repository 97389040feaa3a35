"""FreeDoM: its loop, how much noise takes a latent back in time, and what the published code adds instead."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators, paper_sigmas
from dmap_core.solvers import FreeDoM
from dmap_core.solvers.freedom import TRAVELS, published_travel

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's "scaled linear"
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(z, generator):
    return torch.randn(z.shape, generator=generator).to(z)


def problem(conv_prior, batch=1):
    f = SuperResolution(2)
    return Posterior(conv_prior(), f, f(randn(batch, 3, 8, 12, seed=1).tanh()), "fast"), 9 * randn(batch, 2, 4, 6, seed=2)


def loop(posterior, z, zeta, passes, window, eta, travel, generator):
    """From the paper's appendix, in VE space; passes over a step leave it at the next level."""
    trace = []
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        up = eta * sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
        for k in range(passes if i in window else 1):
            if k:
                kept, added = (
                    (1, math.sqrt(sigma**2 - sigma_next**2)) if travel == "forward" else (math.sqrt(1 - BETAS[i]), BETAS[i] ** 0.5)
                )
                z = kept * z + added * draw(z, generator)
            leaf = z.clone().requires_grad_()
            z0 = posterior.prior.denoise(leaf, sigma)
            norm = (posterior.operator(posterior.prior.decode(z0)) - posterior.y).flatten(1).norm(dim=1)
            (grad,) = torch.autograd.grad(norm.sum(), leaf)
            z0 = z0.detach()
            z = z0 + math.sqrt(sigma_next**2 - up**2) / sigma * (z - z0) - zeta * grad
            if up > 0:
                z = z + up * draw(z, generator)
        trace.append(z)
    return trace


@pytest.mark.parametrize("travel", TRAVELS)
@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("K, first, last", [(2, 1, 2), (3, 0, 0), (2, 4, 5)])
def test_the_papers_loop(conv_prior, travel, eta, K, first, last):
    posterior, z = problem(conv_prior, 2)
    latents = []
    FreeDoM(zeta=0.5, K=K, first=first, last=last, travel=travel, eta=eta)(
        posterior, z, SIGMAS, generator=torch.Generator().manual_seed(3), callback=lambda i, d, z, r: latents.append(z)
    )
    expected = loop(posterior, z, 0.5, K, range(first, last + 1), eta, travel, torch.Generator().manual_seed(3))
    for ours, theirs in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("K, first, last, calls", [(1, 0, 5, 6), (2, 0, 0, 7), (2, 1, 3, 9), (4, 2, 5, 18), (3, 0, 5, 18)])
def test_calls(conv_prior, K, first, last, calls):
    """T + (K - 1) (last - first + 1)"""
    posterior, z = problem(conv_prior)
    FreeDoM(zeta=0.5, K=K, first=first, last=last)(posterior, z, SIGMAS)
    assert posterior.denoiser_calls == calls
    assert all(with_gradient for _, with_gradient in posterior.prior.denoised_at)


# A Gaussian prior N(0, STD^2), next to no guidance: every latent is Gaussian, and its variance follows from the coefficients alone.
STD, BATCH, SIDE = 0.8, 16, 32
SAMPLES = BATCH * SIDE**2  # 16384 draws: a variance is known to 1.1 %
MASK = torch.zeros(SIDE, SIDE)
MASK[0] = 1


class Recording(Posterior):
    """Keeps the variance of every latent whose gradient is asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.variances = []

    def gradient(self, z, sigma, extra=None, jacobian="exact"):
        self.variances.append((sigma, float(z.var())))
        return super().gradient(z, sigma, extra, jacobian)


def variances(levels, K, window, travel):
    """The variance at every gradient, then that of the result: a recursion of numbers."""
    v, seen = STD**2 + levels[0] ** 2, []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        shrink = STD**2 / (STD**2 + sigma**2)
        up = sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
        share = shrink + math.sqrt(sigma_next**2 - up**2) / sigma * (1 - shrink)
        for k in range(K if i in window else 1):
            if k:
                beta = float(BETAS[i])
                v = v + sigma**2 - sigma_next**2 if travel == "forward" else (1 - beta) * v + beta
            seen.append(v)
            v = share**2 * v + up**2
    return [*seen, v]


LEVELS = np.geomspace(10, 0.1, 40).tolist() + [0.0]
WINDOW = range(12, 18)


def travelled(travel, K=3):
    posterior = Recording(GaussianMixture(torch.zeros(1, 1, SIDE, SIDE), STD), Inpainting(MASK), torch.zeros(BATCH, 1, SIDE, SIDE))
    start = math.sqrt(LEVELS[0] ** 2 + STD**2) * torch.randn(BATCH, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    out = FreeDoM(zeta=1e-12, K=K, first=WINDOW[0], last=WINDOW[-1], travel=travel)(
        posterior, start, LEVELS, generator=generators(1, BATCH)
    )
    return posterior.variances, float(out.var())


@pytest.mark.parametrize("travel", TRAVELS)
def test_variances_along_the_way(travel):
    found, last = travelled(travel)
    expected = variances(LEVELS, 3, WINDOW, travel)
    np.testing.assert_allclose([v for _, v in found] + [last], expected, rtol=0.05)


def test_forward_comes_back_to_the_noise_level_and_published_does_not():
    """A latent that a pass begins with ought to have the variance STD^2 + sigma^2 of its noise level."""
    ratios, ends = {}, {}
    for travel in TRAVELS:
        found, last = travelled(travel)
        again = {}
        for sigma, v in found:
            again.setdefault(sigma, []).append(v / (STD**2 + sigma**2))
        ratios[travel] = [r for passes in again.values() for r in passes[1:]]
        assert len(ratios[travel]) == 2 * len(WINDOW)
        ends[travel] = last
    # every ancestral step with a denoiser that is only a mean loses a little, also without going back
    assert all(0.91 < r < 1.05 for r in ratios["forward"])
    # a step of this schedule takes 21 % of the noise's variance away, and beta returns less than 1 % of that
    assert all(0.4 < r < 0.9 for r in ratios["published"])
    # ancestral steps in any number lose some of the prior's variance: going forward loses no more, the published way does
    straight = variances(LEVELS, 1, WINDOW, "forward")[-1]
    assert ends["forward"] == pytest.approx(straight, rel=0.05)
    assert ends["published"] < 0.92 * straight


def test_published_travel_is_the_training_schedule_from_the_wrong_end():
    for step in (0, 25, 50, 499, 999, 5000):
        kept, added = published_travel(step)
        assert added**2 == pytest.approx(float(BETAS[min(step, 999)]), rel=1e-9)
        assert kept**2 + added**2 == pytest.approx(1, rel=1e-12)


def test_published_noise_is_a_thousandth_of_what_is_right():
    """Step 25 of the paper's 500: beta 0.001, where the step took 2.65 from the noise's variance."""
    abar = torch.cumprod(1 - BETAS, 0)
    sigmas = paper_sigmas(((1 - abar) / abar).sqrt(), 500).double()
    assert float(sigmas[25] ** 2 - sigmas[26] ** 2) == pytest.approx(2.65, abs=0.01)
    assert published_travel(25)[1] ** 2 == pytest.approx(1e-3, rel=0.05)
    # at the step's own timestep, 949, beta is an order of magnitude larger
    t = round(999 * (1 - 25 / 499))
    assert float(BETAS[t]) > 10 * published_travel(25)[1] ** 2
