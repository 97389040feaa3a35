"""Opening a diffusers folder of a flow transformer. Nothing is downloaded, and only safetensors are read.

The prompt is encoded by diffusers' own pipeline of the family, on the CPU in float32, and its text encoders are gone before the transformer is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .autoencoded import FACTOR, Network
from .families import FAMILIES, GUIDANCE, PATCH, REFUSED, Family
from .fingerprint import fingerprint
from .flow import Shift
from .transformer import TransformerPrior

LOCAL: dict[str, Any] = {"local_files_only": True}
STORED = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors call them


def open_transformer(folder: Path, prompt: str = "", prediction: str = "auto", guidance: float | None = None) -> TransformerPrior:
    """The flow transformer in a diffusers folder, in the precision of its files. Raises ValueError that says what is wrong with it.

    prediction: "auto" or "flow". guidance: distilled guidance, of models that read one; None: 3.5.
    """
    described = _json(folder / "transformer" / "config.json")
    family = family_of(described, folder)
    if prediction not in ("auto", "flow"):
        raise ValueError(f"{folder}: prediction is {prediction!r}, and {family.name} predicts velocities; leave the prediction at auto")
    if "quantization_config" in described:
        raise ValueError(f"{folder}: the weights of its transformer are quantised; take the folder in bf16 or fp16")
    patch = 1 if family.packed else PATCH
    if described.get("patch_size", patch) != patch:
        raise ValueError(f"{folder}: the patch_size of its transformer is {described['patch_size']}, and that of {family.name} is {patch}")
    if guidance is not None and not described.get("guidance_embeds"):
        raise ValueError(f"distilled_guidance is {guidance:g}, and {folder} ({family.name}) does not read one; leave it out")
    parts = _parts(folder, family)
    shift = shift_of(folder)
    kind: Network = getattr(diffusers, family.network)
    with torch.device("meta"):  # what pipelines ask of it is its configuration
        empty = kind.from_config(kind.load_config(folder / "transformer"))
    read, predicted = family.channels(empty.config)
    if read != predicted:
        raise ValueError(
            f"{folder}: its transformer reads more than latents (a model for inpainting or editing); use the text-to-image model"
        )
    conditioned = encode(folder, family, empty, prompt, absent=[name for name in family.optional if name not in parts])
    if described.get("guidance_embeds"):
        conditioned["guidance"] = torch.tensor([GUIDANCE if guidance is None else guidance])
    vae: Network = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32, **LOCAL)
    if vae.config.latent_channels != read:
        raise ValueError(
            f"{folder}: its autoencoder makes latents of {vae.config.latent_channels} channels, and its transformer reads {read}; they are of different models"
        )
    pixels = 2 ** (len(vae.config.block_out_channels) - 1)
    if pixels != FACTOR:
        raise ValueError(f"{folder}: its autoencoder makes one latent of {pixels}x{pixels} pixels, and only {FACTOR}x{FACTOR} are read")
    transformer = kind.from_pretrained(
        folder, subfolder="transformer", use_safetensors=True, torch_dtype=_stored(folder / "transformer"), **LOCAL
    )
    for network in (transformer, vae):
        network.requires_grad_(False).eval()
    return TransformerPrior(transformer, vae, family, conditioned, shift, folder.name, fingerprint(transformer.state_dict()))


def family_of(described: dict[str, Any], folder: Path) -> Family:
    """The family of a transformer's configuration. Raises ValueError with the reason where there is none, and the names of those that there are."""
    name = str(described.get("_class_name"))
    for family in FAMILIES:
        if family.network == name:
            return family
    why = next((why for part, why in REFUSED.items() if part in name), "there is no adapter for it")
    raise ValueError(
        f"{folder} holds a {name}, which is not read: {why}. Of transformers the command line takes {', '.join(f.name for f in FAMILIES)}"
    )


def shift_of(folder: Path) -> Shift:
    """Of the scheduler in a folder. Raises ValueError for one that is not a flow's."""
    described: Any = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler", **LOCAL)
    name = described["_class_name"]
    if not name.startswith("FlowMatch"):
        raise ValueError(
            f"{folder}: its scheduler is {name}, and its transformer is a flow, whose scheduler must be a FlowMatch one; take the one it came with"
        )
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(described)
    config = scheduler.config
    if config.invert_sigmas:
        raise ValueError(f"{folder}: its scheduler turns times round, as those of no family that is read; take the one it came with")
    if not config.use_dynamic_shifting:
        return Shift(config.shift)
    line = (config.base_image_seq_len, config.base_shift), (config.max_image_seq_len, config.max_shift)
    return Shift(line=line, exponential=config.time_shift_type == "exponential")


def encode(folder: Path, family: Family, empty: Network, prompt: str, absent: Sequence[str] = ()) -> dict[str, Tensor]:
    """What the family's transformer reads of the prompt. empty: that transformer, without weights. absent: parts that are not there. Raises ValueError for a prompt that is too long."""
    kind: Network = getattr(diffusers, family.pipeline)
    pipe = kind.from_pretrained(
        folder, transformer=empty, vae=None, **dict.fromkeys(absent), use_safetensors=True, torch_dtype=torch.float32, **LOCAL
    )
    tokenizer, most = next((getattr(pipe, name), most) for name, most in family.tokenizers if getattr(pipe, name, None) is not None)
    tokens = len(tokenizer(family.written(pipe, prompt)).input_ids)
    if tokens > most:
        raise ValueError(f"prompt has {tokens} tokens, and {folder} ({family.name}) reads {most}; shorten it")
    with torch.no_grad():
        return family.prompt(pipe, prompt)


def _parts(folder: Path, family: Family) -> set[str]:
    """What the folder says that it has. Raises ValueError where a part of it is missing."""
    parts = {"transformer", "vae", "scheduler"}
    index = _json(folder / "model_index.json")
    parts |= {name for name, kind in index.items() if isinstance(kind, list) and all(kind)}
    missing = sorted(part for part in parts if not (folder / part).is_dir())
    if missing:
        raise ValueError(f"{folder} is no whole diffusers folder of {family.name}: it has no {'/, '.join(missing)}/ in it")
    return parts


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: it holds no settings by name")
    return found


def _stored(part: Path) -> torch.dtype:
    """In which a part's weights are stored; read as they are, a large model takes no more memory than its files."""
    from safetensors import SafetensorError, safe_open

    file = next(iter(sorted(part.glob("*.safetensors"))), None)
    if file is None:
        raise ValueError(f"{part} holds no .safetensors, and other files of weights are not read")
    try:
        with safe_open(file, "pt") as tensors:
            return STORED.get(tensors.get_slice(next(iter(tensors.keys()))).get_dtype(), torch.float32)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file (is the download complete?): {error}") from error
