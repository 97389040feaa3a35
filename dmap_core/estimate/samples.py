"""Which part of a picture is looked at: all of a small one, tiles of a large one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.colour import luma_weights

TILE = 256  # pixels, a multiple of every compression's block
MOST = 16  # tiles: a megapixel


def tiles_of(levels: Tensor) -> Tensor:
    """(n, c, h, w) of a picture (c, H, W): itself if it has no more than `MOST` tiles' pixels, else that many tiles, evenly spread.

    Rows and columns of a tile begin at multiples of 16 of the picture's, so a compression's blocks stay where they are.
    """
    height, width = levels.shape[-2:]
    if height * width <= MOST * TILE**2 or min(height, width) < TILE:
        return _middle(levels).unsqueeze(0)
    across = max(1, min(MOST, width // TILE, round((MOST * width / height) ** 0.5)))
    down = max(1, min(MOST // across, height // TILE))
    rows, columns = (
        [round(i) // 16 * 16 for i in torch.linspace(0, n - TILE, count).tolist()] for n, count in ((height, down), (width, across))
    )
    return torch.stack([levels[:, i : i + TILE, j : j + TILE] for i in rows for j in columns])


def _middle(levels: Tensor) -> Tensor:
    """A strip too narrow for tiles, at most as many pixels of it."""
    (height, width), most = levels.shape[-2:], MOST * TILE**2
    if height * width <= most:
        return levels
    rows, columns = (min(n, max(1, most // other)) for n, other in ((height, width), (width, height)))
    top, left = ((n - kept) // 32 * 16 for n, kept in ((height, rows), (width, columns)))
    return levels[:, top : top + rows, left : left + columns]


def luma_of(tiles: Tensor) -> Tensor:
    """(n, h, w) of R, G, B (n, 3, h, w)."""
    return (tiles * luma_weights(tiles)).sum(1)
