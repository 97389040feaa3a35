"""A prior given by the velocity of a rectified flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..prior import Prior, levels_of
from ..schedule import flow_time


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
