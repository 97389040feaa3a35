"""DMAP: the posterior maximised by K projected gradient steps at every noise level. Alg. 2 and 4 of the paper."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .adam import direction
from .checks import check_finite, check_problem, check_settings


def project(z: Tensor, mu: Tensor, sigma_up: float) -> Tensor:
    """The nearest point to z on every sample's sphere of centre mu and radius sqrt(d) sigma_up, d its number of elements (Eq. 17).

    That is where N(mu, sigma_up^2 I) has its mass in high dimension.
    """
    offset = (z - mu).float().flatten(1)
    radius = math.sqrt(offset.shape[1]) * sigma_up
    return mu + (offset * (radius / torch.linalg.vector_norm(offset, dim=1, keepdim=True))).view_as(z)


@torch.no_grad()
def sample_dmap(
    posterior: Posterior,
    z: Tensor,
    sigmas,
    *,
    zeta: float,
    K: int = 2,
    optimizer: str = "gradient",
    eta: float = 1.0,
    generator=None,
    callback=None,
) -> Tensor:
    """One ancestral step without gradient, then K times: a gradient step at the *new* noise level, and back onto the sphere.

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta > 0 and optimizer as in `sample_dps`. K >= 1: the paper's "same" has
    K = 2, half the steps and twice the zeta of DPS; its "full" has K = 3 and all steps. eta in (0, 1]: at 0 the sphere is a point.
    generator: one torch.Generator, or one per sample. callback(step, denoised, z, residual) after every step. Returns z0.
    The last step has sigma_up = 0, where the projection undoes every gradient step: it is the denoised latent. So T steps cost T + (T - 1) K
    denoiser calls, (T - 1) K of them with gradient. Raises ValueError for settings or sigmas without meaning and errors.Diverged for NaN.
    """
    check_settings(zeta, eta, K)
    if eta == 0:
        raise ValueError("eta is 0, where DMAP's sphere shrinks to a point and nothing is guided; use a value above 0, or DPS")
    step = direction(optimizer)
    levels = check_problem(posterior, z, sigmas)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = posterior.denoise(z, sigma)
        mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
        if sigma_up > 0:
            z = mu + sigma_up * randn_like(z, generator)
            for _ in range(int(K)):
                grad, denoised, residual = posterior.gradient(z, sigma_next)
                check_finite(i, len(levels) - 1, zeta, grad, residual)
                z = project(z - zeta * step(grad), mu, sigma_up)
        else:
            z = mu
            residual = posterior.residual(z, 0.0)
        check_finite(i, len(levels) - 1, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z
