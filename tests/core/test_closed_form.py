"""Solvers on priors whose posterior is known in closed form."""

import math

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators, randn_like
from dmap_core.solvers import DMAP, DPS

SHAPE = (3, 8, 8)
STD = 0.5


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_missing():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    return mask


MEAN = 0.3 * randn(1, *SHAPE)
PRIOR = GaussianMixture(MEAN, STD)
OPERATORS = [Inpainting(half_missing()), SuperResolution(2)]
every_operator = pytest.mark.parametrize("f", OPERATORS, ids=lambda f: f.name)


def null_space(f):
    """Projector onto what f does not see."""
    basis = torch.eye(192, dtype=torch.float64).view(192, *SHAPE)
    matrix = f(basis).flatten(1).mT
    return torch.eye(192, dtype=torch.float64) - torch.linalg.pinv(matrix) @ matrix


@every_operator
@pytest.mark.parametrize("sample, settings", [(DMAP, {"zeta": 0.1, "K": 2}), (DPS, {"zeta": 0.2})], ids=["dmap", "dps"])
def test_a_gaussian_prior_is_led_to_the_measurement(karras, f, sample, settings):
    """What f sees comes to fit y; what it does not see stays a sample of the prior, as the posterior has it.

    Unconditional samples have a residual of 2.3 (SR) to 6.8 (inpainting); measured, guidance divides it by 60 to 280.
    """
    y = f(MEAN + STD * randn(2, *SHAPE, seed=1))
    sigmas = karras(200, 0.01, 10.0)
    z = 10 * randn(2, *SHAPE, seed=2)
    guided = sample(**settings)(Posterior(PRIOR, f, y), z, sigmas, generator=generators(1, 2))
    free = DPS(zeta=1e-12)(Posterior(PRIOR, f, y), z, sigmas, generator=generators(1, 2))
    assert (f.distance(f(free), y) > 1.5).all()
    assert (f.distance(f(guided), y) < f.distance(f(free), y) / 40).all()

    projector = null_space(f)
    unseen = ((guided - MEAN).flatten(1) @ projector).square().sum(1) / projector.trace()
    # about 100 unseen dimensions: the deviation of a sample is known to 7 %, and 3 of these
    assert ((unseen.sqrt() / STD - 1).abs() < 0.21).all()


def test_dmap_finds_the_maximum_on_the_sphere():
    """One step with many gradient steps: the point of the sphere with the smallest residual, known in closed form.

    z0 = m + s (z - m), so on the known pixels z wants to be t = m + (y - m) / s. If t is further from mu than the radius, the best
    point lies on the straight way from mu to t.
    """
    f = OPERATORS[0]
    known = f(torch.ones(1, *SHAPE, dtype=torch.float64))
    z = 4 * randn(1, *SHAPE, seed=2)
    y = f(torch.full((1, *SHAPE), 3.0, dtype=torch.float64))
    sigma, sigma_next = 1.0, 0.5
    s = STD**2 / (STD**2 + sigma_next**2)
    mu, sigma_up = ancestral_step(z, PRIOR.denoise(z, sigma), sigma, sigma_next)
    radius = math.sqrt(192) * sigma_up
    way = known * (MEAN + (y - MEAN) / s - mu)
    assert way.norm() > radius
    best = mu + radius * way / way.norm()

    seen = {}
    posterior = Posterior(PRIOR, f, y)
    DMAP(zeta=20.0, K=30)(
        posterior, z, [sigma, sigma_next, 0.0], generator=generators(0, 1), callback=lambda step, d, z, r: seen.setdefault(step, (z, r))
    )
    latent, residual = seen[0]
    torch.testing.assert_close(latent, best, rtol=0, atol=1e-3)
    lowest = posterior.residual(best, sigma_next)
    assert float(posterior.residual(latent, sigma_next)) == pytest.approx(float(lowest), rel=1e-5)
    assert float(residual) >= float(lowest) * (1 - 1e-6)


