"""Indices that continue a signal of length n past its ends."""

import torch
from torch import Tensor


def symmetric_index(index: Tensor, n: int) -> Tensor:
    """Reflection that repeats the edge: ... 1 0 | 0 1 ... n-1 | n-1 n-2 ..."""
    period = index.remainder(2 * n)
    return torch.where(period < n, period, 2 * n - 1 - period)


def reflect_index(n: int, radius: int) -> Tensor:
    """Reflection that does not repeat the edge, for positions -radius .. n-1+radius: ... 2 1 | 0 1 ... n-1 | n-2 ..."""
    index = torch.arange(-radius, n + radius).abs()
    return torch.where(index < n, index, 2 * (n - 1) - index)
