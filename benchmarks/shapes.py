"""The shapes that are measured and counted: UNets and decoders of ComfyUI's classes, with seeded random weights, as a Prior.

The configurations are those of the published models, as ComfyUI's loader detects them. Nothing is downloaded. Under FakeTensorMode the same
classes have shapes and no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from host import import_comfy
from torch import Tensor, nn

from dmap_core.memory import blocks_of
from dmap_core.prior import DTYPES
from dmap_core.tiles import decoding, denoising, encoding, tiled

FACTOR = 8  # pixels along a latent's side
CHANNELS = 4  # of a latent
TOKENS = 77  # of a prompt
COMMON = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True, "legacy": False}
LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
HEADS = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
UNETS = {
    "SD 1.5": {**COMMON, **LEVELS, "context_dim": 768, "num_heads": 8, "num_head_channels": -1, "use_linear_in_transformer": False},
    "SD 2.0": {**COMMON, **LEVELS, **HEADS, "context_dim": 1024},
    "SDXL": {
        **COMMON,
        **HEADS,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "demo prior": {
        **COMMON,
        **HEADS,
        "num_res_blocks": [1],
        "channel_mult": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [0, 0],
        "transformer_depth_middle": -1,
        "context_dim": 1024,
    },
}
# For what runs anywhere in seconds: two levels, one transformer each.
TINY = {
    **COMMON,
    **HEADS,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 64,
}
FAMILIES = tuple(UNETS)
DECODERS = ("KL", "TAESD")
KL = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4]}
KL |= {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
TINY_KL = {**KL, "ch": 32}
# Those that may run again on the way back: what the nodes' own prior has; tests/nodes/test_benchmarks.py holds the two together.
BLOCKS = frozenset(["ResBlock", "SpatialTransformer", "ResnetBlock", "AttnBlock", "Upsample", "Downsample", "Block"])
HINT_CHANNELS = 3
SCHEDULE = (0.00085**0.5, 0.012**0.5, 1000)  # Stable Diffusion's: square roots of the first and the last beta, and how many


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights of a scale that keeps variances from layer to layer: ComfyUI's layers are created without any."""
    rngs: dict[torch.device, torch.Generator] = {}
    for name, p in module.named_parameters():
        rng = rngs.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
        if p.ndim > 1:
            values = torch.randn(p.shape, generator=rng, device=p.device) / math.sqrt(p[0].numel())
        elif p.ndim == 1:
            values = torch.full(p.shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            continue  # TAESD's scale and shift, which have theirs
        p.copy_(values)
    return module


def layers(cast: bool):
    """ComfyUI's layers. cast: weights are cast to the precision of what comes in, call by call."""
    import_comfy()
    import comfy.ops

    return comfy.ops.manual_cast if cast else comfy.ops.disable_weight_init


def unet_of(family: str, device: torch.device | str, dtype: torch.dtype, weights: bool = True, cast: bool = False) -> nn.Module:
    """The UNet of one of FAMILIES, or the tiny one. weights: random ones; without, memory as it came. cast: see `layers`."""
    operations = layers(cast)
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = TINY if family == "tiny" else UNETS[family]
    with torch.no_grad():
        unet = UNetModel(**config, operations=operations, device=device, dtype=dtype)
        return frozen(randomise(unet) if weights else unet)


def controlnet_of(family: str, device: torch.device | str, dtype: torch.dtype, weights: bool = True, cast: bool = False) -> nn.Module:
    """A ControlNet of the family's shape, as a CSE is one. Its last convolutions are random, too, where a new one's are zero."""
    operations = layers(cast)
    from comfy.cldm.cldm import ControlNet

    config = {**(TINY if family == "tiny" else UNETS[family]), "hint_channels": HINT_CHANNELS}
    del config["out_channels"]
    with torch.no_grad():
        network = ControlNet(**config, operations=operations, device=device, dtype=dtype)
        return frozen(randomise(network, seed=1) if weights else network)


def autoencoder_of(decoder: str, device: torch.device | str, dtype: torch.dtype, weights: bool = True) -> nn.Module:
    """The KL autoencoder or TAESD, with its encoder, which takes memory as well."""
    import_comfy()
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules import model as kl
    from comfy.taesd.taesd import TAESD

    with torch.no_grad(), torch.device(device), default_dtype(dtype):
        if decoder == "TAESD":
            network = TAESD()
        else:
            network = AutoencoderKL(ddconfig=TINY_KL if decoder == "tiny KL" else KL, embed_dim=4)
            for module in network.modules():
                if isinstance(module, kl.AttnBlock):
                    module.optimized_attention = kl.pytorch_attention  # what CUDA takes; the CPU's would slice
        return frozen(randomise(network, seed=2) if weights else network)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of new layers inside: fake ones cannot be cast later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def timestep(sigma: float) -> float:
    """The timestep of Stable Diffusion's schedule whose level is nearest to sigma."""
    first, last, n = SCHEDULE
    betas = torch.linspace(first, last, n, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return float((((1 - kept) / kept).sqrt().log() - math.log(sigma)).abs().argmin())


def own_skip(h: Tensor, options: dict) -> Tensor:
    """As the nodes do: a ControlNet adds to skip connections in place, which the way back still needs as the next block's input."""
    return h.clone() if h.requires_grad else h


class ShapePrior:
    """dmap_core.prior.Prior of a UNet and an autoencoder of ComfyUI's classes.

    tile: latents of a side of tiles, for both networks; None for whole pictures. hint: (1, 3, H, W) that the controlnet, if there is one, sees.
    """

    def __init__(self, unet: nn.Module, autoencoder: nn.Module, tile: int | None = None, controlnet=None, hint: Tensor | None = None):
        from comfy.ldm.modules.attention import attention_pytorch

        self.unet, self.autoencoder, self.tile, self.controlnet, self.hint = unet, autoencoder, tile, controlnet, hint
        p = next(unet.parameters())
        self.device, self.dtype = p.device, p.dtype
        self.vae_dtype = next(autoencoder.parameters()).dtype
        width = next(m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock").attn2.to_k.in_features
        self.context = torch.zeros(1, TOKENS, width, device=self.device, dtype=self.dtype)
        label = getattr(unet, "label_emb", None)
        self.pooled = None if label is None else torch.zeros(1, label[0][0].in_features, device=self.device, dtype=self.dtype)
        self.options = {"optimized_attention_override": lambda func, *args, **kwargs: attention_pytorch(*args, **kwargs)}
        if controlnet is not None:
            self.options["patches"] = {"input_block_patch_after_skip": [own_skip]}
        self.timestep = 500.0  # of every level, until `at` says another

    def at(self, sigma: float) -> ShapePrior:
        """The prior at a level's own timestep. Costs do not depend on it."""
        self.timestep = timestep(sigma)
        return self

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        def whole(z: Tensor, _=None) -> Tensor:
            b = len(z)
            t = torch.full((b,), self.timestep, device=z.device)
            x = (z / (sigma**2 + 1) ** 0.5).to(self.dtype)
            known = {"context": self.context.expand(b, -1, -1), "transformer_options": dict(self.options)}
            if self.pooled is not None:
                known["y"] = self.pooled.expand(b, -1)
            if self.controlnet is not None:
                known["control"] = self._control(x, t, known)
            return z - sigma * self.unet(x, t, **known).float()

        return tiled(whole, z, denoising(self.tile)) if self.tile else whole(z)

    def _control(self, x: Tensor, t: Tensor, known: dict) -> dict:
        """Residuals as comfy.controlnet gives them: lists from which the UNet takes the last."""
        found = self.controlnet(
            x=x, hint=self.hint.to(x).expand(len(x), -1, -1, -1), timesteps=t, context=known["context"], y=known.get("y")
        )
        return {"middle": found["middle"], "output": list(found["output"])}

    def decode(self, z0: Tensor) -> Tensor:
        def whole(latent: Tensor, _=None) -> Tensor:
            return self.autoencoder.decode(latent).float()

        latent = (z0 / 0.18215).to(self.vae_dtype)
        return tiled(whole, latent, decoding(self.tile), FACTOR) if self.tile else whole(latent)

    def encode(self, image: Tensor) -> Tensor:
        def whole(image: Tensor, _=None) -> Tensor:
            return self.autoencoder.encode(image).float()

        image = image.to(self.vae_dtype)
        return 0.18215 * (tiled(whole, image, encoding(self.tile), of=FACTOR) if self.tile else whole(image))

    def networks(self) -> list[nn.Module]:
        return [n for n in (self.unet, self.autoencoder, self.controlnet) if n is not None]

    def blocks(self) -> list[nn.Module]:
        return blocks_of(self.networks(), BLOCKS)

    def free_memory(self) -> float:
        return float("inf")


def build(
    family: str, decoder: str, dtype: str = "fp32", vae_dtype: str | None = None, device="cpu", weights=True, tile=None
) -> ShapePrior:
    """The prior of a family and a decoder. vae_dtype: the autoencoder's, if it is another. tile: see ShapePrior."""
    unet = unet_of(family, device, DTYPES[dtype], weights)
    return ShapePrior(unet, autoencoder_of(decoder, device, DTYPES[vae_dtype or dtype], weights), tile)


def latent(size: int, batch: int = 1, seed: int = 0, device="cpu") -> Tensor:
    """A noisy latent (B, 4, size / 8, size / 8) of a picture of size x size, at a level of 5."""
    return torch.randn(batch, CHANNELS, size // FACTOR, size // FACTOR, generator=torch.Generator().manual_seed(seed)).to(device) * 5


def demo(dtype: str = "fp32", device="cpu") -> ShapePrior:
    """The demo prior with its own weights."""
    import_comfy()
    import comfy.utils

    from . import ROOT

    weights = comfy.utils.load_torch_file(str(ROOT / "models" / "checkpoints" / "dmap-demo-prior.safetensors"))
    prior = build("demo prior", "TAESD", dtype, device=device, weights=False)
    for network, prefix in ((prior.unet, "model.diffusion_model."), (prior.autoencoder, "first_stage_model.")):
        network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return prior
