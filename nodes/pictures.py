"""ComfyUI pictures, (B, H, W, C) in [0, 1], and dmap_core's, (B, C, H, W) in [-1, 1]; and what is wrong with a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..dmap_core.operators import Operator
from .messages import speaking_of_nodes

CHANNELS = (1, 3)  # grey, RGB
LARGEST = 16  # decoders overshoot, but not by that much


def check_picture(image: Tensor, name: str) -> Tensor:
    """The picture, in floats. Raises ValueError, naming the input, for one that no node can use.

    Truth values become 0 and 1. Other whole numbers are taken as they are, which is refused where they go up to 255.
    """
    if not isinstance(image, Tensor):
        raise ValueError(f"{name}: expected a picture, got {type(image).__name__}")
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name}: expected a batch of pictures (B, H, W, C), got shape {tuple(image.shape)}")
    if image.shape[-1] == 4:
        raise ValueError(
            f"{name}: the picture has an alpha channel, and this pack neither guesses a background nor drops alpha silently. "
            "Split it off with the node 'Split Image with Alpha'; for holes, give that mask to 'Operator: Inpainting'"
        )
    if image.shape[-1] not in CHANNELS:
        raise ValueError(f"{name}: the picture has {image.shape[-1]} channels; it needs 3 (RGB) or 1 (grey)")
    return _values(image, name)


def check_mask(mask: Tensor, name: str) -> Tensor:
    """Masks (N, H, W), in floats; a single one may lack the first dimension. Raises ValueError, naming the input, for what is no mask."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: expected a mask, got {type(mask).__name__}")
    mask = mask.unsqueeze(0) if mask.ndim == 2 else mask
    if mask.ndim != 3 or 0 in mask.shape:
        raise ValueError(f"{name}: expected a mask (N, H, W), got shape {tuple(mask.shape)}")
    return _values(mask, name)


def _values(image: Tensor, name: str) -> Tensor:
    if image.is_complex():
        raise ValueError(f"{name}: its values are complex numbers; look at the node that made it")
    image = image if image.is_floating_point() else image.float()
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} values are NaN or infinite; look at the node that made the picture")
    largest = float(image.abs().max())
    if largest > LARGEST:
        raise ValueError(f"{name}: values reach {largest:.0f}; pictures are expected in 0..1 (divide by 255?)")
    return image


def to_core(image: Tensor, name: str) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1] for an operator's input."""
    image = check_picture(image, name)
    if image.shape[-1] != 3:
        raise ValueError(f"{name}: the picture has {image.shape[-1]} channel(s); it needs 3 (RGB)")
    return image.movedim(-1, 1).float() * 2 - 1


def measurement_to_core(image: Tensor, operator: Operator, name: str) -> Tensor:
    """A measurement picture, or masks (N, H, W) -> the y (B, c, h, w) that it shows; RGB becomes luma where c is 1."""
    masks = isinstance(image, Tensor) and image.ndim == 3
    image = check_mask(image, name) if masks else check_picture(image, name)
    with speaking_of_nodes(f"{name}: "):
        return operator.read_masks(image.float()) if masks else operator.read(image.movedim(-1, 1).float() * 2 - 1)


def measurement_of(restored: Tensor, measurement: Tensor, operator: Operator, node: str) -> Tensor:
    """The y (1 or B, c, h, w) of restored pictures (B, 3, H, W). Raises ValueError, naming the inputs of `node`, for what does not go together."""
    y = measurement_to_core(measurement, operator, f"{node}: measurement")
    with speaking_of_nodes(f"{node}: measurement: "):
        made = operator.image_size(y)
    size = tuple(restored.shape[-2:])
    if made != size:
        raise ValueError(
            f"{node}: measurement and {operator.describe()} belong to pictures of {made[1]}x{made[0]}, but restored is {size[1]}x{size[0]}"
        )
    if len(y) not in (1, len(restored)):
        raise ValueError(f"{node}: measurement holds {len(y)} for {len(restored)} restored pictures; give one, or one for each")
    return y


def with_given(image: Tensor, mask: Tensor, measurement: Tensor) -> Tensor:
    """The picture (B, H, W, 3) with a measurement's own pixels where an Inpainting's mask (B, 1, H, W) is 0: to the bit, as they were never elsewhere."""
    return image.where(mask.movedim(1, -1).to(image) > 0, measurement.to(image))


def from_core(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) in [0, 1], not clamped."""
    return ((image + 1) / 2).movedim(1, -1)


def to_image(pages: Sequence[Image.Image | np.ndarray]) -> Tensor:
    """Pictures of one size, 8-bit RGB -> (B, H, W, 3) in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(page, dtype=np.float32) for page in pages])) / 255
