"""The half of a prior that all of diffusers' models share: an autoencoder, the picture's size, tiles and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..memory import blocks_of
from ..tiles import decoding, encoding, tiled

Network = Any  # a model of diffusers, whose decorators hide its types
Kind = TypeVar("Kind", bound="Autoencoded")

FACTOR = 8  # pixels per latent, of all autoencoders that are opened

# Classes of the blocks that make up diffusers' UNets, ControlNets and autoencoders, and its transformers.
BLOCKS = frozenset(["ResnetBlock2D", "Transformer2DModel", "Upsample2D", "Downsample2D"]) | {
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
    "ChromaTransformerBlock",
    "ChromaSingleTransformerBlock",
    "AuraFlowJointTransformerBlock",
    "AuraFlowSingleTransformerBlock",
    "Lumina2TransformerBlock",
    "ZImageTransformerBlock",
}


class Autoencoded:
    """vae: an AutoencoderKL or AutoencoderTiny. size: (H, W) of the picture, to which a wider decoded one is cropped; None: as wide as its latents.

    tile: latents of a side of the tiles on which the networks run (`tiles.py`); None: whole pictures. device: where the networks are.
    """

    vae: Network
    size: tuple[int, int] | None
    tile: int | None

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def networks(self) -> list[nn.Module]:
        raise NotImplementedError

    def sized(self: Kind, size: tuple[int, int]) -> Kind:
        """The same networks for pictures of that size (H, W)."""
        found = copy.copy(self)
        found.size = size
        return found

    def tiled(self: Kind, tile: int | None) -> Kind:
        """The same networks on tiles of so many latents a side."""
        found = copy.copy(self)
        found.tile = tile
        return found

    def latent_size(self) -> tuple[int, int]:
        """(h, w): the size divided by the autoencoder's factor, rounded up."""
        if self.size is None:
            raise ValueError("this prior is for pictures of no size yet: take that of sized(...)")
        height, width = (-(-n // FACTOR) for n in self.size)
        return height, width

    def decode(self, z0: Tensor) -> Tensor:
        return self.decoded_by(self.vae)(z0)

    def decoded_by(self, vae: Network) -> Callable[[Tensor], Tensor]:
        """z0 -> the picture that another autoencoder of the same latents makes of it, as `decode` does. Raises ValueError where it is of others."""
        scale, shift = scale_and_shift(vae)
        if vae.config.latent_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"guidance: the decoder takes latents of {vae.config.latent_channels} channels, and the model's have "
                f"{self.vae.config.latent_channels}; leave it out, or take a decoder that was made for this model"
            )

        def decode(z0: Tensor) -> Tensor:
            z0 = z0.to(vae.dtype) / scale + shift
            if self.tile is None:
                image = vae.decode(z0).sample
            else:
                image = tiled(lambda z0, _: vae.decode(z0).sample, z0, decoding(self.tile), FACTOR)
            return image if self.size is None else image[..., : self.size[0], : self.size[1]]

        return decode

    def encode(self, image: Tensor) -> Tensor:
        """Latents of images; the mean of the encoder, where it gives a distribution."""
        scale, shift = scale_and_shift(self.vae)
        image = F.pad(image, surplus(image), mode="replicate")
        image = image.to(self.device, self.vae.dtype)

        def encode(picture: Tensor, _=None) -> Tensor:
            encoded = self.vae.encode(picture)
            return encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()

        z0 = encode(image) if self.tile is None else tiled(encode, image, encoding(self.tile), of=FACTOR)
        return (z0 - shift) * scale

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.networks(), BLOCKS)

    def free_memory(self) -> float:
        device = self.device
        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return float(torch.cuda.mem_get_info(device)[0] + kept)
        import psutil

        return float(psutil.virtual_memory().available)


def scale_and_shift(vae: Network) -> tuple[float, float]:
    """Latents of a denoiser are (what the encoder makes - shift) scale; older autoencoders have no shift."""
    return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0


def surplus(image: Tensor) -> tuple[int, int, int, int]:
    """What `decode` crops of pictures like this one, as `F.pad` wants it."""
    h, w = (-n % FACTOR for n in image.shape[-2:])
    return (0, w, 0, h)