def test_more_gradient_steps_come_closer():
    f = OPERATORS[1]
    y = f(MEAN + STD * randn(1, *SHAPE, seed=1))
    z = 4 * randn(1, *SHAPE, seed=2)
    residuals = []
    for K in (1, 2, 4, 8):
        last = []
        DMAP(zeta=0.1, K=K)(
            Posterior(PRIOR, f, y),
            z,
            [4.0, 2.0, 1.0, 0.5, 0.0],
            generator=generators(0, 1),
            callback=lambda i, d, z, r, last=last: last.append(float(r)),
        )
        residuals.append(last[-1])
    assert residuals == sorted(residuals, reverse=True)


# The toy example of A.4: two Gaussians in the plane, the second coordinate is not seen, y = (0.5, 0).
TOY = GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), std=0.3)
SAMPLES = 1500


@pytest.fixture(scope="module")
def toy_posterior():
    weights, means, covariance = TOY.posterior(torch.tensor([[1.0, 0.0]], dtype=torch.float32), torch.tensor([0.5]), 0.01)
    return weights, means, covariance.diag().sqrt()


def test_the_toys_true_posterior(toy_posterior):
    weights, means, deviation = toy_posterior
    torch.testing.assert_close(means, torch.tensor([[0.5, -1.0], [0.5, 1.0]]), rtol=0, atol=2e-3)
    torch.testing.assert_close(deviation, torch.tensor([0.01, 0.3]), rtol=2e-3, atol=0)
    # exp(-1.5^2 / 2 / 0.3^2) / exp(-0.5^2 / 2 / 0.3^2)
    assert float(weights[0]) == pytest.approx(1.5e-5, rel=0.05)


def toy_run(karras, first_coordinate, zeta):
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(SAMPLES, 2, generator=generator)
    posterior = Posterior(TOY, first_coordinate, torch.tensor([[0.5, 0.0]]).expand(SAMPLES, 2))
    return DPS(zeta=zeta)(posterior, z, karras(100, 0.01, 4.0), generator=generator)


def test_unguided_toy_samples_are_the_prior(karras, first_coordinate):
    points = toy_run(karras, first_coordinate, zeta=1e-12)
    upper = points[:, 0] > 0
    # 1500 samples: half of them in either mode to within 4 %, their deviations to within 8 %
    assert abs(float(upper.float().mean()) - 0.5) < 0.05
    for mode, centre in ((points[upper], 1.0), (points[~upper], -1.0)):
        torch.testing.assert_close(mode.mean(0), torch.full((2,), centre), rtol=0, atol=0.05)
        torch.testing.assert_close(mode.std(0), torch.full((2,), 0.3), rtol=0.08, atol=0)


def test_dps_samples_of_the_toy_are_not_the_posteriors(karras, first_coordinate, toy_posterior):
    """DPS with the paper's zeta of 0.05 fits the measurement, but many samples stay in the mode that the posterior all but rules out."""
    points = toy_run(karras, first_coordinate, zeta=0.05)
    assert abs(float(points[:, 0].mean()) - 0.5) < 0.02
    assert float(points[:, 0].std()) < 0.1
    lower = float((points[:, 1] < 0).float().mean())
    assert 0.25 < lower < 0.5
    assert lower > 1e4 * float(toy_posterior[0][0])


def test_ancestral_steps_with_the_exact_conditional_denoiser_are_the_posterior(karras, toy_posterior):
    """The steps are not to blame: given the true conditional denoiser they sample the true posterior of the unseen coordinate."""
    weights, means, _ = toy_posterior
    unseen = GaussianMixture(means[:, 1:], 0.3, weights)
    generator = torch.Generator().manual_seed(0)
    sigmas = karras(100, 0.01, 4.0).tolist()
    z = 4 * torch.randn(SAMPLES, 1, generator=generator)
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        mu, sigma_up = ancestral_step(z, unseen.denoise(z, sigma), sigma, sigma_next)
        z = mu + sigma_up * randn_like(z, generator)
    assert float((z < 0).float().mean()) < 0.01
    assert float(z.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(z.std()) == pytest.approx(0.3, rel=0.08)
