"""A prior without ComfyUI: diffusers' networks, and a ControlNet of theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..schedule import double_on_cpu
from .keys import to_diffusers

FACTOR = 8  # pixels per latent, of all autoencoders that `open_base` reads

# Classes of the blocks that make up diffusers' UNets, ControlNets and autoencoders.
BLOCKS = frozenset(["ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Downsample2D"])


@dataclass
class BaseModel:
    """A frozen UNet and autoencoder. sigmas: (1000,) VE noise levels of the timesteps; context: (1, L, D) of the prompt."""

    unet: UNet2DConditionModel
    vae: nn.Module
    context: Tensor
    sigmas: Tensor
    prediction: str
    name: str
    fingerprint: str

    def new_controlnet(self, weights: Mapping[str, Tensor]) -> ControlNetModel:
        """diffusers' ControlNet of this base with the given weights (original names)."""
        controlnet = ControlNetModel.from_unet(self.unet, load_weights_from_unet=False)
        controlnet.load_state_dict(to_diffusers(weights))
        return controlnet

    def to(self, device: torch.device, dtype: torch.dtype) -> BaseModel:
        self.unet.to(device)
        if dtype != torch.float32:  # diffusers warns about every cast, also about one that changes nothing
            self.unet.to(dtype)
        self.vae.to(device)  # float32: half precision overflows in the autoencoder of SD 2
        self.context, self.sigmas = self.context.to(device, dtype), self.sigmas.to(device)
        return self

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """VE latents (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; the mean of the encoder, where it gives a distribution."""
        encoded = self.vae.encode(image.to(self.context.device, torch.float32))
        z0 = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return z0 * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, z0: Tensor) -> Tensor:
        return self.vae.decode(z0.float() / self.vae.config.scaling_factor).sample

    def denoise(self, controlnet: nn.Module | None, z: Tensor, timestep: Tensor, hint: Tensor | None) -> Tensor:
        """E[z0 | z, hint] of VE latents (B, C, h, w) at timesteps (B,), float32."""
        return self.denoise_at(controlnet, z, self.sigmas[timestep], timestep, hint)

    def denoise_at(self, controlnet: nn.Module | None, z: Tensor, sigma: Tensor, timestep: Tensor, hint: Tensor | None) -> Tensor:
        """The same at noise levels sigma (B,) that may lie between those of the timesteps."""
        sigma = sigma.view(-1, 1, 1, 1)
        x = (z / (1 + sigma**2).sqrt()).to(self.context.dtype)
        context = self.context.expand(len(z), -1, -1)
        control = {}
        if controlnet is not None:
            down, mid = controlnet(x, timestep, encoder_hidden_states=context, controlnet_cond=hint.to(x.dtype), return_dict=False)
            control = {"down_block_additional_residuals": [d.to(x.dtype) for d in down], "mid_block_additional_residual": mid.to(x.dtype)}
        out = self.unet(x, timestep, encoder_hidden_states=context, return_dict=False, **control)[0].float()
        if self.prediction == "v":
            return z / (1 + sigma**2) - out * sigma / (1 + sigma**2).sqrt()
        return z - sigma * out


class DiffusersPrior:
    """prior.Prior of a base model. `size` (H, W) is the picture's; a wider decoded picture is cropped to it.

    controlnet and hint (1 or B, 3, H, W), in the ControlNet's own range: a CSE that takes part in every call of the denoiser (Sec. 4.2).
    Between the noise levels of the model's timesteps the nearest timestep, by log sigma, stands for a level, as in ComfyUI.
    """

    def __init__(self, base: BaseModel, size: tuple[int, int], controlnet: nn.Module | None = None, hint: Tensor | None = None):
        self.base, self.size, self.controlnet = base, size, controlnet
        self.hint = None if hint is None else F.pad(hint, _surplus(size), mode="replicate").to(base.context.device)
        self._log_sigmas = double_on_cpu(base.sigmas).log()

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w): the size divided by the autoencoder's factor, rounded up."""
        return (self.base.unet.config.in_channels, *(-(-n // FACTOR) for n in self.size))

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        level = z.new_full((len(z),), sigma)
        timestep = (self._log_sigmas - math.log(sigma)).abs().argmin().to(z.device).expand(len(z))
        hint = None if self.hint is None else self.hint.expand(len(z), -1, -1, -1)
        return self.base.denoise_at(self.controlnet, z, level, timestep, hint)

    def decode(self, z0: Tensor) -> Tensor:
        image = self.base.vae.decode(z0.float() / self.base.vae.config.scaling_factor).sample
        return image[..., : self.size[0], : self.size[1]]

    def encode(self, image: Tensor) -> Tensor:
        encoded = self.base.vae.encode(F.pad(image, _surplus(image.shape[-2:]), mode="replicate"))
        z0 = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return z0 * self.base.vae.config.scaling_factor

    def networks(self) -> list[nn.Module]:
        return [self.base.unet, self.base.vae, *([self.controlnet] if self.controlnet else [])]

    def blocks(self) -> list[nn.Module]:
        return [m for network in self.networks() for m in network.modules() if type(m).__name__ in BLOCKS]

    def free_memory(self) -> float:
        device = self.base.context.device
        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return float(torch.cuda.mem_get_info(device)[0] + kept)
        import psutil

        return float(psutil.virtual_memory().available)


def _surplus(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What `decode` crops, as `F.pad` wants it."""
    h, w = (-n % FACTOR for n in size)
    return (0, w, 0, h)
