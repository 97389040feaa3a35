"""ComfyUI's MODEL and VAE as a dmap_core Prior, and which of them can be one.

VAE.decode clamps and may decode in tiles, so that the network behind it is called instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...dmap_core.backends.fingerprint import fingerprint
from ...dmap_core.memory import blocks_of
from ...dmap_core.operators import Operator
from ...dmap_core.presets import MODELS
from ...dmap_core.prior import levels_of
from ...dmap_core.schedule import flow_sigmas
from ...dmap_core.tiles import decoding, encoding, tiled
from .flow import is_flow

# Classes of the blocks that UNets, ControlNets and decoders are made of here, TAESD among them; and those of flow transformers.
BLOCKS = frozenset(["ResBlock", "SpatialTransformer", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Block"])
FLOW_BLOCKS = frozenset(["JointBlock", "DoubleStreamBlock", "SingleStreamBlock", "MMDiTBlock", "DiTBlock", "JointTransformerBlock"])
SDXL_WIDTH, SDXL_REFINER_WIDTH = 2048, 1280  # of their context
ROUND_TRIP_SIZE = 256  # pixels of the middle of a measurement that are tried
ROUND_TRIP_PSNR = 20.0  # dB below which a VAE is not one for such pictures
USABLE = "Use Stable Diffusion 1.5, 2.0, 2.1, SDXL or 3.5, Flux.1, Chroma, AuraFlow, Lumina 2 or Z-Image"
LARGEST_SHARE = 0.5  # of a GPU's memory that the weights may take of a model through which gradients go
GUIDANCE_PSNR = 15.0  # dB between two decoders below which one does not stand for the other


class HostPrior:
    """dmap_core.prior.Prior of a loaded ComfyUI model and VAE. `size` (H, W) is the picture's; a wider decoded picture is cropped to it.

    autoencoders: the loaded networks of `vae`, and of `guidance_vae` where there is one. tile: latents of a side of the tiles on which networks run, one after
    the other; None: whole pictures.
    """

    def __init__(
        self,
        base_model,
        vae,
        autoencoders: list[nn.Module],
        controls: list[nn.Module],
        size: tuple[int, int],
        tile: int | None = None,
        guidance_vae=None,
    ):
        self.base_model, self.vae, self.guidance_vae, self.size = base_model, vae, guidance_vae, size
        self.autoencoder, self._guidance = autoencoders[0], autoencoders[-1]
        self.tile = tile
        self._networks = [base_model.diffusion_model, *autoencoders, *controls]
        self.denoiser: Callable[[Tensor, Tensor], Tensor] | None = None  # (z, sigma (B,)) -> denoised, set for every run

    def denoise(self, z: Tensor, sigma: float | Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.denoiser(z, levels_of(z, sigma)).float()

    def decode(self, z0: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.picture(z0)

    def guide(self, z0: Tensor) -> Tensor:
        """The picture that `guidance_vae` makes."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        return self.rough_picture(z0)

    def picture(self, z0: Tensor) -> Tensor:
        """What `decode` makes, for a run that is cancelled, too."""
        return self._decoded(self.vae, self.autoencoder, z0)

    def rough_picture(self, z0: Tensor) -> Tensor:
        return self._decoded(self.guidance_vae, self._guidance, z0)

    def _decoded(self, vae, autoencoder: nn.Module, z0: Tensor) -> Tensor:
        latent = self.base_model.process_latent_out(z0).to(vae.device, vae.vae_dtype)

        def decode(latent: Tensor, _=None) -> Tensor:
            return autoencoder.decode(latent).to(z0.device, torch.float32)

        image = tiled(decode, latent, decoding(self.tile), vae.downscale_ratio) if self.tile else decode(latent)
        return image[..., : self.size[0], : self.size[1]]

    def encode(self, image: Tensor) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        image = of_whole_latents(image, self.vae)  # what `decode` cropped

        def encode(picture: Tensor, _=None) -> Tensor:
            return self.autoencoder.encode(picture).to(image.device, torch.float32)

        picture = image.to(self.vae.device, self.vae.vae_dtype)
        latent = tiled(encode, picture, encoding(self.tile), of=self.vae.downscale_ratio) if self.tile else encode(picture)
        return self.base_model.process_latent_in(latent)

    def networks(self) -> list[nn.Module]:
        return self._networks

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.networks(), BLOCKS | FLOW_BLOCKS)

    def free_memory(self) -> float:
        return comfy.model_management.get_free_memory(self.vae.device)


