"""What a solver needs of a latent diffusion model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # in which networks compute


def levels_of(z: Tensor, sigma: float | Tensor) -> Tensor:
    """(B,) noise levels of the latents z, for one that they share or for those themselves."""
    return sigma.to(z) if isinstance(sigma, Tensor) else z.new_full((len(z),), sigma)


class Prior(Protocol):
    """A denoiser and an autoencoder, all differentiable. Latents are (B, C, h, w) in VE space, scaled as the denoiser wants them."""

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        """E[z0 | z] at noise level sigma, or at levels (B,) (Tweedie, Eq. 4), float32, never clamped."""
        ...

    def decode(self, z0: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1], float32, not clamped."""
        ...

    def encode(self, image: Tensor) -> Tensor:
        """Latent of an image (B, 3, H, W)."""
        ...

    def networks(self) -> Iterable[nn.Module]:
        """The networks behind denoise and decode, whose weights take no memory of a gradient's; empty for closed forms."""
        ...

    def blocks(self) -> Iterable[nn.Module]:
        """The modules of those networks that may run again on a gradient's way back instead of keeping their activations."""
        ...

    def free_memory(self) -> float:
        """Bytes that activations may take now; infinite where memory does not matter."""
        ...


class NetworkPrior(Prior, Protocol):
    """A prior that was trained at timesteps, and for which ControlNets can be.

    sigmas: (N,) rising VE noise levels of the timesteps. prediction: what its network predicts, "eps", "v" or "flow". fingerprint: tells networks apart.
    """

    prediction: str
    fingerprint: str

    @property
    def sigmas(self) -> Tensor: ...

    def controlled(self, controlnet: nn.Module | None, hint: Tensor | None) -> NetworkPrior:
        """The prior that sees a hint (B, 3, H, W), in the ControlNet's own range, through a ControlNet; None: the prior without one."""
        ...

    def original_weights(self) -> Mapping[str, Tensor]:
        """The denoiser's weights under the names that they have in the original code."""
        ...

    def new_controlnet(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A ControlNet of this prior's kind with these weights (original names), float32."""
        ...

    def conditioning(self) -> Sequence[Tensor]:
        """What the networks read of the prompt."""
        ...
