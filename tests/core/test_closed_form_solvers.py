"""Whole runs of every solver on a Gaussian prior, where theory says what comes out.

The prior is N(MEAN, STD^2 I) and f a mask or a mean, so p(z | y) without noise is: what f sees equals y, what it does not see keeps the
prior's mean and deviation. The point of f(x) = y where the prior is densest is y where f sees, MEAN elsewhere.
"""

import math
from itertools import pairwise

import pytest
import torch

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Inpainting, SuperResolution
from dmap_core.posterior import Posterior
from dmap_core.schedule import generators
from dmap_core.solvers import SOLVERS

SHAPE, STD, BATCH, STEPS = (3, 8, 8), 0.5, 24, 60
UNSEEN = BATCH * 96  # draws of what half a mask hides: their mean is known to 0.0104, their deviation to 1.5 %


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_missing():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    return mask


MEAN = 0.3 * randn(1, *SHAPE)
PRIOR = GaussianMixture(MEAN, STD)
MASK = Inpainting(half_missing())
HIDDEN = MASK.mask.bool().expand(1, *SHAPE)
RUNS = {
    "DPS adam": ("DPS", {"zeta": 0.1, "optimizer": "adam"}),
    "PSLD": ("PSLD", {"zeta": 0.8, "gamma": 0.1}),
    "PSLD published": ("PSLD", {"zeta": 0.8, "gamma": 0.1, "transpose": "published"}),
    "FreeDoM": ("FreeDoM", {"zeta": 1.0, "K": 3, "first": 20, "last": 30}),
    "ReSample": (
        "ReSample",
        {"zeta": 0.2, "first": 20, "last": 50, "every": 10, "iterations": 60, "learning_rate": 0.02, "space": "latent"},
    ),
    "DSG": ("DSG", {"zeta": 0.4}),
    "DMAP": ("DMAP", {"zeta": 0.8, "K": 2}),
    "DMAP adam": ("DMAP", {"zeta": 0.1, "K": 2, "optimizer": "adam"}),
}
# What guidance divides the residual by, at least. Measured: half as much again to twice as much. DPS-like steps have a constant length, so
# they end up to one step away from y; on DMAP's and DSG's spheres, which shrink, and after ReSample's optimisation little of that is left.
CLOSER = {"DPS adam": 6, "PSLD": 8, "PSLD published": 6, "FreeDoM": 8, "ReSample": 40, "DSG": 30, "DMAP": 15, "DMAP adam": 25}
every_run = pytest.mark.parametrize("name", RUNS)


def measured(f, batch=BATCH):
    return f(MEAN + STD * randn(batch, *SHAPE, seed=1))


def run(karras, name, f=MASK, batch=BATCH, **more):
    solver, settings = RUNS[name]
    y = measured(f, batch)
    z = math.sqrt(10**2 + STD**2) * randn(batch, *SHAPE, seed=2) + MEAN
    sigmas = karras(STEPS, 0.02, 10.0).tolist()
    return SOLVERS[solver](**{**settings, **more})(Posterior(PRIOR, f, y), z, sigmas, generator=generators(1, batch)), y


def free(karras, f=MASK, batch=BATCH):
    posterior, z = Posterior(PRIOR, f, measured(f, batch)), 10 * randn(batch, *SHAPE, seed=2)
    return SOLVERS["DPS"](zeta=1e-12)(posterior, z, karras(STEPS, 0.02, 10.0), generator=generators(1, batch))


@every_run
@pytest.mark.parametrize("f", [MASK, SuperResolution(2)], ids=lambda f: f.name)
def test_every_solver_comes_to_fit_the_measurement(karras, name, f):
    out, y = run(karras, name, f, 3)
    unguided = f.distance(f(free(karras, f, 3)), y)
    assert (unguided > 1.5).all()
    assert (f.distance(f(out), y) < unguided / CLOSER[name]).all()


@every_run
def test_what_f_sees_is_y(karras, name):
    """Every pixel, not only their norm: the deviation from y is a fraction of the prior's own."""
    out, y = run(karras, name)
    error = (out - y)[~HIDDEN.expand_as(out)]
    assert float(error.square().mean().sqrt()) < 0.25 * STD
    assert abs(float(error.mean())) < 0.02


# Solvers that move an element along its own gradient leave what f does not see to the prior: a recursion of numbers tells its deviation.


