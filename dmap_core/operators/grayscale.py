"""Loss of colour."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Operator, Size
from .colour import luma, luma_weights


@dataclass(frozen=True)
class Grayscale(Operator):
    """Luma (BT.601) of an RGB image: (B, 3, H, W) -> (B, 1, H, W)."""

    title = "Grayscale"

    def __call__(self, image: Tensor) -> Tensor:
        self.channels(image.shape[1])
        return luma(image)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        self.check_size(y, size)
        return y * luma_weights(y)

    def hidden(self, before: Tensor | None = None, channels: int = 3) -> Tensor | None:
        return before

    def channels(self, image_channels: int = 3) -> int:
        if image_channels != 3:
            raise ValueError(f"Grayscale: the picture has {image_channels} channels; it must have 3 (put Grayscale first in a Compose)")
        return 1

    def hint(self, y: Tensor) -> Tensor:
        return y.expand(-1, 3, -1, -1)
