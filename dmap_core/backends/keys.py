"""Names of the tensors of UNets and ControlNets: those of the original code (LDM, what ComfyUI reads) and those of diffusers.

A mapping is derived from the names in a file, so that it holds for any number of levels, blocks and transformer layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block_out.0": "controlnet_mid_block",
}
DIFFUSERS_MARK = "controlnet_cond_embedding.conv_in.weight"
LDM_MARK = "input_hint_block.0.weight"
HINT_CONVOLUTIONS = 8  # of the hint's encoder: one at the start, six between, one at the end


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """The numbers that the group of `pattern` takes in the names, in rising order."""
    return sorted({int(found[1]) for name in names if (found := re.match(pattern, name))})


def resnets_per_level(names: Iterable[str]) -> list[int]:
    """How many resnets every level of the encoder has, of names of either kind."""
    names = list(names)
    if any(name.startswith("down_blocks.") for name in names):
        levels = _numbers(names, r"down_blocks\.(\d+)\.")
        return [len(_numbers(names, rf"down_blocks\.{level}\.resnets\.(\d+)\.")) for level in levels]
    counts = [0]
    for n in _numbers(names, r"input_blocks\.(\d+)\.")[1:]:
        if any(name.startswith(f"input_blocks.{n}.0.op.") for name in names):  # a downsampling ends a level
            counts.append(0)
        else:
            counts[-1] += 1
    return counts


def prefixes(names: Iterable[str]) -> dict[str, str]:
    """LDM's prefixes of blocks -> diffusers', for the layout that the names (of either kind) have. Every prefix ends before a dot."""
    names = list(names)
    resnets = resnets_per_level(names)
    found = dict(ENDS)

    def resnet(ldm: str, diffusers: str) -> None:
        found.update({f"{ldm}.{a}": f"{diffusers}.{b}" for a, b in RESNET.items()})

    n = 1
    for level, count in enumerate(resnets):
        for i in range(count):
            resnet(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}")
            found[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{i}"
            n += 1
        if level < len(resnets) - 1:
            found[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            n += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    found["middle_block.1"] = "mid_block.attentions.0"
    resnet("middle_block.2", "mid_block.resnets.1")
    for i in range(n):
        found[f"zero_convs.{i}.0"] = f"controlnet_down_blocks.{i}"
    last = HINT_CONVOLUTIONS - 1
    hint = ["conv_in", *(f"blocks.{i}" for i in range(last - 1)), "conv_out"]
    found.update({f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)})
    n = 0
    for level, count in enumerate(reversed(resnets)):
        for i in range(count + 1):
            resnet(f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{i}")
            attention = f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{i}"
            has_attention = any(name.startswith((f"{attention[0]}.norm.", f"{attention[1]}.")) for name in names)
            if has_attention:
                found[attention[0]] = attention[1]
            if i == count and level < len(resnets) - 1:  # upsampling comes after the attention, if there is one
                found[f"output_blocks.{n}.{2 if has_attention else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            n += 1
    return found


def _renamed(state: Mapping[str, T], table: dict[str, str]) -> dict[str, T]:
    renamed = {}
    for name, value in state.items():
        parts = name.split(".")
        prefix = next((p for i in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:i])) in table), None)
        if prefix is None:
            raise ValueError(f"the tensor {name} belongs to no UNet or ControlNet of the kinds that this pack knows")
        renamed[table[prefix] + name[len(prefix) :]] = value
    return renamed


def to_diffusers(state: Mapping[str, T]) -> dict[str, T]:
    """A UNet's or ControlNet's tensors under diffusers' names. Raises ValueError for a name that neither has in the original code."""
    return _renamed(state, prefixes(state))


def to_ldm(state: Mapping[str, T]) -> dict[str, T]:
    """A UNet's or ControlNet's tensors under the original names. Raises ValueError for a name that neither has in diffusers."""
    return _renamed(state, {b: a for a, b in prefixes(state).items()})


def original_names(names: Iterable[str]) -> dict[str, str]:
    """The name in the original code of every tensor of a ControlNet, for its names of either kind."""
    names = list(names)
    return {own: original for original, own in to_ldm({n: n for n in names}).items()} if DIFFUSERS_MARK in names else {n: n for n in names}
