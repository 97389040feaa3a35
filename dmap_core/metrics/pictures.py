"""What every metric asks of the pictures that it is given."""

from __future__ import annotations

import torch
from torch import Tensor

OUTSIDE = 0.5  # of [0, 1]: a decoder overshoots by less; beyond are pictures in [-1, 1] or of 0..255


def saved(image: Tensor, name: str = "image") -> Tensor:
    """Pictures (B, 3, H, W) as float32 in [0, 1]. What lies slightly outside is clamped, as it is when a picture is saved.

    Raises ValueError for another shape, integers, NaN, and values so far outside that they have another range.
    """
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {tuple(image.shape)}; it must be (B, 3, H, W): RGB pictures")
    if not image.is_floating_point():
        raise ValueError(
            f"{name} holds {str(image.dtype).removeprefix('torch.')}; it must be floating point in [0, 1]: divide 8-bit values by 255"
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{name} holds NaN or infinite values; the restoration has probably diverged")
    low, high = float(image.min()), float(image.max())
    if low < -OUTSIDE or high > 1 + OUTSIDE:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; they must be in [0, 1]")
    return image.detach().float().clamp(0, 1)


def pair(image: Tensor, reference: Tensor, smallest: int = 1, what: str = "the metric") -> tuple[Tensor, Tensor]:
    """Both as `saved` gives them, the reference on the image's device.

    Raises ValueError for different shapes, for sides of fewer than `smallest` pixels, which `what` needs, and as `saved` does.
    """
    if image.shape != reference.shape:
        raise ValueError(f"image and reference have shapes {tuple(image.shape)} and {tuple(reference.shape)}; crop or resize one of them")
    image, reference = saved(image), saved(reference, "reference").to(image.device)
    height, width = image.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(f"{what} needs pictures of at least {smallest}x{smallest} pixels; these are {width}x{height}")
    return image, reference
