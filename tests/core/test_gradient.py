"""The stages of a gradient by themselves: each is a vector-Jacobian product, and the picture's cotangent is a value that can be cut up."""

import pytest
import torch

from dmap_core.gradient import LOSS_SCALE, STRATEGIES, latent_gradient, linearise, picture_gradient
from dmap_core.operators import GaussianBlur, SuperResolution
from dmap_core.posterior import Posterior

every_strategy = pytest.mark.parametrize("memory", STRATEGIES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prior, f=None, batch=2, memory="auto"):
    f = f or SuperResolution(2)
    return Posterior(prior, f, f(randn(batch, 3, 16, 16, seed=1).tanh()), memory), randn(batch, 2, 8, 8, seed=2)


def norms(posterior, x):
    """||f(x) - y|| in double precision, where the operator's own distance is rounded to float32."""
    return (posterior.operator(x) - posterior.y).flatten(1).norm(dim=1)


@every_strategy
@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_of_the_clean_latent(conv_prior, memory, squared):
    posterior, z0 = problem(conv_prior(), memory=memory)
    leaf = z0.clone().requires_grad_()
    wanted = norms(posterior, posterior.prior.decode(leaf))
    (expected,) = torch.autograd.grad(((wanted.square() / 2) if squared else wanted).sum(), leaf)
    grad, residual = posterior.gradient_z0(z0, squared)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(residual.double(), wanted.detach(), rtol=1e-6, atol=0)
    assert not grad.requires_grad and not residual.requires_grad
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (0, 1)


@pytest.mark.parametrize("squared", [False, True])
def test_the_gradient_of_the_picture(conv_prior, squared):
    posterior, _ = problem(conv_prior())
    x = randn(2, 3, 16, 16, seed=3)
    leaf = x.clone().requires_grad_()
    wanted = norms(posterior, leaf)
    (expected,) = torch.autograd.grad(((wanted.square() / 2) if squared else wanted).sum(), leaf)
    grad, residual = posterior.gradient_x(x, squared)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(residual.double(), wanted.detach(), rtol=1e-6, atol=0)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (0, 0)


@every_strategy
def test_the_chain_of_the_stages_is_the_gradient(conv_prior, memory):
    """Denoiser's product of the clean latent's gradient, which is the decoder's product of the picture's."""
    posterior, z = problem(conv_prior(), memory=memory)
    z0, pull_z = linearise(lambda z: posterior.prior.denoise(z, 0.7), z)
    x, pull_z0 = linearise(posterior.prior.decode, z0)
    grad, denoised, residual = posterior.gradient(z, 0.7)
    assert torch.equal(z0, denoised)
    of_x, at_x = posterior.gradient_x(x)
    of_z0, at_z0 = posterior.gradient_z0(z0)
    assert torch.equal(at_x, residual) and torch.equal(at_z0, residual)
    torch.testing.assert_close(pull_z0(of_x), of_z0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pull_z(of_z0), grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [SuperResolution(2), GaussianBlur(5, 1.0)], ids=lambda f: f.name)
def test_the_pictures_cotangent_may_be_cut_into_pieces(conv_prior, f):
    """One measurement of the whole picture, and the decoder's product piece by piece: what tiles do."""
    posterior, z0 = problem(conv_prior(), f)
    whole, _ = posterior.gradient_z0(z0)
    x = posterior.prior.decode(z0).detach()
    cotangent, _ = posterior.gradient_x(x)
    total = torch.zeros_like(z0)
    for rows in (slice(0, 5), slice(5, 16)):
        for columns in (slice(0, 9), slice(9, 16)):
            piece = torch.zeros_like(x)
            piece[..., rows, columns] = cotangent[..., rows, columns]
            total += linearise(posterior.prior.decode, z0)[1](piece)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)


def test_a_loss_that_sees_the_latent_directly():
    """Its own cotangent of z0 is added to what comes through the decoder; where the loss does not see it, there is none."""
    z0 = randn(1, 1, 2, 2)

    def decode(z):
        return 3 * z

    def objective(z0, x):
        residual = x.flatten(1).sum(1)
        return residual, residual + 2 * z0.flatten(1).sum(1)

    residual, direct, cotangent = picture_gradient(objective, z0, decode(z0))
    assert torch.equal(direct, torch.full_like(z0, 2 * LOSS_SCALE)) and torch.equal(cotangent, torch.full_like(z0, LOSS_SCALE))
    assert torch.equal(latent_gradient(decode, objective, z0)[1], torch.full_like(z0, (3 + 2) * LOSS_SCALE))
    assert picture_gradient(lambda z0, x: objective(z0, x)[:1] * 2, z0, decode(z0))[1] is None


def test_a_product_can_be_taken_once():
    _, pull = linearise(torch.exp, randn(1, 3))
    pull(torch.ones(1, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="second time"):
        pull(torch.ones(1, 3, dtype=torch.float64))


def test_a_gradient_of_the_clean_latent_falls_back_too(conv_prior):
    prior = conv_prior()
    decode, left = prior.decode, [1]

    def starved(z0):
        if torch.is_grad_enabled() and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return decode(z0)

    posterior, z0 = problem(prior)
    expected = posterior.gradient_z0(z0)[0]
    prior.decode = starved
    assert torch.equal(posterior.gradient_z0(z0)[0], expected)
    assert posterior.plan == "lean"
    left[0] = 1
    with pytest.raises(torch.OutOfMemoryError):
        problem(prior, memory="fast")[0].gradient_z0(z0)


def test_a_gradient_of_the_clean_latent_does_not_choose_for_the_whole_chain(conv_prior):
    """It needs less: what fits there may not fit the denoiser as well."""
    prior = conv_prior(free=1e12)
    posterior, z = problem(prior)
    posterior.gradient_z0(z)
    assert posterior.plan == "fast"
    prior.free = 1.0
    posterior.gradient(z, 0.7)
    assert posterior.plan == "checkpoint"
