"""Whole runs, unguided and guided, whose steps are the schedulers of the diffusers library and whose gradient is written out here.

All of its schedulers but Euler's walk in VP latents, which are sqrt(abar) times the VE latents of this library.
"""

import diffusers.schedulers.scheduling_ddim
import diffusers.schedulers.scheduling_ddpm
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler

from dmap_core.backends.mixture import GaussianMixture
from dmap_core.operators import Compose, GaussianBlur, Grayscale, Inpainting, SuperResolution, centred_box
from dmap_core.posterior import Posterior
from dmap_core.schedule import ancestral_step, randn_like
from dmap_core.solvers import DPS, guided_denoised

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

STEPS = 20
SHAPE = (2, 3, 8, 8)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZETA = 2.0


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


PRIOR = GaussianMixture(0.5 * normal(0, 3, *SHAPE[1:]), std=0.3, weights=torch.tensor([0.2, 0.5, 0.3]))

OPERATORS = {
    "super-resolution": SuperResolution(2),
    "gaussian blur": GaussianBlur(5, 1.0),
    "inpainting": Inpainting(centred_box(SHAPE[2:], (4, 4))),
    "old photo": Compose((Grayscale(), GaussianBlur(3, 0.8), SuperResolution(2))),
}


@pytest.fixture(autouse=True)
def noise(monkeypatch):
    """VP schedulers draw in the latents' dtype; here in float32, as this library does, so that the same seed is the same noise."""

    def draw(shape, generator=None, device=None, dtype=None, **_):
        return torch.randn(shape, generator=generator).to(dtype)

    for module in (diffusers.schedulers.scheduling_ddim, diffusers.schedulers.scheduling_ddpm):
        monkeypatch.setattr(module, "randn_tensor", draw)


class Vp:
    """A scheduler that walks in VP latents, computing in float64."""

    atol = 2e-9  # DDPM's variance is nowhere below 1e-20, not even at the last step

    def __init__(self, scheduler, our_eta, **settings):
        self.scheduler, self.eta, self.settings = scheduler, our_eta, settings
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.set_timesteps(STEPS)
        self.abars = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0]
        self.sigmas = [((1 - abar) / abar) ** 0.5 for abar in self.abars]
        self.scales = [abar**0.5 for abar in self.abars]  # theirs is so many times the VE latent

    def output(self, x, denoised, i):
        """What the network would say at the latents x whose denoised latents are these."""
        abar = self.abars[i]
        eps = (x - abar**0.5 * denoised) / (1 - abar) ** 0.5
        velocity = abar**0.5 * eps - (1 - abar) ** 0.5 * denoised
        return {"epsilon": eps, "v_prediction": velocity, "sample": denoised}[self.scheduler.config.prediction_type]

    def step(self, x, denoised, i, generator):
        t = self.scheduler.timesteps[i]
        return self.scheduler.step(self.output(x, denoised, i), t, x, generator=generator, **self.settings).prev_sample


class EulerAncestral:
    """This one walks in VE latents, computing in float32."""

    atol, eta, scales = 2e-4, 1.0, [1.0] * (STEPS + 1)

    def __init__(self, kind):
        self.scheduler = EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="linspace", prediction_type=kind)
        self.scheduler.set_timesteps(STEPS)
        self.sigmas = self.scheduler.sigmas.tolist()

    def step(self, x, denoised, i, generator):
        t, sigma = self.scheduler.timesteps[i], self.sigmas[i]
        eps, scaled = (x - denoised) / sigma, self.scheduler.scale_model_input(x, t)
        # v = sqrt(abar) eps - sqrt(1 - abar) z0, and the scaled input is sqrt(abar) z0 + sqrt(1 - abar) eps
        velocity = (eps - sigma * denoised) / (1 + sigma**2) ** 0.5
        torch.testing.assert_close(scaled.double(), ((denoised + sigma * eps) / (1 + sigma**2) ** 0.5).double(), rtol=0, atol=1e-5)
        output = {"epsilon": eps, "v_prediction": velocity}[self.scheduler.config.prediction_type]
        return self.scheduler.step(output.float(), t, x.float(), generator=generator).prev_sample.double()