def round_trip(prior: HostPrior, image: Tensor) -> list[str]:
    """A warning if the VAE does not give back a picture (1, 3, H, W) in [-1, 1] that goes through it."""
    image = _middle(image)
    psnr = _psnr(prior.decode(prior.encode(image))[..., : image.shape[-2], : image.shape[-1]], image)
    if psnr >= ROUND_TRIP_PSNR:
        return []
    return [f"the VAE gives the measurement back with {psnr:.1f} dB only; is it the one that belongs to the model?"]


def _middle(image: Tensor) -> Tensor:
    height, width = (min(n, ROUND_TRIP_SIZE) for n in image.shape[-2:])
    top, left = ((n - m) // 2 for n, m in zip(image.shape[-2:], (height, width), strict=True))
    return image[..., top : top + height, left : left + width].clamp(-1, 1)


def _psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(float(((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().mean()), 1e-12))


def stand_in(prior: HostPrior, image: Tensor) -> list[str]:
    """A warning if `guidance_vae` does not decode what `vae` makes of a picture (1, 3, H, W) to about the same."""
    image = _middle(image)
    z0 = prior.encode(image)
    psnr = _psnr(prior.guide(z0), prior.decode(z0))
    if psnr >= GUIDANCE_PSNR:
        return []
    return [f"guidance_vae and vae decode the measurement to pictures {psnr:.1f} dB apart; are both made for the model?"]


def check_model(model) -> None:
    """Raises ValueError for models whose latents are not those of a picture, or not VE ones in some coordinates."""
    sampling = model.get_model_object("model_sampling")
    name = type(model.model).__name__
    kinds = comfy.model_sampling
    others = (kinds.IMG_TO_IMG, kinds.StableCascadeSampling)  # subclasses of EPS
    if not isinstance(sampling, (kinds.EPS, kinds.CONST)) or isinstance(sampling, others):
        raise ValueError(
            f"model: {name} is a cascade, an image-to-image or another model whose latents are not a picture's with Gaussian noise. {USABLE}"
        )
    latent = model.get_model_object("latent_format")
    if getattr(latent, "latent_dimensions", 2) != 2 or model.model.model_config.unet_config.get("use_temporal_resblock"):
        raise ValueError(f"model: {name} works on latents of videos or of sound; this pack restores still pictures. {USABLE}")
    if latent.latent_channels == 3:
        raise ValueError(f"model: {name} works on pixels, without the VAE whose decoder the guidance goes through. {USABLE}")
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ValueError(f"model: {name} scales its noise by {sampling.noise_scale:g}, which is not supported. {USABLE}")


def doubts(model, steps: int) -> list[str]:
    """What may be wrong with a model in the way that nodes have set it up, for people. steps: of the run."""
    sampling, found = model.get_model_object("model_sampling"), []
    if is_flow(model) and not is_demo_prior(model) and not isinstance(model.model.model_sampling, comfy.model_sampling.CONST):
        found.append(
            f"the model is a {type(model.model.model_config).__name__} by its file, and a ModelSampling node makes a flow of it: right only if it was trained as one"
        )
    distilled = getattr(sampling, "original_timesteps", None)  # of ModelSamplingDiscrete's lcm
    if distilled and steps > distilled:
        found.append(
            f"{steps} steps of a model that was distilled for {distilled} and fewer (ModelSamplingDiscrete lcm): 4 to 8 are enough"
        )
    return found


def unread_guidance(conditioning: list, model) -> list[str]:
    """A warning if the conditioning brings a distilled guidance (FluxGuidance) that the model does not read."""
    if any(values.get("guidance") is not None for _, values in conditioning) and not model.model.model_config.unet_config.get(
        "guidance_embed"
    ):
        return [
            f"the conditioning has a guidance, which {type(model.model.model_config).__name__} models do not read; leave FluxGuidance out, or use cfg"
        ]
    return []


def too_large_for_gradients(model) -> bool:
    """Whether a gradient through the denoiser would leave too little of the GPU for its activations: its weights must be there as a whole."""
    device = comfy.model_management.get_torch_device()
    return device.type != "cpu" and model.model_size() > LARGEST_SHARE * comfy.model_management.get_total_memory(device)


def check_vae(vae, model, name: str = "vae") -> None:
    """Raises ValueError for a VAE that is not one of pictures, or not of this model's latents."""
    wanted = model.get_model_object("latent_format").latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"{name}: it has {vae.latent_channels} latent channels and the model {wanted}; load the VAE that belongs to the model"
        )
    probe = vae.process_output(torch.tensor([-1.0, 0.0, 1.0]))
    if not isinstance(vae.downscale_ratio, int) or not torch.allclose(probe, torch.tensor([0.0, 0.5, 1.0])):
        raise ValueError(f"{name}: it does not decode to still pictures in [-1, 1]; load the VAE that belongs to the model")


def check_conditioning(conditioning: list, model, name: str) -> None:
    """Raises ValueError for the prompt of another model's text encoder, by its width."""
    wanted = context_width(model)
    for tokens, _ in conditioning:
        if wanted and tokens.shape[-1] != wanted:
            raise ValueError(
                f"{name}: its width is {tokens.shape[-1]}, and {type(model.model.model_config).__name__} models read {wanted}: it comes from another "
                "model's text encoder. Encode the prompt with the CLIP of the same checkpoint, or connect DMAPUnconditional"
            )


def load_vae(path: Path):
    """The VAE of a file, as Load VAE reads it."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def latent_size(vae, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the latents of a picture of `size` (H, W): divided by the VAE's factor, rounded up."""
    return tuple(math.ceil(n / vae.downscale_ratio) for n in size)


def of_whole_latents(image: Tensor, vae) -> Tensor:
    """The picture (B, C, H, W), its edges repeated up to multiples of the VAE's factor."""
    h, w = (-n % vae.downscale_ratio for n in image.shape[-2:])
    return F.pad(image, (0, w, 0, h), mode="replicate")


def warm_latent(vae, operator: Operator, y: Tensor) -> Tensor:
    """(B, C, h, w) of the measurement's own picture, enlarged where it is smaller, as VAE Encode gives it. y: (B, c, h, w) in [-1, 1]."""
    picture = of_whole_latents(operator.hint(y).clamp(-1, 1), vae)  # VAE Encode would crop
    return vae.encode((picture.movedim(1, -1) + 1) / 2)


def model_sigmas(model) -> Tensor:
    """(N,) rising VE sigmas of the model's training timesteps; of a flow those between `schedule.FLOW_LAST` and FLOW_FIRST."""
    check_model(model)
    sigmas = model.get_model_object("model_sampling").sigmas.float().cpu()
    return flow_sigmas(sigmas) if is_flow(model) else sigmas


def searched_model(model) -> str:
    """The one of presets.MODELS whose zetas fit a model: the demo prior, which is known by its only level, or Stable Diffusion."""
    check_model(model)
    return MODELS[1] if is_demo_prior(model) else MODELS[0]


def is_demo_prior(model) -> bool:
    """Whether it has a single level, as only the demo prior does."""
    return len(model.model.model_config.unet_config.get("channel_mult", ())) == 1


def native_latents(model) -> int:
    """Latents of a side of the pictures that a model was trained on: those of SDXL, SD 2.1, or SD 1.5 and 2.0, and the demo prior's."""
    if is_demo_prior(model):
        return 16
    if is_flow(model) or context_width(model) in (SDXL_WIDTH, SDXL_REFINER_WIDTH):
        return 128
    return 96 if prediction_of(model) == "v" else 64


def context_width(model) -> int | None:
    """Width of the text encoder's output that a model reads; None where its configuration does not say."""
    config = model.model.model_config.unet_config
    named = [config.get(name) for name in ("context_dim", "context_in_dim", "cond_seq_dim", "cap_feat_dim")]
    named.append(config.get("context_embedder_config", {}).get("params", {}).get("in_features"))
    return next((width for width in named if isinstance(width, int)), None)


def null_conditioning(model):
    """Conditioning of all-zero context, for checkpoints without a text encoder."""
    config = model.model.model_config.unet_config
    width = context_width(model)
    if not width:
        raise ValueError(f"model: {type(model.model).__name__} has no cross-attention context; it needs no DMAPUnconditional")
    pooled = config.get("vec_in_dim") or (config.get("adm_in_channels") if is_flow(model) else None) or 1280  # read by SDXL and some flows
    return [[torch.zeros(1, 1, width), {"pooled_output": torch.zeros(1, pooled)}]]


def has_text(model) -> bool:
    """Whether a model was trained with prompts, an empty one among them; SDXL's empty prompt is all zeros, as `null_conditioning` is."""
    return not is_demo_prior(model) and context_width(model) != SDXL_WIDTH


def prediction_of(model: Any) -> str:
    """What the network of a MODEL predicts: "eps", "v" or "flow"."""
    if is_flow(model):
        return "flow"
    return "v" if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION) else "eps"


def base_name(model: Any) -> str:
    """The kind of model, such as SD20: what ComfyUI knows of where a MODEL came from."""
    return type(model.model.model_config).__name__


def base_fingerprint(model: Any) -> str:
    """Tells checkpoints apart, whatever precision they are loaded in."""
    return fingerprint(model.model.diffusion_model.state_dict())
