"""The model alone, without guidance by the measurement: what a CSE makes by itself (Fig. 7), or what the prior dreams."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .checks import check_finite, check_problem, check_settings


@torch.no_grad()
def sample_unguided(posterior: Posterior, z: Tensor, sigmas, *, eta: float = 1.0, generator=None, callback=None) -> Tensor:
    """z_{t-1} = mu + sigma_up eps   (Eq. 2)

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. eta: 1 ancestral (DDPM), 0 PF-ODE (DDIM). generator: one
    torch.Generator, or one per sample. callback(step, denoised, z, residual) after every step; the residual, of the denoised latent, is
    computed for the callback only. Returns z0. len(sigmas) - 1 denoiser calls.
    """
    check_settings(1.0, eta)
    levels = check_problem(posterior, z, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = posterior.denoise(z, sigma)
        z, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
        if sigma_up > 0:
            z = z + sigma_up * randn_like(z, generator)
        residual = posterior.residual(denoised, 0.0) if callback else z.new_zeros(len(z))
        check_finite(i, len(levels) - 1, 1.0, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z