def deviation(levels, name):
    solver, settings = RUNS[name]
    v, i = levels[0] ** 2 + STD**2, 0
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        shrink = STD**2 / (STD**2 + sigma**2)
        up = sigma_next * math.sqrt(1 - sigma_next**2 / sigma**2)
        share = shrink + math.sqrt(sigma_next**2 - up**2) / sigma * (1 - shrink)
        inside = settings.get("first", math.inf) <= i <= settings.get("last", -1)
        for _ in range(settings["K"] - 1 if solver == "FreeDoM" and inside else 0):
            v = share**2 * v + up**2 + sigma**2 - sigma_next**2
        if solver == "ReSample" and inside and (i - settings["first"]) % settings["every"] == 0:
            abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
            s = 40 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
            w = s / (s + 1 - abar_next)
            # the consistent latent is the denoised one where f sees nothing, but for AdamW's decay of 1 % of 60 steps of 0.02
            v = (w * shrink * (1 - 0.0002) ** 60 + (1 - w) * share) ** 2 * v + (1 - w) ** 2 * up**2 + w * (1 - abar_next) / abar_next
        else:
            v = share**2 * v + up**2
    return math.sqrt(v)


@pytest.mark.parametrize("name", ["DPS adam", "PSLD", "PSLD published", "FreeDoM", "ReSample"])
def test_what_f_does_not_see_is_a_sample_of_the_prior(karras, name):
    out, _ = run(karras, name)
    hidden = (out - MEAN)[HIDDEN.expand_as(out)]
    expected = deviation(karras(STEPS, 0.02, 10.0).tolist(), name)
    assert abs(float(hidden.mean())) < 0.045  # 4 of its deviations
    assert float(hidden.std()) == pytest.approx(expected, rel=0.06)
    # ancestral steps lose some of the prior's deviation, and resampling, which narrows around denoised latents, some more
    assert 0.7 * STD < expected < 1.01 * STD


@pytest.mark.parametrize("name", ["DSG", "DMAP", "DMAP adam"])
def test_the_sphere_leaves_the_unseen_part_its_spread(karras, name):
    """Not the densest point of the prior on f(x) = y, whatever DMAP's name says: that has no spread where f sees nothing.

    The sphere has the radius of all the noise, and guidance only turns it, so what it takes for the seen part the unseen part loses.
    """
    out, _ = run(karras, name)
    hidden = (out - MEAN)[HIDDEN.expand_as(out)]
    assert abs(float(hidden.mean())) < 0.045
    assert 0.6 * STD < float(hidden.std()) < 1.1 * STD


@pytest.mark.parametrize("name", ["DMAP", "DMAP adam"])
def test_dmaps_seen_part_is_the_constrained_maximum_where_f_is_a_mean(karras, name):
    """f sees means of pixels: of what it sees the densest point is MEAN + f^+ (y - f(MEAN)), and the result's seen part comes near that."""
    f = SuperResolution(2)
    out, y = run(karras, name, f, 6)
    matrix = f(torch.eye(192, dtype=torch.float64).view(192, *SHAPE)).flatten(1).mT
    inverse = torch.linalg.pinv(matrix)
    best = (y - f(MEAN)).flatten(1) @ inverse.mT
    seen = (out - MEAN).flatten(1) @ (inverse @ matrix).mT
    assert ((seen - best).norm(dim=1) < 0.15 * best.norm(dim=1)).all()


def test_a_larger_step_fits_better_until_it_is_too_large(karras):
    """DPS's step has a constant length, so at the end it cannot come closer than zeta times the gradient's size."""
    ends = [run(karras, "PSLD", batch=2, zeta=zeta, gamma=0.1 * zeta) for zeta in (0.01, 0.05, 0.4, 6.0)]
    residuals = [float(MASK.distance(MASK(out), y).mean()) for out, y in ends]
    assert residuals[0] > residuals[1] > residuals[2]
    assert residuals[3] > 3 * residuals[2]


def test_consistency_steps_of_resample_come_closer_than_guidance_alone(karras):
    """With a step of guidance that is too small to fit y, the optimisation makes up for it."""
    late = {"zeta": 0.01, "first": 20, "last": 59, "every": 3}
    with_it, y = run(karras, "ReSample", batch=3, **late)
    solver = {"zeta": 0.01, "gamma": 0.0}
    without, _ = run(karras, "PSLD", batch=3, **solver)
    assert (MASK.distance(MASK(with_it), y) < 0.5 * MASK.distance(MASK(without), y)).all()
