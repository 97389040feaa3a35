"""The closed-form prior against integration, autograd and a grid."""

import math

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture

TOY = GaussianMixture(torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), std=0.3)
LOPSIDED = GaussianMixture(
    torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.2, -0.7]], dtype=torch.float64),
    std=0.4,
    weights=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
)
PICTURES = GaussianMixture(torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), std=0.7)
every_prior = pytest.mark.parametrize("prior", [TOY, LOPSIDED, PICTURES], ids=["toy", "lopsided", "pictures"])
planar = pytest.mark.parametrize("prior", [TOY, LOPSIDED], ids=["toy", "lopsided"])
every_sigma = pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 4.0, 15.0])


def weights_of(prior):
    weights = torch.ones(len(prior.means), dtype=torch.float64) if prior.weights is None else prior.weights
    return weights / weights.sum()


def log_density(prior, z, sigma):
    """log p(z) of z = z0 + sigma eps, up to its constant."""
    variance = prior.std**2 + sigma**2
    squares = (z.unsqueeze(1) - prior.means).flatten(2).square().sum(2)
    return torch.logsumexp(weights_of(prior).log() - squares / (2 * variance), 1)


def samples(prior, n, sigma, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(weights_of(prior), n, replacement=True, generator=generator)
    z0 = prior.means[k] + prior.std * torch.randn(n, *prior.means.shape[1:], generator=generator, dtype=torch.float64)
    return z0, z0 + sigma * torch.randn(z0.shape, generator=generator, dtype=torch.float64)


def grid(reach=4.0, n=401):
    axis = torch.linspace(-reach, reach, n, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)


@every_prior
@every_sigma
def test_denoise_is_tweedie(prior, sigma):
    _, z = samples(prior, 5, sigma)
    z.requires_grad_()
    (score,) = torch.autograd.grad(log_density(prior, z, sigma).sum(), z)
    torch.testing.assert_close(prior.denoise(z.detach(), sigma), z.detach() + sigma**2 * score, rtol=1e-10, atol=1e-10)


@planar
@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_denoise_is_the_posterior_mean_on_a_grid(prior, sigma):
    points = grid()
    _, z = samples(prior, 4, sigma, seed=3)
    for sample in z:
        log_p = log_density(prior, points, 0.0) - (points - sample).square().sum(1) / (2 * sigma**2)
        expected = torch.softmax(log_p, 0) @ points
        torch.testing.assert_close(prior.denoise(sample[None], sigma)[0], expected, rtol=0, atol=1e-6)


def test_denoise_is_the_best_guess_in_the_mean():
    """Among a (z - c) + c + b the posterior mean leaves nothing to gain: its error is uncorrelated with any function of z."""
    z0, z = samples(LOPSIDED, 200_000, 0.8)
    error = z0 - LOPSIDED.denoise(z, 0.8)
    for feature in (torch.ones_like(z), z, z.sin(), z.flip(1) ** 2):
        product = error * feature
        standard_error = product.std(0) / math.sqrt(len(z))
        assert (product.mean(0).abs() < 4 * standard_error).all()


@every_prior
def test_limits_of_the_denoiser(prior):
    _, z = samples(prior, 3, 1.0)
    torch.testing.assert_close(prior.denoise(z, 1e-6), z, rtol=0, atol=1e-9)
    mean = torch.einsum("k,k...->...", weights_of(prior), prior.means)
    torch.testing.assert_close(prior.denoise(z, 1e5), mean.expand_as(z), rtol=0, atol=1e-4)


@every_prior
@every_sigma
def test_responsibilities_are_bayes(prior, sigma):
    _, z = samples(prior, 6, sigma)
    variance = prior.std**2 + sigma**2
    squares = (z.unsqueeze(1) - prior.means).flatten(2).square().sum(2)
    joint = weights_of(prior) * torch.exp(-(squares - squares.min(1, keepdim=True).values) / (2 * variance))
    torch.testing.assert_close(prior.responsibilities(z, sigma), joint / joint.sum(1, keepdim=True), rtol=1e-7, atol=1e-12)


def test_weights_need_not_be_normalised():
    twice = GaussianMixture(LOPSIDED.means, LOPSIDED.std, 2 * LOPSIDED.weights)
    _, z = samples(LOPSIDED, 5, 1.0)
    torch.testing.assert_close(twice.denoise(z, 1.0), LOPSIDED.denoise(z, 1.0))


def test_batch_and_dtype():
    _, z = samples(PICTURES, 3, 1.0)
    whole = PICTURES.denoise(z, 1.0)
    assert whole.shape == z.shape
    for i in range(3):
        torch.testing.assert_close(PICTURES.denoise(z[i : i + 1], 1.0), whole[i : i + 1], rtol=1e-12, atol=1e-12)
    single = GaussianMixture(PICTURES.means.float(), PICTURES.std)
    assert single.denoise(z.float(), 1.0).dtype == torch.float32


def test_denoise_passes_gradcheck():
    _, z = samples(LOPSIDED, 2, 0.5)
    assert torch.autograd.gradcheck(lambda z: LOPSIDED.denoise(z, 0.5), (z.requires_grad_(),))


def test_autoencoder_is_the_identity_and_memory_does_not_matter():
    z = torch.ones(1, 2)
    assert TOY.decode(z) is z
    assert TOY.encode(z) is z
    assert list(TOY.networks()) == []
    assert TOY.free_memory() == math.inf


@planar
@pytest.mark.parametrize(
    "matrix, y, sigma_y",
    [
        ([[1.0, 0.0]], [0.5], 0.1),
        ([[0.3, -0.8]], [0.2], 0.3),
        ([[1.0, 0.0], [0.5, 0.5]], [0.1, -0.4], 0.5),
        ([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [0.4, 0.1, 0.2], 0.6),
    ],
)
def test_posterior_on_a_grid(prior, matrix, y, sigma_y):
    matrix, y = torch.tensor(matrix, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    points = grid()
    log_p = log_density(prior, points, 0.0) - (points @ matrix.mT - y).square().sum(1) / (2 * sigma_y**2)
    p = torch.softmax(log_p, 0)
    mean = p @ points
    covariance = (points - mean).mT @ ((points - mean) * p[:, None])

    weights, means, common = prior.posterior(matrix, y, sigma_y)
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights @ means, mean, rtol=0, atol=1e-6)
    spread = (means - weights @ means).mT @ ((means - weights @ means) * weights[:, None])
    torch.testing.assert_close(common + spread, covariance, rtol=0, atol=1e-6)

    theirs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, common.expand(len(means), 2, 2))
    ).log_prob(points)
    cell = float(points[1, 1] - points[0, 1]) ** 2
    torch.testing.assert_close(theirs.exp() * cell, p, rtol=0, atol=1e-9)


def test_posterior_of_pictures_agrees_with_the_denoiser():
    """To see z = z0 + sigma eps is to measure with the identity."""
    _, z = samples(PICTURES, 1, 0.9)
    weights, means, _ = PICTURES.posterior(torch.eye(40, dtype=torch.float64), z.flatten(), 0.9)
    torch.testing.assert_close((weights @ means).view_as(z), PICTURES.denoise(z, 0.9), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(weights[None], PICTURES.responsibilities(z, 0.9), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prior", [LOPSIDED, PICTURES], ids=["points", "pictures"])
def test_a_level_for_each_sample(prior):
    sigmas = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    z = torch.randn(3, *prior.means.shape[1:], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    together, parts = prior.denoise(z, sigmas), prior.responsibilities(z, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        torch.testing.assert_close(together[i : i + 1], prior.denoise(z[i : i + 1], sigma), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts[i : i + 1], prior.responsibilities(z[i : i + 1], sigma), rtol=1e-12, atol=1e-12)
