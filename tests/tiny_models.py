"""A base model and a CSE as small as diffusers' blocks allow, with random weights, and pictures for them."""

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dmap_core.backends.keys import to_ldm
from dmap_core.cse.checkpoint import write_cse
from dmap_core.cse.metadata import CSEMetadata
from dmap_core.cse.network import initial_controlnet

UNET = "model.diffusion_model."


def tiny_checkpoint(path, seed=0, width=64):
    """A UNet of two levels and a tiny autoencoder in one file, under the original names."""
    from diffusers import AutoencoderTiny, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(width, width),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=1,
        )
        vae = AutoencoderTiny(scaling_factor=1.0)
    state = {f"{UNET}{name}": tensor for name, tensor in to_ldm(unet.state_dict()).items()}
    for name, tensor in vae.state_dict().items():
        part, _, n, rest = name.split(".", 3)
        first = part == "decoder"  # whose first module, in the original, clamps
        state[f"first_stage_model.taesd_{part}.{int(n) + first}.{rest}"] = tensor
    last = max(int(name.split(".")[2]) for name in state if ".taesd_encoder." in name)
    state[f"first_stage_model.taesd_encoder.{last}.weight"] *= 30  # latents of a variance near 1
    last = max(int(name.split(".")[2]) for name in state if ".taesd_decoder." in name)
    state[f"first_stage_model.taesd_decoder.{last}.weight"] *= 4  # pictures between black and white, where they were nearly black
    state[f"first_stage_model.taesd_decoder.{last}.bias"] += 0.5
    state["first_stage_model.vae_scale"] = torch.tensor(0.18215)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def tiny_cse(path, checkpoint, seed=0, **metadata):
    """A ControlNet of a checkpoint file, none of whose convolutions is zero, so that it does something. metadata: fields of CSEMetadata."""
    unet = {name.removeprefix(UNET): tensor for name, tensor in load_file(checkpoint).items() if name.startswith(UNET)}
    generator = torch.Generator().manual_seed(seed)
    weights = initial_controlnet(unet, seed)
    for tensor in weights.values():
        if not tensor.any() and tensor.ndim == 4:
            tensor.normal_(0, 0.1, generator=generator)
    write_cse(path, weights, CSEMetadata(**metadata), torch.float32)
    return path


def pictures(folder, count, prefix="", size=(48, 40)):
    """A folder of smooth random pictures of `size` (width, height), called 0.png and so on."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        rough.resize(size, Image.Resampling.BICUBIC).save(folder / f"{prefix}{i}.png")
    return folder
