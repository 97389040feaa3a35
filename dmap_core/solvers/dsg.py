"""Diffusion with spherical Gaussian constraint: Yang et al. 2024, Eq. 40 and 41 of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .base import Cost, Solver, check_sphere, check_zeta, eta_setting, setting
from .checks import check_finite, check_problem
from .dmap import project


@dataclass(frozen=True, kw_only=True)
class DSG(Solver):
    """u* = -sqrt(d) sigma_up g / ||g||, u = eps + zeta (u* - eps), z_{t-1} = mu + sqrt(d) sigma_up u / ||u||, g = grad_{z_t} ||f(D(z0)) - y||

    zeta in (0, 1] is a mix rate, not a step size: 0.08 in the paper, 1 is steepest descent on the sphere; it has no unit, and was better unscaled
    with few steps (docs/solvers.md). d and both norms are every sample's own. eta in (0, 1]: at 0 the sphere is a point. T steps cost T denoiser
    calls, T - 1 of them with gradient: at the last step sigma_up = 0 and z0 is the denoised latent, unguided.
    """

    zeta: float = setting(
        "Mix rate, not a step size: how far the noise is turned, 0 to 1 (paper: 0.08 at 500 steps). With some dozens of steps several times that.",
        usual=0.08,
        least=0.001,
        most=1.0,
        step=0.01,
        digits=0.001,
    )
    eta: float = eta_setting(0.05)

    def __post_init__(self):
        check_zeta(self.zeta)
        check_sphere(self.name(), self.eta)
        if self.zeta > 1:
            raise ValueError(f"zeta is {self.zeta:g}; DSG's is a mix rate between 0 (no guidance) and 1 (no noise), 0.08 in the paper")

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            if sigma_next > 0:
                grad, denoised, residual = posterior.gradient(z, sigma)
                check_finite(i, len(levels) - 1, self.zeta, grad, residual)
                mu, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, self.eta)
                radius = math.sqrt(z[0].numel()) * sigma_up
                noise = sigma_up * randn_like(z, generator)
                steepest = -radius * unit(grad, instead=-noise)
                z = project(mu + noise + self.zeta * (steepest - noise), mu, sigma_up)
            else:  # no sphere to move on: a gradient would be thrown away
                denoised = posterior.denoise(z, sigma)
                z, _ = ancestral_step(z, denoised, sigma, sigma_next, self.eta)
                residual = posterior.residual(z, 0.0)
            check_finite(i, len(levels) - 1, self.zeta, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        return Cost(denoiser=steps, denoiser_gradients=steps - 1, decoder=steps, decoder_gradients=steps - 1)


def unit(g: Tensor, instead: Tensor) -> Tensor:
    """g / ||g|| of every sample; of `instead` where g is 0, so that a sample with nothing left to gain keeps its noise."""

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.flatten(1).float(), dim=1).to(x).view(-1, *[1] * (x.ndim - 1))

    g = torch.where(norm(g) > 0, g, instead)
    return g / norm(g)
