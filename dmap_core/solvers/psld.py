"""Posterior sampling with latent diffusion: Rout et al. 2023, Eq. 35 of the paper (whose first norm lacks the decoder)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operators import Operator
from ..operators.base import Size
from ..posterior import Posterior
from .checks import check_finite, check_problem, check_settings
from .dps import guided_step

TRANSPOSES = ("adjoint", "published")


@torch.no_grad()
def sample_psld(
    posterior: Posterior,
    z: Tensor,
    sigmas,
    *,
    zeta: float,
    gamma: float,
    transpose: str = "adjoint",
    eta: float = 1.0,
    generator=None,
    callback=None,
) -> Tensor:
    """z_{t-1} = mu + sigma_up eps - zeta grad ||f(D(z0)) - y|| - gamma grad ||z0 - E(f^T(y) + D(z0) - f^T(f(D(z0))))||, both at z_t

    z: (B, C, h, w) in VE space at noise level sigmas[0]; sigmas: falling to 0. zeta > 0 as in `sample_dps`, gamma >= 0 in the same units
    (paper: 0.002 zeta). transpose: what f^T is. "adjoint": the true adjoint divided by the squared norm of f, so that f^T(f(.)) is a projection
    where f is a mask or a plain average and never stretches a picture elsewhere. "published": what the authors' code uses, the
    nearest-neighbour enlargement of y (the identity for blur). eta: 1 ancestral, 0 PF-ODE. generator: one torch.Generator, or one per sample.
    callback(step, denoised, z, residual) after every step. Returns z0. len(sigmas) - 1 denoiser calls, each with gradient, also through the
    encoder. Raises ValueError for nonlinear operators, settings or sigmas without meaning, and errors.Diverged for NaN.
    """
    check_settings(zeta, eta)
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}; the weight of the gluing term must be a number of at least 0")
    levels = check_problem(posterior, z, sigmas)
    f, encode = posterior.operator, posterior.prior.encode
    y = f.seen(posterior.y)  # the published transpose, unlike the true one, would glue in what the measurement shows in a hole
    back = transposed(f, f.image_size(y), y, transpose)

    def glue(z0: Tensor, image: Tensor) -> Tensor:
        glued = encode(image + back(y - f(image)))
        return (gamma / zeta) * torch.linalg.vector_norm((z0 - glued).float().flatten(1), dim=1)

    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        grad, denoised, residual = posterior.gradient(z, sigma, extra=glue)
        z = guided_step(z, denoised, zeta * grad, sigma, sigma_next, eta, generator)
        check_finite(i, len(levels) - 1, zeta, z, residual)
        if callback:
            callback(i, denoised, z, residual)
    return z


def check_linear(f: Operator) -> None:
    """Raises ValueError for an operator without transpose."""
    if not f.linear:
        raise ValueError(f"operator: {f.describe()} is not linear, and PSLD needs its transpose; use DMAP, DPS, DSG or FreeDoM instead")


def transposed(f: Operator, size: Size, y: Tensor, kind: str = "adjoint"):
    """y -> f^T(y), an image of `size`, for the gluing term. y (B, c, h, w) is an example. Raises ValueError for nonlinear f."""
    if kind not in TRANSPOSES:
        raise ValueError(f"transpose is {kind!r}; it must be one of {', '.join(TRANSPOSES)}")
    check_linear(f)
    if kind == "published":
        return lambda y: F.interpolate(y, size, mode="nearest").expand(-1, 3, -1, -1)
    scale = 1 / squared_norm(f, size, y)
    return lambda y: scale * f.adjoint(y, size)


def squared_norm(f: Operator, size: Size, y: Tensor, iterations: int = 30) -> Tensor:
    """Largest eigenvalue of f^T f for every sample, (B, 1, 1, 1), by power iteration from a fixed start, to a few per cent from below.

    y (B, c, h, w) is an example of a measurement. The start is positive, as the pictures that blurs and averages shrink least are.
    """
    with torch.no_grad():
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(y).expand(len(y), -1, -1, -1)
        for _ in range(iterations):
            x = f.adjoint(f(x / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)), size)
        return torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
