"""The ControlNet that training starts from: a copy of the UNet's encoder, a hint encoder, and convolutions that begin at zero."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..backends.keys import HINT_CONVOLUTIONS, resnets_per_level
from ..weights import first

HINT_CHANNELS = (16, 16, 32, 32, 96, 96, 256)  # what the hint encoder's convolutions put out; the last one puts out the UNet's width
RESNET_LAYERS = {"in_layers.0": 1, "in_layers.2": 4, "emb_layers.1": 2, "out_layers.0": 1, "out_layers.3": 4}  # and their dimensions
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


def _expected(names: Iterable[str]) -> dict[str, int]:
    """Dimensions of tensors that a ControlNet with these names must have: all but those of attention and middle block, which differ."""
    names = list(names)
    numbers = [int(name.split(".")[1]) for name in names if re.match(r"(input_blocks|zero_convs)\.\d+\.", name)]
    layers = dict.fromkeys(("time_embed.0", "time_embed.2"), 2) | {"input_blocks.0.0": 4, "middle_block_out.0": 4}
    layers |= {f"input_hint_block.{2 * i}": 4 for i in range(HINT_CONVOLUTIONS)}
    resnets = [block for block in ("middle_block.0", "middle_block.2") if any(name.startswith(f"{block}.") for name in names)]
    for n in range(min(max(numbers, default=0), len(names)) + 1):
        layers[f"zero_convs.{n}.0"] = 4
        if any(name.startswith(f"input_blocks.{n}.0.op.") for name in names):
            layers[f"input_blocks.{n}.0.op"] = 4
        elif n:
            resnets.append(f"input_blocks.{n}.0")
    layers |= {f"{resnet}.{layer}": n for resnet in resnets for layer, n in RESNET_LAYERS.items()}
    return {f"{layer}.{part}": n if part == "weight" else 1 for layer, n in layers.items() for part in ("weight", "bias")}


def check_controlnet(weights: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the first tensors, for weights (original names) of which no ControlNet can be built.

    Whether what is there fits together is known to the network that is built of it only.
    """
    expected = _expected(weights)
    missing = [name for name in expected if name not in weights]
    wrong = [
        f"{name} has {weights[name].ndim} dimensions instead of {n}"
        for name, n in expected.items()
        if name in weights and weights[name].ndim != n
    ]
    wrong += [f"{name} is empty" for name, tensor in weights.items() if tensor.numel() == 0]
    wrong += [
        f"{name} holds {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in weights.items() if not tensor.is_floating_point()
    ]
    if missing:
        raise ValueError(f"it lacks {len(missing)} tensors of a ControlNet: {first(missing)}. Is the file complete?")
    if wrong:
        raise ValueError(f"it has tensors that no ControlNet has: {first(wrong)}")


def encoder_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a ControlNet copied of its UNet, from the weights (original names) of either: equal for a ControlNet and its base."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name.startswith(COPIED)}
