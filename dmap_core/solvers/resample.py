"""ReSample: hard data consistency and stochastic resampling, Song et al. 2023, Eq. 37 to 39 of the paper (operands of 39 put right)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import randn_like
from .checks import check_finite, check_problem, check_settings, check_window
from .dps import guided_step

SPACES = ("both", "latent", "pixel")
TWEEDIES = ("correct", "published")


@torch.no_grad()
def sample_resample(
    posterior: Posterior,
    z: Tensor,
    sigmas,
    *,
    zeta: float,
    first: int = 50,
    last: int = 100,
    every: int = 50,
    space: str = "both",
    iterations: int = 200,
    learning_rate: float = 5e-3,
    factor: float = 40.0,
    tweedie: str = "correct",
    eta: float = 1.0,
    generator=None,
    callback=None,
) -> Tensor:
    """DPS; after the steps first, first + every, ... up to last, z0 is optimised until f(D(z0)) is y, and noised again around the latent.

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta > 0 as in `sample_dps`. first <= last: numbers of steps
    counted from 0 at the noisiest. space: what AdamW optimises, the "latent" z0 or the "pixel" picture D(z0), which is then encoded; "both":
    the picture in the first two thirds of the schedule, the latent in the last (the original's stages). iterations and learning_rate are
    AdamW's. factor: how far the resampled latent leaves the current one, 40 in the original. tweedie: "published" takes its starting point as
    the original's code does, with (1 - abar) eps for sqrt(1 - abar) eps. eta: 1 ancestral, 0 PF-ODE (the original's). generator: one
    torch.Generator, or one per sample. callback(step, denoised, z, residual) after every step. Returns z0.
    len(sigmas) - 1 denoiser calls, each with gradient; a consistency step in latent space adds `iterations` decoder calls.
    Raises ValueError for settings, windows or sigmas without meaning and errors.Diverged for NaN.
    """
    check_settings(zeta, eta)
    for name, value, known in (("space", space, SPACES), ("tweedie", tweedie, TWEEDIES)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if not (0 < learning_rate < math.inf and 0 < factor < math.inf):
        raise ValueError(f"learning_rate is {learning_rate} and factor {factor}; both must be numbers above 0")
    every, iterations = whole("every", every, 1), whole("iterations", iterations, 1)
    levels = check_problem(posterior, z, sigmas)
    steps = len(levels) - 1
    check_window(first, last, steps)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        grad, denoised, residual = posterior.gradient(z, sigma)
        z0 = denoised if tweedie == "correct" else z - sigma / math.sqrt(1 + sigma**2) * (z - denoised)
        z = guided_step(z, denoised, zeta * grad, sigma, sigma_next, eta, generator)
        check_finite(i, steps, zeta, z, residual)
        if first <= i <= last and (i - first) % every == 0:
            pixel = space == "pixel" or (space == "both" and i < 2 * steps / 3)
            z0 = (consistent_picture if pixel else consistent_latent)(posterior, z0, iterations, learning_rate)
            mean, std = resampling(z0, z, sigma, sigma_next, factor)
            z = mean + std * randn_like(z, generator) if std > 0 else mean
            check_finite(i, steps, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z


def consistent_latent(posterior: Posterior, z0: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """argmin_Z ||y - f(D(Z))||^2 / 2 from z0 (Eq. 37, below)."""
    with posterior.economy():
        return _minimise(lambda z: posterior.distance(posterior.decode(z)), z0, iterations, learning_rate)


def consistent_picture(posterior: Posterior, z0: Tensor, iterations: int, learning_rate: float) -> Tensor:
    """E(argmin_X ||y - f(X)||^2 / 2) from X = D(z0) (Eq. 37, above)."""
    with torch.no_grad():
        image = posterior.decode(z0)
    image = _minimise(posterior.distance, image, iterations, learning_rate)
    with torch.no_grad():
        return posterior.prior.encode(image)


def _minimise(distance, x: Tensor, iterations: int, learning_rate: float) -> Tensor:
    x = x.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(iterations):
            (x.grad,) = torch.autograd.grad(distance(x).square().sum() / 2, x)
            optimizer.step()
    return x.detach()


def resampling(z0: Tensor, z: Tensor, sigma: float, sigma_next: float, factor: float) -> tuple[Tensor, float]:
    """Mean and standard deviation, in VE space, of the noisy latent at sigma_next given the consistent z0 and the current latent z (Eq. 39).

    The product of N(z0, sigma_next^2 I), what z0's noisy latent would be, with a Gaussian of VP variance s around z, which has
    s = factor (1 - abar_next) / (1 - abar) (1 - abar / abar_next).
    """
    abar, abar_next = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    noise = 1 - abar_next
    if noise == 0:
        return z0, 0.0
    s = factor * noise / (1 - abar) * (1 - abar / abar_next)
    return (s * z0 + noise * z) / (s + noise), math.sqrt(s * noise / (s + noise) / abar_next)
