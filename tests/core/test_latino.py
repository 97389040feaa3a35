"""LATINO against its rule in variance-preserving terms, written with dense matrices, on a prior whose denoiser is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.consistency import ROUNDING, match
from dmap_core.operators import Inpainting, Jpeg, MotionBlur, Noisy, Segmentation, SuperResolution
from dmap_core.operators.segmentation import random_room_layout
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import LATINO

SHAPE = (3, 8, 4)
SIGMAS = [14.6, 7.0, 3.0, 1.2, 0.5, 0.2, 0.0]
NOISE = 0.02


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEANS = 0.25 * randn(3, *SHAPE)
PRIOR = GaussianMixture(MEANS, std=0.15)


def problem(f, batch=2):
    truth = (MEANS[:1] + 0.15 * randn(batch, *SHAPE, seed=1)).clamp(-1, 1)
    y = f.operator(truth) + NOISE * randn(*f.operator(truth).shape, seed=4) if isinstance(f, Noisy) else f(truth)
    return Posterior(PRIOR, f, y), SIGMAS[0] * randn(batch, *SHAPE, seed=2)


def dense(f):
    """(m, d) matrix of a linear f without hidden pixels."""
    basis = torch.eye(math.prod(SHAPE), dtype=torch.float64).view(-1, *SHAPE)
    return f(basis).flatten(1).mT


def minimiser(A, x, y, gamma):
    """argmin_u gamma / 2 ||A u - y||^2 + ||u - x||^2 / 2, of flat vectors."""
    return torch.linalg.solve(gamma * A.mT @ A + torch.eye(A.shape[1], dtype=A.dtype), gamma * A.mT @ y + x)


def discrepancy(A, x, y, noise):
    """The gamma whose u leaves 0.99 of the noise's norm as a residual, by bisection; 0 where x leaves less than the norm."""
    target = math.sqrt(len(y)) * noise
    if torch.linalg.vector_norm(A @ x - y) <= target:
        return 0.0
    low, high = 1e-9, 1e9
    for _ in range(60):
        gamma = math.sqrt(low * high)
        left = torch.linalg.vector_norm(A @ minimiser(A, x, y, gamma) - y)
        low, high = (gamma, high) if left > 0.99 * target else (low, gamma)
    # no lam below a ten-thousandth of the largest eigenvalue of A A^T
    return min(low, 1e4 / float(torch.linalg.matrix_norm(A, 2)) ** 2)


