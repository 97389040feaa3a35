"""Noise levels, steps between them, and the noise itself."""

import math

import numpy as np
import pytest
import torch

from dmap_core.schedule import ancestral_step, check_sigmas, exponential_sigmas, generators, paper_sigmas, randn_like

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's "scaled linear"
ABAR = torch.cumprod(1 - BETAS, 0)
SD_SIGMAS = ((1 - ABAR) / ABAR).sqrt()


def respaced(steps):
    """abar of `steps` timesteps, rising noise."""
    return ABAR[torch.linspace(0, 999, steps, dtype=torch.float64).round().long()]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [25, 100, 1000])
def test_eta_1_is_ddpms_posterior(steps):
    """DDPM Eq. 7 in VP coefficients, mean and variance, rescaled to VE: z = x / sqrt(abar)."""
    abar = respaced(steps)
    z, z0 = randn(1, 2, 3, 3), randn(1, 2, 3, 3, seed=1)
    for t in range(1, steps):
        a, a_prev = float(abar[t]), float(abar[t - 1])
        beta = 1 - a / a_prev
        x = math.sqrt(a) * z
        mean = math.sqrt(a_prev) * beta / (1 - a) * z0 + math.sqrt(a / a_prev) * (1 - a_prev) / (1 - a) * x
        variance = (1 - a_prev) / (1 - a) * beta
        mu, sigma_up = ancestral_step(z, z0, math.sqrt((1 - a) / a), math.sqrt((1 - a_prev) / a_prev))
        torch.testing.assert_close(mu, mean / math.sqrt(a_prev), rtol=1e-9, atol=1e-10)
        assert sigma_up**2 == pytest.approx(variance / a_prev, rel=1e-9)


@pytest.mark.parametrize("steps", [25, 100, 1000])
def test_eta_0_is_ddim(steps):
    abar = respaced(steps)
    z, z0 = randn(1, 2, 3, 3), randn(1, 2, 3, 3, seed=1)
    for t in range(1, steps):
        a, a_prev = float(abar[t]), float(abar[t - 1])
        eps = (math.sqrt(a) * z - math.sqrt(a) * z0) / math.sqrt(1 - a)
        x_prev = math.sqrt(a_prev) * z0 + math.sqrt(1 - a_prev) * eps
        mu, sigma_up = ancestral_step(z, z0, math.sqrt((1 - a) / a), math.sqrt((1 - a_prev) / a_prev), eta=0.0)
        assert sigma_up == 0
        torch.testing.assert_close(mu, x_prev / math.sqrt(a_prev), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("sigma, sigma_next", [(14.6, 14.5), (14.6, 0.1), (1.0, 0.99), (0.5, 0.03), (1e-3, 1e-4)])
def test_a_step_lands_on_the_next_noise_level(eta, sigma, sigma_next):
    """If the noise in z is all there is between z and z0, mean and draw together carry a noise of sigma_next."""
    z0, eps = randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
    mu, sigma_up = ancestral_step(z0 + sigma * eps, z0, sigma, sigma_next, eta)
    remaining = float(((mu - z0) / eps).mean())
    assert 0 <= sigma_up <= sigma_next
    assert math.hypot(remaining, sigma_up) == pytest.approx(sigma_next, rel=1e-9)
    full = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    assert sigma_up == pytest.approx(eta * full, rel=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_last_step_is_the_denoised_latent(eta):
    z, z0 = randn(1, 1, 2, 2), randn(1, 1, 2, 2, seed=1)
    mu, sigma_up = ancestral_step(z, z0, 0.03, 0.0, eta)
    assert sigma_up == 0 and torch.equal(mu, z0)


def test_paper_sigmas_of_stable_diffusion():
    sigmas = paper_sigmas(SD_SIGMAS, 500)
    assert sigmas.shape == (501,) and sigmas.dtype == torch.float32
    assert float(sigmas[0]) == pytest.approx(14.6146, abs=1e-3)
    assert float(sigmas[-2]) == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1] == 0
    assert check_sigmas(sigmas) == sigmas.tolist()


@pytest.mark.parametrize("steps", [1, 2, 7, 500, 1000])
def test_paper_sigmas_are_interpolated_over_equally_spaced_timesteps(steps):
    timesteps = np.linspace(999, 0, steps)
    expected = np.interp(timesteps, np.arange(1000), SD_SIGMAS.numpy())
    np.testing.assert_allclose(paper_sigmas(SD_SIGMAS, steps)[:-1].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_sigmas_of_every_timestep_are_the_models_own(dtype):
    expected = torch.cat([SD_SIGMAS.flip(0), torch.zeros(1)]).float()
    torch.testing.assert_close(paper_sigmas(SD_SIGMAS.to(dtype), 1000), expected, rtol=1e-6, atol=0)


def test_start_and_end_cut_the_schedule():
    sigmas = paper_sigmas(SD_SIGMAS, 11, start=500 / 999, end=100 / 999)
    assert float(sigmas[0]) == pytest.approx(float(SD_SIGMAS[500]), rel=1e-6)
    assert float(sigmas[5]) == pytest.approx(float(SD_SIGMAS[300]), rel=1e-6)
    assert float(sigmas[-2]) == pytest.approx(float(SD_SIGMAS[100]), rel=1e-6)
    assert sigmas[-1] == 0


@pytest.mark.parametrize("steps", [0, -3])
def test_paper_sigmas_without_steps(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; it must be at least 1"):
        paper_sigmas(SD_SIGMAS, steps)


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.2, 0.4), (1.1, 0.0), (1.0, -0.1), (math.nan, 0.0), (1.0, math.nan)])
def test_start_and_end_must_make_a_range(start, end):
    with pytest.raises(ValueError, match=f"start is {start} and end {end}"):
        paper_sigmas(SD_SIGMAS, 10, start, end)


