"""The pack's own pictures, so that every workflow of the pack runs before a picture of one's own is there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from .host.folders import SAMPLE_FILES
from .schema import schema

DEMO = Path(__file__).resolve().parent.parent / "demo"
# Written down, so that no folder is looked through while ComfyUI starts; a test holds it.
HELD_OUT = tuple(f"dmap-demo-{i:02}" for i in range(64))
SAMPLES = tuple(name.removesuffix(".png") for name in SAMPLE_FILES)


def picture_path(name: str) -> Path:
    return DEMO / ("held-out" if name in HELD_OUT else "samples") / f"{name}.png"


class SamplePicture(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_SamplePicture",
            display_name="DMAP Sample Picture",
            category="DMAP",
            description="A picture that comes with this pack, so that its workflows run at once. Put Load Image in its place for a picture of your own: it has the same outputs.",
            search_aliases=["example picture", "demo picture", "test photo", "load image"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=[*HELD_OUT, *SAMPLES],
                    default="dmap-demo-00",
                    tooltip="dmap-demo-*: 128x128, what the demo prior knows. rooster-512 is a good picture for Stable Diffusion; the other roosters are that one damaged, "
                    "emoji-* the same for the demo prior. The number is their width and height.",
                )
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.Mask.Output(display_name="mask", tooltip="White where the picture is missing, as Load Image gives it."),
            ],
        )

    @classmethod
    def execute(cls, picture) -> io.NodeOutput:
        with Image.open(picture_path(picture)) as file:
            rgba = torch.from_numpy(np.asarray(file.convert("RGBA"), np.float32) / 255).unsqueeze(0)
        image = rgba[..., :3].clone()
        return io.NodeOutput(image, 1 - rgba[..., 3], ui=ui.PreviewImage(image))

    @classmethod
    def fingerprint_inputs(cls, picture) -> str:
        return hashlib.sha256(picture_path(picture).read_bytes()).hexdigest()


NODES = [SamplePicture]
