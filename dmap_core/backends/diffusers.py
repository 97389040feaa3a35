"""A prior without ComfyUI: diffusers' networks, and a ControlNet of theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..memory import blocks_of
from ..prior import levels_of
from ..schedule import double_on_cpu, flow_time
from ..tiles import Part, decoding, denoising, tiled
from .keys import to_diffusers, to_ldm

Network = Any  # a model of diffusers, whose decorators hide its types

FLOW_TIMESTEPS = 1000  # what a flow's network is told at t = 1
FACTOR = 8  # pixels per latent, of all autoencoders that `open_base` reads

# Classes of the blocks that make up diffusers' UNets, ControlNets and autoencoders.
BLOCKS = frozenset(["ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Downsample2D"])


@dataclass(eq=False)
class DiffusersPrior:
    """prior.NetworkPrior of a frozen UNet and autoencoder, and of a ControlNet that takes part in every call of the denoiser (Sec. 4.2).

    context: (1, L, D) of the prompt. sigmas: (N,) VE noise levels of the timesteps. prediction: "eps", "v" or "flow". name, fingerprint: of the
    checkpoint. size: (H, W) of the picture, to which a wider decoded one is cropped; None: as wide as its latents. hint: (1 or B, 3, H, W).
    tile: latents of a side of the tiles on which the networks run (`tiles.py`); None: whole pictures.
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

    def sized(self, size: tuple[int, int]) -> DiffusersPrior:
        """The same networks for pictures of that size (H, W)."""
        found = copy.copy(self)
        found.size = size
        return found

    def tiled(self, tile: int | None) -> DiffusersPrior:
        """The same networks on tiles of so many latents a side."""
        found = copy.copy(self)
        found.tile = tile
        return found

    def controlled(self, controlnet: nn.Module | None, hint: Tensor | None) -> DiffusersPrior:
        """The same networks with a ControlNet that sees the hint, which is in the ControlNet's own range; its edges are repeated up to whole latents."""
        found = copy.copy(self)
        found.controlnet = controlnet
        found.hint = None if hint is None else F.pad(hint, _surplus(hint), mode="replicate").to(self.context.device)
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
        """(C, h, w): the size divided by the autoencoder's factor, rounded up."""
        if self.size is None:
            raise ValueError("this prior is for pictures of no size yet: take that of sized(...)")
        height, width = (-(-n // FACTOR) for n in self.size)
        return self.unet.config.in_channels, height, width

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

    def decode(self, z0: Tensor) -> Tensor:
        return self.decoded_by(self.vae)(z0)

    def decoded_by(self, vae: Network) -> Callable[[Tensor], Tensor]:
        """z0 -> the picture that another autoencoder of the same latents makes of it, as `decode` does."""

        def decode(z0: Tensor) -> Tensor:
            z0 = z0.float() / vae.config.scaling_factor
            if self.tile is None:
                image = vae.decode(z0).sample
            else:
                image = tiled(lambda z0, _: vae.decode(z0).sample, z0, decoding(self.tile), FACTOR)
            return image if self.size is None else image[..., : self.size[0], : self.size[1]]

        return decode

    def encode(self, image: Tensor) -> Tensor:
        """Latents of images; the mean of the encoder, where it gives a distribution."""
        image = F.pad(image, _surplus(image), mode="replicate")
        encoded = self.vae.encode(image.to(self.context.device, torch.float32))
        z0 = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return z0 * self.vae.config.scaling_factor

    def networks(self) -> list[nn.Module]:
        return [self.unet, self.vae, *([self.controlnet] if self.controlnet else [])]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.networks(), BLOCKS)

    def free_memory(self) -> float:
        device = self.context.device
        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return float(torch.cuda.mem_get_info(device)[0] + kept)
        import psutil

        return float(psutil.virtual_memory().available)


def _surplus(image: Tensor) -> tuple[int, int, int, int]:
    """What `decode` crops of pictures like this one, as `F.pad` wants it."""
    h, w = (-n % FACTOR for n in image.shape[-2:])
    return (0, w, 0, h)
