"""The ControlNet that training starts from: a copy of the UNet's encoder, a hint encoder, and convolutions that begin at zero."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .keys import HINT_CONVOLUTIONS, resnets_per_level

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)  # what the hint encoder's convolutions put out; the last one puts out the UNet's width
SAMPLED = 1024  # values of a tensor that a fingerprint looks at
COPIED = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")


def _convolution(out: int, inside: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 3x3 convolution, distributed as torch initialises one."""
    bound = 1 / math.sqrt(inside * 9)
    weight = torch.empty(out, inside, 3, 3).uniform_(-bound, bound, generator=generator)
    return weight, torch.empty(out).uniform_(-bound, bound, generator=generator)


def initial_controlnet(unet: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Weights (float32, original names) of a ControlNet that leaves `unet` (original names) as it is, until it is trained (Zhang et al. 2023).

    The encoder and the middle are copies. The hint encoder takes (B, 3, H, W) to (B, width, H/8, W/8); its weights are random, by the seed.
    Its last convolution and the ones behind every block ("zero convolutions") are zero.
    """
    state = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in unet.items() if name.startswith(COPIED)}
    width = state["input_blocks.0.0.weight"].shape[0]
    generator = torch.Generator().manual_seed(seed)
    inside = 3
    for i, out in enumerate((*HINT_CHANNELS, width)):
        weight, bias = _convolution(out, inside, generator)
        is_last = i == HINT_CONVOLUTIONS - 1
        state[f"input_hint_block.{2 * i}.weight"] = torch.zeros_like(weight) if is_last else weight
        state[f"input_hint_block.{2 * i}.bias"] = torch.zeros_like(bias) if is_last else bias
        inside = out

    def zero(name: str, channels: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.zeros(channels, channels, 1, 1), torch.zeros(channels)

    zero("zero_convs.0.0", width)
    n, channels = 1, width
    resnets = resnets_per_level(state)
    for level, count in enumerate(resnets):
        for _ in range(count):
            channels = state[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0]
            zero(f"zero_convs.{n}.0", channels)
            n += 1
        if level < len(resnets) - 1:
            zero(f"zero_convs.{n}.0", channels)
            n += 1
    zero("middle_block_out.0", channels)
    return state


def encoder_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a ControlNet copied of its UNet, from the weights (original names) of either: equal for a ControlNet and its base."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(COPIED)}


def fingerprint(unet: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that tell UNets (original names) apart: SHA-256 of values of every tensor, spread over it, in half precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.items()):
        values = tensor.detach().flatten()
        digest.update(name.encode())
        digest.update(values[:: max(1, len(values) // SAMPLED)].to("cpu", torch.float16).contiguous().numpy())
    return digest.hexdigest()[:16]
