"""Posterior sampling with latent diffusion: Rout et al. 2023, Eq. 35 of the paper (whose first norm lacks the decoder)."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..operators import Operator
from ..operators.base import Size, squared_norm
from ..posterior import Posterior
from .base import STEP, Cost, Solver, check_choice, check_eta, check_zeta, choice_setting, eta_setting, setting, zeta_setting
from .checks import check_finite, check_problem
from .dps import guided_step

TRANSPOSES = ("adjoint", "published")


@dataclass(frozen=True, kw_only=True)
class PSLD(Solver):
    """z_{t-1} = mu + sigma_up eps - zeta grad ||f(D(z0)) - y|| - gamma grad ||z0 - E(f^T(y) + D(z0) - f^T(f(D(z0))))||, both at z_t

    zeta > 0 as in DPS, gamma >= 0 in the same units (paper: 0.002 zeta). transpose: what f^T is. "adjoint": the true adjoint divided by the squared
    norm of f, so that f^T(f(.)) is a projection where f is a mask or a plain average and never stretches a picture elsewhere. "published": what
    the authors' code uses, the nearest-neighbour enlargement of y (the identity for blur). eta: 1 ancestral, 0 PF-ODE. T steps cost T denoiser
    calls, each with gradient, also through the encoder. Linear operators only.
    """

    zeta: float = zeta_setting(4.8, MISSING)
    gamma: float = setting(
        "Weight of the second term, in the units of zeta (paper: 0.002 zeta). 0 is DPS.",
        usual=0.0096,
        least=0.0,
        most=1000.0,
        step=0.001,
        digits=0.0001,
        scales=STEP,
    )
    transpose: str = choice_setting(
        TRANSPOSES,
        "The operator's transpose in the second term. adjoint: the true one, scaled. published: what the authors' code uses in its place, "
        "the measurement enlarged without interpolation.",
    )
    eta: float = eta_setting()

    def __post_init__(self):
        check_zeta(self.zeta)
        check_eta(self.eta)
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma is {self.gamma}; the weight of the gluing term must be a number of at least 0")
        check_choice("transpose", self.transpose, TRANSPOSES)

    def check(self, operator: Operator, steps: int) -> None:
        check_linear(operator)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        f, encode = posterior.operator, posterior.prior.encode
        y = f.seen(posterior.y)  # the published transpose, unlike the true one, would glue in what the measurement shows in a hole
        back = transposed(f, f.image_size(y), y, self.transpose)

        def glue(z0: Tensor, image: Tensor) -> Tensor:
            glued = encode(image + back(y - f(image)))
            return (self.gamma / self.zeta) * torch.linalg.vector_norm((z0 - glued).float().flatten(1), dim=1)

        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            grad, denoised, residual = posterior.gradient(z, sigma, extra=glue)
            z = guided_step(z, denoised, self.zeta * grad, sigma, sigma_next, self.eta, generator)
            check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        return Cost(
            denoiser=steps, denoiser_gradients=steps, decoder=steps, decoder_gradients=steps, encoder=steps, encoder_gradients=steps
        )


def check_linear(f: Operator) -> None:
    """Raises ValueError for an operator without transpose."""
    if not f.linear:
        raise ValueError(f"operator: {f.describe()} is not linear, and PSLD needs its transpose; use DMAP, DPS, DSG or FreeDoM instead")


def transposed(f: Operator, size: Size, y: Tensor, kind: str = "adjoint"):
    """y -> f^T(y), an image of `size`, for the gluing term. y (B, c, h, w) is an example. Raises ValueError for nonlinear f."""
    check_choice("transpose", kind, TRANSPOSES)
    check_linear(f)
    if kind == "published":
        return lambda y: F.interpolate(y, size, mode="nearest").expand(-1, 3, -1, -1)
    scale = 1 / squared_norm(f, size, y)
    return lambda y: scale * f.adjoint(y, size)
