"""Loss of colour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Operator, Size

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Grayscale(Operator):
    """Luma (BT.601) of an RGB image: (B, 3, H, W) -> (B, 1, H, W)."""

    def __call__(self, image: Tensor) -> Tensor:
        if image.shape[1] != 3:
            raise ValueError(f"Grayscale: the picture has {image.shape[1]} channels; it must have 3 (put Grayscale first in a Compose)")
        return (image * self._weights(image)).sum(1, keepdim=True)

    def adjoint(self, y: Tensor, size: Size) -> Tensor:
        return y * self._weights(y)

    @staticmethod
    def _weights(like: Tensor) -> Tensor:
        return torch.tensor(LUMA, dtype=torch.float64).to(like).view(1, 3, 1, 1)

    def channels(self, image_channels: int = 3) -> int:
        return 1

    def hint(self, y: Tensor) -> Tensor:
        return y.expand(-1, 3, -1, -1)
