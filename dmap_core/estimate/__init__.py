"""What damaged a picture, estimated from the picture alone: colour, compression, enlarging, grain and softness.

One small file for each. docs/estimates.md has how far each is off, and where it fails.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..operators import Jpeg
from . import colours, lattice
from .result import IDENTITY, LEVELS, Estimate
from .samples import luma_of, tiles_of

SMALLEST = 32  # pixels along a side, below which nothing but colour is looked for

__all__ = ["IDENTITY", "Estimate", "estimate"]


def estimate(picture: Tensor, jpeg: Jpeg | None = None) -> Estimate:
    """What damaged a picture (1, 3, H, W) in [-1, 1]. jpeg: its compression, from the file's tables, where they are known: nothing is guessed then.

    Takes the same picture to the same answer; no network, no draw. Raises ValueError for another shape, and for values that are not finite.
    """
    if picture.ndim != 4 or len(picture) != 1 or picture.shape[1] != 3 or 0 in picture.shape:
        raise ValueError(f"estimate: the picture has shape {tuple(picture.shape)}; it must be (1, 3, H, W), one picture")
    if not bool(torch.isfinite(picture).all()):
        raise ValueError("estimate: the picture has values that are NaN or infinite; look at what made it")
    with torch.no_grad():
        levels = ((picture[0].detach().cpu().float().clamp(-1, 1) + 1) * (LEVELS / 2)).round()
        return _of_levels(levels, jpeg)


def _of_levels(levels: Tensor, jpeg: Jpeg | None) -> Estimate:
    """Of R, G, B (3, H, W) in whole levels."""
    height, width = levels.shape[-2:]
    found = Estimate(size=(height, width), grey=colours.is_grey(levels), jpeg=jpeg, blur=None, grain=None)
    if min(height, width) < SMALLEST:
        note = f"the picture is smaller than {SMALLEST} pixels; softness, grain, enlarging and compression cannot be told from so little"
        return replace(found, notes=(note,))
    tiles = tiles_of(levels)
    luma = luma_of(tiles)
    trace = lattice.find(tiles, luma) if jpeg is None else lattice.of(jpeg, tiles, luma)
    notes = []
    if not found.grey and colours.is_toned(levels):
        notes.append("all colours are shades of one, as in a toned print; turn the picture grey first if it was black and white")
    if trace is not None:
        found = replace(found, jpeg=trace.jpeg, grid=trace.grid, spent=lattice.spent(trace) / LEVELS)
        if trace.grid != (0, 0):
            notes.append(cut_after(trace.grid))
    return replace(found, notes=tuple(notes))


def cut_after(grid: tuple[int, int]) -> str:
    rows, columns = grid
    return (
        f"the picture was cut after it had been saved as a JPEG: its blocks begin {rows} rows and {columns} columns inside. The compression is taken for grain; "
        f"cut off {rows} rows at the top and {columns} columns at the left to have it undone as what it is"
    )
