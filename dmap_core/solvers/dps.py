"""Diffusion posterior sampling: Chung et al. 2022, Alg. 1 and 3 of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .adam import OPTIMIZERS, direction, optimizer_setting
from .base import Cost, Solver, check_choice, check_eta, eta_setting, zeta_setting
from .checks import check_finite, check_problem
from .guidance import check_guidance, every_setting, guide_setting, guided_levels, inner_setting, shift_of, told_guidance
from .step import check_step, jacobian_setting, strength_setting, told


@dataclass(frozen=True, kw_only=True)
class DPS(Solver):
    """z_{t-1} = mu + sigma_up eps - zeta grad_{z_t} ||f(D(z0(z_t))) - y||   (Eq. 19)

    zeta > 0 in VE latent units per unit of the residual's gradient (4.8 for SR x8 of 512x512 pictures at 500 steps); None: the step sets itself
    (step.step_size), `strength` in (0, 2] of Polyak's. jacobian: "exact", or "none" for the gradient with respect to z0 in its place. optimizer: "adam" steps
    along Adam's direction instead of the gradient (C.1); zeta is then the step of every latent element. eta: 1 ancestral (DDPM), 0 PF-ODE (DDIM).
    every, guide_start, guide_end: the noise levels that are guided, and inner: gradient steps per denoiser call (guidance.py); by default all, and one.
    T steps cost T denoiser calls, each with gradient.
    """

    zeta: float | None = zeta_setting(4.8)
    eta: float = eta_setting()
    optimizer: str = optimizer_setting()
    strength: float = strength_setting()
    jacobian: str = jacobian_setting()
    every: int = every_setting()
    guide_start: float = guide_setting("guide_start")
    guide_end: float = guide_setting("guide_end")
    inner: int = inner_setting()

    def __post_init__(self):
        check_step(self.zeta, self.strength, self.jacobian, self.optimizer)
        check_eta(self.eta)
        check_guidance(self)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        step = direction(self.optimizer)
        levels = check_problem(self, posterior, z, sigmas)
        guided, residual = guided_levels(self, len(levels) - 1), None
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if guided[i]:
                shift, denoised, residual = shift_of(self, posterior, z, sigma, sigma, step)
            else:
                shift, denoised = 0.0, posterior.denoise(z, sigma)
                residual = posterior.residual(denoised, 0.0) if residual is None else residual
            z = guided_step(z, denoised, shift, sigma, sigma_next, self.eta, generator)
            check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        guided = guided_levels(self, steps)
        gradients = sum(guided) * int(self.inner)
        through = gradients if self.jacobian == "exact" else 0
        first = int(guided[:1] == [False])  # whose residual is told before there is a gradient
        return Cost(denoiser=steps, denoiser_gradients=through, decoder=gradients + first, decoder_gradients=gradients)

    def describe(self) -> str:
        return f"DPS ({', '.join([told(self), *told_guidance(self)])})"


def guided_step(z: Tensor, denoised: Tensor, shift: Tensor | float, sigma: float, sigma_next: float, eta: float, generator) -> Tensor:
    """mu + sigma_up eps - shift: an ancestral step, guided by shift = zeta grad. PSLD, FreeDoM and ReSample take it too."""
    mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
    z = mu - shift
    return z + sigma_up * randn_like(z, generator) if sigma_up > 0 else z


def guided_denoised(denoised: Tensor, grad: Tensor, zeta: float | Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The denoised latent that belongs to DPS's conditional score (Prop. 1, Eq. 9): an ancestral step from it is a DPS step.

    In VE space the ancestral mean is mu = (1 - a) denoised + a z with a = sigma_next^2 / sigma^2, hence the division.
    """
    return denoised - (zeta / (1 - sigma_next**2 / sigma**2)) * grad
