"""A prior without ComfyUI: diffusers' networks, from a single-file checkpoint or a diffusers folder, and a CSE for them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cse.checkpoint import read_controlnet
from ..cse.diffusers_models import BaseModel
from ..cse.loss import in_range
from ..cse.metadata import CSEMetadata
from ..schedule import double_on_cpu

FACTOR = 8  # pixels per latent, of all autoencoders that `open_base` reads


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


def open_cse(path: Path, base: BaseModel) -> tuple[nn.Module, CSEMetadata | None]:
    """(diffusers' ControlNet without gradients of its weights, what the file says about itself) of a CSE for this base.

    Raises ValueError, naming the file, for one that was made for another kind of base model.
    """
    weights, metadata = read_controlnet(path)
    try:
        controlnet = base.new_controlnet({name: tensor.float() for name, tensor in weights.items()})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} was made for another base model than {base.name}: {error}") from error
    if metadata and metadata.prediction != base.prediction:
        raise ValueError(
            f"{path} was trained for {metadata.prediction}-prediction, and {base.name} makes {base.prediction}-predictions; "
            f"use it with {metadata.base or 'the checkpoint that it was trained on'}"
        )
    controlnet = controlnet.requires_grad_(False).eval().to(base.context.device)
    return controlnet if base.context.dtype == torch.float32 else controlnet.to(base.context.dtype), metadata


def hint_for(hint: Tensor, metadata: CSEMetadata | None) -> Tensor:
    """An operator's hint (B, 3, H, W) in [-1, 1] in the range that the file asks for; [0, 1], as in diffusers, where it says nothing."""
    return in_range(hint, metadata.hint_range if metadata else "0..1")
