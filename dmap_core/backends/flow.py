"""A prior given by the velocity of a rectified flow, and the times that one was trained at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prior import Prior, levels_of
from ..schedule import flow_sigmas, flow_time

TIMESTEPS = 1000


def flow_times(shift: float) -> Tensor:
    """(N,) rising VE noise levels of a flow's training times, which are shifted: t -> shift t / (1 + (shift - 1) t) (Esser et al. 2024, Eq. 23)."""
    t = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    return flow_sigmas(shift * t / (1 + (shift - 1) * t))


@dataclass(frozen=True)
class Shift:
    """The shift of a flow's times: the same for all pictures, or one that grows with them.

    fixed: the first kind. line: two points (tokens, mu) of the second, a straight line that goes on beyond them, as in diffusers' pipelines; the
    shift is exp(mu), or mu itself where it is not exponential. Tokens are patches of 2x2 latents.
    """

    fixed: float = 1.0
    line: tuple[tuple[float, float], tuple[float, float]] | None = None
    exponential: bool = True

    def of(self, tokens: int) -> float:
        if self.line is None:
            return self.fixed
        (low, mu_low), (high, mu_high) = self.line
        mu = mu_low + (mu_high - mu_low) * (tokens - low) / (high - low)
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class FlowPrior:
    """The prior of x_t = (1 - t) z0 + t eps (Liu et al. 2022): z = x_t / (1 - t) is its VE latent, at sigma = t / (1 - t).

    velocity: (x (B, C, h, w), t (B,)) -> E[eps - z0 | x_t], of whatever model, differentiable. autoencoder: whose decoder and encoder belong to it.
    """

    velocity: Callable[[Tensor, Tensor], Tensor]
    autoencoder: Prior

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        t = flow_time(levels_of(z, sigma))
        level = t.view(-1, *[1] * (z.ndim - 1))
        x = (1 - level) * z
        return x - level * self.velocity(x, t)

    def decode(self, z0: Tensor) -> Tensor:
        return self.autoencoder.decode(z0)

    def encode(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image)

    def networks(self):
        return self.autoencoder.networks()

    def blocks(self):
        return self.autoencoder.blocks()

    def free_memory(self) -> float:
        return self.autoencoder.free_memory()
