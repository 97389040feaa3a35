"""Bicubic downsampling by an integer factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Separable, Size, whole
from .boundary import symmetric_index

LARGEST = 64  # scale: one pixel for 64 x 64 says nothing about a picture any more


def cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (Keys 1981), zero outside |x| < 2."""
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def downsampling_taps(length: int, scale: int) -> tuple[Tensor, Tensor]:
    """Pixels and float64 weights, (length / scale, 4 scale + 2): the cubic kernel stretched by `scale` (antialiasing), symmetric reflection, sum 1."""
    centre = (torch.arange(length // scale, dtype=torch.float64) + 0.5) * scale - 0.5
    first = torch.floor(centre - 2 * scale).long()
    taps = first[:, None] + torch.arange(4 * scale + 2)
    weights = cubic((centre[:, None] - taps) / scale)
    return symmetric_index(taps, length), weights / weights.sum(1, keepdim=True)


@dataclass(frozen=True)
class SuperResolution(Separable):
    """Antialiased bicubic downsampling by `scale` (2 to 64) with symmetric reflection at the borders, as in the paper's SR x8.

    The measurement of an image (B, C, H, W) is (B, C, H/scale, W/scale).
    """

    scale: int = 8

    title = "Super-Resolution"

    def __post_init__(self):
        object.__setattr__(self, "scale", whole("SuperResolution: scale", self.scale, 2, LARGEST))

    def taps(self, length: int) -> tuple[Tensor, Tensor]:
        return downsampling_taps(length, self.scale)

    def measurement_size(self, size: Size) -> Size:
        if size[0] % self.scale or size[1] % self.scale:
            raise ValueError(
                f"SuperResolution: a picture of {size[1]}x{size[0]} (width x height) cannot be reduced {self.scale} times without a remainder; "
                f"crop it to {size[1] // self.scale * self.scale}x{size[0] // self.scale * self.scale} or choose another scale"
            )
        return size[0] // self.scale, size[1] // self.scale

    def image_size(self, y: Tensor) -> Size:
        return y.shape[-2] * self.scale, y.shape[-1] * self.scale

    def hint(self, y: Tensor) -> Tensor:
        return F.interpolate(y, scale_factor=self.scale, mode="bicubic", align_corners=False)
