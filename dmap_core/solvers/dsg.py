"""Diffusion with spherical Gaussian constraint: Yang et al. 2024, Eq. 40 and 41 of the paper."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .checks import check_finite, check_problem, check_settings
from .dmap import project


@torch.no_grad()
def sample_dsg(posterior: Posterior, z: Tensor, sigmas, *, zeta: float, eta: float = 1.0, generator=None, callback=None) -> Tensor:
    """u* = -sqrt(d) sigma_up g / ||g||, u = eps + zeta (u* - eps), z_{t-1} = mu + sqrt(d) sigma_up u / ||u||, g = grad_{z_t} ||f(D(z0)) - y||

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta in (0, 1] is a mix rate, not a step size: 0.08 in the
    paper, 1 is steepest descent on the sphere. d and both norms are every sample's own. eta in (0, 1]: at 0 the sphere is a point.
    generator: one torch.Generator, or one per sample. callback(step, denoised, z, residual) after every step. Returns z0.
    T = len(sigmas) - 1 denoiser calls, T - 1 of them with gradient: at the last step sigma_up = 0 and z0 is the denoised latent, unguided.
    Raises ValueError for settings or sigmas without meaning and errors.Diverged for NaN.
    """
    check_settings(zeta, eta)
    if zeta > 1:
        raise ValueError(f"zeta is {zeta:g}; DSG's is a mix rate between 0 (no guidance) and 1 (no noise), 0.08 in the paper")
    if eta == 0:
        raise ValueError("eta is 0, where DSG's sphere shrinks to a point and nothing is guided; use a value above 0, or DPS")
    levels = check_problem(posterior, z, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if sigma_next > 0:
            grad, denoised, residual = posterior.gradient(z, sigma)
            check_finite(i, len(levels) - 1, zeta, grad, residual)
            mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
            radius = math.sqrt(z[0].numel()) * sigma_up
            noise = sigma_up * randn_like(z, generator)
            steepest = -radius * unit(grad, instead=-noise)
            z = project(mu + noise + zeta * (steepest - noise), mu, sigma_up)
        else:  # no sphere to move on: a gradient would be thrown away
            denoised = posterior.denoise(z, sigma)
            z, _ = ancestral_step(z, denoised, sigma, sigma_next, eta)
            residual = posterior.residual(z, 0.0)
        check_finite(i, len(levels) - 1, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z


def unit(g: Tensor, instead: Tensor) -> Tensor:
    """g / ||g|| of every sample; of `instead` where g is 0, so that a sample with nothing left to gain keeps its noise."""

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.flatten(1).float(), dim=1).to(x).view(-1, *[1] * (x.ndim - 1))

    g = torch.where(norm(g) > 0, g, instead)
    return g / norm(g)
