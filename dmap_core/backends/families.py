"""How diffusers' flow transformers are called: for every family what the prompt becomes, and the velocity of (x_t, t).

A family's own pipeline in diffusers encodes the prompt. Of what it makes, padding that the network would have to mask out is left away, which is the same
and needs no mask. (ChromaPipeline of diffusers 0.39 hands its mask on as floats, which attention adds instead of masking: its issue 12116.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Network = Any
Pipeline = Any
Conditioning = Mapping[str, Tensor]  # each (1, ...)

PATCH = 2  # latents of a side of a patch, of all families
GUIDANCE = 3.5  # distilled guidance where none is given, as in diffusers and ComfyUI
MOST_GUIDANCE = 100  # more cannot have been meant
CLIP_TOKENS, T5_TOKENS, LONG_TOKENS = 77, 256, 512  # that pipelines pad a prompt to


@dataclass(frozen=True)
class Family:
    """name: for people. network, pipeline: diffusers' classes. tokenizers: the name in the pipeline of the one that reads most of a prompt, and how many
    tokens of it are read; the first that the folder has counts. prompt: (pipeline, prompt) -> conditioning. velocity: (network, x (B, C, h, w), t (B,) in
    (0, 1), conditioning) -> E[eps - z0 | x_t]. written: (pipeline, prompt) -> the text that the tokenizer sees. optional: parts of the pipeline that a folder may lack.
    packed: its channels are those of a patch.
    side: of a network's configuration, the most latents of a side, of those whose table of positions ends.
    """

    name: str
    network: str
    pipeline: str
    tokenizers: tuple[tuple[str, int], ...]
    prompt: Callable[[Pipeline, str], dict[str, Tensor]]
    velocity: Callable[[Network, Tensor, Tensor, Conditioning], Tensor]
    written: Callable[[Pipeline, str], str] = lambda _, prompt: prompt
    optional: tuple[str, ...] = ()
    packed: bool = False
    side: Callable[[Any], int | None] = lambda _: None

    def channels(self, config: Any) -> tuple[int, int]:
        """Of latents: (read, predicted)."""
        patch = PATCH**2 if self.packed else 1
        return config.in_channels // patch, (config.get("out_channels") or config.in_channels) // patch


def each(given: Conditioning, n: int) -> dict[str, Tensor]:
    """The conditioning of n samples."""
    return {name: tensor.expand(n, *[-1] * (tensor.ndim - 1)) for name, tensor in given.items()}


def _sd3_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    tokens, _, pooled, _ = pipe.encode_prompt(prompt, None, None, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def _sd3(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    return network(x, timestep=1000 * t, return_dict=False, **each(given, len(x)))[0]


def _flux_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    tokens, pooled, _ = pipe.encode_prompt(prompt, device="cpu")
    return {"encoder_hidden_states": tokens, "pooled_projections": pooled}


def _chroma_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    tokens, _, mask, *_ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": tokens[:, mask[0] > 0]}


def _flux(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    """Flux.1 and Chroma: patches are packed into channels, and every token has a place (0, row, column), words (0, 0, 0)."""
    rows, columns = (torch.arange(n // PATCH, device=x.device, dtype=torch.float32) for n in x.shape[-2:])
    places = torch.stack(torch.meshgrid(rows.new_zeros(1), rows, columns, indexing="ij"), dim=-1).flatten(0, 2)
    out = network(
        F.pixel_unshuffle(x, PATCH).flatten(2).mT,
        timestep=t,
        img_ids=places,
        txt_ids=rows.new_zeros(given["encoder_hidden_states"].shape[1], 3),
        return_dict=False,
        **each(given, len(x)),
    )[0]
    return F.pixel_shuffle(out.mT.unflatten(2, (len(rows), len(columns))), PATCH)


def _aura_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    tokens, *_ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": tokens}  # with zeros for padding, which the network was trained to see


def _aura(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    return network(x, timestep=t, return_dict=False, **each(given, len(x)))[0]


def _lumina_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    tokens, mask, *_ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")
    return {"encoder_hidden_states": tokens[:, mask[0] > 0]}


def _lumina(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    """Its time runs from noise to picture, and so does its velocity."""
    seen = each(given, len(x))
    mask = torch.ones(seen["encoder_hidden_states"].shape[:2], dtype=torch.long, device=x.device)
    return -network(x, timestep=1 - t, encoder_attention_mask=mask, return_dict=False, **seen)[0]


def _z_prompt(pipe: Pipeline, prompt: str) -> dict[str, Tensor]:
    (tokens,), _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": tokens.unsqueeze(0)}


def _z_written(pipe: Pipeline, prompt: str) -> str:
    said = [{"role": "user", "content": prompt}]
    return pipe.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=True)


def _z_image(network: Network, x: Tensor, t: Tensor, given: Conditioning) -> Tensor:
    """It takes lists of pictures of one frame each; its time and velocity run as Lumina's."""
    found = network(list(x.unsqueeze(2)), 1 - t, list(each(given, len(x))["encoder_hidden_states"]), return_dict=False)[0]
    return -torch.stack(list(found)).squeeze(2)


FAMILIES = (
    Family(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        (("tokenizer_3", T5_TOKENS), ("tokenizer_2", CLIP_TOKENS)),
        _sd3_prompt,
        _sd3,
        optional=("text_encoder_3", "tokenizer_3"),
        side=lambda config: PATCH * config.pos_embed_max_size,
    ),
    Family("Flux.1", "FluxTransformer2DModel", "FluxPipeline", (("tokenizer_2", LONG_TOKENS),), _flux_prompt, _flux, packed=True),
    Family("Chroma", "ChromaTransformer2DModel", "ChromaPipeline", (("tokenizer", LONG_TOKENS),), _chroma_prompt, _flux, packed=True),
    Family(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        "AuraFlowPipeline",
        (("tokenizer", T5_TOKENS),),
        _aura_prompt,
        _aura,
        side=lambda config: PATCH * math.isqrt(config.pos_embed_max_size),
    ),
    Family(
        "Lumina 2",
        "Lumina2Transformer2DModel",
        "Lumina2Pipeline",
        (("tokenizer", T5_TOKENS),),
        _lumina_prompt,
        _lumina,
        written=lambda pipe, prompt: f"{pipe.system_prompt} <Prompt Start> {prompt}",
        side=lambda config: PATCH * min(config.axes_lens[1:]),
    ),
    Family(
        "Z-Image",
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        (("tokenizer", LONG_TOKENS),),
        _z_prompt,
        _z_image,
        written=_z_written,
        side=lambda config: PATCH * min(config.axes_lens[1:]),
    ),
)

# Parts of the names of other transformers' classes, and why they are not read.
REFUSED = {
    "Flux2": "its latents are packed and normalised by statistics of its autoencoder",
    "Sana": "its autoencoder makes one latent of 32x32 pixels",
    "HunyuanImage": "its autoencoder makes one latent of 32x32 pixels",
    "PixArt": "it predicts noise, and the command line reads such models with UNets only",
    "HunyuanDiT": "it predicts noise, and the command line reads such models with UNets only",
    "DiT": "it predicts noise of classes of pictures",
    "Audio": "it makes sound",
    "AceStep": "it makes sound",
    "QwenImage": "its autoencoder is one of videos, whose latents have other dimensions",
} | dict.fromkeys(
    ["3D", "Video", "Wan", "LTX", "Mochi", "Cosmos", "Allegro", "Latte", "SkyReels", "Helios", "EasyAnimate", "AnyFlow", "Kandinsky5"],
    "it makes videos, whose latents have other dimensions",
)
