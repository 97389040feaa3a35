"""Scores of DPS on priors whose scores are known in closed form."""

import math

import numpy as np
import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators, randn_like
from dmap_core.solvers import DPS
from dmap_core.studies import score as study
from dmap_core.studies.score import (
    UNCONDITIONAL,
    ScoreMean,
    dps_score,
    plain_score_mean,
    score_errors,
    score_means,
    score_points,
    timesteps,
    vp_score,
)

SHAPE = (3, 4, 4)
SIGMAS = [4.0, 1.5, 0.6, 0.2, 0.0]
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
MODEL_SIGMAS = ((1 - ABAR) / ABAR).sqrt()


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


PRIOR = GaussianMixture(0.5 * randn(2, *SHAPE), 0.4, torch.tensor([1.0, 2.0], dtype=torch.float64))
F = SuperResolution(2)
Y = F(PRIOR.means[:1] + 0.4 * randn(1, *SHAPE, seed=1))


def vp_log_density(x, sigma):
    """log p(x) of x = sqrt(abar) z0 + sqrt(1 - abar) eps, up to its constant, in the terms of VP alone."""
    abar = 1 / (1 + sigma**2)
    variance = abar * PRIOR.std**2 + 1 - abar
    squares = (x.unsqueeze(1) - math.sqrt(abar) * PRIOR.means).flatten(2).square().sum(2)
    return torch.logsumexp((PRIOR.weights / PRIOR.weights.sum()).log() - squares / (2 * variance), 1)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0, 14.6])
