"""One restoration: what its seed decides, and what is counted."""

import math

import pytest
import torch

from dmap_core.errors import Diverged
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.restore import initial_latent, noised, restore, warm_latent
from dmap_core.schedule import generators
from dmap_core.solvers import DMAP, DPS

SHAPE = (2, 4, 4)
T = 4


@pytest.fixture
def prior(conv_prior):
    return conv_prior(dtype=torch.float32, trainable=False)


@pytest.fixture
def sigmas(karras):
    return karras(T, 0.05, 10.0)


@pytest.fixture
def run(prior, sigmas):
    def run(seeds, y=None, solver=DPS, settings=None, **more):
        y = torch.linspace(-1, 1, 3 * 16).view(1, 3, 4, 4) if y is None else y
        return restore(prior, SuperResolution(2), y, SHAPE, sigmas, solver(**{"zeta": 0.3} | (settings or {})), seeds, **more)

    return run


def test_the_first_latent_has_the_noise_of_the_last_timestep():
    sigma = 14.6
    z = initial_latent((4, 32, 32), sigma, range(40))
    assert z.shape == (40, 4, 32, 32)
    n = z.numel()
    variance = 1 + sigma**2
    assert float(z.mean()) == pytest.approx(0, abs=4 * math.sqrt(variance / n))
    assert float(z.double().var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))


def test_a_seed_is_torchs():
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(7))
    assert torch.equal(initial_latent(SHAPE, 3.0, [7]), math.sqrt(10) * noise)


def test_the_same_seed_makes_the_same_picture_and_another_another(run):
    assert torch.equal(run([5]).image, run([5]).image)
    assert not torch.allclose(run([5]).image, run([6]).image, atol=0.01)


def test_a_run_that_begins_from_a_latent(prior, sigmas, run, monkeypatch):
    """It is noised to the first level, by the seed of x_T; the steps have the next one, as always."""
    monkeypatch.setattr(prior, "encode", lambda image: image[:, :2, ::2, ::2])
    y = torch.linspace(-1, 1, 3 * 16).view(1, 3, 4, 4)
    latent = warm_latent(prior, SuperResolution(2), y)
    torch.testing.assert_close(latent, prior.encode(SuperResolution(2).hint(y).clamp(-1, 1)))
    z = noised(latent, float(sigmas[0]), [5])
    torch.testing.assert_close(z - latent, 10.0 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(5)), rtol=1e-5, atol=1e-5)
    posterior = Posterior(prior, SuperResolution(2), y)
    z0 = DPS(zeta=0.3)(posterior, z, sigmas, generator=generators(6, 1))
    assert torch.equal(run([5], y, latent=latent).image, prior.decode(z0))
    assert not torch.equal(run([5], y).image, run([5], y, latent=latent).image)


@pytest.mark.parametrize("solver", [DPS, DMAP])
def test_no_sample_depends_on_the_others(run, solver):
    together = run([3, 9, 4], solver=solver)
    for i, seed in enumerate([3, 9, 4]):
        alone = run([seed], solver=solver)
        assert torch.allclose(together.image[i : i + 1], alone.image, atol=1e-5)


def test_measurements_of_their_own(run):
    y = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = run([3, 9], y)
    for i, seed in enumerate([3, 9]):
        assert torch.allclose(together.image[i : i + 1], run([seed], y[i : i + 1]).image, atol=1e-5)


def test_the_steps_have_the_noise_of_the_next_seed(prior, sigmas, run):
    """As in ComfyUI, where a sampler's noise is seeded with seed + 1."""
    y = torch.zeros(1, 3, 4, 4)
    z = math.sqrt(1 + float(sigmas[0]) ** 2) * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(11))
    z0 = DPS(zeta=0.3)(Posterior(prior, SuperResolution(2), y), z, sigmas, generator=generators(12, 1))
    with torch.no_grad():
        assert torch.equal(run([11], y).image, prior.decode(z0))


@pytest.mark.parametrize("K", [1, 2, 3])
def test_dmaps_calls(run, K):
    done = run([1], solver=DMAP, settings={"K": K})
    assert done.denoiser_calls == T + (T - 1) * K and done.decoder_calls == (T - 1) * K + 1


def test_dps_calls(run):
    done = run([1, 2])
    assert (done.denoiser_calls, done.decoder_calls) == (T, T)


def test_what_is_told(run):
    seen = []
    done = run([1, 2], callback=lambda step, denoised, z, residual: seen.append((step, residual.tolist())))
    assert [step for step, _ in seen] == list(range(T))
    assert all(len(of_samples) == 2 and all(r > 0 for r in of_samples) for _, of_samples in seen)
    assert done.image.shape == (2, 3, 8, 8) and not done.image.requires_grad
    assert done.seconds > 0 and done.peak_memory is None


def test_the_memory_plan(run):
    assert run([1]).memory == "fast"
    lean = run([1], memory="lean")
    assert lean.memory == "lean" and torch.allclose(lean.image, run([1]).image, atol=1e-5)


def test_a_picture_that_is_not_finite(prior, run):
    decode = prior.decode
    prior.decode = lambda z0: decode(z0) if torch.is_grad_enabled() else decode(z0) * float("inf")
    with pytest.raises(Diverged, match="the decoded picture holds NaN or infinity; lower zeta"):
        run([1])


def test_a_latent_that_is_not_finite(run):
    with pytest.raises(Diverged, match="step"):
        run([1], settings={"zeta": 1e38})


def test_settings_without_meaning(run):
    with pytest.raises(ValueError, match="zeta is -1"):
        run([1], settings={"zeta": -1})
