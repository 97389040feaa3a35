"""The brightness of a colour."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def luma_weights(like: Tensor) -> Tensor:
    """(1, 3, 1, 1) in the dtype and on the device of `like`."""
    return _weights(like.dtype, like.device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # a host may call this under inference mode, and the cache outlives that
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(LUMA, dtype=torch.float64).to(device, dtype).view(1, 3, 1, 1)


def luma(image: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)"""
    return (image * luma_weights(image)).sum(1, keepdim=True)
