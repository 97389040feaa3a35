"""ComfyUI pictures, (B, H, W, C) in [0, 1], and dmap_core's, (B, C, H, W) in [-1, 1]; and what is wrong with a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dmap_core.operators import Operator


def check_picture(image: Tensor, name: str) -> None:
    """Raises ValueError, naming the input, for a picture that no operator can use."""
    if image.ndim != 4 or 0 in image.shape:
        raise ValueError(f"{name}: expected a batch of pictures (B, H, W, C), got shape {tuple(image.shape)}")
    if image.shape[-1] == 4:
        raise ValueError(
            f"{name}: the picture has an alpha channel, and this pack neither guesses a background nor drops alpha silently. "
            "Split it off with the node 'Split Image with Alpha'; for holes, give that mask to 'Operator: Inpainting'"
        )
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} values are NaN or infinite; look at the node that made the picture")
    if float(image.abs().max()) > 16:
        raise ValueError(f"{name}: values reach {float(image.abs().max()):.0f}; pictures are expected in 0..1 (divide by 255?)")


def to_core(image: Tensor, name: str) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1] for an operator's input."""
    check_picture(image, name)
    if image.shape[-1] != 3:
        raise ValueError(f"{name}: the picture has {image.shape[-1]} channel(s); it needs 3 (RGB)")
    return image.movedim(-1, 1).float() * 2 - 1


def measurement_to_core(image: Tensor, operator: Operator, name: str) -> Tensor:
    """A measurement picture, or masks (N, H, W) -> the y (B, c, h, w) that it shows; RGB becomes luma where c is 1."""
    masks = image.ndim == 3
    check_picture(image.unsqueeze(-1) if masks else image, name)
    try:
        return operator.read_masks(image.float()) if masks else operator.read(image.movedim(-1, 1).float() * 2 - 1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def from_core(image: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) in [0, 1], not clamped."""
    return ((image + 1) / 2).movedim(1, -1)
