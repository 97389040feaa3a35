"""DMAP: the posterior maximised by K projected gradient steps at every noise level. Alg. 2 and 4 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.base import whole
from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .adam import OPTIMIZERS, direction, optimizer_setting
from .base import Cost, Solver, check_choice, check_sphere, eta_setting, setting, zeta_setting
from .checks import check_finite, check_problem
from .guidance import check_guidance, every_setting, guide_setting, guided_levels, inner_setting, shift_of, told_guidance
from .step import check_step, jacobian_setting, strength_setting, told


def project(z: Tensor, mu: Tensor, sigma_up: float) -> Tensor:
    """The nearest point to z on every sample's sphere of centre mu and radius sqrt(d) sigma_up, d its number of elements (Eq. 17).

    That is where N(mu, sigma_up^2 I) has its mass in high dimension.
    """
    offset = (z - mu).float().flatten(1)
    radius = math.sqrt(offset.shape[1]) * sigma_up
    return mu + (offset * (radius / torch.linalg.vector_norm(offset, dim=1, keepdim=True))).view_as(z)


@dataclass(frozen=True, kw_only=True)
class DMAP(Solver):
    """One ancestral step without gradient, then K times: a gradient step at the *new* noise level, and back onto the sphere.

    zeta, strength, jacobian, optimizer, every, guide_start, guide_end and inner as in DPS. K >= 1: the paper's "same" has K = 2, half the steps and twice
    the zeta of DPS; its "full" has K = 3 and all steps. eta in (0, 1]: at 0 the sphere is a point. The last step has sigma_up = 0, where the projection undoes every gradient step: it is the
    denoised latent. So T steps cost T + (T - 1) K denoiser calls, (T - 1) K of them with gradient.
    """

    K: int = setting(
        "Gradient steps per noise level. 2 with half the steps and twice the zeta costs what DPS costs (the paper's 'same'); 3 with all steps is its 'full'.",
        default=2,
        least=1,
        most=100,
    )
    zeta: float | None = zeta_setting(9.6)
    eta: float = eta_setting(0.05)
    optimizer: str = optimizer_setting()
    strength: float = strength_setting()
    jacobian: str = jacobian_setting()
    every: int = every_setting()
    guide_start: float = guide_setting("guide_start")
    guide_end: float = guide_setting("guide_end")
    inner: int = inner_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, self.jacobian, self.optimizer)
        check_sphere(self.name(), self.eta)
        whole("K", self.K, 1)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_guidance(self)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        step = direction(self.optimizer)
        levels = check_problem(self, posterior, z, sigmas)
        guided, residual = [*guided_levels(self, len(levels) - 2), False], None
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            denoised = posterior.denoise(z, sigma)
            mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, self.eta)
            z = mu + sigma_up * randn_like(z, generator) if sigma_up > 0 else mu
            for _ in range(int(self.K) if guided[i] else 0):
                shift, denoised, residual = shift_of(self, posterior, z, sigma_next, sigma_up, step)
                check_finite(i, len(levels) - 1, self.zeta, shift, residual)
                z = project(z - shift, mu, sigma_up)
            if residual is None or sigma_next == 0:
                residual = posterior.residual(denoised if sigma_next > 0 else z, 0.0)
            check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        guided = guided_levels(self, steps - 1)
        calls = sum(guided) * int(self.K)
        gradients, through = calls * int(self.inner), calls if self.jacobian == "exact" else 0
        residuals = 1 + int(guided[:1] == [False])  # of the last step, and of a first one without a gradient
        return Cost(denoiser=steps + calls, denoiser_gradients=through, decoder=gradients + residuals, decoder_gradients=gradients)

    def describe(self) -> str:
        return f"DMAP ({', '.join([f'K {self.K}', told(self), *told_guidance(self)])})"
