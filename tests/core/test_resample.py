"""ReSample: stochastic resampling, the optimisation to data consistency, and where in the schedule which of them happens."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dmap_core.operators import Inpainting, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import ReSample
from dmap_core.solvers.resample import TWEEDIES, consistent_latent, consistent_picture, resampling

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]
SETTINGS = {"zeta": 0.5, "first": 0, "last": 4, "every": 2, "iterations": 3, "learning_rate": 0.05}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def autoencoder(conv_autoencoder):
    class Autoencoder(conv_autoencoder):
        """Keeps the order of its calls."""

        def __init__(self):
            super().__init__()
            self.calls = []

        def denoise(self, z, sigma):
            self.calls.append("denoise")
            return super().denoise(z, sigma)

        def decode(self, z0):
            self.calls.append("decode")
            return super().decode(z0)

        def encode(self, image):
            self.calls.append("encode")
            return super().encode(image)

    return Autoencoder


def problem(prior, batch=1, f=None):
    f = f or SuperResolution(2)
    return Posterior(prior, f, f(randn(batch, 3, *IMAGE, seed=1).tanh()), "fast"), SIGMAS[0] * randn(batch, *LATENT, seed=2)


# Resampling


@pytest.mark.parametrize("factor", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("sigma, sigma_next", [(14.0, 13.7), (2.0, 1.2), (0.6, 0.2), (0.05, 0.03)])
def test_resampling_is_the_product_of_two_gaussians(sigma, sigma_next, factor):
    """In variance-preserving terms, by precisions: N(sqrt(abar) Z, 1 - abar) of the consistent Z times N(current latent, s)."""
    abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    s = factor * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    z0, z = randn(2, 3), randn(2, 3, seed=1)
    clean, current = np.sqrt(abar_next) * z0.numpy(), np.sqrt(abar_next) * z.numpy()
    precision = 1 / (1 - abar_next) + 1 / s
    mean_vp = (clean / (1 - abar_next) + current / s) / precision
    mean, std = resampling(z0, z, sigma, sigma_next, factor)
    np.testing.assert_allclose(mean.numpy(), mean_vp / np.sqrt(abar_next), rtol=1e-9)
    assert std == pytest.approx(np.sqrt(1 / precision / abar_next), rel=1e-9)
    assert std < sigma_next


def test_the_factor_says_how_far_from_the_current_latent():
    """Eq. 39 is printed with its operands swapped, which would have it the other way round."""
    z0, z = randn(2, 3), randn(2, 3, seed=1)
    mean, std = resampling(z0, z, 2.0, 1.2, 1e9)
    torch.testing.assert_close(mean, z0, rtol=0, atol=1e-7)
    assert std == pytest.approx(1.2, rel=1e-7)
    mean, std = resampling(z0, z, 2.0, 1.2, 1e-9)
    torch.testing.assert_close(mean, z, rtol=0, atol=1e-7)
    assert std == pytest.approx(0, abs=1e-4)
    away = [float((resampling(z0, z, 2.0, 1.2, factor)[0] - z).norm()) for factor in (0.1, 1, 10, 40, 400)]
    assert away == sorted(away)


def test_resampling_at_the_end_returns_the_consistent_latent():
    z0 = randn(2, 3)
    mean, std = resampling(z0, randn(2, 3, seed=1), 0.2, 0.0, 40.0)
    assert torch.equal(mean, z0)
    assert std == 0


# Data consistency


def reachable(prior, batch=1):
    """A measurement that the decoder can produce; that of `problem` it cannot."""
    f = SuperResolution(2)
    return Posterior(prior, f, f(prior.decode(randn(batch, *LATENT, seed=6))).detach(), "fast")


@pytest.mark.parametrize("batch", [1, 3])
def test_both_spaces_reduce_the_residual(autoencoder, batch):
    posterior = reachable(autoencoder(), batch)
    z0 = randn(batch, *LATENT, seed=5)
    before = posterior.residual(z0, 0.0)
    latent = consistent_latent(posterior, z0, 200, 0.02)
    assert (posterior.residual(latent, 0.0) < 0.2 * before).all()
    # the picture itself, before it is encoded
    pictures = []
    posterior.prior.encode = lambda image: pictures.append(image) or image[:, :2, ::2, ::2]
    consistent_picture(posterior, z0, 200, 0.02)
    assert (posterior.distance(pictures[0]) < 0.05 * before).all()


@pytest.mark.parametrize("consistent", [consistent_latent, consistent_picture])
def test_more_iterations_come_closer(autoencoder, consistent):
    posterior = reachable(autoencoder())
    z0 = randn(1, *LATENT, seed=5)
    posterior.prior.encode = lambda image: image
    distances = [float(posterior.residual(z0, 0.0))]
    for iterations in (1, 5, 20, 60):
        out = consistent(posterior, z0, iterations, 0.01)
        distances.append(float(posterior.distance(out if consistent is consistent_picture else posterior.decode(out)).detach()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]


@pytest.mark.parametrize("consistent", [consistent_latent, consistent_picture])
def test_samples_are_optimised_on_their_own(autoencoder, consistent):
    prior = autoencoder()
    posterior, _ = problem(prior, 3)
    z0 = randn(3, *LATENT, seed=5)
    before = z0.clone()
    whole = consistent(posterior, z0, 20, 0.02)
    assert torch.equal(z0, before)
    assert not whole.requires_grad
    for i in range(3):
        alone = Posterior(prior, posterior.operator, posterior.y[i : i + 1], "fast")
        torch.testing.assert_close(consistent(alone, z0[i : i + 1], 20, 0.02), whole[i : i + 1], rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for network in prior.networks() for p in network.parameters())


def adamw(objective, x, iterations, learning_rate):
    """Loshchilov & Hutter 2019 with the usual decay of 0.01, moment by moment in float64."""
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for n in range(1, iterations + 1):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(leaf), leaf)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        x = x * (1 - 0.01 * learning_rate)
        x = x - learning_rate * (first / (1 - 0.9**n)) / ((second / (1 - 0.999**n)).sqrt() + 1e-8)
    return x


def half_square(posterior, picture):
    return (posterior.operator(picture) - posterior.y).square().sum() / 2


@pytest.mark.parametrize("iterations", [1, 7])
def test_the_optimiser_is_adamw_by_hand(autoencoder, iterations):
    prior = autoencoder()
    posterior, _ = problem(prior)
    z0 = randn(1, *LATENT, seed=5)
    expected = adamw(lambda z: half_square(posterior, prior.decode(z)), z0, iterations, 0.02)
    torch.testing.assert_close(consistent_latent(posterior, z0, iterations, 0.02), expected, rtol=1e-4, atol=1e-5)
    picture = adamw(lambda x: half_square(posterior, x), prior.decode(z0).detach(), iterations, 0.02)
    expected = prior.encode(picture).detach()
    torch.testing.assert_close(consistent_picture(posterior, z0, iterations, 0.02), expected, rtol=1e-4, atol=1e-5)


def test_the_optimiser_is_torchs_adamw_on_one_sample(autoencoder):
    prior = autoencoder()
    posterior, _ = problem(prior, 2)
    z0 = randn(2, *LATENT, seed=5)
    ours = consistent_latent(posterior, z0, 15, 0.02)
    x = z0[:1].clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        ((posterior.operator(prior.decode(x)) - posterior.y[:1]).square().sum() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(ours[:1], x.detach(), rtol=1e-4, atol=1e-5)


def test_unknown_pixels_of_a_picture_only_decay(autoencoder):
    """Where f sees nothing, AdamW only multiplies by 1 - 0.01 * learning rate each time."""
    mask = torch.zeros(IMAGE)
    mask[2:5, 3:9] = 1
    posterior, _ = problem(autoencoder(), f=Inpainting(mask))
    z0, pictures = randn(1, *LATENT, seed=5), []
    posterior.prior.encode = lambda image: pictures.append(image) or image
    consistent_picture(posterior, z0, 50, 0.02)
    before = posterior.prior.decode(z0).detach()
    torch.testing.assert_close(pictures[0] * mask, before * mask * (1 - 0.0002) ** 50, rtol=1e-9, atol=1e-12)


# Which steps, in which space


def consistency_steps(prior, sigmas=SIGMAS, **settings):
    """step -> "pixel" or "latent" """
    posterior, z = problem(prior)
    kinds, done = {}, []

    def callback(step, *_):
        calls = prior.calls[len(done) :]
        done.extend(calls)
        assert calls.count("denoise") == 1
        if "encode" in calls:
            assert calls[2:] == ["decode", "encode"]
            kinds[step] = "pixel"
        elif len(calls) > 2:
            assert calls[2:] == ["decode"] * 3
            kinds[step] = "latent"

    ReSample(**{**SETTINGS, **settings})(posterior, z, sigmas, callback=callback)
    return kinds


@pytest.mark.parametrize(
    "first, last, every, expected",
    [
        (0, 5, 1, [0, 1, 2, 3, 4, 5]),
        (0, 5, 2, [0, 2, 4]),
        (1, 4, 3, [1, 4]),
        (1, 3, 3, [1]),
        (2, 2, 1, [2]),
        (2, 5, 10, [2]),
        (5, 5, 1, [5]),
    ],
)
def test_windows(autoencoder, first, last, every, expected):
    assert list(consistency_steps(autoencoder(), first=first, last=last, every=every)) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])
def test_both_is_pixel_for_two_thirds(autoencoder, steps):
    sigmas = np.geomspace(9, 0.2, steps).tolist() + [0.0]
    kinds = consistency_steps(autoencoder(), sigmas, first=0, last=steps - 1, every=1)
    assert kinds == {i: "pixel" if 3 * i < 2 * steps else "latent" for i in range(steps)}


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_one_space_is_one_space(autoencoder, space):
    kinds = consistency_steps(autoencoder(), space=space, last=5, every=1)
    assert kinds == dict.fromkeys(range(6), space)


# A whole run


def run_by_hand(posterior, z, tweedie, eta, generator):
    """In variance-preserving terms: x = sqrt(abar) z. Consistency at steps 0 and 2 in pixels, at step 4 in the latent."""
    prior, trace = posterior.prior, []
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
        leaf = z.clone().requires_grad_()
        z0 = prior.denoise(leaf, sigma)
        norm = (posterior.operator(prior.decode(z0)) - posterior.y).flatten(1).norm(dim=1)
        (grad,) = torch.autograd.grad(norm.sum(), leaf)
        z0 = z0.detach()
        x = math.sqrt(abar) * z
        eps = (x - math.sqrt(abar) * z0) / math.sqrt(1 - abar)
        start = (x - (1 - abar if tweedie == "published" else math.sqrt(1 - abar)) * eps) / math.sqrt(abar)
        up = eta * sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
        z = z0 + math.sqrt(sigma_next**2 - up**2) / sigma * (z - z0) - 0.5 * grad
        if up > 0:
            z = z + up * torch.randn(z.shape, generator=generator).to(z)
        if i in (0, 2):
            picture = adamw(lambda x: half_square(posterior, x), prior.decode(start).detach(), 3, 0.05)
            start = prior.encode(picture).detach()
        elif i == 4:
            start = adamw(lambda x: half_square(posterior, prior.decode(x)), start, 3, 0.05)
        if i in (0, 2, 4):
            s = 40 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
            x = (s * math.sqrt(abar_next) * start + (1 - abar_next) * math.sqrt(abar_next) * z) / (s + 1 - abar_next)
            x = x + math.sqrt(s * (1 - abar_next) / (s + 1 - abar_next)) * torch.randn(z.shape, generator=generator).to(z)
            z = x / math.sqrt(abar_next)
        trace.append(z)
    return trace


@pytest.mark.parametrize("tweedie", TWEEDIES)
@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_a_whole_run_by_hand(autoencoder, tweedie, eta):
    posterior, z = problem(autoencoder(), 2)
    latents = []
    ReSample(**SETTINGS, tweedie=tweedie, eta=eta)(
        posterior, z, SIGMAS, generator=torch.Generator().manual_seed(3), callback=lambda i, d, z, r: latents.append(z)
    )
    expected = run_by_hand(posterior, z, tweedie, eta, torch.Generator().manual_seed(3))
    for ours, theirs in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_whole_runs_tell_the_variants_apart(autoencoder):
    """What the test above allows for rounding is far below what they differ by."""
    posterior, z = problem(autoencoder(), 2)
    results = [run_by_hand(posterior, z, t, eta, torch.Generator().manual_seed(3))[-1] for t in TWEEDIES for eta in (1.0, 0.0)]
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            assert (a - b).abs().max() > 2e-2


def test_a_window_that_ends_the_schedule_returns_the_consistent_latent(autoencoder):
    posterior, z = problem(autoencoder())
    latents = []
    settings = {**SETTINGS, "first": 5, "last": 5}
    out = ReSample(**settings)(posterior, z, SIGMAS, generator=generators(1, 1), callback=lambda i, d, z, r: latents.append(z))
    denoised = posterior.denoise(latents[-2], SIGMAS[-2])
    torch.testing.assert_close(out, consistent_latent(posterior, denoised, 3, 0.05), rtol=0, atol=1e-12)


def test_the_optimisation_of_a_latent_keeps_to_the_memory_plan(conv_prior, rng):
    """Under "checkpoint" the decoder's blocks recompute, so that they run twice per iteration; the result is the same."""
    found = {}
    for plan in ("fast", "checkpoint"):
        prior = conv_prior()
        runs = []
        prior.decoder.blocks[0].norm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        posterior = Posterior(prior, SuperResolution(2), torch.zeros(1, 3, 4, 4, dtype=torch.float64), memory=plan)
        z0 = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found[plan] = consistent_latent(posterior, z0, 3, 0.1), len(runs)
    assert found["fast"][1] == 3 and found["checkpoint"][1] == 6
    torch.testing.assert_close(found["fast"][0], found["checkpoint"][0], rtol=1e-12, atol=1e-12)