def ddpm(kind="epsilon", spacing="trailing"):
    return Vp(DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small", prediction_type=kind, timestep_spacing=spacing), 1.0)


def ddim(eta, kind="epsilon"):
    # it takes every step for equally many timesteps, which is true of "trailing"
    return Vp(DDIMScheduler(**BETAS, clip_sample=False, prediction_type=kind, timestep_spacing="trailing"), eta, eta=eta)


SCHEDULERS = {
    "ddpm": ddpm,
    "ddpm, linspace": lambda: ddpm(spacing="linspace"),
    "ddpm, v": lambda: ddpm("v_prediction"),
    "ddpm, x0": lambda: ddpm("sample"),
    "ddim, eta 0": lambda: ddim(0.0),
    "ddim, eta 0.6": lambda: ddim(0.6),
    "ddim, eta 1": lambda: ddim(1.0),
    "ddim, eta 0, v": lambda: ddim(0.0, "v_prediction"),
    "euler ancestral": lambda: EulerAncestral("epsilon"),
    "euler ancestral, v": lambda: EulerAncestral("v_prediction"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_unguided_run(name):
    theirs = SCHEDULERS[name]()
    z = theirs.sigmas[0] * normal(1, *SHAPE)
    x = theirs.scales[0] * z
    their_noise, our_noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    for i in range(STEPS):
        sigma, sigma_next = theirs.sigmas[i], theirs.sigmas[i + 1]
        x = theirs.step(x, PRIOR.denoise(x / theirs.scales[i], sigma), i, their_noise)
        z, sigma_up = ancestral_step(z, PRIOR.denoise(z, sigma), sigma, sigma_next, theirs.eta)
        if sigma_up > 0:
            z = z + sigma_up * randn_like(z, our_noise)
        torch.testing.assert_close(z, x / theirs.scales[i + 1], rtol=theirs.atol, atol=theirs.atol)


def residual_gradient(f, y, x, sigma, scale):
    """(denoised, gradient) at their latents x: the l2 norm of every sample and autograd, nothing else."""
    x = x.clone().requires_grad_()
    denoised = PRIOR.denoise(x / scale, sigma)
    norms = ((f(denoised) - y) ** 2).sum(dim=(1, 2, 3)).sqrt()
    return denoised.detach(), torch.autograd.grad(norms.sum(), x)[0]


def dps_with(theirs, f, y, z):
    """DPS with their step. A latent that is `scale` times ours has a gradient 1 / scale of ours, hence the two factors."""
    x, draws = theirs.scales[0] * z, torch.Generator().manual_seed(2)
    latents = []
    for i in range(STEPS):
        denoised, gradient = residual_gradient(f, y, x, theirs.sigmas[i], theirs.scales[i])
        x = theirs.step(x, denoised, i, draws) - ZETA * theirs.scales[i] * theirs.scales[i + 1] * gradient
        latents.append(x / theirs.scales[i + 1])
    return latents


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_guided_run(name, operator):
    theirs, f = SCHEDULERS[name](), OPERATORS[operator]
    z, y = theirs.sigmas[0] * normal(1, *SHAPE), f(normal(3, *SHAPE))
    latents = []
    DPS(zeta=ZETA, eta=theirs.eta)(
        Posterior(PRIOR, f, y),
        z,
        theirs.sigmas,
        generator=torch.Generator().manual_seed(2),
        callback=lambda i, denoised, z, residual: latents.append(z),
    )
    # the residual is taken in float32 here, which the gradients of all steps inherit
    atol = max(theirs.atol, 1e-5)
    for ours, expected in zip(latents, dps_with(theirs, f, y, z), strict=True):
        torch.testing.assert_close(ours, expected, rtol=atol, atol=atol)


@pytest.mark.parametrize("name", ["ddpm", "ddpm, v", "ddim, eta 1", "euler ancestral"])
def test_a_scheduler_that_knows_of_no_guidance_walks_dps_from_guided_denoised(name):
    """Prop. 1: DPS is an unguided ancestral sampler under another score."""
    theirs, f = SCHEDULERS[name](), OPERATORS["super-resolution"]
    z, y = theirs.sigmas[0] * normal(1, *SHAPE), f(normal(3, *SHAPE))
    ours = DPS(zeta=ZETA)(Posterior(PRIOR, f, y), z, theirs.sigmas, generator=torch.Generator().manual_seed(2))

    x, draws = theirs.scales[0] * z, torch.Generator().manual_seed(2)
    for i in range(STEPS):
        denoised, gradient = residual_gradient(f, y, x, theirs.sigmas[i], theirs.scales[i])
        guided = guided_denoised(denoised, theirs.scales[i] * gradient, ZETA, theirs.sigmas[i], theirs.sigmas[i + 1])
        x = theirs.step(x, guided, i, draws)
    torch.testing.assert_close(ours, x, rtol=0, atol=max(theirs.atol, 1e-5))


def test_guidance_is_seen():
    """The tolerances above are far below what guidance changes."""
    theirs, f = ddpm(), OPERATORS["super-resolution"]
    z, y = theirs.sigmas[0] * normal(1, *SHAPE), f(normal(3, *SHAPE))
    runs = [DPS(zeta=zeta)(Posterior(PRIOR, f, y), z, theirs.sigmas, generator=torch.Generator().manual_seed(2)) for zeta in (ZETA, 1e-9)]
    assert (runs[0] - runs[1]).abs().mean() > 0.05