@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [10, 3, 0], (2.0, 1.0, 0.5, 0.0)])
def test_check_sigmas_takes_sequences_and_tensors(sigmas):
    assert check_sigmas(sigmas) == check_sigmas(torch.tensor(sigmas, dtype=torch.float64)) == [float(s) for s in sigmas]


BAD_SIGMAS = [
    ([], "holds 0 noise levels"),
    ([0.0], "holds 1 noise levels"),
    ([3.0], "at least two"),
    ([3.0, math.nan, 0.0], "NaN or infinite"),
    ([math.inf, 1.0, 0.0], "NaN or infinite"),
    ([0.0, 1.0, 3.0], "step 0 goes from 0 to 1; do not flip"),
    ([3.0, 1.0, 2.0, 0.0], "step 1 goes from 1 to 2"),
    ([3.0, 1.0, 1.0, 0.0], "step 1 goes from 1 to 1"),
    ([3.0, 0.0, 0.0], "step 1 goes from 0 to 0"),
    ([3.0, 2.0, 1.0], "must end at 0, but end at 1"),
    ([1.0, 0.0, -1.0], "must end at 0, but end at -1"),
]


@pytest.mark.parametrize("sigmas, message", BAD_SIGMAS)
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_sigmas_without_meaning(sigmas, message, kind):
    with pytest.raises(ValueError, match=f"sigmas .*{message}"):
        check_sigmas(kind(sigmas))


def test_a_split_schedule_passes_where_it_may():
    assert check_sigmas([3.0, 2.0, 1.0], to_zero=False) == [3.0, 2.0, 1.0]
    for sigmas, message in BAD_SIGMAS[:9]:
        with pytest.raises(ValueError, match=message):
            check_sigmas(sigmas, to_zero=False)


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63, 2**64 - 1])
def test_a_sample_does_not_depend_on_the_batch_size(seed):
    z = torch.zeros(4, 2, 3, 3)
    whole = [randn_like(z, gs) for gs in [generators(seed, 4)] for _ in range(3)]
    pair = [randn_like(z[:2], gs) for gs in [generators(seed, 2)] for _ in range(3)]
    for i in range(4):
        gs = [generators(seed, 4)[i]]
        for step in range(3):
            alone = randn_like(z[:1], gs)
            assert torch.equal(whole[step][i : i + 1], alone)
            if i < 2:
                assert torch.equal(pair[step][i : i + 1], alone)


def test_samples_and_steps_and_seeds_differ():
    z = torch.zeros(3, 2, 3, 3)
    draws = []
    for seed in (5, 6):
        gs = generators(seed, 3)
        draws += [*randn_like(z, gs), *randn_like(z, gs)]
    for i, a in enumerate(draws):
        assert not any(torch.equal(a, b) for b in draws[i + 1 :])


def test_sample_0_is_what_a_single_run_with_that_seed_draws():
    z = torch.zeros(2, 2, 3, 3)
    assert torch.equal(randn_like(z, generators(9, 2))[:1], randn_like(z[:1], torch.Generator().manual_seed(9)))


def test_same_seed_same_noise():
    z = torch.zeros(2, 4, 8, 8)
    assert torch.equal(randn_like(z, generators(3, 2)), randn_like(z, generators(3, 2)))
    assert torch.equal(randn_like(z, torch.Generator().manual_seed(3)), randn_like(z, torch.Generator().manual_seed(3)))
    torch.manual_seed(3)
    first = randn_like(z, None)
    torch.manual_seed(3)
    assert torch.equal(first, randn_like(z, None))


def test_generators_leave_the_global_one_alone():
    before = torch.get_rng_state()
    randn_like(torch.zeros(2, 3), generators(3, 2))
    randn_like(torch.zeros(2, 3), torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_noise_is_unit_gaussian_in_the_latents_dtype(dtype):
    noise = randn_like(torch.zeros(4, 4, 64, 64, dtype=dtype), generators(0, 4))
    assert noise.dtype == dtype
    # 65536 draws: mean within 4 / 256, variance within 4 sqrt(2) / 256
    assert abs(float(noise.double().mean())) < 0.016 and abs(float(noise.double().var()) - 1) < 0.023


def test_the_number_of_generators_must_fit():
    with pytest.raises(ValueError, match="2 generators for a batch of 3"):
        randn_like(torch.zeros(3, 1, 2, 2), generators(0, 2))


def test_exponential_sigmas_fall_by_one_factor_between_the_ends_of_the_paper():
    model_sigmas = torch.linspace(0.03, 14.6, 1000)
    sigmas = exponential_sigmas(model_sigmas, 20, start=0.8, end=0.1)
    paper = paper_sigmas(model_sigmas, 20, start=0.8, end=0.1)
    torch.testing.assert_close(sigmas[[0, -2, -1]], paper[[0, -2, -1]])
    ratios = sigmas[1:-1] / sigmas[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios))


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 5, "start": 0.2, "end": 0.2}, {"steps": 5, "start": 1.2}, {"steps": 5, "end": -0.1}]
)
def test_exponential_sigmas_refuses_what_paper_sigmas_refuses(arguments):
    for spacing in (paper_sigmas, exponential_sigmas):
        with pytest.raises(ValueError, match="steps is|start is"):
            spacing(torch.linspace(0.03, 14.6, 1000), **arguments)