def by_hand(f, y, z, delta, eta, generators):
    A, noise = dense(f), max(f.noise, ROUNDING)
    levels = [1 / (1 + s**2) for s in SIGMAS]
    x_t, trace = math.sqrt(levels[0]) * z, []
    for abar, abar_next in pairwise(levels):
        eps = (x_t - math.sqrt(abar) * PRIOR.denoise(x_t / math.sqrt(abar), math.sqrt((1 - abar) / abar))) / math.sqrt(1 - abar)
        z0 = (x_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        found = []
        for x, one in zip(z0.clamp(-1, 1).flatten(1), y.flatten(1), strict=True):
            gamma = delta * (1 - abar) / noise**2 if delta else discrepancy(A, x, one, noise)
            found.append(minimiser(A, x, one, gamma).clamp(-1, 1).view(SHAPE))
        z0 = torch.stack(found)
        eps = (x_t - math.sqrt(abar) * z0) / math.sqrt(1 - abar)
        if abar_next < 1:
            fresh = torch.stack([torch.randn(SHAPE, generator=g).double() for g in generators]) if eta else 0.0
            eps = math.sqrt(1 - eta**2) * eps + eta * fresh
        x_t = math.sqrt(abar_next) * z0 + math.sqrt(1 - abar_next) * eps
        trace.append(x_t / math.sqrt(abar_next))
    return trace


@pytest.mark.parametrize("eta", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("delta", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("f", [SuperResolution(2), Noisy(SuperResolution(2), NOISE / 2)], ids=["exact", "noisy"])
def test_a_whole_run_by_hand(f, delta, eta):
    posterior, z = problem(f)
    seen = []
    LATINO(delta=delta, eta=eta)(posterior, z, SIGMAS, generator=generators(5, 2), callback=lambda i, d, z, r: seen.append(z))
    expected = by_hand(f, posterior.y, z, delta, eta, generators(5, 2))
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # lam is a bisection, the noise float32


def test_the_runs_by_hand_tell_the_variants_apart():
    posterior, z = problem(SuperResolution(2))
    ends = [
        by_hand(posterior.operator, posterior.y, z, *variant, generators(5, 2))[-1] for variant in ((0, 1), (0.02, 1), (0, 0.6), (0, 0))
    ]
    assert min((a - b).abs().max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-3


def test_what_a_mask_hides_keeps_the_priors_recursion():
    """On N(mean, std^2): seen pixels are y to rounding; hidden ones shrink towards the mean and get sigma_next of noise, whose deviation is a recursion."""
    mean, std, batch = MEANS[:1], 0.15, 60
    mask = torch.zeros(8, 4)
    mask[4:] = 1
    f = Inpainting(mask)
    y = f((mean + std * randn(batch, *SHAPE, seed=1)).clamp(-1, 1))
    z = mean + math.hypot(SIGMAS[0], std) * randn(batch, *SHAPE, seed=2)
    out = LATINO()(Posterior(GaussianMixture(mean, std), f, y), z, SIGMAS, generator=generators(1, batch))
    hidden = f.mask.bool().expand_as(out)
    assert ((out - y)[~hidden].square().mean().sqrt() <= ROUNDING) and ((out - y)[~hidden].abs().max() < 0.2 * std)
    v = SIGMAS[0] ** 2 + std**2
    for sigma, sigma_next in pairwise(SIGMAS):
        v = (std**2 / (std**2 + sigma**2)) ** 2 * v + sigma_next**2
    left = (out - mean)[hidden]  # 2880 draws: their deviation is known to 1.3 %
    assert float(left.std()) == pytest.approx(math.sqrt(v), rel=0.05)
    assert abs(float(left.mean())) < 4 * math.sqrt(v / len(left))


def test_a_large_delta_is_the_projection_and_a_small_one_the_model_alone():
    posterior, z = problem(SuperResolution(2))
    f, y = posterior.operator, posterior.y
    ends = [LATINO(delta=delta)(posterior, z, SIGMAS, generator=generators(5, 2)) for delta in (1e-9, 1e-3, 1e3)]
    residuals = [f.distance(f(end), y) for end in ends]
    assert (residuals[0] > 5 * residuals[2]).all() and (residuals[1] > residuals[2]).all()
    alone = z
    drawn = generators(5, 2)
    for sigma, sigma_next in pairwise(SIGMAS):
        alone = PRIOR.denoise(alone, sigma).clamp(-1, 1)
        if sigma_next:
            alone = alone + sigma_next * torch.stack([torch.randn(SHAPE, generator=g) for g in drawn])
    torch.testing.assert_close(ends[0], alone, rtol=0, atol=1e-4)


def test_the_end_explains_the_measurement_as_well_as_its_noise_allows():
    f = Noisy(SuperResolution(2), NOISE / 2)  # of [0, 1]: half of that in [-1, 1]
    assert f.noise == pytest.approx(NOISE)
    posterior, z = problem(f)
    out = LATINO()(posterior, z, SIGMAS, generator=generators(5, 2))
    left = torch.linalg.vector_norm((f.operator(out) - posterior.y).flatten(1), dim=1) / math.sqrt(24)
    assert ((left > 0.9 * NOISE) & (left < 1.1 * NOISE)).all()


def test_a_blur_that_is_not_separable():
    f = MotionBlur(5.0, 30.0)
    posterior, z = problem(f)
    out = LATINO()(posterior, z, SIGMAS, generator=generators(5, 2))
    start = f.distance(f(PRIOR.denoise(z, SIGMAS[0])), posterior.y)
    assert (f.distance(f(out), posterior.y) < 0.2 * start).all()


def test_a_jpeg_is_matched_at_every_step():
    """The autoencoder is the identity: the end is what `match` makes of the last denoised latent."""
    f, seen = Jpeg(50), []
    posterior, z = problem(f)
    out = LATINO()(posterior, z, SIGMAS, generator=generators(5, 2), callback=lambda i, d, z, r: seen.append(d))
    assert torch.equal(out, match(f, seen[-1], posterior.y).image) and not torch.equal(out, seen[-1])


@pytest.mark.parametrize(
    "f, delta, message",
    [
        (Noisy(Jpeg(50), 0.1), 0.0, "^operator: .*hides what its file held, which LATINO needs at every step; use DMAP"),
        (Segmentation(random_room_layout(0)), 0.0, "^operator: Segmentation .*is not linear.*use DMAP"),
        (Jpeg(50), 0.5, r"^delta is 0.5, but JPEG .*set it to 0"),
    ],
    ids=["noisy JPEG", "segmentation", "delta"],
)
def test_what_it_refuses_before_anything_runs(f, delta, message):
    with pytest.raises(ValueError, match=message):
        LATINO(delta=delta).check(f, 8)


def test_what_people_are_told():
    assert LATINO().describe() == "LATINO (as close as the noise allows)"
    assert LATINO(delta=0.5, eta=0.25).describe() == "LATINO (delta 0.5, eta 0.25)"
