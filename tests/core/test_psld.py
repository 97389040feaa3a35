"""PSLD: the gradient of both its norms, what stands for f^T, and how far the published stand-in is from it."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, MotionBlur, SuperResolution, centred_box
from dmap_core.operators.base import squared_norm
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import DPS, PSLD
from dmap_core.solvers.psld import TRANSPOSES, transposed

LATENT, IMAGE = (2, 4, 6), (8, 12)
OPERATORS = [
    SuperResolution(2),
    SuperResolution(4),
    GaussianBlur(5, 1.0),
    MotionBlur(4.0, 30.0),
    Inpainting(centred_box(IMAGE, (4, 5))),
    Grayscale(),
    Compose([Grayscale(), GaussianBlur(5, 1.0), SuperResolution(2)]),
]
every_operator = pytest.mark.parametrize("f", OPERATORS, ids=lambda f: f.describe())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(f, size=IMAGE):
    """f as a matrix, one column per value of the picture."""
    basis = torch.eye(3 * math.prod(size), dtype=torch.float64).view(-1, 3, *size)
    return f(basis).flatten(1).mT


def measurement(f, batch=1, size=IMAGE):
    return f(randn(batch, 3, *size, seed=1).tanh())


@pytest.fixture
def prior(conv_autoencoder):
    class Autoencoder(conv_autoencoder):
        def encode(self, image):
            return 2 * super().encode(image)

    return Autoencoder()


def step(posterior, z, sigma, sigma_next, **settings):
    """What one deterministic step subtracts from the mean."""
    seen = []
    PSLD(eta=0.0, **settings)(posterior, z, [sigma, sigma_next, 0.0], callback=lambda i, d, z, r: seen.append((d, z, r)))
    denoised, latent, residual = seen[0]
    return denoised + sigma_next / sigma * (z - denoised) - latent, residual


@pytest.mark.parametrize("kind", TRANSPOSES)
@pytest.mark.parametrize("zeta, gamma", [(1.0, 1.0), (0.01, 2.0), (0.5, 0.001)])
@every_operator
def test_the_step_is_the_finite_difference_of_both_norms(prior, f, zeta, gamma, kind):
    """In float64 through denoiser, decoder and encoder; f and its transpose are dense matrices here."""
    y = measurement(f, 2)
    matrix = dense(f)
    if kind == "adjoint":
        back = matrix.mT / float(squared_norm(f, IMAGE, y)[0])
    else:
        columns = torch.eye(y[0].numel(), dtype=torch.float64).view(-1, *y.shape[1:])
        back = F.interpolate(columns, IMAGE, mode="nearest").expand(-1, 3, -1, -1).flatten(1).mT
    sigma, sigma_next, z = 0.7, 0.3, 1.5 * randn(2, *LATENT, seed=2)

    def loss(z):
        z0 = prior.denoise(z, sigma)
        picture = prior.decode(z0)
        error = picture.flatten(1) @ matrix.mT - y.flatten(1)
        glued = prior.encode((picture.flatten(1) - error @ back.mT).view_as(picture))
        return (zeta * error.norm(dim=1) + gamma * (z0 - glued).flatten(1).norm(dim=1)).detach()

    taken, residual = step(Posterior(prior, f, y, "fast"), z, sigma, sigma_next, zeta=zeta, gamma=gamma, transpose=kind)
    h = 1e-5
    for seed in range(2):
        direction = randn(*z.shape, seed=10 + seed)
        slope = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
        # the norms' own gradients are rounded to float32
        torch.testing.assert_close((taken * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=2e-6)
    picture = prior.decode(prior.denoise(z, sigma))
    expected = (picture.flatten(1) @ matrix.mT - y.flatten(1)).norm(dim=1).detach()
    torch.testing.assert_close(residual.double(), expected, rtol=1e-6, atol=0)  # without the gluing term


@pytest.mark.parametrize("kind", TRANSPOSES)
def test_the_gluing_term_matters(prior, kind):
    """What the test above allows for rounding is far below it."""
    f = SuperResolution(2)
    posterior, z = Posterior(prior, f, measurement(f), "fast"), 1.5 * randn(1, *LATENT, seed=2)
    with_it, without = (step(posterior, z, 0.7, 0.3, zeta=0.5, gamma=gamma, transpose=kind)[0] for gamma in (0.5, 0.0))
    assert (with_it - without).norm() > 0.1 * without.norm()


def test_the_two_transposes_differ(prior):
    f = SuperResolution(2)
    posterior, z = Posterior(prior, f, measurement(f), "fast"), 1.5 * randn(1, *LATENT, seed=2)
    taken = [step(posterior, z, 0.7, 0.3, zeta=0.01, gamma=0.5, transpose=kind)[0] for kind in TRANSPOSES]
    assert (taken[0] - taken[1]).norm() > 0.01 * taken[0].norm()


@pytest.mark.parametrize("kind", TRANSPOSES)
def test_without_an_autoencoder_a_mask_adds_gamma_to_zeta(kind):
    """E = D = identity and f^T f = f: z0 - (z0 + y - f(z0)) is the residual itself, so the run is DPS with zeta + gamma."""
    f = Inpainting(torch.eye(4))
    posterior = Posterior(GaussianMixture(randn(2, 3, 4, 4), 0.5), f, f(randn(2, 3, 4, 4, seed=1)))
    z, sigmas = 4 * randn(2, 3, 4, 4, seed=2), [4.0, 2.0, 1.0, 0.3, 0.0]
    out = PSLD(zeta=0.3, gamma=0.2, transpose=kind)(posterior, z, sigmas, generator=generators(0, 2))
    expected = DPS(zeta=0.5)(posterior, z, sigmas, generator=generators(0, 2))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@every_operator
def test_the_squared_norm_is_the_largest_singular_values_square(f):
    expected = float(torch.linalg.matrix_norm(dense(f), 2)) ** 2
    for batch in (1, 3):
        found = squared_norm(f, IMAGE, measurement(f, batch))
        assert found.shape == (batch, 1, 1, 1)
        assert expected * 0.999 < float(found.min()) and float(found.max()) < expected * (1 + 1e-9)


@pytest.mark.parametrize("f", [SuperResolution(8), GaussianBlur(61, 3.0)], ids=lambda f: f.name)
def test_the_squared_norm_of_a_larger_picture(f):
    """Separable: the norm of the whole is the product of the norms of both axes."""
    size = (64, 48)
    expected = math.prod(float(torch.linalg.matrix_norm(f.matrix(n), 2)) for n in size) ** 2
    assert expected * 0.999 < squared_norm(f, size, measurement(f, 1, size)) < expected * (1 + 1e-9)


@every_operator
def test_the_squared_norm_does_not_depend_on_the_batch(f):
    """Otherwise a sample of a batch would be glued a little otherwise than alone."""
    alone = float(squared_norm(f, IMAGE, measurement(f, 1)))
    assert squared_norm(f, IMAGE, measurement(f, 4)).flatten().tolist() == pytest.approx([alone] * 4, rel=1e-12)


def test_every_mask_of_a_batch_has_a_squared_norm_of_its_own():
    masks = torch.zeros(2, 1, *IMAGE)
    masks[0, :, 0, 0] = 1
    masks[1, :, :, 1:] = 1  # one column is known
    blur = GaussianBlur(5, 1.0)
    both = squared_norm(Compose([blur, Inpainting(masks)]), IMAGE, randn(2, 3, *IMAGE))
    alone = [float(squared_norm(Compose([blur, Inpainting(mask[None])]), IMAGE, randn(1, 3, *IMAGE))) for mask in masks]
    assert both.flatten().tolist() == pytest.approx(alone, rel=1e-12)
    assert alone[1] < 0.8 * alone[0]


@every_operator
def test_the_adjoint_is_scaled_by_the_squared_norm(f):
    y = measurement(f, 2)
    expected = (y.flatten(1) @ dense(f)).view(2, 3, *IMAGE) / squared_norm(f, IMAGE, y)
    torch.testing.assert_close(transposed(f, IMAGE, y)(y), expected, rtol=1e-10, atol=1e-12)


def test_there_and_back_is_a_projection_for_masks():
    masks = (torch.rand(2, 1, *IMAGE, generator=torch.Generator().manual_seed(4)) < 0.3).float()
    f = Inpainting(masks)
    x = randn(2, 3, *IMAGE)
    back = transposed(f, IMAGE, f(x))
    once = back(f(x))
    torch.testing.assert_close(once, f(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back(f(once)), once, rtol=1e-12, atol=1e-12)


def test_there_and_back_is_a_projection_for_grey():
    """f^T f of one row of weights is their outer product: a projection, once divided by its trace."""
    f = Grayscale()
    x = randn(2, 3, *IMAGE)
    back = transposed(f, IMAGE, f(x))
    once = back(f(x))
    torch.testing.assert_close(back(f(once)), once, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(f(once), f(x), rtol=1e-9, atol=1e-12)


@every_operator
def test_there_and_back_never_stretches_a_picture(f):
    matrix = dense(f)
    eigenvalues = torch.linalg.eigvalsh(matrix.mT @ matrix / float(squared_norm(f, IMAGE, measurement(f, 1))))
    assert float(eigenvalues.min()) > -1e-12
    assert 1 - 1e-9 < float(eigenvalues.max()) < 1.001


def test_published_is_the_nearest_enlargement():
    y = randn(2, 3, 2, 3)
    out = transposed(SuperResolution(4), (8, 12), y, "published")(y)
    torch.testing.assert_close(out, torch.from_numpy(np.kron(y.numpy(), np.ones((4, 4)))), rtol=0, atol=0)


def test_published_is_the_identity_where_the_size_stays():
    y = randn(2, 3, *IMAGE)
    for f in (GaussianBlur(5, 1.0), MotionBlur(4.0, 30.0)):
        assert torch.equal(transposed(f, IMAGE, y, "published")(y), y)


def test_published_repeats_grey_in_three_channels():
    y = randn(2, 1, *IMAGE)
    assert torch.equal(transposed(Grayscale(), IMAGE, y, "published")(y), y.repeat(1, 3, 1, 1))


@pytest.mark.parametrize("f, cosine", [(SuperResolution(8), 0.87), (GaussianBlur(61, 3.0), 0.19)], ids=["SR", "blur"])
def test_how_far_published_is_from_the_adjoint(f, cosine):
    """White noise as measurement of pictures of 128 pixels; the border moves SR's cosine by less than 0.01."""
    size = (128, 128)
    y = randn(2, 3, *f.measurement_size(size))
    adjoint, published = f.adjoint(y, size).flatten(1), transposed(f, size, y, "published")(y).flatten(1)
    found = F.cosine_similarity(adjoint, published)
    torch.testing.assert_close(found, torch.full_like(found, cosine), rtol=0, atol=0.012)


def test_an_unknown_transpose_is_named():
    f = SuperResolution(2)
    with pytest.raises(ValueError, match="transpose is 'inverse'; it must be one of adjoint, published"):
        transposed(f, IMAGE, measurement(f), "inverse")
