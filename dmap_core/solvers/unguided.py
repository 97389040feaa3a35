"""The model alone, without guidance by the measurement: what a CSE makes by itself (Fig. 7), or what the prior dreams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..posterior import Posterior
from ..schedule import ancestral_step, randn_like
from .base import Cost, Solver, check_eta, eta_setting
from .checks import check_finite, check_problem


def unguided_steps(
    denoise: Callable[[Tensor, float], Tensor],
    z: Tensor,
    levels: Sequence[float],
    eta: float,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(denoised, z) of every step, without a measurement and without checks. levels: falling to 0."""
    for sigma, sigma_next in pairwise(levels):
        denoised = denoise(z, sigma)
        z, sigma_up = ancestral_step(z, denoised, sigma, sigma_next, eta)
        if sigma_up > 0:
            z = z + sigma_up * randn_like(z, generator)
        yield denoised, z


@dataclass(frozen=True, kw_only=True)
class Unguided(Solver):
    """z_{t-1} = mu + sigma_up eps   (Eq. 2)

    eta: 1 ancestral (DDPM), 0 PF-ODE (DDIM). The residual, of the denoised latent, is computed for the callback only. T steps cost T denoiser calls.
    """

    eta: float = eta_setting()

    def __post_init__(self):
        check_eta(self.eta)

    @torch.no_grad()
    def __call__(self, posterior: Posterior, z: Tensor, sigmas, generator=None, callback=None) -> Tensor:
        levels = check_problem(self, posterior, z, sigmas)
        for i, (denoised, z) in enumerate(unguided_steps(posterior.denoise, z, levels, self.eta, generator)):  # noqa: B020 (the last one)
            residual = posterior.residual(denoised, 0.0) if callback else z.new_zeros(len(z))
            check_finite(i, len(levels) - 1, 1.0, z, residual)
            if callback:
                callback(i, denoised, z, residual)
        return z

    def cost(self, steps: int) -> Cost:
        """Without a callback."""
        return Cost(denoiser=steps, denoiser_gradients=0, decoder=0, decoder_gradients=0)
