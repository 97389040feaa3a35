"""Cheaper guidance: which noise levels are guided, inner steps on the clean latent, and another decoder for gradients."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, generators, randn_like
from dmap_core.solvers import DMAP, DPS, PSLD, ReSample
from dmap_core.solvers.dmap import project
from dmap_core.solvers.guidance import guided_levels
from dmap_core.solvers.step import step_size

LATENT, IMAGE = (2, 4, 6), (8, 12)
SIGMAS = [9.0, 4.0, 2.0, 1.2, 0.6, 0.2, 0.0]
SOLVERS = [DPS(jacobian="none"), DMAP(K=2, jacobian="none")]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prior, batch=1, **more):
    f = SuperResolution(2)
    return Posterior(prior, f, f(randn(batch, 3, *IMAGE, seed=1).tanh()), "fast", **more), SIGMAS[0] * randn(batch, *LATENT, seed=2)


@pytest.mark.parametrize(
    ("settings", "guided"),
    [
        ({}, "111111"),
        ({"every": 2}, "010101"),
        ({"every": 4}, "010001"),
        ({"every": 100}, "000001"),
        ({"guide_start": 0.5}, "000111"),
        ({"guide_end": 0.5}, "111000"),
        ({"guide_start": 0.3, "guide_end": 0.8, "every": 2}, "001010"),
        ({"guide_start": 0.95, "guide_end": 0.96}, "000001"),
    ],
)
def test_which_levels_are_guided(settings, guided):
    assert guided_levels(DPS(**settings), 6) == [level == "1" for level in guided]
    assert guided_levels(DPS(**settings), 0) == []


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name())
@pytest.mark.parametrize(
    "settings", [{"every": 2}, {"guide_start": 0.5}, {"guide_end": 0.4}, {"inner": 3}, {"every": 3, "inner": 2}], ids=str
)
def test_calls_are_those_that_cost_says(conv_prior, solver, settings):
    prior = conv_prior()
    posterior, z = problem(prior, 2)
    solver, steps = replace(solver, **settings), len(SIGMAS) - 1
    seen = []
    z0 = solver(posterior, z, SIGMAS, generators(1, 2), lambda i, denoised, z, residual: seen.append(residual))
    cost = solver.cost(steps)
    assert (posterior.denoiser_calls, posterior.decoder_calls) == (cost.denoiser, cost.decoder)
    assert (prior.decoded, prior.decoded_with_gradient) == (cost.decoder, cost.decoder_gradients)
    # where nothing has been guided yet, the decoder says how far it is; DMAP's ends the same way
    first = not guided_levels(solver, steps - (solver.name() == "DMAP"))[0]
    assert cost.decoder - cost.decoder_gradients == first + (solver.name() == "DMAP")
    assert cost.denoiser_gradients == 0 and torch.isfinite(torch.stack(seen)).all() and len(seen) == steps
    assert not torch.equal(z0, replace(solver, every=1, guide_start=0.0, guide_end=1.0, inner=1)(posterior, z, SIGMAS, generators(1, 2)))


def descend(posterior, z, sigma, longest, inner, strength=0.7):
    """By hand: the clean latent goes down `inner` times, and z with it."""
    z0 = posterior.denoise(z, sigma)
    moved = torch.zeros_like(z)
    for _ in range(inner):
        grad, residual = posterior.gradient_z0(z0 + moved)
        moved = moved - step_size(None, strength, grad, residual, math.sqrt(z[0].numel()) * longest) * grad
    return z0, moved


def test_inner_steps_of_dps_are_those_written_down(conv_prior):
    posterior, z = problem(conv_prior(), 2)
    noise, expected = generators(1, 2), z
    for sigma, sigma_next in pairwise(SIGMAS):
        z0, moved = descend(posterior, expected, sigma, sigma, inner=3)
        mu, sigma_up = ancestral_step(expected, z0, sigma, sigma_next, 1.0)
        expected = mu + moved + (sigma_up * randn_like(mu, noise) if sigma_up > 0 else 0)
    torch.testing.assert_close(DPS(jacobian="none", inner=3)(posterior, z, SIGMAS, generators(1, 2)), expected)


def test_inner_steps_of_dmap_are_those_written_down(conv_prior):
    posterior, z = problem(conv_prior(), 2)
    noise, expected = generators(1, 2), z
    for sigma, sigma_next in pairwise(SIGMAS):
        mu, sigma_up = ancestral_step(expected, posterior.denoise(expected, sigma), sigma, sigma_next, 1.0)
        expected = mu
        if sigma_up > 0:
            expected = mu + sigma_up * randn_like(mu, noise)
            for _ in range(2):
                _, moved = descend(posterior, expected, sigma_next, sigma_up, inner=3)
                expected = project(expected + moved, mu, sigma_up)
    found = DMAP(K=2, jacobian="none", inner=3)(posterior, z, SIGMAS, generators(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # spheres are rounded to float32


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.name())
def test_inner_steps_lower_the_residual(conv_prior, solver):
    posterior, z = problem(conv_prior(), 4)
    one, three = (replace(solver, inner=n)(posterior, z, SIGMAS, generators(3, 4)) for n in (1, 3))
    assert posterior.residual(three, 0.0).mean() < posterior.residual(one, 0.0).mean()


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS, DPS(), ReSample(first=0, last=4, every=2, iterations=3, learning_rate=0.05, space="latent")],
    ids=lambda s: s.describe(),
)
def test_the_same_decoder_as_guidance_changes_no_bit(conv_prior, solver):
    prior = conv_prior()
    prior.encode = lambda image: torch.nn.functional.avg_pool2d(image[:, :2], 2)
    (plain, z), (guided, _) = problem(prior), problem(prior, guidance=prior.decode)
    assert torch.equal(solver(plain, z, SIGMAS, generators(1, 1)), solver(guided, z, SIGMAS, generators(1, 1)))
    assert plain.guidance_calls == 0 and guided.guidance_calls + guided.decoder_calls == plain.decoder_calls
    assert guided.guidance_calls == solver.cost(len(SIGMAS) - 1).decoder_gradients


def test_gradients_are_those_of_the_guidance_decoder_and_the_residual_in_the_end_is_not(conv_prior):
    prior, other = conv_prior(), conv_prior()
    other.decode = lambda z0: prior.decode(z0).flip(-1)
    posterior, z = problem(prior, guidance=other.decode)
    grad, residual = posterior.gradient_z0(z)
    expected, expected_residual = problem(other)[0].gradient_z0(z)
    assert not torch.equal(residual, posterior.residual(z, 0.0))
    assert torch.equal(grad, expected) and torch.equal(residual, expected_residual)
    assert torch.equal(posterior.residual(z, 0.0), posterior.distance(prior.decode(z)))
    seen = []
    z0 = SOLVERS[1](posterior, z, SIGMAS, generators(1, 1), lambda i, denoised, z, residual: seen.append(residual))
    assert torch.equal(seen[-1], posterior.distance(prior.decode(z0)))


def test_what_is_refused():
    for solver in (DPS, DMAP):
        for name in ("every", "inner"):
            with pytest.raises(ValueError, match=f"{name} is 0; it must be a whole number of at least 1"):
                solver(**{name: 0}, jacobian="none")
        with pytest.raises(
            ValueError, match="inner is 2, whose steps after the first know no denoiser; it needs jacobian 'none' .now 'exact'."
        ):
            solver(inner=2)
        for start, end in ((0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0), (0.0, math.nan)):
            with pytest.raises(ValueError, match=f"guide_start is {start} and guide_end {end}; they must lie between 0 and 1"):
                solver(guide_start=start, guide_end=end)
    with pytest.raises(TypeError):
        PSLD(zeta=1.0, gamma=0.1, inner=2)


def test_how_it_is_told():
    told = DMAP(jacobian="none", inner=4, every=2, guide_start=0.25).describe()
    assert told == "DMAP (K 2, automatic step 0.7, no Jacobian, 4 inner steps, every 2 levels, guided from 0.25 to 1)"
    assert DPS(guide_end=0.5).told() == "strength 0.7, guide_end 0.5"
