"""The ancestral step against the scheduler of the diffusers library."""

import pytest
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

from dmap_core.schedule import ancestral_step, paper_sigmas, randn_like

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")


def scheduler_of(steps):
    scheduler = EulerAncestralDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    return scheduler


def model_sigmas(scheduler):
    abar = scheduler.alphas_cumprod.double()
    return ((1 - abar) / abar).sqrt()


@pytest.mark.parametrize("steps", [10, 50, 500])
def test_paper_sigmas_are_diffusers_linspace(steps):
    scheduler = scheduler_of(steps)
    torch.testing.assert_close(paper_sigmas(model_sigmas(scheduler), steps), scheduler.sigmas, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [10, 50])
def test_a_whole_run_of_ancestral_steps_is_diffusers(steps):
    """Both walk from the same latent with the same noise; the "model" predicts tanh of the scaled latent as noise."""
    scheduler = scheduler_of(steps)
    start = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    theirs, ours = start, start
    their_noise, our_noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for i, t in enumerate(scheduler.timesteps):
        eps = torch.tanh(scheduler.scale_model_input(theirs, t))
        theirs = scheduler.step(eps, t, theirs, generator=their_noise, return_dict=False)[0]

        sigma, sigma_next = float(scheduler.sigmas[i]), float(scheduler.sigmas[i + 1])
        denoised = ours - sigma * torch.tanh(ours / (1 + sigma**2) ** 0.5)
        mu, sigma_up = ancestral_step(ours, denoised, sigma, sigma_next)
        ours = mu + sigma_up * randn_like(mu, our_noise)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
