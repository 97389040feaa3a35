"""Training-free energy-guided conditional diffusion: Yu et al. 2023, Eq. 36 of the paper."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import randn_like
from .checks import check_finite, check_problem, check_settings, check_window
from .dps import guided_step

TRAVELS = ("forward", "published")


@torch.no_grad()
def sample_freedom(
    posterior: Posterior,
    z: Tensor,
    sigmas,
    *,
    zeta: float,
    K: int = 2,
    first: int = 25,
    last: int = 50,
    travel: str = "forward",
    eta: float = 1.0,
    generator=None,
    callback=None,
) -> Tensor:
    """DPS that walks every step from `first` to `last` K times, going back in time between: z_t = z_{t-1} + N(0, sigma_t^2 - sigma_{t-1}^2).

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta > 0 as in `sample_dps`. K >= 1, the passes over a
    step of the window; 1 is DPS. first <= last: the window [c1, c2], numbers of steps counted from 0 at the noisiest. travel: "forward" adds
    the noise that the step took away; "published" adds what the authors' latent code does, the VP beta of the wrong end of the schedule,
    which is almost none. eta: 1 ancestral, 0 PF-ODE. generator: one torch.Generator, or one per sample. callback(step, denoised, z, residual)
    after every step. Returns z0. T + (K - 1) (last - first + 1) denoiser calls, each with gradient.
    Raises ValueError for settings, windows or sigmas without meaning and errors.Diverged for NaN.
    """
    check_settings(zeta, eta, K)
    if travel not in TRAVELS:
        raise ValueError(f"travel is {travel!r}; it must be one of {', '.join(TRAVELS)}")
    levels = check_problem(posterior, z, sigmas)
    check_window(first, last, len(levels) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        passes = int(K) if first <= i <= last else 1
        for k in range(passes):
            grad, denoised, residual = posterior.gradient(z, sigma)
            z = guided_step(z, denoised, zeta * grad, sigma, sigma_next, eta, generator)
            if k + 1 < passes:
                shrink, noise = (1.0, math.sqrt(sigma**2 - sigma_next**2)) if travel == "forward" else published_travel(i)
                z = shrink * z + noise * randn_like(z, generator)
            check_finite(i, len(levels) - 1, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z


def published_travel(step: int) -> tuple[float, float]:
    """sqrt(1 - beta) and sqrt(beta) of Stable Diffusion's training schedule at timestep `step`, where the step's own is 999 - step or so."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    beta = (low + min(step, 999) / 999 * (high - low)) ** 2
    return math.sqrt(1 - beta), math.sqrt(beta)
