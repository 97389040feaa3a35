"""A prior without ComfyUI: diffusers' networks, and a ControlNet of theirs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..prior import levels_of
from ..schedule import double_on_cpu, flow_time
from ..tiles import Part, denoising, tiled
from .autoencoded import FACTOR, Autoencoded, Network, surplus
from .keys import to_diffusers, to_ldm

FLOW_TIMESTEPS = 1000  # what a flow's network is told at t = 1


@dataclass(eq=False)
class DiffusersPrior(Autoencoded):
    """prior.NetworkPrior of a frozen UNet and autoencoder, and of a ControlNet that takes part in every call of the denoiser (Sec. 4.2).

    context: (1, L, D) of the prompt. sigmas: (N,) VE noise levels of the timesteps. prediction: "eps", "v" or "flow". name, fingerprint: of the
    checkpoint. hint: (1 or B, 3, H, W).
    Between the noise levels of the timesteps the nearest timestep, by log sigma, stands for a level, as in ComfyUI; a flow's times have no steps.
    """

    unet: Network
    vae: Network
    context: Tensor
    sigmas: Tensor
    prediction: str
    name: str
    fingerprint: str
    size: tuple[int, int] | None = None
    controlnet: Network | None = None
    hint: Tensor | None = None
    tile: int | None = None
    _log_sigmas: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        self._log_sigmas = double_on_cpu(self.sigmas).log()

    @property
    def device(self) -> torch.device:
        return self.context.device

    def controlled(self, controlnet: nn.Module | None, hint: Tensor | None) -> DiffusersPrior:
        """The same networks with a ControlNet that sees the hint, which is in the ControlNet's own range; its edges are repeated up to whole latents."""
        found = copy.copy(self)
        found.controlnet = controlnet
        found.hint = None if hint is None else F.pad(hint, surplus(hint), mode="replicate").to(self.context.device)
        return found

    def original_weights(self) -> dict[str, Tensor]:
        return to_ldm(self.unet.state_dict())

    def new_controlnet(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """diffusers' ControlNet of this base with the given weights (original names)."""
        controlnet = ControlNetModel.from_unet(self.unet, load_weights_from_unet=False)
        controlnet.load_state_dict(to_diffusers(weights))
        return controlnet

    def to(self, device: torch.device, dtype: torch.dtype) -> DiffusersPrior:
        self.unet.to(device)
        if dtype != torch.float32:  # diffusers warns about every cast, also about one that changes nothing
            self.unet.to(dtype)
        self.vae.to(device)  # float32: half precision overflows in the autoencoder of SD 2
        self.context, self.sigmas = self.context.to(device, dtype), self.sigmas.to(device)
        return self

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)"""
        return self.unet.config.in_channels, *self.latent_size()

    def conditioning(self) -> list[Tensor]:
        return [self.context]

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        if self.tile is None:
            return self._denoise(z, sigma, self.hint)
        return tiled(lambda z, part: self._denoise(z, sigma, self._hint_of(part)), z, denoising(self.tile))

    def _hint_of(self, part: Part) -> Tensor | None:
        """What the ControlNet sees of a tile."""
        rows, columns = (slice(FACTOR * s.start, FACTOR * s.stop) for s in part)
        return self.hint if self.hint is None else self.hint[..., rows, columns]

    def _denoise(self, z: Tensor, sigma: float | Tensor, hint: Tensor | None) -> Tensor:
        levels = levels_of(z, sigma).view(-1, 1, 1, 1)
        flow = self.prediction == "flow"
        timestep = FLOW_TIMESTEPS * flow_time(levels.flatten()) if flow else self._timesteps(sigma).to(z.device).expand(len(z))
        x = (z / (1 + levels if flow else (1 + levels**2).sqrt())).to(self.context.dtype)
        context = self.context.expand(len(z), -1, -1)
        control = {}
        if self.controlnet is not None:
            if hint is None:
                raise ValueError("the ControlNet has nothing to see: give controlled(...) a hint")
            hint = hint.expand(len(z), -1, -1, -1).to(x.dtype)
            down, mid = self.controlnet(x, timestep, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
            control = {"down_block_additional_residuals": [d.to(x.dtype) for d in down], "mid_block_additional_residual": mid.to(x.dtype)}
        out = self.unet(x, timestep, encoder_hidden_states=context, return_dict=False, **control)[0].float()
        if flow:  # its velocity is eps - z0
            return z / (1 + levels) - flow_time(levels) * out
        if self.prediction == "v":
            return z / (1 + levels**2) - out * levels / (1 + levels**2).sqrt()
        return z - levels * out

    def _timesteps(self, sigma: float | Tensor) -> Tensor:
        """The nearest ones, (B,), or (1,) for a single level."""
        levels = double_on_cpu(sigma if isinstance(sigma, Tensor) else [sigma])
        return (self._log_sigmas - levels.log().unsqueeze(1)).abs().argmin(1)

    def networks(self) -> list[nn.Module]:
        return [self.unet, self.vae, *([self.controlnet] if self.controlnet else [])]
