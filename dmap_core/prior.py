"""What a solver needs of a latent diffusion model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn


class Prior(Protocol):
    """A denoiser and an autoencoder, all differentiable. Latents are (B, C, h, w) in VE space, scaled as the denoiser wants them."""

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        """E[z0 | z] at noise level sigma (Tweedie, Eq. 4), float32, never clamped."""

    def decode(self, z0: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1], float32, not clamped."""

    def encode(self, image: Tensor) -> Tensor:
        """Latent of an image (B, 3, H, W)."""

    def networks(self) -> Iterable[nn.Module]:
        """The networks behind denoise and decode, whose weights take no memory of a gradient's; empty for closed forms."""

    def blocks(self) -> Iterable[nn.Module]:
        """The modules of those networks that may run again on a gradient's way back instead of keeping their activations."""

    def free_memory(self) -> float:
        """Bytes that activations may take now; infinite where memory does not matter."""
