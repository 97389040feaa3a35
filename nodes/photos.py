"""Load Photo: a picture file with what the stock loader drops."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..dmap_core.operators.jpeg import jpeg_of_file
from ..dmap_core.pictures import open_photo
from .host.folders import input_pictures, photo_path
from .operators import Operator
from .pictures import to_image
from .schema import schema

NAME = "DMAP Load Photo"
TRANSPARENT = ("auto", "is missing", "stays transparent")
PAINTED = "clipspace"  # where the mask editor puts what was painted


class LoadPhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="DMAP_LoadPhoto",
            display_name=f"{NAME} (with mask and JPEG tables)",
            category="DMAP",
            description="A photo as DMAP Restore wants it: upright, first frame, 16 bits and CMYK read rightly, transparency apart, and how strongly its JPEG was compressed. "
            "Right-click it to paint a mask over scratches.",
            search_aliases=["load image", "open photo", "jpeg quality", "exif", "restore", "upload"],
            inputs=[
                io.Combo.Input(
                    "transparent",
                    options=list(TRANSPARENT),
                    default=TRANSPARENT[0],
                    tooltip="What transparent pixels are. is missing: holes, which are the mask. stays transparent: the result has the same alpha channel. "
                    "auto: holes where they were painted in the mask editor, else transparency.",
                ),
                io.Combo.Input(
                    "image",
                    options=input_pictures(),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A file of ComfyUI's input folder; upload, drop or paste one. Those of dmap/ come with this pack.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image", tooltip="RGB; with an alpha channel where that stays, which DMAP Restore puts back in the end."
                ),
                io.Mask.Output(display_name="mask", tooltip="White where the photo is missing: what was painted."),
                io.Mask.Output(display_name="alpha", tooltip="The alpha channel: white is opaque."),
                Operator.Output(
                    display_name="jpeg",
                    tooltip="The compression of a JPEG file, from its own tables. Goes to DMAP Restore's operator, or to Estimate Degradation. Nothing for other files.",
                ),
                io.String.Output(display_name="text", tooltip="What was read."),
            ],
        )

    @classmethod
    def validate_inputs(cls, image) -> bool | str:
        try:
            photo_path(image)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, transparent, image) -> str:
        return hashlib.sha256(photo_path(image).read_bytes()).hexdigest()

    @classmethod
    def execute(cls, transparent, image) -> io.NodeOutput:
        path = photo_path(image)
        photo = open_photo(path)
        picture = to_image([photo.picture])
        alpha = torch.ones(picture.shape[:3]) if photo.alpha is None else as_mask(photo.alpha)
        holes = transparent == TRANSPARENT[1] or (transparent == TRANSPARENT[0] and image.replace("\\", "/").startswith(PAINTED))
        jpeg = jpeg_of_file(path)
        said = [f"{photo.picture.width}x{photo.picture.height}"]
        if jpeg is not None:
            said.append(jpeg.describe())
        if photo.turned:
            said.append("turned upright" + ("" if jpeg else ", after which its tables are of no use if it is a JPEG"))
        if photo.frames > 1:
            said.append(f"the first of {photo.frames} frames")
        if photo.alpha is not None:
            said.append("transparent parts are missing" if holes else "transparent parts stay transparent")
        if photo.alpha is not None and not holes:
            picture = torch.cat([picture, alpha[..., None]], dim=-1)
        mask = 1 - alpha if holes else torch.zeros_like(alpha)
        return io.NodeOutput(picture, mask, alpha, jpeg, f"{image}: {', '.join(said)}")


def as_mask(channel: Image.Image) -> Tensor:
    """(1, H, W) in [0, 1] of an 8-bit channel."""
    return torch.from_numpy(np.array(channel, np.float32) / 255).unsqueeze(0)


NODES = [LoadPhoto]