def test_the_score_is_the_gradient_of_the_vp_densitys_logarithm(sigma):
    z = PRIOR.means[:1] + sigma * randn(3, *SHAPE, seed=2)
    x = (z / math.sqrt(1 + sigma**2)).requires_grad_()
    (expected,) = torch.autograd.grad(vp_log_density(x, sigma).sum(), x)
    torch.testing.assert_close(vp_score(z, PRIOR.denoise(z, sigma), sigma), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t, before", [(999, 997), (500, 499), (20, 10)])
def test_dps_score_is_proposition_1_in_vp_terms(t, before):
    """s_theta - sqrt(alpha_t) / beta_t zeta_t grad_x, where a step of zeta in VE is one of zeta sqrt(abar_t abar_before) in VP."""
    sigma, sigma_next, zeta = float(MODEL_SIGMAS[t]), float(MODEL_SIGMAS[before]), 0.7
    alpha = ABAR[t] / ABAR[before]
    z = sigma * randn(2, *SHAPE, seed=3)
    x = (z * ABAR[t].sqrt()).requires_grad_()
    residual = F.distance(F(PRIOR.denoise(x / ABAR[t].sqrt(), sigma)), Y)
    (grad_x,) = torch.autograd.grad(residual.sum(), x)
    zeta_vp = zeta * (ABAR[t] * ABAR[before]).sqrt()
    denoised = PRIOR.denoise(z, sigma)
    expected = vp_score(z, denoised, sigma) - alpha.sqrt() / (1 - alpha) * zeta_vp * grad_x.detach()

    grad, _, _ = Posterior(PRIOR, F, Y).gradient(z, sigma)
    # the residual is rounded to float32 on its way
    torch.testing.assert_close(dps_score(z, denoised, grad, zeta, sigma, sigma_next), expected, rtol=1e-5, atol=1e-6)


def test_an_ancestral_step_along_dps_score_is_a_step_of_dps():
    sigma, sigma_next, zeta = 1.5, 0.6, 0.8
    z = sigma * randn(2, *SHAPE, seed=4)
    posterior = Posterior(PRIOR, F, Y)
    grad, denoised, _ = posterior.gradient(z, sigma)
    score = dps_score(z, denoised, grad, zeta, sigma, sigma_next)
    implied = z + sigma**2 / math.sqrt(1 + sigma**2) * score  # Tweedie
    mu, sigma_up = ancestral_step(z, implied, sigma, sigma_next)
    expected = mu + sigma_up * randn_like(z, generators(0, 2))

    after = {}
    DPS(zeta=zeta)(
        posterior, z, [sigma, sigma_next, 0.0], generator=generators(0, 2), callback=lambda step, d, z, r: after.setdefault(step, z)
    )
    torch.testing.assert_close(after[0], expected, rtol=1e-12, atol=1e-12)


def points(batch=3):
    z0 = PRIOR.means[:1].expand(batch, *SHAPE)
    return score_points(Posterior(PRIOR, F, Y), z0, SIGMAS, generators(7, batch))


def test_points_are_noised_at_every_level_but_0():
    seen = []
    z0 = PRIOR.means[:1].expand(3, *SHAPE)
    posterior = Posterior(PRIOR, F, Y)
    found = score_points(posterior, z0, SIGMAS, generators(7, 3), lambda i, point: seen.append((i, point.sigma)))
    assert [(p.sigma, p.sigma_next) for p in found] == [(4.0, 1.5), (1.5, 0.6), (0.6, 0.2), (0.2, 0.0)]
    assert seen == list(enumerate(SIGMAS[:-1]))
    assert posterior.denoiser_calls == 4
    noise = generators(7, 3)
    for point in found:
        torch.testing.assert_close(point.z, z0 + point.sigma * randn_like(z0, noise), rtol=0, atol=0)
        grad, denoised, residual = posterior.gradient(point.z, point.sigma)
        for ours, theirs in ((point.grad, grad), (point.denoised, denoised), (point.residual, residual)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def conditional(point, measured=0):
    """The denoised latent of a prior that has been told the mode."""
    return GaussianMixture(PRIOR.means[measured : measured + 1], PRIOR.std).denoise(point.z, point.sigma)


def test_the_unconditional_scores_error_is_known_in_closed_form():
    """Both denoisers shrink towards a mean, and the means differ by p(other mode | z) times the distance between the modes."""
    found = points()
    errors = score_errors(found, [conditional(p) for p in found], [0.3])
    distance = float((PRIOR.means[1] - PRIOR.means[0]).norm())
    for t, point in enumerate(found):
        sigma, variance = point.sigma, PRIOR.std**2 + point.sigma**2
        other = PRIOR.responsibilities(point.z, sigma)[:, 1]
        expected = math.sqrt(1 + sigma**2) / variance * distance * other
        torch.testing.assert_close(errors.unconditional[t], expected, rtol=1e-8, atol=1e-10)
        norms = math.sqrt(1 + sigma**2) / variance * (point.z - PRIOR.means[0]).flatten(1).norm(dim=1)
        torch.testing.assert_close(errors.conditional_norm[t], norms, rtol=1e-10, atol=0)


def test_measured_from_the_unconditional_score_the_error_is_linear_in_zeta():
    found = points()
    errors = score_errors(found, [p.denoised for p in found], [0.05, 0.3, 4.8])
    assert errors.dps.shape == (3, 4, 3)
    assert float(errors.unconditional.max()) == 0
    for t, p in enumerate(found):
        factor = math.sqrt(1 + p.sigma**2) / (p.sigma**2 - p.sigma_next**2)
        torch.testing.assert_close(errors.dps[1, t], 0.3 * factor * p.grad.flatten(1).norm(dim=1), rtol=1e-8, atol=0)
    torch.testing.assert_close(errors.dps[0] * 96, errors.dps[2], rtol=1e-8, atol=0)


def test_a_conditional_model_that_is_dps_leaves_no_error_at_its_zeta():
    found = points()
    guided = [p.z + p.sigma**2 / math.sqrt(1 + p.sigma**2) * dps_score(p.z, p.denoised, p.grad, 0.3, p.sigma, p.sigma_next) for p in found]
    errors = score_errors(found, guided, [0.1, 0.3])
    assert float((errors.dps[1] / errors.conditional_norm).max()) < 1e-12
    torch.testing.assert_close(errors.dps[0] * 1.5, errors.unconditional, rtol=1e-8, atol=0)  # 0.2 and 0.3 away


def test_rows_hold_every_method_and_level():
    found = points()
    errors = score_errors(found, [conditional(p) for p in found], [0.3, 4.8])
    rows = errors.rows(timesteps(errors.sigmas, MODEL_SIGMAS))
    assert [(r["method"], r["zeta"]) for r in rows[::4]] == [(UNCONDITIONAL, None), ("DPS", 0.3), ("DPS", 4.8)]
    assert [r["sigma"] for r in rows] == SIGMAS[:-1] * 3
    row, values = rows[4 + 2], errors.dps[0, 2].numpy()
    assert row["mean"] == pytest.approx(values.mean())
    assert row["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert row["n"] == 3
    assert row["conditional_norm"] == pytest.approx(float(errors.conditional_norm[2].mean()))
    assert row["t"] == pytest.approx(float(timesteps([0.6], MODEL_SIGMAS)))
    assert "t" not in errors.rows()[0]


def test_a_single_sample_has_no_standard_error():
    found = points(batch=1)
    rows = score_errors(found, [conditional(p) for p in found], [0.3]).rows()
    assert all(math.isnan(r["standard_error"]) and math.isfinite(r["mean"]) for r in rows)


def test_without_zetas_there_is_the_unconditional_score_alone():
    found = points()
    errors = score_errors(found, [conditional(p) for p in found], [])
    assert errors.dps.shape == (0, 4, 3)
    assert {r["method"] for r in errors.rows()} == {UNCONDITIONAL}


def test_what_does_not_fit_is_refused():
    found = points()
    with pytest.raises(ValueError, match="4 points but 3 conditional_denoised"):
        score_errors(found, [p.denoised for p in found[:3]], [0.3])
    with pytest.raises(ValueError, match="points is empty"):
        score_errors([], [], [0.3])
    with pytest.raises(ValueError, match="shape"):
        score_errors(found, [p.denoised[:1] for p in found], [0.3])
    with pytest.raises(ValueError, match="5 timesteps were given for 4"):
        score_errors(found, [p.denoised for p in found], [0.3]).rows(range(5))
    with pytest.raises(ValueError, match="end at 0"):
        score_points(Posterior(PRIOR, F, Y), PRIOR.means[:1], SIGMAS[:-1], None)


def test_timesteps_of_the_models_levels_are_their_places():
    t = torch.tensor([0, 1, 250, 998, 999])
    torch.testing.assert_close(timesteps(MODEL_SIGMAS[t], MODEL_SIGMAS), t.double(), rtol=0, atol=1e-9)
    between = (MODEL_SIGMAS[10] * MODEL_SIGMAS[11]).sqrt()
    assert float(timesteps([between], MODEL_SIGMAS)) == pytest.approx(10.5)
    levels = np.geomspace(0.001, 100, 50)
    expected = np.interp(np.log(levels), MODEL_SIGMAS.log().numpy(), np.arange(1000))
    np.testing.assert_allclose(timesteps(levels, MODEL_SIGMAS).numpy(), expected, rtol=0, atol=1e-9)


def test_levels_without_a_timestep_are_refused():
    with pytest.raises(ValueError, match="final 0"):
        timesteps(SIGMAS, MODEL_SIGMAS)
    with pytest.raises(ValueError, match="rising"):
        timesteps([1.0], MODEL_SIGMAS.flip(0))


def test_a_unit_gaussian_shows_the_floor_and_the_papers_04():
    """1000 samples of a score without mean: 0.025 is what there is to see, and 0.4 what Table 2 calls the mean."""
    mean = ScoreMean()
    for first in range(0, 1000, 250):
        mean.update(randn(250, 4, 16, 16, seed=first))
    assert mean.k == 1000
    assert mean.floor == pytest.approx(math.sqrt(2 / (math.pi * 1000)), rel=0.01)
    assert mean.true_mean == pytest.approx(0.0252, rel=0.08)  # 1024 elements: known to 2.4 %
    assert mean.published == pytest.approx(math.sqrt(2 / (4 * math.pi)), rel=0.01)
    assert mean.published == pytest.approx(0.399, abs=0.004)


def test_a_score_mean_is_numpys():
    scores = 0.3 + randn(7, 4, 5, 6)
    mean = ScoreMean()
    mean.update(scores[:3])
    mean.update(scores[3:])
    values = scores.numpy()
    np.testing.assert_allclose(mean.mean.numpy(), values.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean.std.numpy(), values.std(0, ddof=1), rtol=1e-12, atol=0)
    assert mean.true_mean == pytest.approx(np.abs(values.mean(0)).mean())
    assert mean.norm_of_mean == pytest.approx(np.linalg.norm(values.mean(0)))
    assert mean.published == pytest.approx(np.abs(values.mean(1)).mean())
    assert mean.floor == pytest.approx(math.sqrt(2 / (math.pi * 7)) * values.std(0, ddof=1).mean())


def figures(mean):
    return mean.k, mean.true_mean, mean.floor, mean.norm_of_mean, mean.published


def test_batches_do_not_change_a_score_mean_in_the_last_bit():
    scores = randn(11, 4, 3, 3, dtype=torch.float32)
    means = [ScoreMean() for _ in range(3)]
    for mean, size in zip(means, (1, 4, 11), strict=True):
        for part in scores.split(size):
            mean.update(part)
    assert figures(means[0]) == figures(means[1]) == figures(means[2])


def test_a_mean_of_too_few_is_refused():
    mean = ScoreMean()
    with pytest.raises(ValueError, match="0 sample"):
        mean.published  # noqa: B018
    mean.update(randn(1, 4, 2, 2))
    assert mean.true_mean > 0
    with pytest.raises(ValueError, match="at least 2"):
        mean.floor  # noqa: B018


SINGLE = GaussianMixture(0.3 * randn(1, *SHAPE, dtype=torch.float32), 0.4)
Y32 = F(SINGLE.means)


@pytest.mark.parametrize("repeated", [1, 4], ids=["y of one", "y repeated"])
def test_score_means_do_not_depend_on_the_batch(repeated):
    found = []
    for batch in (1, 4, 10):
        posterior = Posterior(SINGLE, F, Y32.expand(repeated, -1, -1, -1))
        found.append(score_means(posterior, SHAPE, 10.0, 9.0, [0.3, 4.8], k=10, batch=batch, seed=5))
        assert len(posterior.y) == repeated
    assert list(found[0]) == [UNCONDITIONAL, 0.3, 4.8]
    for other in found[1:]:
        for key, mean in found[0].items():
            assert figures(other[key]) == pytest.approx(figures(mean), rel=1e-6)


def test_the_unconditional_score_has_its_mean_in_closed_form():
    """x ~ N(0, I) instead of p_T: the score of one Gaussian is linear, so its mean is (sqrt(abar) m - mean of x) / variance."""
    sigma, k = 3.0, 40
    found = score_means(Posterior(SINGLE, F, Y32), SHAPE, sigma, 2.0, [1.0], k=k, batch=16, seed=5)
    x = torch.stack([torch.randn(SHAPE, generator=g) for g in generators(5, k)]).double()
    abar = 1 / (1 + sigma**2)
    variance = abar * SINGLE.std**2 + 1 - abar
    expected = (math.sqrt(abar) * SINGLE.means[0].double() - x.mean(0)) / variance
    torch.testing.assert_close(found[UNCONDITIONAL].mean, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[UNCONDITIONAL].std, x.std(0) / variance, rtol=1e-4, atol=1e-6)


def test_the_means_of_dps_are_linear_in_zeta():
    """A measurement far away, so that every sample is drawn in the same direction, to which the scores' mean goes."""
    found = score_means(Posterior(SINGLE, F, Y32 + 5), SHAPE, 3.0, 2.0, [50.0, 150.0], k=6, batch=6)
    base, some, more = (found[key].mean for key in (UNCONDITIONAL, 50.0, 150.0))
    assert (some > base + 0.01).all()
    torch.testing.assert_close(3 * (some - base), more - base, rtol=1e-4, atol=1e-6)


def test_a_conditional_model_is_asked_at_the_very_same_samples():
    seen = []

    def denoise(z, sigma):
        seen.append(len(z))
        return SINGLE.denoise(z, sigma)

    done = []
    plain = plain_score_mean(denoise, SHAPE, 3.0, k=10, batch=4, seed=5, callback=lambda *count: done.append(count))
    means = score_means(Posterior(SINGLE, F, Y32), SHAPE, 3.0, 2.0, [], k=10, batch=4, seed=5)
    assert figures(plain) == figures(means[UNCONDITIONAL])
    assert seen == [4, 4, 2]
    assert done == [(4, 10), (8, 10), (10, 10)]


def test_measurements_of_different_pictures_have_no_common_mean():
    posterior = Posterior(SINGLE, F, torch.cat([Y32, Y32 + 1]))
    with pytest.raises(ValueError, match="2 different measurements"):
        score_means(posterior, SHAPE, 3.0, 2.0, [1.0], k=4, batch=2)


@pytest.mark.parametrize("wrong, match", [({"k": 0}, "k is 0"), ({"batch": 0}, "batch is 0"), ({"sigma_next": 5.0}, "fall")])
def test_settings_without_meaning_are_refused(wrong, match):
    settings = {"sigma": 3.0, "sigma_next": 2.0, "zetas": [1.0], "k": 4, "batch": 2} | wrong
    with pytest.raises(ValueError, match=match):
        score_means(Posterior(SINGLE, F, Y32), SHAPE, **settings)


def test_the_measurement_is_put_back_after_a_failure(monkeypatch):
    posterior = Posterior(SINGLE, F, Y32.expand(2, -1, -1, -1))
    monkeypatch.setattr(study, "dps_score", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_means(posterior, SHAPE, 3.0, 2.0, [1.0], k=4, batch=2)
    assert len(posterior.y) == 2
