"""Diffusion posterior sampling: Chung et al. 2022, Alg. 1 and 3 of the paper."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .adam import direction
from .checks import check_finite, check_problem, check_settings


@torch.no_grad()
def sample_dps(
    posterior: Posterior, z: Tensor, sigmas, *, zeta: float, optimizer: str = "gradient", eta: float = 1.0, generator=None, callback=None
) -> Tensor:
    """z_{t-1} = mu + sigma_up eps - zeta grad_{z_t} ||f(D(z0(z_t))) - y||   (Eq. 19)

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta > 0 in VE latent units per unit of the residual's
    gradient (4.8 for SR x8 of 512x512 pictures at 500 steps). optimizer: "adam" steps along Adam's direction instead of the gradient (C.1);
    zeta is then the step of every latent element. eta: 1 ancestral (DDPM), 0 PF-ODE (DDIM). generator: one torch.Generator, or one per sample.
    callback(step, denoised, z, residual) after every step. Returns z0. len(sigmas) - 1 denoiser calls, each with gradient.
    Raises ValueError for settings or sigmas without meaning and errors.Diverged for NaN.
    """
    check_settings(zeta, eta)
    step = direction(optimizer)
    levels = check_problem(posterior, z, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        grad, denoised, residual = posterior.gradient(z, sigma)
        z = guided_step(z, denoised, zeta * step(grad), sigma, sigma_next, eta, generator)
        check_finite(i, len(levels) - 1, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z


def guided_step(z: Tensor, denoised: Tensor, shift: Tensor, sigma: float, sigma_next: float, eta: float, generator) -> Tensor:
    """mu + sigma_up eps - shift: an ancestral step, guided by shift = zeta grad. PSLD, FreeDoM and ReSample take it too."""
    mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
    z = mu - shift
    return z + sigma_up * randn_like(z, generator) if sigma_up > 0 else z


def guided_denoised(denoised: Tensor, grad: Tensor, zeta: float, sigma: float, sigma_next: float) -> Tensor:
    """The denoised latent that belongs to DPS's conditional score (Prop. 1, Eq. 9): an ancestral step from it is a DPS step.

    In VE space the ancestral mean is mu = (1 - a) denoised + a z with a = sigma_next^2 / sigma^2, hence the division.
    """
    return denoised - (zeta / (1 - sigma_next**2 / sigma**2)) * grad
