"""Opening a base model for diffusers' networks: a single-file checkpoint, or a diffusers folder.

Nothing is downloaded: the architecture is read off the file, and the prompt is encoded by the text encoder beside the UNet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..weights import first, load_into, read_metadata, read_tensors
from .autoencoded import Network
from .diffusers import DiffusersPrior
from .families import MOST_GUIDANCE
from .fingerprint import fingerprint
from .flow import TIMESTEPS, flow_times
from .keys import resnets_per_level, to_diffusers, to_ldm
from .transformer import TransformerPrior
from .transformer_files import open_transformer

log = logging.getLogger(__name__)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TINY_ENCODER, TINY_DECODER = f"{VAE}taesd_encoder.", f"{VAE}taesd_decoder."
CONVOLUTIONS = (".in_layers.2.weight", ".out_layers.3.weight", ".op.weight", ".conv.weight", "input_blocks.0.0.weight", "out.2.weight")
LATENT_CHANNELS = (4, 16)  # of tiny autoencoders
SD_SCALE = 0.18215  # of Stable Diffusion 1 and 2: latents have unit variance after it
SD_BETAS = (0.00085, 0.012)
PREDICTION_TYPE = "modelspec.prediction_type"  # in a file's description
SD1_WIDTH = 768  # of its text encoder; it has 8 heads on every level, the others heads of 64 channels
CLIP_TOKENS, CLIP_START, CLIP_END = 77, 49406, 49407
# The published v-prediction model of SD 2 differs from the eps one in nothing but its weights: this tensor spreads wider in it.
V_TENSOR, V_SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
KL_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "scaling_factor": SD_SCALE,
}


def unet_config(unet: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel, read off a UNet's weights (original names)."""
    flat = [name for name, tensor in unet.items() if name.endswith(".weight") and tensor.ndim < (4 if name.endswith(CONVOLUTIONS) else 1)]
    if flat:
        raise ValueError(f"its UNet has tensors of too few dimensions (a quantised or packed file?): {first(flat)}")
    resnets = resnets_per_level(unet)
    if len(set(resnets)) != 1:
        raise ValueError(f"its UNet has {resnets} blocks on its levels, and diffusers wants the same number on all of them")
    starts = [1 + sum(n + 1 for n in resnets[:level]) for level in range(len(resnets))]
    attention = [f"input_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight" for n in starts]
    has_attention = [name in unet for name in attention]
    ups = [sum(n + 1 for n in resnets[:level]) for level in range(len(resnets))]
    up_attention = [f"output_blocks.{n}.1.transformer_blocks.0.attn2.to_k.weight" in unet for n in ups]
    widths = [unet[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0] for n in starts]
    context = next((unet[name].shape[1] for name in attention if name in unet), None)
    if context is None:
        raise ValueError("its UNet has no cross-attention; it is no text-to-image model of the Stable Diffusion family")
    if unet["input_blocks.0.0.weight"].shape[1] != unet["out.2.weight"].shape[0]:
        raise ValueError("its UNet reads more than latents (a model for inpainting or editing); use the text-to-image model")
    depths = [len({name.split(".")[4] for name in unet if name.startswith(f"input_blocks.{n}.1.transformer_blocks.")}) for n in starts]
    return {
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": unet["out.2.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": resnets[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in up_attention),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if "middle_block.1.norm.weight" in unet else "UNetMidBlock2D",
        "cross_attention_dim": context,
        "transformer_layers_per_block": tuple(max(1, depth) for depth in depths),
        "attention_head_dim": 8 if context == SD1_WIDTH else tuple(max(1, w // 64) for w in widths),  # diffusers means the number of heads
        "use_linear_projection": unet[f"input_blocks.{starts[has_attention.index(True)]}.1.proj_in.weight"].ndim == 2,
    }


def sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()


def open_base(path: Path, prompt: str = "", prediction: str = "auto", guidance: float | None = None) -> DiffusersPrior | TransformerPrior:
    """The base model in a checkpoint file (.safetensors, .ckpt) or a diffusers folder. Raises ValueError that says what is wrong with it.

    prediction: "eps", "v", "flow", or "auto": what a folder's scheduler says; a file is taken for eps unless it looks like the published SD 2 v-model, or
    its description says that it is a flow. guidance: distilled guidance, of the transformers that read one; None: their default, 3.5.
    """
    path = Path(path)
    if guidance is not None and not 0 < guidance <= MOST_GUIDANCE:
        raise ValueError(f"distilled_guidance is {guidance:g}; it must be a number above 0 and at most {MOST_GUIDANCE}")
    if path.is_dir():
        try:
            if (path / "transformer").is_dir():
                return open_transformer(path, prompt, prediction, guidance)
            _check_guidance(guidance, path)
            return _open_folder(path, prompt, prediction)
        except (OSError, TypeError) as error:  # what diffusers and transformers raise for files that are missing or damaged
            raise ValueError(f"{path} cannot be read: {error}") from error
    _check_guidance(guidance, path)
    state = read_tensors(path)
    unet = {name[len(UNET) :]: tensor.float() for name, tensor in state.items() if name.startswith(UNET)}
    if "input_blocks.0.0.weight" not in unet:
        raise ValueError(f"{path} is no checkpoint of the Stable Diffusion family: there is no {UNET}input_blocks.0.0.weight in it")
    if "label_emb.0.0.weight" in unet:
        raise ValueError(
            f"{path} is an SDXL or unCLIP model, whose conditioning needs more than a prompt. Train its CSE in ComfyUI, with the node TrainCSE"
        )
    whole = [name for name, tensor in state.items() if name.startswith((UNET, VAE)) and not tensor.is_floating_point()]
    if whole:
        raise ValueError(f"{path}: its weights must be floats, and these are not (a quantised file?): {first(whole)}")
    try:
        config = unet_config(unet)
        network = UNet2DConditionModel(**config)
        load_into(network, to_diffusers(unet), path)
        vae = _autoencoder(state, path)
    except KeyError as error:
        raise ValueError(f"{path} is incomplete: the tensor {error} is missing") from error
    except (ValueError, RuntimeError, IndexError, ArithmeticError, TypeError) as error:  # what tensors of odd shapes raise in diffusers
        raise ValueError(f"{path}: {error}") from error
    betas = torch.linspace(SD_BETAS[0] ** 0.5, SD_BETAS[1] ** 0.5, TIMESTEPS, dtype=torch.float64) ** 2
    if prediction == "auto":
        looks_v = "v_pred" in state or (V_TENSOR in state and float(state[V_TENSOR].float().std()) > V_SPREAD)
        prediction = "flow" if read_metadata(path).get(PREDICTION_TYPE) == "flow" else "v" if looks_v else "eps"
    try:
        context = _context(state, config["cross_attention_dim"], prompt, path)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: its text encoder is incomplete or damaged ({type(error).__name__}: {error})") from error
    sigmas = flow_times(1.0) if prediction == "flow" else sigmas_of(torch.cumprod(1 - betas, 0))
    return DiffusersPrior(network, vae, context, sigmas, prediction, path.name, fingerprint(unet))


def _check_guidance(guidance: float | None, path: Path) -> None:
    if guidance is not None:
        raise ValueError(f"distilled_guidance is {guidance:g}, and {path} is a UNet, which does not read one; leave it out")


def _autoencoder(state: Mapping[str, Tensor], path: Path) -> nn.Module:
    if any(name.startswith(TINY_ENCODER) for name in state):
        tiny = {f"encoder.layers.{name[len(TINY_ENCODER) :]}": t for name, t in state.items() if name.startswith(TINY_ENCODER)}
        tiny |= {f"decoder.{name}": tensor for name, tensor in _tiny_layers(state, TINY_DECODER).items()}
        if _number(state, "vae_shift", 0.0):
            raise ValueError("its tiny autoencoder has a shift, which diffusers has no place for")
        vae = AutoencoderTiny(scaling_factor=1.0)
        # ComfyUI divides the encoder's output by vae_scale and multiplies it by the model's scale
        given = _number(state, "vae_scale", 1.0)
        if not given > 0:
            raise ValueError(f"its tiny autoencoder has a vae_scale of {given:g}; it must be above 0")
        scale = SD_SCALE / given
        if abs(scale - 1) > 1e-3:  # half precision rounds it
            raise ValueError(f"its tiny autoencoder's latents would have to be scaled by {scale:.4f}; only 1 is supported")
        load_into(vae, tiny, path)
        return vae
    vae = AutoencoderKL(**KL_VAE)
    load_into(vae, convert_ldm_vae_checkpoint({k: v for k, v in state.items() if k.startswith(VAE)}, KL_VAE), path)
    return vae


def open_decoder(path: Path) -> nn.Module:
    """An autoencoder of which only the decoder is of use: the TAESD of a file, a whole checkpoint's, or alone as Load VAE knows it.

    TAESD (latents of Stable Diffusion 1 and 2), TAESDXL, TAESD3, TAEF1: how many channels they have, the file tells. Raises ValueError for files without one.
    """
    state = {name.removeprefix(VAE): tensor for name, tensor in read_tensors(path).items()}
    prefix = TINY_DECODER.removeprefix(VAE)
    if not any(name.startswith(prefix) for name in state):
        state = {f"{prefix}{name}": tensor for name, tensor in state.items()}  # of a file that holds nothing else
    layers = _tiny_layers(state, prefix)
    first_layer = layers.get("layers.0.weight")
    channels = first_layer.shape[1] if first_layer is not None and first_layer.ndim == 4 else LATENT_CHANNELS[0]
    try:
        if channels not in LATENT_CHANNELS:
            raise ValueError(f"it takes latents of {channels} channels; those of 4 and 16 are known")
        vae = AutoencoderTiny(latent_channels=channels, scaling_factor=1.0)
        load_into(vae.decoder, layers, path)
    except ValueError as error:
        raise ValueError(
            f"{path} holds no TAESD decoder ({error}); give taesd_decoder.safetensors, or a checkpoint with a TAESD"
        ) from error
    return vae


def _tiny_layers(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The decoder's tensors under diffusers' names: the first module clamps and has no weights, and diffusers does that in forward."""
    found = {}
    for name, tensor in state.items():
        n, _, rest = name[len(prefix) :].partition(".")
        if name.startswith(prefix) and n.isdigit():
            found[f"layers.{int(n) - 1}.{rest}"] = tensor
    return found


def _number(state: Mapping[str, Tensor], name: str, default: float) -> float:
    tensor = state.get(f"{VAE}{name}")
    if tensor is not None and tensor.numel() != 1:
        raise ValueError(f"its {name} has the shape {tuple(tensor.shape)}; it must be a single number")
    return default if tensor is None else float(tensor)


def _context(state: Mapping[str, Tensor], width: int, prompt: str, path: Path) -> Tensor:
    """(1, L, width): the prompt by the checkpoint's own text encoder; zeros for a checkpoint without one."""
    sd1, sd2 = "cond_stage_model.transformer.", "cond_stage_model.model."
    if not any(name.startswith((sd1, sd2)) for name in state):
        if prompt:
            raise ValueError(f"prompt is {prompt!r}, but {path} has no text encoder. Leave the prompt empty")
        log.info("%s has no text encoder: the context is zero, as the node DMAPUnconditional makes it", path.name)
        return torch.zeros(1, 1, width)
    if prompt:
        raise ValueError(
            f"prompt is {prompt!r}, but a single file brings no tokenizer. Leave the prompt empty (the paper's), or give a diffusers folder"
        )
    tokens = torch.full((1, CLIP_TOKENS), CLIP_END if any(name.startswith(sd1) for name in state) else 0)
    tokens[0, :2] = torch.tensor([CLIP_START, CLIP_END])
    if any(name.startswith(sd1) for name in state):
        config = CLIPTextConfig(projection_dim=768, eos_token_id=CLIP_END, pad_token_id=CLIP_END, bos_token_id=CLIP_START)
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers = 768, 3072, 12, 12
        encoder = CLIPTextModel(config)
        weights = convert_ldm_clip_checkpoint(dict(state))
    else:  # OpenCLIP's ViT-H, of which SD 2 uses the last layer but one
        config = CLIPTextConfig(projection_dim=512, eos_token_id=CLIP_END, pad_token_id=0, bos_token_id=CLIP_START, hidden_act="gelu")
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers = 1024, 4096, 16, 23
        encoder = CLIPTextModel(config)
        weights = convert_open_clip_checkpoint(encoder, dict(state))
    load_into(encoder, {name: weights[name] for name in encoder.state_dict() if name in weights}, path)
    with torch.no_grad():
        return encoder(tokens).last_hidden_state


def _open_folder(folder: Path, prompt: str, prediction: str) -> DiffusersPrior:
    for part in ("unet", "vae", "scheduler", "text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is no diffusers folder of a Stable Diffusion model: it has no {part}/ in it")
    local: dict[str, Any] = {"local_files_only": True}
    unet: Network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True, **local)
    if unet.config.addition_embed_type or unet.config.class_embed_type:
        raise ValueError(
            f"{folder} is an SDXL or unCLIP model, whose conditioning needs more than a prompt. Train its CSE in ComfyUI, with the node TrainCSE"
        )
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, **local)
    described: Any = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler", **local)
    flow = described["_class_name"].startswith("FlowMatch")
    scheduler: Any = (FlowMatchEulerDiscreteScheduler if flow else DDPMScheduler).from_pretrained(folder, subfolder="scheduler", **local)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **local)
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", use_safetensors=True, **local)
    tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        context = encoder(tokens.input_ids).last_hidden_state
    if prediction == "auto" and flow:
        prediction = "flow"
    if prediction == "auto":
        kinds = {"epsilon": "eps", "v_prediction": "v"}
        kind = scheduler.config.prediction_type
        if kind not in kinds:
            raise ValueError(f"{folder}: its scheduler predicts {kind!r}; it must be epsilon, v_prediction, or a FlowMatch scheduler's")
        prediction = kinds[kind]
    for network in (unet, vae):
        network.requires_grad_(False).eval()
    if flow != (prediction == "flow"):
        raise ValueError(
            f"{folder}: prediction is {prediction!r}, and its scheduler is {type(scheduler).__name__}; leave the prediction at auto"
        )
    sigmas = flow_times(scheduler.config.shift) if flow else sigmas_of(scheduler.alphas_cumprod)
    return DiffusersPrior(unet, vae, context, sigmas, prediction, folder.name, fingerprint(to_ldm(unet.state_dict())))
