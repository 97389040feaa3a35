"""Karras et al.'s spacing against its formula and against the diffusers library."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from dmap_core.schedule import SPACINGS, check_sigmas, karras_sigmas, paper_sigmas

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # Stable Diffusion's "scaled linear"
ABAR = torch.cumprod(1 - BETAS, 0)
SD_SIGMAS = ((1 - ABAR) / ABAR).sqrt()


@pytest.mark.parametrize("steps", [2, 10, 50, 500])
def test_they_are_diffusers(steps):
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace", use_karras_sigmas=True
    )
    scheduler.set_timesteps(steps)
    # theirs raises float32 betas' products to the 7th power
    torch.testing.assert_close(karras_sigmas(SD_SIGMAS, steps), scheduler.sigmas, rtol=1e-4, atol=0)


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_they_are_equation_5(steps, rho):
    high, low = float(SD_SIGMAS[-1]), float(SD_SIGMAS[0])
    expected = [(high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(steps)]
    found = karras_sigmas(SD_SIGMAS, steps, rho=rho)
    np.testing.assert_allclose(found.numpy(), [*expected, 0.0], rtol=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("steps, start, end", [(20, 1.0, 0.0), (20, 0.8, 0.1), (2, 0.5, 0.4), (1, 1.0, 0.0), (1, 0.3, 0.0)])
def test_the_ends_are_those_of_the_papers_spacing(steps, start, end):
    ours, paper = karras_sigmas(SD_SIGMAS, steps, start, end), paper_sigmas(SD_SIGMAS, steps, start, end)
    assert len(ours) == len(paper) == steps + 1
    torch.testing.assert_close(ours[[0, -2, -1]], paper[[0, -2, -1]], rtol=1e-6, atol=0)


def test_steps_shrink_toward_the_end_and_rho_says_how_fast():
    steps = karras_sigmas(SD_SIGMAS, 30)[:-1].diff().neg()
    assert (steps.diff() < 0).all()
    halves = [float(karras_sigmas(SD_SIGMAS, 31, rho=rho)[15]) for rho in (1, 3, 7, 20)]
    assert halves == sorted(halves, reverse=True)


def test_every_spacing_makes_a_schedule_that_solvers_take():
    for spacing in SPACINGS.values():
        for steps in (1, 2, 7, 500):
            levels = check_sigmas(spacing(SD_SIGMAS, steps))
            assert len(levels) == steps + 1
    assert SPACINGS["karras"] is karras_sigmas


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 5, "start": 0.2, "end": 0.2}, {"steps": 5, "start": 1.2}, {"steps": 5, "end": -0.1}]
)
def test_what_makes_no_schedule_is_refused(arguments):
    with pytest.raises(ValueError, match="steps is|start is"):
        karras_sigmas(SD_SIGMAS, **arguments)
