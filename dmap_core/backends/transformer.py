"""A prior without ComfyUI: diffusers' flow transformers (SD3, Flux.1 and their like)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..prior import levels_of
from ..schedule import flow_time
from ..tiles import denoising, tiled
from .autoencoded import FACTOR, Autoencoded, Network
from .families import PATCH, Family
from .flow import Shift, flow_times

NO_CSE = "a CSE is a ControlNet of a UNet, and cannot be made for a transformer"


@dataclass(eq=False)
class TransformerPrior(Autoencoded):
    """prior.NetworkPrior of a frozen flow transformer and its autoencoder, which speaks of VE latents as every other.

    conditioned: what the network reads of the prompt and of distilled guidance, each (1, ...). shift: of its noise levels. name, fingerprint: of the folder.
    Latents that patches do not fill are continued from the other edge for the network, as in ComfyUI: noise stays noise.
    """

    transformer: Network
    vae: Network
    family: Family
    conditioned: dict[str, Tensor]
    shift: Shift
    name: str
    fingerprint: str
    size: tuple[int, int] | None = None
    tile: int | None = None
    prediction: str = "flow"

    @property
    def device(self) -> torch.device:
        return next(iter(self.conditioned.values())).device

    @property
    def sigmas(self) -> Tensor:
        """(N,) rising noise levels of the training times, for pictures of this size where the shift goes by size; also on tiles that of the whole picture."""
        tokens = 0
        if self.shift.line is not None:
            height, width = self.latent_size()
            tokens = -(-height // PATCH) * -(-width // PATCH)
        return flow_times(self.shift.of(tokens)).to(self.device)

    def to(self, device: torch.device, dtype: torch.dtype) -> TransformerPrior:
        self.transformer.to(device)
        if self.transformer.dtype != dtype:  # diffusers warns about every cast, also about one that changes nothing
            self.transformer.to(dtype)
        self.vae.to(device)  # float32
        self.conditioned = {name: tensor.to(device, dtype) for name, tensor in self.conditioned.items()}
        return self

    def controlled(self, controlnet: nn.Module | None, hint: Tensor | None) -> TransformerPrior:
        """The same prior; there is no ControlNet to take."""
        if controlnet is not None:
            raise ValueError(f"{self.name} is {self.family.name}: {NO_CSE}")
        return copy.copy(self)

    def original_weights(self) -> Mapping[str, Tensor]:
        raise ValueError(f"{self.name} is {self.family.name}: {NO_CSE}")

    def new_controlnet(self, weights: Mapping[str, Tensor]) -> nn.Module:
        raise ValueError(f"{self.name} is {self.family.name}: {NO_CSE}")

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return self.vae.config.latent_channels, *self.latent_size()

    def conditioning(self) -> list[Tensor]:
        return list(self.conditioned.values())

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        if self.tile is None:
            return self._denoise(z, sigma)
        return tiled(lambda z, _: self._denoise(z, sigma), z, denoising(self.tile))

    def _denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        t = flow_time(levels_of(z, sigma))
        times = t.view(-1, 1, 1, 1)
        x = (1 - times) * z
        return x - times * self._velocity(x.to(self.transformer.dtype), t).to(z.dtype)

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[eps - z0 | x_t], (B, C, h, w)."""
        height, width = x.shape[-2:]
        most = self.family.side(self.transformer.config)
        if most is not None and max(height, width) > most:
            raise ValueError(
                f"the picture has {FACTOR * width}x{FACTOR * height} pixels, and {self.name} ({self.family.name}) has places for "
                f"{FACTOR * most} a side; take a smaller one, or a tile"
            )
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH), mode="circular")
        given = {name: tensor.to(x.dtype) for name, tensor in self.conditioned.items()}
        return self.family.velocity(self.transformer, x, t, given)[..., :height, :width]

    def networks(self) -> list[nn.Module]:
        return [self.transformer, self.vae]
